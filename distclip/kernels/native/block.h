/* Sums of squares of a block. Included once for each instruction set, with
     NAME(x)          x with the set's name,
     TARGET           what tells the compiler to use it,
     WIDEN(x)         four floats as four doubles,
     JOIN(x, y)       two vectors of four words as one of eight,
     PRODUCTS(x, y)   of each word the products of its halves, which have signs, added.
   NAME(read_halves), before it, reads eight elements of fp16 as read_lanes does others.
   Where `zeros` is there, numbers that are 0 are counted; each of its lanes counts at most the elements of a block.
   Where `bits` is there, the elements are added to it as integers too, modulo 2 ** 32. */

/* Each element as an integer, those of 16 bits with their sign, and the squares of its halves. Of 16 bits that is
   x + x * x, which is -(x * ~x). */
TARGET INLINE void NAME(add_integers)(integers *bits, const char *at, size_t apart, int kind)
{
    for (int stream = 0; stream < STREAMS; stream += kind == FP32 ? 1 : 2) {
        integers read;
        if (kind == FP32) {
            memcpy(&read, at + stream * apart, 32);
            *bits += read + PRODUCTS(read, read);
        } else {
            words one, other;
            memcpy(&one, at + stream * apart, 16);
            memcpy(&other, at + (stream + 1) * apart, 16);
            read = JOIN(one, other);
            *bits -= PRODUCTS(read, ~read);
        }
    }
}

TARGET INLINE void NAME(add)(doubles *lanes, words *zeros, integers *bits, const char *at, size_t apart, int kind)
{
    for (int stream = 0; stream < STREAMS; stream++) {
        floats low, high;
        if (kind == FP16)
            NAME(read_halves)(at + stream * apart, &low, &high);
        else
            read_lanes(at + stream * apart, kind, &low, &high);
        if (zeros)
            *zeros -= (words)(low == 0) + (words)(high == 0); /* true is -1 */
        doubles x = WIDEN(low), y = WIDEN(high);
        lanes[2 * stream] += x * x;
        lanes[2 * stream + 1] += y * y;
    }
    if (bits)
        NAME(add_integers)(bits, at, apart, kind);
}

/* What is left of the last step is read from a copy filled up with zeros. */
TARGET INLINE double NAME(sum)(const char *start, size_t numel, int kind, double *zeros, uint32_t *bits)
{
    const size_t size = kind == FP32 ? 4 : 2;
    doubles lanes[2 * STREAMS] = {{0}};
    words counts = {0};
    integers added = {0};
    size_t apart = numel / STEP * LANES * size;
    for (size_t at = 0; at < apart; at += LANES * size)
        NAME(add)(lanes, zeros ? &counts : NULL, bits ? &added : NULL, start + at, apart, kind);
    if (numel % STEP) {
        char rest[STEP * 4] = {0};
        memcpy(rest, start + STREAMS * apart, numel % STEP * size);
        NAME(add)(lanes, zeros ? &counts : NULL, bits ? &added : NULL, rest, LANES * size, kind);
    }
    if (zeros) /* less those that the copy was filled up with */
        *zeros += (double)counts[0] + counts[1] + counts[2] + counts[3] - (numel % STEP ? STEP - numel % STEP : 0);
    for (int lane = 0; bits && lane < LANES; lane++)
        *bits += added[lane];
    doubles sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

TARGET INLINE void NAME(sum_each)(const char *start, size_t numel, size_t rows, int kind, double *sums, double *zeros,
                                  uint32_t *bits)
{
    const size_t size = kind == FP32 ? 4 : 2;
    for (size_t row = 0; row < rows; row++)
        sums[row] = NAME(sum)(start + row * numel * size, numel, kind, zeros, bits);
}

/* The sums of `rows` rows of `numel` elements, one after the other; how many are 0 is added to `zeros`, or the sum of
   their integers to `bits`, whichever is there. */
TARGET static void NAME(sum_rows)(const char *start, size_t numel, size_t rows, int kind, double *sums, double *zeros,
                                  uint32_t *bits)
{
    uint32_t added = 0; /* which the compiler sees is there, so that no loop asks */
    switch (3 * kind + (zeros ? 2 : bits ? 1 : 0)) { /* each with its own loop */
    case 3 * FP32: NAME(sum_each)(start, numel, rows, FP32, sums, NULL, NULL); break;
    case 3 * BF16: NAME(sum_each)(start, numel, rows, BF16, sums, NULL, NULL); break;
    case 3 * FP16: NAME(sum_each)(start, numel, rows, FP16, sums, NULL, NULL); break;
    case 3 * FP32 + 1: NAME(sum_each)(start, numel, rows, FP32, sums, NULL, &added); break;
    case 3 * BF16 + 1: NAME(sum_each)(start, numel, rows, BF16, sums, NULL, &added); break;
    case 3 * FP16 + 1: NAME(sum_each)(start, numel, rows, FP16, sums, NULL, &added); break;
    case 3 * FP32 + 2: NAME(sum_each)(start, numel, rows, FP32, sums, zeros, NULL); break;
    case 3 * BF16 + 2: NAME(sum_each)(start, numel, rows, BF16, sums, zeros, NULL); break;
    default: NAME(sum_each)(start, numel, rows, FP16, sums, zeros, NULL);
    }
    if (bits)
        *bits += added;
}

#undef NAME
#undef TARGET
#undef WIDEN
#undef JOIN
#undef PRODUCTS

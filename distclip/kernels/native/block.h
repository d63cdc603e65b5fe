/* Sums of squares of a block. Included once for each instruction set, with
     NAME(x)    x with the set's name,
     TARGET     what tells the compiler to use it,
     WIDEN(x)   four floats as four doubles. */

TARGET INLINE void NAME(add)(doubles *lanes, const char *at, size_t apart, int kind)
{
    for (int stream = 0; stream < STREAMS; stream++) {
        floats low, high;
        read_lanes(at + stream * apart, kind, &low, &high);
        doubles x = WIDEN(low), y = WIDEN(high);
        lanes[2 * stream] += x * x;
        lanes[2 * stream + 1] += y * y;
    }
}

/* What is left of the last step is read from a copy filled up with zeros. */
TARGET INLINE double NAME(sum)(const char *start, size_t numel, int kind)
{
    const size_t size = kind == FP32 ? 4 : 2;
    doubles lanes[2 * STREAMS] = {{0}};
    size_t apart = numel / STEP * LANES * size;
    for (size_t at = 0; at < apart; at += LANES * size)
        NAME(add)(lanes, start + at, apart, kind);
    if (numel % STEP) {
        char rest[STEP * 4] = {0};
        memcpy(rest, start + STREAMS * apart, numel % STEP * size);
        NAME(add)(lanes, rest, LANES * size, kind);
    }
    doubles sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

TARGET INLINE void NAME(sum_each)(const char *start, size_t numel, size_t rows, int kind, double *sums)
{
    const size_t size = kind == FP32 ? 4 : 2;
    for (size_t row = 0; row < rows; row++)
        sums[row] = NAME(sum)(start + row * numel * size, numel, kind);
}

/* The sums of `rows` rows of `numel` elements, one after the other. */
TARGET static void NAME(sum_rows)(const char *start, size_t numel, size_t rows, int kind, double *sums)
{
    switch (kind) { /* each with its own loop */
    case FP32: NAME(sum_each)(start, numel, rows, FP32, sums); break;
    case BF16: NAME(sum_each)(start, numel, rows, BF16, sums); break;
    default: NAME(sum_each)(start, numel, rows, FP16, sums);
    }
}

#undef NAME
#undef TARGET
#undef WIDEN

/* A part of a block, added exactly in float64. Included once for each instruction set, with
     NAME(x)         x with the set's name,
     TARGET          what tells the compiler to use it,
     LANES           doubles in a vector,
     WIDEN(x)        as many floats as doubles,
     FROM_HALF(x)    as many numbers of fp16 as words of fp32,
     FUSED(x, y, z)  x * y + z of doubles.

   A window is a sum in units of 2 ** u: it begins at 1.5 * 2 ** (52 + u), and as long as it stays between that and its
   neighbours' powers of two, each addition rounds to whole units. What was rounded away is the difference of what came
   and what the sum grew by, exact as well, and goes to the next window, whose unit is 42 bits lower. The unit of the last
   one divides all that comes. Whether a product is fused with a sum does not matter: squares of numbers of
   24 bits are exact. */

typedef double NAME(doubles) __attribute__((vector_size(8 * LANES)));
typedef int64_t NAME(longs) __attribute__((vector_size(8 * LANES)));
typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES)));

TARGET INLINE void NAME(read)(const char *at, int kind, int power, NAME(doubles) *x)
{
    NAME(words) bits;
    if (kind == FP32)
        memcpy(&bits, at, sizeof bits);
    else {
        NAME(halves) narrow;
        memcpy(&narrow, at, sizeof narrow);
        bits = kind == BF16 ? __builtin_convertvector(narrow, NAME(words)) << 16 : FROM_HALF(narrow);
    }
    if (power == 1)
        bits &= 0x7fffffffu;
    *x = WIDEN((NAME(floats))bits);
}

/* The next SIDE vectors into the windows. */
TARGET INLINE void NAME(add)(const char *at, int kind, int power, int windows, NAME(doubles) sums[][SIDE])
{
    for (int side = 0; side < SIDE; side++) {
        NAME(doubles) x, rest = {0};
        NAME(read)(at + side * LANES * size_of(kind), kind, power, &x);
        for (int w = 0; w < windows; w++) {
            NAME(doubles) before = sums[w][side], after;
            after = w > 0 ? before + rest : power == 2 ? FUSED(x, x, before) : before + x;
            sums[w][side] = after;
            before -= after;
            rest = w > 0 ? before + rest : power == 2 ? FUSED(x, x, before) : before + x;
        }
    }
}

TARGET INLINE void NAME(add_windows)(const char *start, size_t numel, int kind, int power, int windows, const int *units,
                                     struct sum *sum)
{
    const size_t step = LANES * SIDE, bytes = step * size_of(kind), end = numel / step * bytes;
    NAME(doubles) sums[3][SIDE];
    double from[3];
    for (int w = 0; w < windows; w++) {
        from[w] = two_to(52 + units[w]) * 1.5;
        for (int side = 0; side < SIDE; side++)
            sums[w][side] = from[w] - (NAME(doubles)){0};
    }
    for (size_t at = 0; at < end; at += bytes) {
        __builtin_prefetch(start + at + PART * size_of(kind)); /* while this part is added: 0.6 of the time */
        NAME(add)(start + at, kind, power, windows, sums);
    }
    if (numel % step) { /* a copy filled up with zeros */
        char rest[LANES * SIDE * 4] = {0};
        memcpy(rest, start + end, numel % step * size_of(kind));
        NAME(add)(rest, kind, power, windows, sums);
    }
    for (int w = 0; w < windows; w++) {
        int64_t units_added = 0, begin;
        memcpy(&begin, &from[w], 8); /* neighbours in their bits are a unit apart */
        for (int side = 0; side < SIDE; side++)
            for (int lane = 0; lane < LANES; lane++)
                units_added += ((NAME(longs))sums[w][side])[lane] - begin;
        deposit(sum->digits, units_added, units[w] - NARROW_BASE);
    }
}

/* The largest and the least of the numbers without their signs, as bits; the least but 0, and 0 where there is no other. */
TARGET INLINE void NAME(range)(const char *start, size_t numel, int kind, uint32_t *largest, uint32_t *least)
{
    if (kind == FP32) {
        uint32_t most = 0, less = 0xffffffffu;
        for (size_t i = 0; i < numel; i++) {
            uint32_t bits;
            memcpy(&bits, start + 4 * i, 4);
            bits &= 0x7fffffffu;
            most = bits > most ? bits : most;
            bits -= 1;
            less = bits < less ? bits : less;
        }
        *largest = most, *least = less + 1;
    } else {
        uint16_t most = 0, less = 0xffffu;
        for (size_t i = 0; i < numel; i++) {
            uint16_t bits;
            memcpy(&bits, start + 2 * i, 2);
            bits &= 0x7fffu;
            most = bits > most ? bits : most;
            bits -= 1;
            less = bits < less ? bits : less;
        }
        *largest = most, *least = (uint16_t)(less + 1);
    }
}

TARGET INLINE void NAME(add_part)(const char *start, size_t numel, int kind, int power, struct sum *sum)
{
    uint32_t largest, least;
    int units[3];
    NAME(range)(start, numel, kind, &largest, &least);
    switch (windows_for(largest, least, kind, power, units)) {
    case 0: break;
    case 1: NAME(add_windows)(start, numel, kind, power, 1, units, sum); break;
    case 2: NAME(add_windows)(start, numel, kind, power, 2, units, sum); break;
    case 3: NAME(add_windows)(start, numel, kind, power, 3, units, sum); break;
    default: add_by_exponent(start, numel, kind, power, sum);
    }
}

TARGET INLINE void NAME(add_parts)(const char *start, size_t numel, int kind, int power, struct sum *sum)
{
    for (size_t at = 0; at < numel; at += PART)
        NAME(add_part)(start + at * size_of(kind), numel - at < PART ? numel - at : PART, kind, power, sum);
}

TARGET static void NAME(add_block)(const char *start, size_t numel, int kind, int power, struct sum *sum)
{
    switch (kind * 2 + power) { /* each with its own loops */
    case FP32 * 2 + 1: NAME(add_parts)(start, numel, FP32, 1, sum); break;
    case FP32 * 2 + 2: NAME(add_parts)(start, numel, FP32, 2, sum); break;
    case BF16 * 2 + 1: NAME(add_parts)(start, numel, BF16, 1, sum); break;
    case BF16 * 2 + 2: NAME(add_parts)(start, numel, BF16, 2, sum); break;
    case FP16 * 2 + 1: NAME(add_parts)(start, numel, FP16, 1, sum); break;
    case FP16 * 2 + 2: NAME(add_parts)(start, numel, FP16, 2, sum); break;
    default: add_float64(start, numel, power, sum);
    }
}

#undef NAME
#undef TARGET
#undef LANES
#undef WIDEN
#undef FROM_HALF
#undef FUSED

/* Sums of mixed words. Included once for each instruction set, with
     NAME(x)                 x with the set's name,
     TARGET                  what tells the compiler to use it,
     LANES                   words of 64 bits in a vector, 0 without vectors,
     WORDS(at), SHORTS(at)   as many words of 32 bits, or of 16, from memory,
     PRODUCT(x, y)           the products of the lower halves of two vectors. */

#if LANES
typedef uint64_t NAME(longs) __attribute__((vector_size(8 * LANES)));

/* Add the words up to the last one that fills vectors; how many those are. */
TARGET INLINE size_t NAME(mix_vectors)(const char *start, size_t count, int size, uint64_t state, uint64_t apart,
                                       uint64_t *sum)
{
    const size_t together = LANES * SIDE, end = count / together * together;
    NAME(longs) states[SIDE], sums[SIDE] = {{0}};
    uint64_t lanes[LANES];
    for (int lane = 0; lane < LANES; lane++)
        lanes[lane] = state + lane * apart;
    memcpy(&states[0], lanes, sizeof lanes);
    for (int side = 1; side < SIDE; side++)
        states[side] = states[side - 1] + LANES * apart;
    for (size_t i = 0; i < end; i += together)
        for (int side = 0; side < SIDE; side++) {
            const void *at = start + (i + side * LANES) * size;
            NAME(longs) z = size == 4 ? (NAME(longs))WORDS(at) : (NAME(longs))SHORTS(at);
            z ^= states[side];
            states[side] += together * apart;
            z += (NAME(longs))PRODUCT(z, z >> 32);
            const NAME(longs) upper = z >> 32; /* which the next line leaves as it is */
            z ^= upper;
            z += (NAME(longs))PRODUCT(z, upper);
            sums[side] += z;
        }
    for (int side = 0; side < SIDE; side++)
        for (int lane = 0; lane < LANES; lane++)
            *sum += sums[side][lane];
    return end;
}
#endif

/* Words of `size` bytes side by side in memory: the state of the first, and how far apart those of neighbours are. */
TARGET INLINE uint64_t NAME(mix_words)(const char *start, size_t count, int size, uint64_t state, uint64_t apart)
{
    uint64_t sum = 0;
    size_t i = 0;
#if LANES
    if (count >= 2 * LANES * SIDE)
        i = NAME(mix_vectors)(start, count, size, state, apart, &sum);
#endif
    for (; i < count; i++) {
        uint64_t word = 0;
        memcpy(&word, start + i * size, size);
        sum += mix(word ^ (state + i * apart));
    }
    return sum;
}

/* Elements of one run: those of more than 32 bits are words of 32. */
TARGET INLINE uint64_t NAME(mix_run)(const char *start, size_t numel, int size, uint64_t seed, uint64_t index, uint64_t step)
{
    const size_t words = size > 4 ? size / 4 : 1;
    uint64_t sum = 0;
    if (words == 1)
        return NAME(mix_words)(start, numel, size, seed + index * APART, step * APART);
    if (step == 1)
        return NAME(mix_words)(start, numel * words, 4, seed + index * words * APART, APART);
    for (size_t i = 0; i < numel; i++)
        sum += NAME(mix_words)(start + i * size, words, 4, seed + (index + i * step) * words * APART, APART);
    return sum;
}

TARGET INLINE uint64_t NAME(mix_runs)(const char *start, size_t numel, int size, const struct place *place, uint64_t at)
{
    uint64_t sum = 0;
    for (size_t done = 0; done < numel;) {
        const uint64_t run = at / place->length, within = at % place->length, left = place->length - within;
        const size_t here = left < numel - done ? left : numel - done;
        const uint64_t index = (uint64_t)place->starts[run] + within * place->step;
        sum += NAME(mix_run)(start + done * size, here, size, place->seed, index, place->step);
        done += here;
        at += here;
    }
    return sum;
}

TARGET static uint64_t NAME(mix_block)(const char *start, size_t numel, int size, const struct place *place, uint64_t at)
{
    switch (size) { /* each with its own loop */
    case 2: return NAME(mix_runs)(start, numel, 2, place, at);
    case 4: return NAME(mix_runs)(start, numel, 4, place, at);
    case 8: return NAME(mix_runs)(start, numel, 8, place, at);
    default: return NAME(mix_runs)(start, numel, 16, place, at);
    }
}

#undef NAME
#undef TARGET
#undef LANES
#undef WORDS
#undef SHORTS
#undef PRODUCT

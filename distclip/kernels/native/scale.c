/* Multiply each row of tensors of fp32 or bf16 numbers in place by a factor of its own: the bits of torch's kernels.

   The factor is rounded to fp32, the product is in fp32, and rounded once, for any instruction set and number of threads.
   From the first tensor to the last: the first ones were summed last, and are in the cache. (fp16 is left to torch: a
   loop without the instructions that convert it takes 10 times as long.) */

#include "waves.h"

INLINE float as_float(uint32_t word)
{
    float number;
    memcpy(&number, &word, 4);
    return number;
}

INLINE uint32_t as_word(float number)
{
    uint32_t word;
    memcpy(&word, &number, 4);
    return word;
}

INLINE float from_bf16(uint16_t bits)
{
    return as_float((uint32_t)bits << 16);
}

/* To the nearest, of two as near the even one. */
INLINE uint16_t to_bf16(float number)
{
    uint32_t word = as_word(number), odd = word >> 16 & 1;
    return number != number ? 0x7fc0 : (word + 0x7fff + odd) >> 16;
}

/* `rows` rows of `numel` elements, one after the other. */
INLINE void multiply_each(char *start, size_t numel, size_t rows, int kind, const double *factors)
{
    for (size_t row = 0; row < rows; row++, start += numel * size_of(kind)) {
        const float factor = (float)factors[row];
        float *words = (float *)start;
        uint16_t *halves = (uint16_t *)start;
        if (factor == 1)
            continue;
        for (size_t k = 0; kind == FP32 && k < numel; k++)
            words[k] *= factor;
        for (size_t k = 0; kind == BF16 && k < numel; k++)
            halves[k] = to_bf16(from_bf16(halves[k]) * factor);
    }
}

INLINE void multiply_block(const struct block *block, int kind)
{
    if (kind == FP32) /* each with its own loop */
        multiply_each(block->start, block->numel, block->rows, FP32, block->numbers);
    else
        multiply_each(block->start, block->numel, block->rows, BF16, block->numbers);
}

static void multiply_portable(struct wave *wave, size_t k)
{
    multiply_block(&wave->blocks[k], wave->kind);
}

#ifdef __x86_64__
__attribute__((target("avx2")))
static void multiply_avx2(struct wave *wave, size_t k)
{
    multiply_block(&wave->blocks[k], wave->kind);
}
#else
#define multiply_avx2 multiply_portable
#endif

/* Cut `rows` rows of `numel` elements into blocks, from the first to the last. */
static void add(struct wave *wave, uint64_t start, size_t numel, size_t rows, double *factors)
{
    const size_t size = size_of(wave->kind), many = numel ? together(numel, rows) : 1;
    for (size_t row = 0, some; row < rows; row += some) {
        some = rows - row < many ? rows - row : many;
        for (size_t from = 0, part; from < numel; from += part) {
            part = numel - from < BLOCK ? numel - from : BLOCK;
            wave->blocks[wave->count++] =
                (struct block){(char *)(uintptr_t)start + (row * numel + from) * size, part, some, factors + row};
            wave->numel += part * some;
            if (wave->count == WAVE) {
                share(wave);
                wave->count = wave->numel = 0;
            }
        }
    }
}

/* Multiply each row of `count` tensors of one kind by its factor: those of tensor k from `first[k]` on. Rows whose
   factor is 1 are not touched. */
void distclip_multiply_rows(const uint64_t *addresses, const struct cut *cuts, const uint64_t *first, size_t count,
                            int kind, int instructions, int threads, double *factors)
{
    const size_t size = size_of(kind);
    struct wave wave;
    begin(&wave, instructions == AVX2 ? multiply_avx2 : multiply_portable, kind, instructions, threads);
    for (size_t k = 0; k < count; k++) {
        const struct cut cut = cuts[k];
        const size_t before = cut.head > 0, whole = cut.count - before - (cut.tail > 0);
        double *by = factors + first[k];
        if (cut.head > 0)
            add(&wave, addresses[k], cut.head, 1, by);
        add(&wave, addresses[k] + cut.head * size, cut.length, whole, by + before);
        if (cut.tail > 0)
            add(&wave, addresses[k] + (cut.head + whole * cut.length) * size, cut.tail, 1, by + before + whole);
    }
    share(&wave);
}

/* Sums of squares of fp32, bf16 and fp16 numbers: each is squared exactly in float64, and added in float64.

   The order of adding is fixed: tensors are cut into blocks, a block into lanes, and blocks are added from the last to
   the first, so that whoever scales the tensors afterwards finds the first ones in the cache. The result has the same
   bits for any number of threads and any instruction set: the square of a 24-bit number fits into the 53 bits of a
   double, so that it does not matter whether it is fused with the sum. Where each tensor, or each row of it, has a sum of
   its own, this depends on nothing but its elements: no block holds elements of two tensors, nor parts of two rows. */

#include "waves.h"

enum {
    STREAMS = 4, /* parts of a block that are read in turn: memory gives more than to one */
    LANES = 8,   /* of a stream: additions that need not wait for each other */
    STEP = STREAMS * LANES
};

typedef double doubles __attribute__((vector_size(32)));
typedef uint32_t integers __attribute__((vector_size(32)));
typedef int32_t signed_integers __attribute__((vector_size(32)));

/* Eight elements of fp32 or bf16 that lie anywhere; of 16 bits, the low halves of four words and the high ones. */
INLINE void read_lanes(const char *at, int kind, floats *low, floats *high)
{
    words pairs;
    memcpy(&pairs, at, 16);
    if (kind == FP32) {
        *low = (floats)pairs;
        memcpy(high, at + 16, 16);
    } else {
        *low = (floats)(pairs << 16);
        *high = (floats)(pairs & 0xffff0000u);
    }
}

/* The same of fp16, without signs. */
INLINE void read_halves_portable(const char *at, floats *low, floats *high)
{
    words pairs;
    memcpy(&pairs, at, 16);
    *low = from_half((pairs & 0x7fffu) << 13);
    *high = from_half((pairs >> 3) & 0x0fffe000u);
}

#define NAME(x) x##_portable
#define TARGET
#define WIDEN(x) __builtin_convertvector(x, doubles)
#define LOW(x) ((signed_integers)((x) << 16) >> 16)
#define HIGH(x) ((signed_integers)(x) >> 16)
#define JOIN(x, y) ((integers){(x)[0], (x)[1], (x)[2], (x)[3], (y)[0], (y)[1], (y)[2], (y)[3]})
#define PRODUCTS(x, y) ((integers)(LOW(x) * LOW(y)) + (integers)(HIGH(x) * HIGH(y)))
#include "block.h"

#ifdef __x86_64__
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
TARGET INLINE void read_halves_avx2(const char *at, floats *low, floats *high)
{
    const __m128i even = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i odd = _mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m128i halves = _mm_loadu_si128((const __m128i *)at) & _mm_set1_epi16(0x7fff);
    *low = (floats)_mm_cvtph_ps(_mm_shuffle_epi8(halves, even));
    *high = (floats)_mm_cvtph_ps(_mm_shuffle_epi8(halves, odd));
}
#define WIDEN(x) ((doubles)_mm256_cvtps_pd((__m128)(x))) /* gcc 12 makes two halves of the portable one: twice the time */
#define JOIN(x, y) ((integers)_mm256_set_m128i((__m128i)(y), (__m128i)(x)))
#define PRODUCTS(x, y) ((integers)_mm256_madd_epi16((__m256i)(x), (__m256i)(y)))
#include "block.h"
#else
#define sum_rows_avx2 sum_rows_portable
#endif

struct summing {
    struct wave wave;
    double sums[WAVE];  /* of blocks of one row, which may be part of a longer one */
    double part, total; /* of this wave, and of the waves before it: where one sum is asked for */
    double zeros[WAVE]; /* how many elements of each block are 0, and where to add that: nowhere if nobody asked */
    double *counts[WAVE], *count;
    uint32_t parts[WAVE], *bits; /* of each block the sum of its integers and squares, and where they are added likewise */
};

/* Where a block has several rows their sums are written to their places; that of one is added to its place later. */
static void sum_block(struct wave *wave, size_t k)
{
    struct block *block = &wave->blocks[k];
    struct summing *all = (struct summing *)wave;
    double *sums = block->rows > 1 ? block->numbers : &all->sums[k], *zeros = all->count ? &all->zeros[k] : NULL;
    uint32_t *bits = all->bits ? &all->parts[k] : NULL;
    if (wave->instructions == AVX2)
        sum_rows_avx2(block->start, block->numel, block->rows, wave->kind, sums, zeros, bits);
    else
        sum_rows_portable(block->start, block->numel, block->rows, wave->kind, sums, zeros, bits);
}

/* Sum the blocks of a wave, which is empty afterwards. */
static void finish(struct summing *all)
{
    struct wave *wave = &all->wave;
    share(wave);
    for (size_t k = 0; k < wave->count; k++) {
        if (wave->blocks[k].rows == 1)
            *wave->blocks[k].numbers += all->sums[k];
        if (all->count)
            *all->counts[k] += all->zeros[k];
        if (all->bits)
            *all->bits += all->parts[k];
    }
    all->total += all->part;
    all->part = 0;
    wave->count = wave->numel = 0;
}

/* Cut `rows` rows of `numel` elements into blocks, from the last to the first. */
static void add(struct summing *all, uint64_t start, size_t numel, size_t rows, double *sums)
{
    struct wave *wave = &all->wave;
    const size_t size = size_of(wave->kind), many = numel ? together(numel, rows) : 1;
    while (rows > 0) {
        size_t some = (rows - 1) % many + 1, left = numel;
        rows -= some;
        while (left > 0) {
            size_t part = (left - 1) % BLOCK + 1; /* the last block is the short one */
            left -= part;
            all->zeros[wave->count] = all->parts[wave->count] = 0;
            all->counts[wave->count] = all->count;
            wave->blocks[wave->count++] =
                (struct block){(char *)(uintptr_t)start + (rows * numel + left) * size, part, some, sums + rows};
            wave->numel += part * some;
            if (wave->count == WAVE)
                finish(all);
        }
    }
}

/* The widest instruction set of this processor that there is a loop for. */
int distclip_instructions(void)
{
#ifdef __x86_64__
    if (has_avx2())
        return AVX2;
#endif
    return PORTABLE;
}

/* The sum of squares of `count` tensors of one kind: `numels` elements each, side by side from `addresses` on. To `bits`,
   if it is there, the elements are added as integers in the same pass, and the squares of their halves of 16 bits,
   modulo 2 ** 32: see bits.py. */
double distclip_sum_of_squares(const uint64_t *addresses, const uint64_t *numels, size_t count, int kind,
                               int instructions, int threads, uint32_t *bits)
{
    struct summing all;
    all.part = all.total = 0;
    all.count = NULL;
    all.bits = bits;
    begin(&all.wave, sum_block, kind, instructions, threads);
    while (count-- > 0)
        add(&all, addresses[count], numels[count], 1, &all.part);
    finish(&all);
    return all.total;
}

/* The sum of squares of each row of `count` tensors of one kind, added to `sums`: those of tensor k from `first[k]` on.
   How many elements of it are 0 is added to `zeros[k]`, if there are any. */
void distclip_sums_of_squares_of_rows(const uint64_t *addresses, const struct cut *cuts, const uint64_t *first,
                                      size_t count, int kind, int instructions, int threads, double *sums,
                                      double *zeros)
{
    const size_t size = size_of(kind);
    struct summing all;
    all.part = all.total = 0;
    all.bits = NULL;
    begin(&all.wave, sum_block, kind, instructions, threads);
    while (count-- > 0) {
        all.count = zeros ? zeros + count : NULL;
        const struct cut cut = cuts[count];
        const size_t before = cut.head > 0, whole = cut.count - before - (cut.tail > 0);
        double *to = sums + first[count];
        if (cut.tail > 0)
            add(&all, addresses[count] + (cut.head + whole * cut.length) * size, cut.tail, 1, to + before + whole);
        add(&all, addresses[count] + cut.head * size, cut.length, whole, to + before);
        if (cut.head > 0)
            add(&all, addresses[count], cut.head, 1, to);
    }
    finish(&all);
}

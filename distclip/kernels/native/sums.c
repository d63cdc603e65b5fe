/* Sums of squares of fp32, bf16 and fp16 numbers: each is squared exactly in float64, and added in float64.

   The order of adding is fixed: tensors are cut into blocks, a block into lanes, and blocks are added from the last to
   the first, so that whoever scales the tensors afterwards finds the first ones in the cache. The result has the same
   bits for any number of threads and any instruction set: the square of a 24-bit number fits into the 53 bits of a
   double, so that it does not matter whether it is fused with the sum. Where each tensor, or each row of it, has a sum of
   its own, this depends on nothing but its elements: no block holds elements of two tensors, nor parts of two rows.

   No global state and no allocation; threads live within a call. Needs the vectors of GNU C (gcc, clang). */

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { FP32, BF16, FP16 };
enum { PORTABLE, AVX2 }; /* AVX-512 took the same time in fp32, and 0.8 to 0.9 of it in bf16 */
enum {
    BLOCK = 1 << 18,     /* elements: 1 MiB of fp32 */
    WAVE = 1 << 10,      /* blocks that threads share at a time: 40 KiB of stack */
    STREAMS = 4,         /* parts of a block that are read in turn: memory gives more than to one */
    LANES = 8,           /* of a stream: additions that need not wait for each other */
    STEP = STREAMS * LANES,
    SHARE = 1 << 21,     /* elements for each thread: 0.25 ms; making one takes 20 to 40 us where a core is free */
    HELPERS = 63         /* threads beside the caller's */
};

typedef double doubles __attribute__((vector_size(32)));
typedef float floats __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

/* fp16 without its sign, shifted to where fp32 has its exponent and fraction. Exponents have another zero: 15 becomes
   127, and 31, which is inf and NaN, 255. Below 2**-14 there is no leading 1: one is added and subtracted again. */
INLINE floats from_half(words shifted)
{
    words exponent = shifted & 0x0f800000u;
    words usual = shifted + 0x38000000u + ((words)(exponent == 0x0f800000u) & 0x38000000u);
    words small = (words)((floats)(shifted + 0x38800000u) - (floats)((shifted & 0u) + 0x38800000u));
    words is_small = (words)(exponent == 0u);
    return (floats)((usual & ~is_small) | (small & is_small));
}

/* Eight elements that lie anywhere; of 16 bits, the low halves of four words and the high ones. */
INLINE void read_lanes(const char *at, int kind, floats *low, floats *high)
{
    words pairs;
    memcpy(&pairs, at, 16);
    if (kind == FP32) {
        *low = (floats)pairs;
        memcpy(high, at + 16, 16);
    } else if (kind == BF16) {
        *low = (floats)(pairs << 16);
        *high = (floats)(pairs & 0xffff0000u);
    } else {
        *low = from_half((pairs & 0x7fffu) << 13);
        *high = from_half((pairs >> 3) & 0x0fffe000u);
    }
}

#define NAME(x) x##_portable
#define TARGET
#define WIDEN(x) __builtin_convertvector(x, doubles)
#include "block.h"

#ifdef __x86_64__
#include <immintrin.h>
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define WIDEN(x) ((doubles)_mm256_cvtps_pd((__m128)(x))) /* gcc 12 makes two halves of the line above: twice the time */
#include "block.h"
#else
#define sum_rows_avx2 sum_rows_portable
#endif

/* A part of a tensor: `rows` rows of `numel` elements, one after the other. Where there are several, each is whole, and
   its sum is written to its place from `sums` on; that of one, which may be part of a longer row, is added to it. */
struct block {
    const char *start;
    size_t numel, rows;
    double *sums;
};

struct wave {
    struct block blocks[WAVE];
    double sums[WAVE]; /* of blocks of one row */
    size_t count, numel;
    int kind, instructions, threads;
    atomic_size_t next;
    double part, total; /* of this wave, and of the waves before it: where one sum is asked for */
};

/* Sum blocks until none is left: what each thread does. */
static void *work(void *shared)
{
    struct wave *wave = shared;
    size_t k;
    while ((k = atomic_fetch_add(&wave->next, 1)) < wave->count) {
        struct block *block = &wave->blocks[k];
        double *sums = block->rows > 1 ? block->sums : &wave->sums[k];
        if (wave->instructions == AVX2)
            sum_rows_avx2(block->start, block->numel, block->rows, wave->kind, sums);
        else
            sum_rows_portable(block->start, block->numel, block->rows, wave->kind, sums);
    }
    return NULL;
}

/* Sum the blocks of a wave, which is empty afterwards. A thread that cannot be made is not missed. */
static void finish(struct wave *wave)
{
    pthread_t helpers[HELPERS];
    int made = 0;
    atomic_init(&wave->next, 0);
    while (made < HELPERS && made + 1 < wave->threads && (made + 2) * (size_t)SHARE <= wave->numel &&
           pthread_create(&helpers[made], NULL, work, wave) == 0)
        made++;
    work(wave);
    while (made > 0)
        pthread_join(helpers[--made], NULL);
    for (size_t k = 0; k < wave->count; k++)
        if (wave->blocks[k].rows == 1)
            *wave->blocks[k].sums += wave->sums[k];
    wave->total += wave->part;
    wave->part = 0;
    wave->count = wave->numel = 0;
}

/* Cut `rows` rows of `numel` elements into blocks, from the last to the first. */
static void add(struct wave *wave, const char *start, size_t numel, size_t rows, double *sums)
{
    const size_t size = wave->kind == FP32 ? 4 : 2;
    const size_t together = rows > 1 && numel && numel < BLOCK ? BLOCK / numel : 1; /* rows in a block */
    while (rows > 0) {
        size_t some = (rows - 1) % together + 1, left = numel;
        rows -= some;
        while (left > 0) {
            size_t part = (left - 1) % BLOCK + 1; /* the last block is the short one */
            left -= part;
            wave->blocks[wave->count++] =
                (struct block){start + (rows * numel + left) * size, part, some, sums + rows};
            wave->numel += part * some;
            if (wave->count == WAVE)
                finish(wave);
        }
    }
}

static void begin(struct wave *wave, int kind, int instructions, int threads)
{
    wave->kind = kind;
    wave->instructions = instructions;
    wave->threads = threads;
    wave->count = wave->numel = 0;
    wave->part = wave->total = 0;
}

/* The widest instruction set of this processor that there is a loop for. */
int distclip_instructions(void)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return AVX2;
#endif
    return PORTABLE;
}

/* The sum of squares of `count` tensors of one kind: `numels` elements each, side by side from `addresses` on. */
double distclip_sum_of_squares(const uint64_t *addresses, const uint64_t *numels, size_t count, int kind,
                               int instructions, int threads)
{
    struct wave wave;
    begin(&wave, kind, instructions, threads);
    while (count-- > 0)
        add(&wave, (const char *)(uintptr_t)addresses[count], numels[count], 1, &wave.part);
    finish(&wave);
    return wave.total;
}

/* How a tensor falls into `count` rows: the end of one in front, of `head` elements; whole ones of `length`; and the
   beginning of one behind them, of `tail`. There is no row of 0 elements in front or behind. */
struct cut {
    uint64_t head, length, tail, count;
};

/* The sum of squares of each row of `count` tensors of one kind, added to `sums`: those of tensor k from `first[k]` on. */
void distclip_sums_of_squares_of_rows(const uint64_t *addresses, const struct cut *cuts, const uint64_t *first,
                                      size_t count, int kind, int instructions, int threads, double *sums)
{
    const size_t size = kind == FP32 ? 4 : 2;
    struct wave wave;
    begin(&wave, kind, instructions, threads);
    while (count-- > 0) {
        const struct cut cut = cuts[count];
        const char *start = (const char *)(uintptr_t)addresses[count];
        const size_t before = cut.head > 0, whole = cut.count - before - (cut.tail > 0);
        double *to = sums + first[count];
        if (cut.tail > 0)
            add(&wave, start + (cut.head + whole * cut.length) * size, cut.tail, 1, to + before + whole);
        add(&wave, start + cut.head * size, cut.length, whole, to + before);
        if (cut.head > 0)
            add(&wave, start, cut.head, 1, to);
    }
    finish(&wave);
}

/* Sums of squares of fp32, bf16 and fp16 numbers: each is squared exactly in float64, and added in float64.

   The order of adding is fixed: tensors are cut into blocks, a block into lanes, and blocks are added from the last to
   the first, so that whoever scales the tensors afterwards finds the first ones in the cache. The result has the same
   bits for any number of threads and any instruction set: the square of a 24-bit number fits into the 53 bits of a
   double, so that it does not matter whether it is fused with the sum.

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
    WAVE = 1 << 10,      /* blocks that threads share at a time: 24 KiB of stack */
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
#define sum_of_block_avx2 sum_of_block_portable
#endif

struct block {
    const char *start;
    size_t numel;
};

struct wave {
    struct block blocks[WAVE];
    double sums[WAVE];
    size_t count, numel;
    int kind, instructions;
    atomic_size_t next;
};

/* Sum blocks until none is left: what each thread does. */
static void *work(void *shared)
{
    struct wave *wave = shared;
    size_t k;
    while ((k = atomic_fetch_add(&wave->next, 1)) < wave->count) {
        struct block block = wave->blocks[k];
        wave->sums[k] = wave->instructions == AVX2 ? sum_of_block_avx2(block.start, block.numel, wave->kind)
                                                   : sum_of_block_portable(block.start, block.numel, wave->kind);
    }
    return NULL;
}

/* The sum of the blocks of a wave, which is empty afterwards. A thread that cannot be made is not missed. */
static double sum_of_wave(struct wave *wave, int threads)
{
    pthread_t helpers[HELPERS];
    int made = 0;
    double total = 0;
    atomic_init(&wave->next, 0);
    while (made < HELPERS && made + 1 < threads && (made + 2) * (size_t)SHARE <= wave->numel &&
           pthread_create(&helpers[made], NULL, work, wave) == 0)
        made++;
    work(wave);
    while (made > 0)
        pthread_join(helpers[--made], NULL);
    for (size_t k = 0; k < wave->count; k++)
        total += wave->sums[k];
    wave->count = wave->numel = 0;
    return total;
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
    const size_t size = kind == FP32 ? 4 : 2;
    struct wave wave;
    double total = 0;
    wave.count = wave.numel = 0;
    wave.kind = kind;
    wave.instructions = instructions;
    while (count-- > 0) {
        const char *start = (const char *)(uintptr_t)addresses[count];
        size_t left = numels[count];
        while (left > 0) {
            size_t numel = (left - 1) % BLOCK + 1; /* the last block is the short one */
            left -= numel;
            wave.blocks[wave.count++] = (struct block){start + left * size, numel};
            wave.numel += numel;
            if (wave.count == WAVE)
                total += sum_of_wave(&wave, threads);
        }
    }
    return total + sum_of_wave(&wave, threads);
}

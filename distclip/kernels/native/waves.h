/* What the loops of this folder share: tensors in blocks, blocks in waves, waves on threads.

   No global state and no allocation; threads live within a call. Needs the vectors of GNU C (gcc, clang). */

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __x86_64__
#include <cpuid.h>
#include <immintrin.h>
#endif

enum { FP32, BF16, FP16, FP64 }; /* the last one in exact sums alone */
enum { PORTABLE, AVX2, AVX512 }; /* the last one for exact sums and fingerprints: other loops took 0.8 to 1.0 of the time */
enum {
    BLOCK = 1 << 18, /* elements: 1 MiB of fp32 */
    WAVE = 1 << 10,  /* blocks that threads share at a time: 40 KiB of stack */
    SHARE = 1 << 21, /* elements for each thread: 0.25 ms; making one takes 20 to 40 us where a core is free */
    HELPERS = 63     /* threads beside the caller's */
};

#define INLINE static inline __attribute__((always_inline))

#ifdef __x86_64__
/* Whether there is AVX2, and beside it what came with it: FMA, and F16C, which compilers before gcc 11 do not ask for. */
INLINE int has_avx2(void)
{
    unsigned a, b, c = 0, d;
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
           (c & bit_F16C);
}
#endif

/* How a tensor falls into `count` rows: the end of one in front, of `head` elements; whole ones of `length`; and the
   beginning of one behind them, of `tail`. There is no row of 0 elements in front or behind. */
struct cut {
    uint64_t head, length, tail, count;
};

/* A part of a tensor: `rows` rows of `numel` elements, one after the other. Where there are several, each is whole. The
   numbers of the rows, their sums or factors, are side by side from `numbers` on. */
struct block {
    char *start;
    size_t numel, rows;
    double *numbers;
};

struct wave {
    struct block blocks[WAVE];
    size_t count, numel;
    void (*call)(struct wave *, size_t); /* what is done with one of the blocks */
    int kind, instructions, threads;
    atomic_size_t next;
};

INLINE size_t size_of(int kind)
{
    return kind == FP64 ? 8 : kind == FP32 ? 4 : 2;
}

typedef float floats __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));

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

/* Take blocks until none is left: what each thread does. */
static void *work(void *shared)
{
    struct wave *wave = shared;
    size_t k;
    while ((k = atomic_fetch_add(&wave->next, 1)) < wave->count)
        wave->call(wave, k);
    return NULL;
}

/* Do what is to be done with all blocks. A thread that cannot be made is not missed. */
static void share(struct wave *wave)
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
}

static void begin(struct wave *wave, void (*call)(struct wave *, size_t), int kind, int instructions, int threads)
{
    wave->call = call;
    wave->kind = kind;
    wave->instructions = instructions;
    wave->threads = threads;
    wave->count = wave->numel = 0;
}

/* How many rows of this length, above 0, a block has. */
INLINE size_t together(size_t numel, size_t rows)
{
    return rows > 1 && numel < BLOCK ? BLOCK / numel : 1;
}

/* Exact sums of |x| and of x ** 2: integers, so that any order, split and number of threads gives the same words.

   A sum is a row of int64 words, the digits: digit k counts units of 2 ** (32 k + base). Words of many sums are added
   like numbers, digit by digit; below 2 ** 32 each, as they are after a call, those of 2 ** 31 ranks fit. Elements that
   are no finite numbers are counted apart and not added.

   Most numbers are added a part of a block at a time by windows.h. Here is what adds every number: by exponents, which
   takes ten times as long, and is for parts whose numbers are too far apart, float64, subnormals, NaN and inf. */

#include "waves.h"

enum {
    PART = 1 << 12,      /* elements: 16 KiB of fp32, which stay in the nearest cache until they are added */
    SIDE = 4,            /* vectors of sums that need not wait for each other */
    WINDOW = 42,         /* bits: 2 ** 8 numbers of a lane fit into 51 */
    NARROW = 20,         /* digits of sums of fp32, bf16 and fp16: 342 bits above their base */
    NARROW_BASE = -298,  /* of 2: the square of the least fp32 number is one unit */
    WIDE = 134,          /* and of float64, */
    BEFORE = 58,         /* of which these stand for less than a unit of the narrow ones */
    WIDE_BASE = NARROW_BASE - BEFORE * 32
};

struct sum {
    int64_t nans, infs;
    int64_t digits[WIDE + 2]; /* the last ones stay 0: a deposit touches three */
};

/* Add value * 2 ** position, in units of the base; the value may be below 0. */
INLINE void deposit(int64_t *digits, int64_t value, unsigned position)
{
    int64_t *at = digits + position / 32;
    const unsigned shift = position % 32;
    const uint64_t low = (uint64_t)(value & 0xffffffff) << shift;
    const int64_t high = (value >> 32) * ((int64_t)1 << shift);
    at[0] += (int64_t)(low & 0xffffffff);
    at[1] += (int64_t)(low >> 32) + (high & 0xffffffff);
    at[2] += high >> 32;
}

/* Digits below 2 ** 32 of the same sum; the last one takes what is left. */
static void carry(int64_t *digits, size_t count)
{
    for (size_t k = 0; k + 1 < count; k++) {
        digits[k + 1] += digits[k] >> 32;
        digits[k] &= 0xffffffff;
    }
}

/* A number without its sign as fp32 has it: what is behind the point, and its exponent; 255 is inf or NaN. Branches would
   be guessed wrong where subnormals are among others. */
INLINE void read_one(const char *at, int kind, uint32_t *significand, uint32_t *exponent)
{
    const int behind = kind == FP16 ? 10 : 23;
    uint32_t bits = 0;
    memcpy(&bits, at, size_of(kind));
    bits = (kind == BF16 ? bits << 16 : bits) & (kind == FP16 ? 0x7fff : 0x7fffffff);
    const uint32_t field = bits >> behind;
    *significand = (bits & ((1u << behind) - 1)) | (uint32_t)(field > 0) << behind;
    *exponent = field + (field == 0);
    if (kind == FP16)
        *exponent = field == 31 ? 255 : *exponent + 125; /* its exponents begin at -14, and its 10 bits stand lower */
}

/* Any numbers, at most PART of them: those of one exponent are added as integers. */
INLINE void add_by_exponent(const char *start, size_t numel, int kind, int power, struct sum *sum)
{
    uint64_t of_exponent[255] = {0}; /* below 2 ** (48 + 12) */
    for (size_t i = 0; i < numel; i++) {
        uint32_t m, exponent;
        read_one(start + i * size_of(kind), kind, &m, &exponent);
        if (exponent == 255) {
            const int is_nan = (m & (m - 1)) != 0; /* beside the bit before the point */
            sum->nans += is_nan;
            sum->infs += !is_nan;
        } else
            of_exponent[exponent] += power == 2 ? (uint64_t)m * m : m;
    }
    for (int e = 1; e < 255; e++)
        if (of_exponent[e])
            deposit(sum->digits, (int64_t)of_exponent[e], power * (e - 150) - NARROW_BASE);
}

/* Numbers of float64: the square of one is that of its 26 upper bits, of its 27 lower ones, and twice their product. */
static void add_float64(const char *start, size_t numel, int power, struct sum *sum)
{
    for (size_t i = 0; i < numel; i++) {
        uint64_t bits;
        memcpy(&bits, start + 8 * i, 8);
        const int field = bits >> 52 & 2047, position = power * (field + (field == 0) - 1075) - WIDE_BASE;
        const uint64_t behind = bits & (((uint64_t)1 << 52) - 1), m = behind | (uint64_t)(field > 0) << 52;
        if (field == 2047) {
            sum->nans += behind != 0;
            sum->infs += behind == 0;
        } else if (power == 1)
            deposit(sum->digits, (int64_t)m, position);
        else {
            const int64_t upper = m >> 27, lower = m & 0x7ffffff;
            deposit(sum->digits, lower * lower, position);
            deposit(sum->digits, 2 * upper * lower, position + 27);
            deposit(sum->digits, upper * upper, position + 54);
        }
    }
}

INLINE double two_to(int exponent)
{
    const uint64_t bits = (uint64_t)(exponent + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return power;
}

/* How many windows, of which units, take all numbers between these two. 0 where there is nothing to add; -1 where there
   are too many bits, or numbers that a processor may have been told to read as 0: subnormals of fp32. */
static int windows_for(uint32_t largest, uint32_t least, int kind, int power, int *units)
{
    const int behind = kind == FP32 ? 23 : kind == BF16 ? 7 : 10; /* bits behind the point */
    int top = largest >> behind, bottom = least >> behind;
    if (largest == 0)
        return 0;
    if (kind == FP16) {
        if (top == 31)
            return -1;
        top = power * ((top ? top : 1) - 14);
        bottom = power * ((bottom ? bottom : 1) - 25);
    } else {
        if (top == 255 || bottom == 0)
            return -1;
        top = power * (top - 126);
        bottom = power * (bottom - 127 - behind);
    }
    const int windows = (top - bottom + WINDOW - 1) / WINDOW;
    if (windows > 3)
        return -1;
    for (int w = 1; w < windows; w++)
        units[w - 1] = top - w * WINDOW;
    units[windows - 1] = bottom;
    return windows;
}

#define NAME(x) x##_portable
#define TARGET
#define LANES 4
#define FROM_HALF(x) ((words)from_half((__builtin_convertvector(x, words) & 0x7fffu) << 13))
#define WIDEN(x) __builtin_convertvector(x, NAME(doubles))
#define FUSED(x, y, z) ((x) * (y) + (z))
#include "windows.h"

#ifdef __x86_64__
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 4
#define FROM_HALF(x) ((NAME(words))_mm_cvtph_ps(_mm_cvtsi64_si128((int64_t)(x))))
#define WIDEN(x) ((NAME(doubles))_mm256_cvtps_pd((__m128)(x)))
#define FUSED(x, y, z) ((NAME(doubles))_mm256_fmadd_pd((__m256d)(x), (__m256d)(y), (__m256d)(z)))
#include "windows.h"
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#define LANES 8
#define FROM_HALF(x) ((NAME(words))_mm256_cvtph_ps((__m128i)(x)))
#define WIDEN(x) ((NAME(doubles))_mm512_cvtps_pd((__m256)(x)))
#define FUSED(x, y, z) ((NAME(doubles))_mm512_fmadd_pd((__m512d)(x), (__m512d)(y), (__m512d)(z)))
#include "windows.h"
#else
#define add_block_avx2 add_block_portable
#define add_block_avx512 add_block_portable
#endif

struct summing {
    struct wave wave;
    int power;
    int64_t *counts, *digits; /* of all threads: integers are added in any order */
    size_t many;              /* digits */
};

INLINE void put(int64_t *to, int64_t amount)
{
    if (amount)
        __atomic_fetch_add(to, amount, __ATOMIC_RELAXED);
}

static void sum_block(struct wave *wave, size_t k)
{
    struct summing *all = (struct summing *)wave;
    struct block *block = &wave->blocks[k];
    struct sum sum = {0};
    switch (wave->instructions) {
    case AVX512: add_block_avx512(block->start, block->numel, wave->kind, all->power, &sum); break;
    case AVX2: add_block_avx2(block->start, block->numel, wave->kind, all->power, &sum); break;
    default: add_block_portable(block->start, block->numel, wave->kind, all->power, &sum);
    }
    carry(sum.digits, all->many);
    put(&all->counts[0], sum.nans);
    put(&all->counts[1], sum.infs);
    for (size_t d = 0; d < all->many; d++)
        put(&all->digits[d], sum.digits[d]);
}

/* The widest instruction set of this processor for exact sums and fingerprints. */
int distclip_widest_instructions(void)
{
#ifdef __x86_64__
    if (has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (has_avx2())
        return AVX2;
#endif
    return PORTABLE;
}

/* Add the sum of |x| ** power over `count` tensors of one kind to `words`: how many elements are NaN, how many inf, and
   the digits, NARROW or WIDE. Blocks from the last to the first, as sums.c has them. */
void distclip_exact_sum(const uint64_t *addresses, const uint64_t *numels, size_t count, int kind, int power,
                        int instructions, int threads, int64_t *words, size_t digits)
{
    struct summing all;
    struct wave *wave = &all.wave;
    begin(wave, sum_block, kind, instructions, threads);
    all.power = power;
    all.counts = words;
    all.many = kind == FP64 ? WIDE : NARROW;
    all.digits = words + 2 + (all.many < digits ? BEFORE : 0);
    while (count-- > 0) {
        size_t left = numels[count];
        while (left > 0) {
            const size_t part = (left - 1) % BLOCK + 1;
            left -= part;
            wave->blocks[wave->count++] =
                (struct block){(char *)(uintptr_t)addresses[count] + left * size_of(kind), part, 1, NULL};
            wave->numel += part;
            if (wave->count == WAVE) {
                share(wave);
                wave->count = wave->numel = 0;
            }
        }
    }
    share(wave);
    carry(words + 2, digits);
}

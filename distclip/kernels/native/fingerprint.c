/* Fingerprints: the sum, modulo 2 ** 64, of every element's bits mixed with its place in the whole parameter.

   A sum has no order: any split of the parameter, and any number of threads, gives the same number. */

#include "waves.h"

enum { SIDE = 4 }; /* vectors that are mixed side by side */

#define APART 0x9e3779b97f4a7c15u /* between the states of neighbours: 2 ** 64 over the golden ratio */

/* Where the elements of a tensor are in the whole parameter: in runs of `length`, which begin at `starts`, neighbours
   `step` apart. The tensor begins with element `skip` of the first run. */
struct place {
    const int64_t *starts;
    uint64_t length, step, skip, seed; /* seed: of the parameter */
};

/* A word, exclusive or the state of its place. Each step multiplies the halves of 64 bits, which one instruction does
   nearly everywhere; upper halves hold the place, so that no two words are mixed alike. */
INLINE uint64_t mix(uint64_t z)
{
    z += (z & 0xffffffffu) * (z >> 32);
    z ^= z >> 32;
    return z + (z & 0xffffffffu) * (z >> 32);
}

#define NAME(x) x##_portable
#define TARGET
#define LANES 0
#include "mix.h"

#ifdef __x86_64__
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#define LANES 4
#define WORDS(at) _mm256_cvtepu32_epi64(_mm_loadu_si128(at))
#define SHORTS(at) _mm256_cvtepu16_epi64(_mm_loadl_epi64(at))
#define PRODUCT(x, y) _mm256_mul_epu32((__m256i)(x), (__m256i)(y))
#include "mix.h"
#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#define LANES 8
#define WORDS(at) _mm512_cvtepu32_epi64(_mm256_loadu_si256(at))
#define SHORTS(at) _mm512_cvtepu16_epi64(_mm_loadu_si128(at))
#define PRODUCT(x, y) _mm512_mul_epu32((__m512i)(x), (__m512i)(y))
#include "mix.h"
#else
#define mix_block_avx2 mix_block_portable
#define mix_block_avx512 mix_block_portable
#endif

/* Of one of the blocks: whose it is, and where it begins among the runs. */
struct part {
    const struct place *place;
    uint64_t at, *number;
};

struct mixing {
    struct wave wave;
    struct part parts[WAVE];
};

static void mix_one(struct wave *wave, size_t k)
{
    const struct block *block = &wave->blocks[k];
    const struct part *part = &((struct mixing *)wave)->parts[k];
    uint64_t sum;
    switch (wave->instructions) {
    case AVX512: sum = mix_block_avx512(block->start, block->numel, wave->kind, part->place, part->at); break;
    case AVX2: sum = mix_block_avx2(block->start, block->numel, wave->kind, part->place, part->at); break;
    default: sum = mix_block_portable(block->start, block->numel, wave->kind, part->place, part->at);
    }
    __atomic_fetch_add(part->number, sum, __ATOMIC_RELAXED);
}

/* Add the fingerprint of each of `count` tensors, whose elements have `size` bytes, to its number. Blocks from the last
   to the first, as sums.c has them. */
void distclip_fingerprints(const uint64_t *addresses, const uint64_t *numels, const struct place *places, size_t count,
                           int size, int instructions, int threads, uint64_t *numbers)
{
    struct mixing all;
    struct wave *wave = &all.wave;
    begin(wave, mix_one, size, instructions, threads);
    while (count-- > 0) {
        size_t left = numels[count];
        while (left > 0) {
            const size_t some = (left - 1) % BLOCK + 1;
            left -= some;
            all.parts[wave->count] = (struct part){&places[count], places[count].skip + left, &numbers[count]};
            wave->blocks[wave->count++] =
                (struct block){(char *)(uintptr_t)addresses[count] + left * size, some, 1, NULL};
            wave->numel += some;
            if (wave->count == WAVE) {
                share(wave);
                wave->count = wave->numel = 0;
            }
        }
    }
    share(wave);
}

// x Wᵀ from NF4 weights in bitsandbytes' packed layout (nf4_pairs.h).
//
// Codes become values in registers or the nearest cache, and never meet memory. Sums over the inputs that share a scale
// meet it in float32, as in bitsandbytes' own kernel.
#define _GNU_SOURCE
#include "low_rank.h"

#if defined(__AVX512BF16__) && defined(__AMX_BF16__) && defined(__linux__)
#define TILES
#endif

#ifdef __AVX512BF16__
#include "nf4_vectors.h"
#ifdef TILES
#include "nf4_tiles.h"
#endif

enum { MOST = 256 };  // tokens whose sums for a group, and whose inputs, stay in the nearer caches

typedef void SumUp(float (*sums)[GROUP], const bfloat16 *x, const uint8_t *packed, const bfloat16 *scales,
                   __m512i values, int64_t tokens, int64_t n, int64_t k);

// Called by all threads of a region.
static void up_to_most(SumUp *sum_up, const bfloat16 *x, const uint8_t *packed, const bfloat16 *scales, __m512i values,
                       bfloat16 *y, int64_t tokens, int64_t n, int64_t k) {
#pragma omp for schedule(static)
    for (int64_t output = 0; output < n; output += GROUP) {
        float sums[MOST][GROUP] __attribute__((aligned(64)));
        sum_up(sums, x, packed + output * (k / 2), scales + output, values, tokens, n, k);
        for (int64_t t = 0; t < tokens; t++) {
            const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(sums[t] + HALF), _mm512_load_ps(sums[t]));
            _mm512_storeu_si512(y + t * n + output, (__m512i)rounded);
        }
    }
}

// Whether `nf4_product` can be used.
int has_nf4_product(void) { return 1; }

// Whether it can be told to use tiles.
int request_tiles(void) {
#ifdef TILES
    return request_tile_registers();
#else
    return 0;
#endif
}

// y[tokens, n] = x[tokens, k] Wᵀ for packed[n / 32, k / 2, 32], scales[k / 64, n] and code[16], rounded, plus all of the
// low-rank sums of x: in one region, whose threads wait for each other once.
void nf4_product(const bfloat16 *x, const uint8_t *packed, const bfloat16 *scales, const float *code, bfloat16 *y,
                 int64_t tokens, int64_t n, int64_t k, int64_t tiles, const LowRankSum *low_rank, int64_t how_many) {
    SumUp *sum_up = sum_up_in_vectors;
#ifdef TILES
    if (tiles) sum_up = sum_up_in_tiles;
#else
    (void)tiles;
#endif
    bfloat16 values[32];
    for (int lane = 0; lane < 32; lane++) values[lane] = narrow(code[lane % 16]);
#pragma omp parallel
    {
        shrink_all(low_rank, how_many, x, k, k);
        for (int64_t t = 0; t < tokens; t += MOST)
            up_to_most(sum_up, x + t * k, packed, scales, _mm512_loadu_si512(values), y + t * n, least(tokens - t, MOST),
                       n, k);
        expand_all(low_rank, how_many, y, n, n);
    }
}

#else

int has_nf4_product(void) { return 0; }
int request_tiles(void) { return 0; }
void nf4_product(void) {}

#endif

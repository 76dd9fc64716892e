// bitsandbytes' packed CPU layout of NF4 weights, and the values of its codes.
//
// For every 32 outputs and every pair of inputs, the layout holds 32 bytes: byte 2r + p has output r's code for input p
// of the pair in its low half, output 16 + r's in its high one. Each of 64 inputs in a row share a scale.
// (bitsandbytes.functional._convert_weight_packed_for_cpu)
#pragma once

#include "bfloat16.h"

enum { BLOCK = 64, GROUP = 32, HALF = GROUP / 2 };  // inputs to a scale; outputs side by side, and those of a vector
enum { PAIRS = BLOCK / 2, PAIR_BYTES = 32 };        // of a group, for a block
enum { AHEAD = 8192 };  // bytes of codes: what the processor asks for by itself leaves much of the bandwidth unused

// For a pair of inputs and each of a group's outputs, two bfloat16 side by side: as a lane of VDPBF16PS takes them.
typedef struct {
    __m512i low, high;
} PairValues;

// `values` holds the 16 of the code twice: of a lane its lowest five bits choose, so what stands above four doesn't matter.
static inline PairValues look_up(const uint8_t *packed, __m512i values) {
    const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)packed));
    _mm_prefetch((const void *)(packed + AHEAD), _MM_HINT_T1);
    return (PairValues){_mm512_permutexvar_epi16(both, values),
                        _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), values)};
}

// Adds a token's products with a block to sums[group].
static inline void add_scaled(float *sums, __m512 low, __m512 high, __m512 low_scales, __m512 high_scales) {
    _mm512_store_ps(sums, _mm512_fmadd_ps(low, low_scales, _mm512_load_ps(sums)));
    _mm512_store_ps(sums + HALF, _mm512_fmadd_ps(high, high_scales, _mm512_load_ps(sums + HALF)));
}

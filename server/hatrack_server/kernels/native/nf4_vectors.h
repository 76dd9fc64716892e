// A group's products with VDPBF16PS: codes are looked up in registers, where the sums of a few tokens stay.
//
// A token's sum is the same to the bit whatever tokens stand beside it.
#pragma once

#include "nf4_pairs.h"

enum { SCALES_AHEAD = AHEAD / (PAIRS * PAIR_BYTES) };  // blocks; scales lie pages apart, so nothing else asks for them
enum { TOGETHER = 8 };  // tokens for which one look-up serves: their sums take half the registers

// sums[tokens, group] of all inputs, for tokens whose number the compiler knows.
//
// Codes are read in one stream: at two places of a page in turn, the processor sees no stream to read ahead in.
__attribute__((always_inline)) static inline void sum_together(float (*sums)[GROUP], const bfloat16 *x,
                                                               const uint8_t *packed, const bfloat16 *scales, int64_t n,
                                                               __m512i values, int64_t k, const int tokens) {
    memset(sums, 0, tokens * sizeof *sums);
    for (int64_t input = 0; input < k; input += BLOCK, scales += n) {
        __m512 low[TOGETHER], high[TOGETHER];
        for (int t = 0; t < tokens; t++) low[t] = high[t] = _mm512_setzero_ps();
#pragma GCC unroll 1
        for (int pair = 0; pair < PAIRS; pair++, packed += PAIR_BYTES) {
            const PairValues weights = look_up(packed, values);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                int32_t inputs;
                memcpy(&inputs, x + t * k + input + pair * 2, sizeof inputs);
                const __m512bh everywhere = (__m512bh)_mm512_set1_epi32(inputs);
                low[t] = _mm512_dpbf16_ps(low[t], (__m512bh)weights.low, everywhere);
                high[t] = _mm512_dpbf16_ps(high[t], (__m512bh)weights.high, everywhere);
            }
        }
        _mm_prefetch((const void *)(scales + SCALES_AHEAD * n), _MM_HINT_T0);
        const __m512 low_scales = (__m512)widen_lanes(scales), high_scales = (__m512)widen_lanes(scales + HALF);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) add_scaled(sums[t], low[t], high[t], low_scales, high_scales);
    }
}

// sums[tokens, group] of all inputs.
static void sum_up_in_vectors(float (*sums)[GROUP], const bfloat16 *x, const uint8_t *packed, const bfloat16 *scales,
                              __m512i values, int64_t tokens, int64_t n, int64_t k) {
    for (int64_t t = 0; t < tokens; t += TOGETHER)
        switch (tokens - t) {
#define CASE(label, some) \
    label: sum_together(sums + t, x + t * k, packed, scales, n, values, k, some); break;
            CASE(case 1, 1) CASE(case 2, 2) CASE(case 3, 3) CASE(case 4, 4) CASE(case 5, 5) CASE(case 6, 6)
            CASE(case 7, 7) CASE(default, TOGETHER)
#undef CASE
        }
}

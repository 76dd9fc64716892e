// A group's products with VDPBF16PS: codes are looked up in registers, where the sums of a few tokens stay.
//
// A token's sum is the same to the bit whatever tokens stand beside it.
#pragma once

#include "nf4_pairs.h"

enum { TOGETHER = 8 };  // tokens for which one look-up serves: their sums take half the registers
enum { FEW = 4 };       // tokens whose sums of two blocks fit as well: those of one would wait for each other

// Adds to sums[tokens, group] the products of blocks that lie side by side from `input` on.
__attribute__((always_inline)) static inline void add_blocks(float (*sums)[GROUP], const bfloat16 *x, int64_t stride,
                                                             const uint8_t *packed, const bfloat16 *scales, int64_t n,
                                                             __m512i values, int64_t input, const int tokens,
                                                             const int blocks) {
    x += input, packed += input / 2 * PAIR_BYTES, scales += input / BLOCK * n;
    __m512 low[2][TOGETHER], high[2][TOGETHER];
    for (int block = 0; block < blocks; block++)
        for (int t = 0; t < tokens; t++) low[block][t] = high[block][t] = _mm512_setzero_ps();
#pragma GCC unroll 1
    for (int pair = 0; pair < PAIRS; pair++)
#pragma GCC unroll 2
        for (int block = 0; block < blocks; block++) {
            const PairValues weights = look_up(packed + (block * PAIRS + pair) * PAIR_BYTES, values);
#pragma GCC unroll 8
            for (int t = 0; t < tokens; t++) {
                int32_t inputs;
                memcpy(&inputs, x + t * stride + block * BLOCK + pair * 2, sizeof inputs);
                const __m512bh everywhere = (__m512bh)_mm512_set1_epi32(inputs);
                low[block][t] = _mm512_dpbf16_ps(low[block][t], (__m512bh)weights.low, everywhere);
                high[block][t] = _mm512_dpbf16_ps(high[block][t], (__m512bh)weights.high, everywhere);
            }
        }
#pragma GCC unroll 2
    for (int block = 0; block < blocks; block++, scales += n) {
        const __m512 low_scales = (__m512)widen_lanes(scales), high_scales = (__m512)widen_lanes(scales + HALF);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; t++) add_scaled(sums[t], low[block][t], high[block][t], low_scales, high_scales);
    }
}

// sums[tokens, group] of all inputs, for tokens whose number the compiler knows.
__attribute__((always_inline)) static inline void sum_together(float (*sums)[GROUP], const bfloat16 *x, int64_t stride,
                                                               const uint8_t *packed, const bfloat16 *scales, int64_t n,
                                                               __m512i values, int64_t k, const int tokens) {
    const int blocks = tokens <= FEW ? 2 : 1;
    int64_t input = 0;
    memset(sums, 0, tokens * sizeof *sums);
    for (; input + blocks * BLOCK <= k; input += blocks * BLOCK)
        add_blocks(sums, x, stride, packed, scales, n, values, input, tokens, blocks);
    if (input < k) add_blocks(sums, x, stride, packed, scales, n, values, input, tokens, 1);
}

// sums[tokens, group] of all inputs.
static void sum_up_in_vectors(float (*sums)[GROUP], const bfloat16 *x, int64_t stride, const uint8_t *packed,
                              const bfloat16 *scales, __m512i values, int64_t tokens, int64_t n, int64_t k) {
    for (int64_t t = 0; t < tokens; t += TOGETHER)
        switch (tokens - t) {
#define CASE(label, some) \
    label: sum_together(sums + t, x + t * stride, stride, packed, scales, n, values, k, some); break;
            CASE(case 1, 1) CASE(case 2, 2) CASE(case 3, 3) CASE(case 4, 4) CASE(case 5, 5) CASE(case 6, 6)
            CASE(case 7, 7) CASE(default, TOGETHER)
#undef CASE
        }
}

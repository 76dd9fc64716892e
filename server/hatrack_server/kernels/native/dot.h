// Products of tokens with rows that lie side by side, a few of both: what is read once serves four.
#pragma once

#include "bfloat16.h"

enum { FEW = 4 };  // of each: four places are read at a time

// v[tokens, rows] = x[tokens, n] a[rows][n]ᵀ, with at most FEW of both; constants where this is inlined. Asks for as
// much at `next`, into the second cache.
static inline __attribute__((always_inline)) void dot(float *v, int64_t v_stride, const bfloat16 *x, int64_t x_stride,
                                                      const bfloat16 *const *a, const bfloat16 *const *next, int64_t n,
                                                      const int tokens, const int rows) {
    lanes vectors[FEW][FEW] = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        pairs inputs[FEW];
        for (int t = 0; t < tokens; t++) inputs[t] = load_pairs(x + t * x_stride + i);
        for (int r = 0; r < rows; r++) {
            const pairs weights = load_pairs(a[r] + i);
            __builtin_prefetch(next[r] + i, 0, 2);
            for (int t = 0; t < tokens; t++) vectors[r][t] = add_dot(vectors[r][t], inputs[t], weights);
        }
    }
    float sums[FEW][FEW];
    if (tokens == FEW && rows == FEW)
        sum_lanes_of_16(sums, vectors);
    else
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++) sums[t][r] = sum_lanes(vectors[r][t]);
    for (; i < n; i++)
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < rows; r++) sums[t][r] += widen(x[t * x_stride + i]) * widen(a[r][i]);
    for (int t = 0; t < tokens; t++) memcpy(v + t * v_stride, sums[t], rows * sizeof *v);
}

// The same for numbers that are not known before, and rows that lie side by side: in fours where there are as many.
static inline void dot_few(float *v, int64_t v_stride, const bfloat16 *x, int64_t x_stride, const bfloat16 *a,
                           const bfloat16 *next, int64_t n, int64_t tokens, int64_t rows) {
    const bfloat16 *own[FEW], *following[FEW];
    for (int64_t r = 0; r < rows; r++) own[r] = a + r * n, following[r] = next + r * n;
    if (tokens == FEW && rows == FEW) {
        dot(v, v_stride, x, x_stride, own, following, n, FEW, FEW);
    } else if (rows == FEW) {
        for (int64_t t = 0; t < tokens; t++)
            dot(v + t * v_stride, v_stride, x + t * x_stride, x_stride, own, following, n, 1, FEW);
    } else {
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t r = 0; r < rows; r++)
                dot(v + t * v_stride + r, v_stride, x + t * x_stride, x_stride, own + r, following + r, n, 1, 1);
    }
}

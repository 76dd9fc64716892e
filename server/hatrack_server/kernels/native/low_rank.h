// y += (x Aᵀ) B, the tokens of each row with its own adapter's A and B: few tokens at the speed of reading them.
//
// In two steps, each called by all threads of a region, and all of the first done before the second begins.
#pragma once

#include "dot.h"

enum { STRIP = 256 };  // outputs that one thread makes at a time: their sums stay in its nearest cache
enum { SLAB = 16 };    // ranks whose products are summed up in registers; more rows of b would push each other out

// Adds v[tokens, ranks] b[ranks, 0 … n) to sums[tokens, 0 … n), which the first slab of a rank begins, and the last one
// adds to y[tokens, 0 … n), rounded once. The rows of b are `stride` apart, as those at `next`, for which it asks.
static inline __attribute__((always_inline)) void add_slab(bfloat16 *y, int64_t y_stride, float (*sums)[STRIP],
                                                           const float *v, int64_t v_stride, const bfloat16 *b,
                                                           const bfloat16 *next, int64_t stride, int64_t n,
                                                           const int tokens, const int64_t ranks, const int first,
                                                           const int last) {
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {  // a cache line of each row: so none is read twice
        lanes low[FEW] = {0}, high[FEW] = {0};
        for (int t = 0; t < tokens && !first; t++) {
            memcpy(&low[t], sums[t] + i, sizeof low[t]);
            memcpy(&high[t], sums[t] + i + LANES, sizeof high[t]);
        }
#pragma GCC unroll 16
        for (int64_t r = 0; r < ranks; r++) {
            const bfloat16 *weights = b + r * stride + i;
            const lanes low_weights = widen_lanes(weights), high_weights = widen_lanes(weights + LANES);
            __builtin_prefetch(next + r * stride + i, 0, 2);
            for (int t = 0; t < tokens; t++) {
                low[t] += v[t * v_stride + r] * low_weights;
                high[t] += v[t * v_stride + r] * high_weights;
            }
        }
        for (int t = 0; t < tokens; t++) {
            bfloat16 *own = y + t * y_stride + i;
            if (last) {
                narrow_lanes(own, widen_lanes(own) + low[t]);
                narrow_lanes(own + LANES, widen_lanes(own + LANES) + high[t]);
            } else {
                memcpy(sums[t] + i, &low[t], sizeof low[t]);
                memcpy(sums[t] + i + LANES, &high[t], sizeof high[t]);
            }
        }
    }
    for (; i < n; i++) {
        for (int t = 0; t < tokens; t++) {
            float sum = first ? 0 : sums[t][i];
            for (int64_t r = 0; r < ranks; r++) sum += v[t * v_stride + r] * widen(b[r * stride + i]);
            if (last)
                y[t * y_stride + i] = narrow(widen(y[t * y_stride + i]) + sum);
            else
                sums[t][i] = sum;
        }
    }
}

// y[tokens, 0 … n) += v[tokens, rank] b[rank, 0 … n), rounded once.
static inline __attribute__((always_inline)) void expand(bfloat16 *y, int64_t y_stride, const float *v, int64_t rank,
                                                         const bfloat16 *b, const bfloat16 *next, int64_t stride,
                                                         int64_t n, const int tokens) {
    float sums[FEW][STRIP] __attribute__((aligned(64)));
#define ADD(ranks, first, last)                                                                                  \
    add_slab(y, y_stride, sums, v + r, rank, b + r * stride, next + r * stride, stride, n, tokens, ranks, first, last)
    int64_t r = 0;
    if (rank == SLAB) {
        ADD(SLAB, 1, 1);
    } else if (rank < SLAB) {
        ADD(rank, 1, 1);
    } else {
        for (; r + SLAB < rank; r += SLAB) ADD(SLAB, r == 0, 0);
        ADD(rank - r, 0, 1);
    }
#undef ADD
}

static void expand_few(bfloat16 *y, int64_t y_stride, const float *v, int64_t rank, const bfloat16 *b,
                       const bfloat16 *next, int64_t stride, int64_t n, int64_t tokens) {
    if (tokens == FEW)
        expand(y, y_stride, v, rank, b, next, stride, n, FEW);
    else
        for (int64_t t = 0; t < tokens; t++)
            expand(y + t * y_stride, y_stride, v + t * rank, rank, b, next, stride, n, 1);
}

// Each of the `count` rows of a[…, rank, in] and b[…, rank, out] meets `length` tokens, one after the other from `start`
// on; v[count · length, rank] is what the first step leaves for the second. (kernels/native/__init__.py has the same.)
typedef struct {
    const bfloat16 *a, *b;
    const int32_t *rows;
    float *v;
    int64_t start, count, length, rank;
} LowRankSum;

// v = x Aᵀ for each of the sums.
static void shrink_all(const LowRankSum *sums, int64_t how_many, const bfloat16 *x, int64_t x_stride, int64_t in) {
    for (const LowRankSum *sum = sums; sum < sums + how_many; sum++) {
        const int64_t rank = sum->rank, length = sum->length;
        const int64_t parts = (length + FEW - 1) / FEW, ranks = (rank + FEW - 1) / FEW;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < sum->count * parts * ranks; i++) {
            const int64_t row = i / ranks / parts, first = i / ranks % parts * FEW, r = i % ranks * FEW;
            const int64_t token = row * length + first, after = least(row + 1, sum->count - 1);
            const bfloat16 *own = sum->a + (sum->rows[row] * rank + r) * in;
            const bfloat16 *next = r + FEW < rank ? own + FEW * in : sum->a + sum->rows[after] * rank * in;
            dot_few(sum->v + token * rank + r, rank, x + (sum->start + token) * x_stride, x_stride, own, next, in,
                    least(length - first, FEW), least(rank - r, FEW));
        }
    }
}

// y += v B for each of the sums.
static void expand_all(const LowRankSum *sums, int64_t how_many, bfloat16 *y, int64_t y_stride, int64_t out) {
    const int64_t strips = (out + STRIP - 1) / STRIP;
    for (const LowRankSum *sum = sums; sum < sums + how_many; sum++) {
        const int64_t rank = sum->rank, length = sum->length, parts = (length + FEW - 1) / FEW;
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < sum->count * parts * strips; i++) {
            const int64_t row = i / strips / parts, first = i / strips % parts * FEW, output = i % strips * STRIP;
            const int64_t token = row * length + first, after = least(row + 1, sum->count - 1);
            const bfloat16 *own = sum->b + sum->rows[row] * rank * out + output;
            const bfloat16 *next = output + STRIP < out ? own + STRIP : sum->b + sum->rows[after] * rank * out;
            expand_few(y + (sum->start + token) * y_stride + output, y_stride, sum->v + token * rank, rank, own, next,
                       out, least(out - output, STRIP), least(length - first, FEW));
        }
    }
}

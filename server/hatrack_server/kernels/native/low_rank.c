// y += (x Aᵀ) B, the tokens of each row with its own adapter's A and B: few tokens at the speed of reading them.
#include "dot.h"

enum { CHUNK = 256 };  // outputs that one thread makes at a time: their sums stay in its nearest cache

// sums[tokens, 0 … n) += v[tokens, ranks] b[ranks, 0 … n), the rows of b being `stride` apart, as those at `next`, for
// which it asks.
static inline __attribute__((always_inline)) void add_scaled(float (*sums)[CHUNK], const float *v, int64_t v_stride,
                                                             const bfloat16 *b, const bfloat16 *next, int64_t stride,
                                                             int64_t n, const int tokens, const int ranks) {
    lanes factors[GROUP][GROUP] = {0};  // in registers, where a store to `sums` can't change them
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < ranks; r++) factors[t][r] += v[t * v_stride + r];
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        lanes weights[GROUP];
        for (int r = 0; r < ranks; r++) {
            weights[r] = widen_lanes(b + r * stride + i);
            __builtin_prefetch(next + r * stride + i, 0, 2);
        }
        for (int t = 0; t < tokens; t++) {
            lanes sum;
            memcpy(&sum, sums[t] + i, sizeof sum);
            for (int r = 0; r < ranks; r++) sum += factors[t][r] * weights[r];
            memcpy(sums[t] + i, &sum, sizeof sum);
        }
    }
    for (; i < n; i++)
        for (int t = 0; t < tokens; t++)
            for (int r = 0; r < ranks; r++) sums[t][i] += v[t * v_stride + r] * widen(b[r * stride + i]);
}

// y[tokens, 0 … n) += v[tokens, rank] b[rank, 0 … n), rounded once.
static inline __attribute__((always_inline)) void expand(bfloat16 *y, int64_t y_stride, const float *v, int64_t rank,
                                                         const bfloat16 *b, const bfloat16 *next, int64_t stride,
                                                         int64_t n, const int tokens) {
    float sums[GROUP][CHUNK] __attribute__((aligned(64)));
    memset(sums, 0, tokens * sizeof *sums);
    int64_t r = 0;
    for (; r + GROUP <= rank; r += GROUP)
        add_scaled(sums, v + r, rank, b + r * stride, next + r * stride, stride, n, tokens, GROUP);
    for (; r < rank; r++) add_scaled(sums, v + r, rank, b + r * stride, next + r * stride, stride, n, tokens, 1);
    for (int t = 0; t < tokens; t++)
        for (int64_t i = 0; i < n; i++) y[t * y_stride + i] = narrow(widen(y[t * y_stride + i]) + sums[t][i]);
}

static void expand_few(bfloat16 *y, int64_t y_stride, const float *v, int64_t rank, const bfloat16 *b,
                       const bfloat16 *next, int64_t stride, int64_t n, int64_t tokens) {
    if (tokens == GROUP)
        expand(y, y_stride, v, rank, b, next, stride, n, GROUP);
    else
        for (int64_t t = 0; t < tokens; t++)
            expand(y + t * y_stride, y_stride, v + t * rank, rank, b, next, stride, n, 1);
}

// Each of the `count` rows of a[…, rank, in] and b[…, rank, out] meets `length` tokens of y and x, which may be the same,
// one after the other from `start` on; v[count · length, rank] is overwritten.
void add_low_rank(bfloat16 *y, int64_t y_stride, const bfloat16 *x, int64_t x_stride, const bfloat16 *a,
                  const bfloat16 *b, const int32_t *rows, float *v, int64_t start, int64_t count, int64_t length,
                  int64_t rank, int64_t in, int64_t out) {
    const int64_t parts = (length + GROUP - 1) / GROUP;
    const int64_t ranks = (rank + GROUP - 1) / GROUP, chunks = (out + CHUNK - 1) / CHUNK;
    y += start * y_stride;
    x += start * x_stride;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < count * parts * ranks; i++) {
            const int64_t row = i / ranks / parts, first = i / ranks % parts * GROUP, r = i % ranks * GROUP;
            const int64_t token = row * length + first, after = least(row + 1, count - 1);
            const bfloat16 *own = a + (rows[row] * rank + r) * in;
            const bfloat16 *next = r + GROUP < rank ? own + GROUP * in : a + rows[after] * rank * in;
            dot_few(v + token * rank + r, rank, x + token * x_stride, x_stride, own, next, in,
                    least(length - first, GROUP), least(rank - r, GROUP));
        }
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < count * parts * chunks; i++) {
            const int64_t row = i / chunks / parts, first = i / chunks % parts * GROUP, output = i % chunks * CHUNK;
            const int64_t token = row * length + first, after = least(row + 1, count - 1);
            const bfloat16 *own = b + rows[row] * rank * out + output;
            const bfloat16 *next = output + CHUNK < out ? own + CHUNK : b + rows[after] * rank * out;
            expand_few(y + token * y_stride + output, y_stride, v + token * rank, rank, own, next, out,
                       least(out - output, CHUNK), least(length - first, GROUP));
        }
    }
}

// y += (x Aᵀ) B, each token with its own adapter's A and B: at the speed of reading them.
#include "bfloat16.h"

enum { CHUNK = 512 };   // outputs that one thread makes at a time: their sums stay in its nearest cache
enum { LANES = 32 };    // of a line of memory
enum { AHEAD = 2048 };  // values to ask for beforehand: processors do so themselves within a page of 4 KiB only

static float dot(const bfloat16 *a, const bfloat16 *x, int64_t n) {
    float sums[LANES] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        __builtin_prefetch(a + i + AHEAD);
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) sums[lane] += widen(a[i + lane]) * widen(x[i + lane]);
    }
    for (; i < n; i++) sum += widen(a[i]) * widen(x[i]);
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return sum;
}

// sums[0 … n) += v b[0 … n); `next` is what will be read after b.
static void add_scaled(float *sums, const bfloat16 *b, const bfloat16 *next, float v, int64_t n) {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        __builtin_prefetch(next + i);
#pragma omp simd
        for (int lane = 0; lane < LANES; lane++) sums[i + lane] += v * widen(b[i + lane]);
    }
    for (; i < n; i++) sums[i] += v * widen(b[i]);
}

// y[0 … n) += Σ v[r] b[r, 0 … n), rounded once; the rows of b are `stride` apart.
static void expand(bfloat16 *y, const bfloat16 *b, const float *v, int64_t rank, int64_t stride, int64_t n) {
    float sums[CHUNK] = {0};
    for (int64_t r = 0; r < rank; r++) add_scaled(sums, b + r * stride, b + (r + 1) * stride, v[r], n);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = narrow(widen(y[i]) + sums[i]);
}

// Token t meets row rows[t] of a[…, rank, in] and b[…, rank, out]. y and x may be the same; v[tokens, rank] is
// overwritten.
void add_low_rank(bfloat16 *y, int64_t y_stride, const bfloat16 *x, int64_t x_stride, const bfloat16 *a,
                  const bfloat16 *b, const int32_t *rows, int64_t tokens, int64_t rank, int64_t in, int64_t out,
                  float *v) {
    const int64_t chunks = (out + CHUNK - 1) / CHUNK;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens * rank; i++) {
            const int64_t t = i / rank, row = rows[t] * rank + i % rank;
            v[i] = dot(a + row * in, x + t * x_stride, in);
        }
#pragma omp for schedule(static) nowait
        for (int64_t i = 0; i < tokens * chunks; i++) {
            const int64_t t = i / chunks, first = i % chunks * CHUNK, n = out - first < CHUNK ? out - first : CHUNK;
            expand(y + t * y_stride + first, b + rows[t] * rank * out + first, v + t * rank, rank, out, n);
        }
    }
}

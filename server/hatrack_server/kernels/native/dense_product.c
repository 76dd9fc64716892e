// x Wᵀ with a dense weight, for few tokens at the speed of reading it.
#include "dot.h"

// y[tokens, n] = x[tokens, k] weight[n, k]ᵀ.
void dense_product(const bfloat16 *x, int64_t x_stride, const bfloat16 *weight, bfloat16 *y, int64_t tokens, int64_t n,
                   int64_t k) {
#pragma omp parallel for schedule(static)
    for (int64_t output = 0; output < n; output += FEW) {
        const int64_t outputs = least(n - output, FEW);
        const bfloat16 *rows = weight + output * k;
        for (int64_t first = 0; first < tokens; first += FEW) {
            const int64_t some = least(tokens - first, FEW);
            float sums[FEW][FEW];
            dot_few(*sums, FEW, x + first * x_stride, x_stride, rows, rows + FEW * k, k, some, outputs);
            for (int64_t t = 0; t < some; t++)
                for (int64_t o = 0; o < outputs; o++) y[(first + t) * n + output + o] = narrow(sums[t][o]);
        }
    }
}

#include "low_rank.h"

// Adds all of the sums to y, given x, which may be y: their tokens are apart.
void add_low_rank(bfloat16 *y, int64_t y_stride, const bfloat16 *x, int64_t x_stride, const LowRankSum *sums,
                  int64_t how_many, int64_t in, int64_t out) {
#pragma omp parallel
    {
        shrink_all(sums, how_many, x, x_stride, in);
#pragma omp barrier
        expand_all(sums, how_many, y, y_stride, out);
    }
}

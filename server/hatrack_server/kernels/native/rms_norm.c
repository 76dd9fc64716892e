// Root mean square normalisation (Zhang & Sennrich 2019).
#include "bfloat16.h"

#include <math.h>

enum { SUMS = 4 };  // that don't wait for each other

static inline float mean_of_squares(const bfloat16 *x, int64_t width) {
    lanes sums[SUMS] = {0};
    for (int64_t i = 0, turn = 0; i < width; i += LANES, turn = (turn + 1) % SUMS) {
        const lanes values = widen_lanes(x + i);
        sums[turn] += values * values;
    }
    return sum_lanes(sums[0] + sums[1] + sums[2] + sums[3]) / width;
}

// y[tokens, width] = x[tokens, width] / √(mean of its squares + epsilon), rounded, times weight[width]; in LANES.
void rms_norm(bfloat16 *y, const bfloat16 *x, const bfloat16 *weight, float epsilon, int64_t tokens, int64_t width) {
#pragma omp parallel for schedule(static) if (tokens > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const bfloat16 *own = x + t * width;
        bfloat16 *out = y + t * width;
        const float factor = 1 / sqrtf(mean_of_squares(own, width) + epsilon);
        for (int64_t i = 0; i < width; i += LANES) {
            narrow_lanes(out + i, widen_lanes(own + i) * factor);
            narrow_lanes(out + i, widen_lanes(out + i) * widen_lanes(weight + i));
        }
    }
}

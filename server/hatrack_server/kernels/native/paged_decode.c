// Attention of one query per row over keys and values that lie scattered in a pool, each read where it lies.
//
// A chunk of keys at a time, by the running maximum and sum of FlashAttention (Dao et al. 2022, algorithm 1).
#include "dot.h"

#include <math.h>

enum { CHUNK = 256 };   // keys whose scores are kept
enum { WIDEST = 512 };  // values of a head
enum { AHEAD = 32 };    // keys that are asked for before their turn

// e to the x, for x of 0 at most; NaN stays NaN. A polynomial of the sixth order for what powers of two leave.
static inline lanes exponential(lanes x) {
    const pairs low = (pairs)(x < -87);  // all bits of a lane, or none
    x = (lanes)((low & (pairs)((lanes){0} - 87)) | (~low & (pairs)x));
    const lanes shifted = x * 1.44269504f + 12582912;  // 1.5 · 2²³, beside which the last bit counts ones
    const lanes power = shifted - 12582912, rest = x - power * 0.693359375f + power * 2.12194440e-4f;
    lanes sum = rest * 1.38888889e-3f + 8.33333333e-3f;
    sum = sum * rest + 4.16666667e-2f;
    sum = sum * rest + 0.166666667f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1;
    sum = sum * rest + 1;
    return sum * (lanes)(((pairs)shifted + 127) << 23);
}

// sums[tokens, vectors] += weights[tokens, keys] values[keys][vectors], from the value `first` on; `tokens` and `vectors`
// are constants where this is inlined.
static inline __attribute__((always_inline)) void add_values(float (*sums)[WIDEST], const float *weights,
                                                             const bfloat16 *const *values, int64_t first, int64_t keys,
                                                             const int tokens, const int vectors) {
    lanes own[FEW][FEW];
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < vectors; i++) memcpy(&own[t][i], sums[t] + first + i * LANES, sizeof own[t][i]);
    for (int64_t key = 0; key < keys; key++)
        for (int i = 0; i < vectors; i++) {
            const lanes value = widen_lanes(values[key] + first + i * LANES);
            for (int t = 0; t < tokens; t++) own[t][i] += weights[t * CHUNK + key] * value;
        }
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < vectors; i++) memcpy(sums[t] + first + i * LANES, &own[t][i], sizeof own[t][i]);
}

// Turns scores[keys] into weights over e to the `highest` of all so far, and keeps that and their total; returns what
// earlier weights are to be multiplied with.
static inline float weigh(float *scores, int64_t keys, float *highest, float *total) {
    float most = *highest;
    for (int64_t key = 0; key < keys; key++) most = scores[key] > most ? scores[key] : most;
    const float earlier = exponential((lanes){*highest - most})[0];
    lanes sums = {0};
    for (int64_t key = keys; key % LANES; key++) scores[key] = -INFINITY;
    for (int64_t key = 0; key < keys; key += LANES) {
        lanes own;
        memcpy(&own, scores + key, sizeof own);
        own = exponential(own - most);
        sums += own;
        memcpy(scores + key, &own, sizeof own);
    }
    *highest = most;
    *total = *total * earlier + sum_lanes(sums);
    return earlier;
}

typedef struct {
    const bfloat16 *keys, *values;  // of one head, in the pool
    int64_t key_stride, value_stride, key_width, value_width;
} Head;

// out[tokens, value width] of queries[tokens, key width] that share a head of keys and values; `tokens` is a constant.
static inline __attribute__((always_inline)) void attend(bfloat16 *out, const bfloat16 *queries, Head head,
                                                         const int64_t *slots, const uint8_t *mask, int64_t length,
                                                         float scale, const int tokens) {
    float sums[FEW][WIDEST] __attribute__((aligned(64))), scores[FEW][CHUNK] __attribute__((aligned(64)));
    float highest[FEW], total[FEW] = {0};
    for (int t = 0; t < tokens; t++) {
        memset(sums[t], 0, head.value_width * sizeof **sums);
        highest[t] = -INFINITY;
    }
    for (int64_t start = 0; start < length; start += CHUNK) {
        const bfloat16 *keys[CHUNK], *values[CHUNK];
        int64_t seen = 0;
        for (int64_t i = start; i < least(start + CHUNK, length); i++)
            if (mask[i]) {
                keys[seen] = head.keys + slots[i] * head.key_stride;
                values[seen++] = head.values + slots[i] * head.value_stride;
            }
        if (!seen) continue;
        for (int64_t key = 0; key < seen; key++)
            for (int64_t i = 0; i < head.value_width; i += 2 * LANES) __builtin_prefetch(values[key] + i);
        int64_t key = 0;
        for (; key + FEW <= seen; key += FEW)
            dot(scores[0] + key, CHUNK, queries, head.key_width, keys + key, keys + least(key + AHEAD, seen - FEW),
                head.key_width, tokens, FEW);
        for (; key < seen; key++)
            dot(scores[0] + key, CHUNK, queries, head.key_width, keys + key, keys + key, head.key_width, tokens, 1);
        for (int t = 0; t < tokens; t++) {
            for (int64_t key = 0; key < seen; key++) scores[t][key] *= scale;
            const float earlier = weigh(scores[t], seen, highest + t, total + t);
            for (int64_t i = 0; i < head.value_width; i++) sums[t][i] *= earlier;
        }
        int64_t i = 0;
        for (; i + FEW * LANES <= head.value_width; i += FEW * LANES)
            add_values(sums, scores[0], values, i, seen, tokens, FEW);
        for (; i < head.value_width; i += LANES) add_values(sums, scores[0], values, i, seen, tokens, 1);
    }
    for (int t = 0; t < tokens; t++)
        for (int64_t i = 0; i < head.value_width; i++) out[t * head.value_width + i] = narrow(sums[t][i] / total[t]);
}

// out[rows, heads, value width] of q[rows, heads, key width] over keys and values[…, kv heads, width] at
// slots[rows, length], where mask[rows, length] is true: for one of a row at least.
void paged_decode(bfloat16 *out, const bfloat16 *q, const bfloat16 *keys, const bfloat16 *values, const int64_t *slots,
                  const uint8_t *mask, float scale, int64_t rows, int64_t length, int64_t heads, int64_t kv_heads,
                  int64_t key_width, int64_t value_width) {
    const int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows * kv_heads; i++) {
        const int64_t row = i / kv_heads, kv = i % kv_heads, last = group * (i + 1);
        const Head head = {keys + kv * key_width,  values + kv * value_width, kv_heads * key_width,
                           kv_heads * value_width, key_width,                 value_width};
        int64_t first = group * i;  // of all rows' heads
#define ATTEND(tokens)                                                                                               \
    attend(out + first * value_width, q + first * key_width, head, slots + row * length, mask + row * length, length, \
           scale, tokens)
        for (; first < last; first += FEW) switch (least(last - first, FEW)) {
                case 1: ATTEND(1); break;
                case 2: ATTEND(2); break;
                case 3: ATTEND(3); break;
                default: ATTEND(FEW);
            }
#undef ATTEND
    }
}

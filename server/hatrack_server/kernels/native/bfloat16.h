// bfloat16 as the upper half of a float32, one value at a time or a vector of them.
#pragma once

#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#include <immintrin.h>
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef uint16_t bfloat16;
typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t pairs __attribute__((vector_size(LANES * 4)));  // of bfloat16

static inline int64_t least(int64_t one, int64_t other) { return one < other ? one : other; }

static inline float widen(bfloat16 half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest, ties to even; NaN stays NaN.
static inline bfloat16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bfloat16)rounded;
}

// LANES values that lie side by side.
static inline lanes widen_lanes(const bfloat16 *from) {
#ifdef __AVX512F__  // what GCC makes of the general form takes twice as many instructions
    return (lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)from)), 16);
#else
    typedef uint16_t half_lanes __attribute__((vector_size(LANES * 2)));
    typedef uint32_t wide_lanes __attribute__((vector_size(LANES * 4)));
    half_lanes values;
    memcpy(&values, from, sizeof values);
    return (lanes)(__builtin_convertvector(values, wide_lanes) << 16);
#endif
}

// To LANES values that lie side by side.
static inline void narrow_lanes(bfloat16 *to, lanes values) {
#ifdef __AVX512BF16__
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
    memcpy(to, &rounded, sizeof rounded);
#else
    for (int lane = 0; lane < LANES; lane++) to[lane] = narrow(values[lane]);
#endif
}

// 2 LANES values that lie side by side.
static inline pairs load_pairs(const bfloat16 *from) {
    pairs values;
    memcpy(&values, from, sizeof values);
    return values;
}

// sums plus the product of both values of each pair.
static inline lanes add_dot(lanes sums, pairs one, pairs other) {
#ifdef __AVX512BF16__
    return (lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)one, (__m512bh)other);
#else
    const pairs upper = one & 0xffff0000, other_upper = other & 0xffff0000;
    return sums + (lanes)(one << 16) * (lanes)(other << 16) + (lanes)upper * (lanes)other_upper;
#endif
}

static inline float sum_lanes(lanes values) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)values);
#else
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += values[lane];
    return sum;
#endif
}

// For each of 4x4 vectors the sum of its lanes: sums[column][row].
static inline void sum_lanes_of_16(float sums[4][4], lanes vectors[4][4]) {
#ifdef __AVX512F__  // by halves: of two vectors, two shuffles and a sum make one that has half as many lanes of each
#define ADD(one, other) (__m512)((lanes)(one) + (lanes)(other))
    __m512 rows[4];
    for (int row = 0; row < 4; row++) {
        const __m512 *v = (const __m512 *)vectors[row];
        const __m512 left = ADD(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee));
        const __m512 right = ADD(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
        rows[row] = ADD(_mm512_shuffle_f32x4(left, right, 0x88), _mm512_shuffle_f32x4(left, right, 0xdd));
    }
    const __m512d first = (__m512d)ADD(_mm512_unpacklo_ps(rows[0], rows[1]), _mm512_unpackhi_ps(rows[0], rows[1]));
    const __m512d second = (__m512d)ADD(_mm512_unpacklo_ps(rows[2], rows[3]), _mm512_unpackhi_ps(rows[2], rows[3]));
    const __m512 all = ADD(_mm512_unpacklo_pd(first, second), _mm512_unpackhi_pd(first, second));
    memcpy(sums, &all, sizeof all);
#undef ADD
#else
    for (int row = 0; row < 4; row++)
        for (int column = 0; column < 4; column++) sums[column][row] = sum_lanes(vectors[row][column]);
#endif
}

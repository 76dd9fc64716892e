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
    typedef uint16_t narrow_lanes __attribute__((vector_size(LANES * 2)));
    typedef uint32_t wide_lanes __attribute__((vector_size(LANES * 4)));
    narrow_lanes values;
    memcpy(&values, from, sizeof values);
    return (lanes)(__builtin_convertvector(values, wide_lanes) << 16);
#endif
}

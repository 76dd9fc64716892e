// x Wᵀ from NF4 weights in bitsandbytes' packed layout (see unpack_nf4.c), with the tile registers of AMX.
//
// What the layout holds for a pair of inputs, 16 outputs in the low halves of its bytes and 16 in the high ones, is just
// what a row of a tile takes: codes become values in the nearest cache, and never meet memory. Sums over the inputs that
// share a scale meet it in float32, as in bitsandbytes' own kernel.
#define _GNU_SOURCE
#include "bfloat16.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAIRS = 16, OUTPUTS = 16, TOKENS = 16, ROW_BYTES = 64 };  // of a tile
enum { BLOCK = 64, GROUP = 32, CHUNK = 2 * TOKENS };             // inputs to a scale; outputs and tokens of four tiles
enum { MOST = 256 };    // tokens whose sums for a group, and whose inputs, stay in the nearer caches
enum { AHEAD = 8192 };  // bytes of codes: what the processor asks for by itself leaves much of the bandwidth unused
enum { ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };  // arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

// The layout of the operand of LDTILECFG.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

// The values of a group's codes for a block of inputs: for each 32 of them, a tile of 16 outputs, and one of the others.
typedef bfloat16 Weights[2][2][PAIRS * OUTPUTS * 2];

// Tiles 0 … 3 sum up 2x2 products, 4 and 5 hold up to 16 tokens each, 6 and 7 the weights of 16 outputs each.
static void shape_tiles(int64_t tokens) {
    TileShapes shapes = {.palette = 1};
    const int64_t first = tokens < TOKENS ? tokens : TOKENS, second = tokens - first;
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = ROW_BYTES;
        const int64_t own = tile == 2 || tile == 3 || tile == 5 ? second : first;
        shapes.rows[tile] = tile >= 6 ? PAIRS : own ? own : 1;
    }
    _tile_loadconfig(&shapes);
}

static inline void look_up(Weights weights, const uint8_t *packed, __m512i values) {
    for (int half = 0; half < 2; half++) {
#pragma GCC unroll 16
        for (int pair = 0; pair < PAIRS; pair++, packed += 32) {
            const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const void *)packed));
            _mm_prefetch(packed + AHEAD, _MM_HINT_T1);
            // A lane's lowest five bits choose: `values` holds every one twice, so what stands above four does not matter.
            const __m512i low = _mm512_permutexvar_epi16(both, values);
            const __m512i high = _mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), values);
            _mm512_store_si512(weights[half][0] + pair * 32, low);
            _mm512_store_si512(weights[half][1] + pair * 32, high);
        }
    }
}

// products[tokens, group] of up to 32 tokens with one block, the tiles being shaped for as many.
static inline void multiply(float products[CHUNK][GROUP], const bfloat16 *x, int64_t stride, Weights weights,
                            int second) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int half = 0; half < 2; half++) {
        const bfloat16 *own = x + half * 2 * PAIRS;
        _tile_loadd(4, own, stride * 2);
        _tile_loadd(6, weights[half][0], ROW_BYTES);
        _tile_loadd(7, weights[half][1], ROW_BYTES);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (second) {
            _tile_loadd(5, own + TOKENS * stride, stride * 2);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, products[0], sizeof *products);
    _tile_stored(1, products[0] + OUTPUTS, sizeof *products);
    if (second) {
        _tile_stored(2, products[TOKENS], sizeof *products);
        _tile_stored(3, products[TOKENS] + OUTPUTS, sizeof *products);
    }
}

static inline void add_scaled(float (*sums)[GROUP], float products[CHUNK][GROUP], __m512 low, __m512 high,
                              int64_t tokens) {
    for (int64_t t = 0; t < tokens; t++) {
        _mm512_store_ps(sums[t], _mm512_fmadd_ps(_mm512_load_ps(products[t]), low, _mm512_load_ps(sums[t])));
        _mm512_store_ps(sums[t] + 16,
                        _mm512_fmadd_ps(_mm512_load_ps(products[t] + 16), high, _mm512_load_ps(sums[t] + 16)));
    }
}

// sums[tokens, group] of all inputs.
static void sum_up(float (*sums)[GROUP], const bfloat16 *x, int64_t stride, const uint8_t *packed,
                   const bfloat16 *scales, __m512i values, int64_t tokens, int64_t n, int64_t k) {
    Weights weights __attribute__((aligned(64)));
    float products[CHUNK][GROUP] __attribute__((aligned(64)));
    memset(sums, 0, tokens * sizeof *sums);
    for (int64_t input = 0; input < k; input += BLOCK, packed += BLOCK / 2 * 32, scales += n) {
        const __m512 low = widen_lanes(scales), high = widen_lanes(scales + OUTPUTS);
        look_up(weights, packed, values);
        for (int64_t t = 0; t < tokens; t += CHUNK) {
            const int64_t some = tokens - t < CHUNK ? tokens - t : CHUNK;
            if (some < CHUNK && t) shape_tiles(some);
            multiply(products, x + t * stride + input, stride, weights, some > TOKENS);
            add_scaled(sums + t, products, low, high, some);
            if (some < CHUNK && t) shape_tiles(CHUNK);
        }
    }
}

static void up_to_most(const bfloat16 *x, int64_t stride, const uint8_t *packed, const bfloat16 *scales,
                       const float *code, bfloat16 *y, int64_t tokens, int64_t n, int64_t k) {
    bfloat16 values[32];
    for (int lane = 0; lane < 32; lane++) values[lane] = narrow(code[lane % 16]);
#pragma omp parallel
    {
        float sums[MOST][GROUP] __attribute__((aligned(64)));
        shape_tiles(tokens < CHUNK ? tokens : CHUNK);
#pragma omp for schedule(static)
        for (int64_t output = 0; output < n; output += GROUP) {
            sum_up(sums, x, stride, packed + output * (k / 2), scales + output, _mm512_loadu_si512(values), tokens, n, k);
            for (int64_t t = 0; t < tokens; t++) {
                const __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_load_ps(sums[t] + 16), _mm512_load_ps(sums[t]));
                _mm512_storeu_si512(y + t * n + output, (__m512i)rounded);
            }
        }
        _tile_release();
    }
}

// Whether `nf4_product` can run: the kernel lends tile registers only to processes that ask.
int request_nf4_product(void) { return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0; }

// y[tokens, n] = x[tokens, k] Wᵀ for packed[n / 32, k / 2, 32], scales[k / 64, n] and code[16].
void nf4_product(const bfloat16 *x, int64_t x_stride, const uint8_t *packed, const bfloat16 *scales, const float *code,
                 bfloat16 *y, int64_t tokens, int64_t n, int64_t k) {
    for (int64_t t = 0; t < tokens; t += MOST)
        up_to_most(x + t * x_stride, x_stride, packed, scales, code, y + t * n, tokens - t < MOST ? tokens - t : MOST, n,
                   k);
}

#else

int request_nf4_product(void) { return 0; }

void nf4_product(const bfloat16 *x, int64_t x_stride, const uint8_t *packed, const bfloat16 *scales, const float *code,
                 bfloat16 *y, int64_t tokens, int64_t n, int64_t k) {
    (void)x, (void)x_stride, (void)packed, (void)scales, (void)code, (void)y, (void)tokens, (void)n, (void)k;
}

#endif

// A group's products in the tile registers of AMX: codes are looked up into the nearest cache, where tiles are loaded from.
//
// What a pair of inputs has for 16 outputs is just what a row of a tile takes.
#pragma once

#include "nf4_pairs.h"

#include <sys/syscall.h>
#include <unistd.h>

enum { TOKENS = 16, ROWS = 16, ROW_BYTES = 64, CHUNK = 2 * TOKENS };  // of a tile; tokens of all
enum { ASK_FOR_STATE = 0x1023, TILE_DATA = 18 };  // arch_prctl(2): ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA

// The layout of the operand of LDTILECFG.
typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileShapes;

// A group's weights for a block: for each 32 inputs a tile of 16 outputs, and one of the others.
typedef __m512i Weights[2][2][ROWS];

// Whether tiles can be used: the operating system lends them only to processes that ask.
static int request_tile_registers(void) { return syscall(SYS_arch_prctl, ASK_FOR_STATE, TILE_DATA) == 0; }

// Tiles 0 … 3 sum up 2x2 products, 4 and 5 hold up to 16 tokens each, 6 and 7 the weights of 16 outputs each.
static void shape_tiles(int64_t tokens) {
    TileShapes shapes = {.palette = 1};
    const int64_t first = least(tokens, TOKENS), second = tokens - first;
    for (int tile = 0; tile < 8; tile++) {
        shapes.row_bytes[tile] = ROW_BYTES;
        const int64_t own = tile == 2 || tile == 3 || tile == 5 ? second : first;
        shapes.rows[tile] = tile >= 6 ? ROWS : own ? own : 1;
    }
    _tile_loadconfig(&shapes);
}

static inline void look_up_block(Weights weights, const uint8_t *packed, __m512i values) {
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++, packed += PAIR_BYTES) {
            const PairValues found = look_up(packed, values);
            weights[half][0][row] = found.low;
            weights[half][1][row] = found.high;
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
        const bfloat16 *own = x + half * BLOCK / 2;
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
    _tile_stored(1, products[0] + HALF, sizeof *products);
    if (second) {
        _tile_stored(2, products[TOKENS], sizeof *products);
        _tile_stored(3, products[TOKENS] + HALF, sizeof *products);
    }
}

// sums[tokens, group] of all inputs.
static void sum_up_in_tiles(float (*sums)[GROUP], const bfloat16 *x, const uint8_t *packed, const bfloat16 *scales,
                            __m512i values, int64_t tokens, int64_t n, int64_t k) {
    Weights weights;
    float products[CHUNK][GROUP] __attribute__((aligned(64)));
    memset(sums, 0, tokens * sizeof *sums);
    shape_tiles(least(tokens, CHUNK));
    for (int64_t input = 0; input < k; input += BLOCK, packed += PAIRS * PAIR_BYTES, scales += n) {
        const __m512 low_scales = (__m512)widen_lanes(scales), high_scales = (__m512)widen_lanes(scales + HALF);
        look_up_block(weights, packed, values);
        for (int64_t first = 0; first < tokens; first += CHUNK) {
            const int64_t some = least(tokens - first, CHUNK);
            if (some < CHUNK && first) shape_tiles(some);
            multiply(products, x + first * k + input, k, weights, some > TOKENS);
            for (int64_t t = 0; t < some; t++)
                add_scaled(sums[first + t], _mm512_load_ps(products[t]), _mm512_load_ps(products[t] + HALF), low_scales,
                           high_scales);
            if (some < CHUNK && first) shape_tiles(CHUNK);
        }
    }
    _tile_release();
}

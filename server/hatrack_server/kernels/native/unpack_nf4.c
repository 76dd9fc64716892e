// NF4 weights in bitsandbytes' packed CPU layout, back to a dense bfloat16 matrix.
//
// For every 32 outputs and every pair of inputs, the layout holds 32 bytes: byte 2r + p has output r's code for input p
// of the pair in its low half, output 16 + r's in its high one. Each of 64 inputs in a row share a scale.
// (bitsandbytes.functional._convert_weight_packed_for_cpu)
#include "bfloat16.h"

typedef uint16_t halves __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef float floats __attribute__((vector_size(64)));

// Which of two vectors' lanes make a new one, as __builtin_shuffle takes them.
typedef struct {
    halves keep[4], give[4];  // exchange bit b of a vector's number with bit b of its lanes'
    halves front, back;       // the codes of 32 pairs, even inputs and odd ones apart, in the order of inputs
} Shuffles;

// Where `transpose` leaves the pair with this number.
static int lane_of(int pair) { return (pair & 1) << 4 | pair >> 1; }

static Shuffles make_shuffles(void) {
    Shuffles s;
    for (int lane = 0; lane < 32; lane++) {
        for (int b = 0; b < 4; b++) {
            const int high = lane >> b & 1, flipped = lane ^ 1 << b;
            s.keep[b][lane] = high ? 32 + flipped : lane;
            s.give[b][lane] = high ? 32 + lane : flipped;
        }
        s.front[lane] = lane % 2 * 32 + lane_of(lane / 2);
        s.back[lane] = lane % 2 * 32 + lane_of(16 + lane / 2);
    }
    return s;
}

// 32 pairs of 16 outputs, two pairs to a vector, become 16 outputs of 32 pairs.
static inline void transpose(halves *v, const Shuffles *s) {
#pragma GCC unroll 4
    for (int b = 0; b < 4; b++)
#pragma GCC unroll 16
        for (int i = 0; i < 16; i++)
            if (!(i >> b & 1)) {
                const halves low = v[i], high = v[i | 1 << b];
                v[i] = __builtin_shuffle(low, high, s->keep[b]);
                v[i | 1 << b] = __builtin_shuffle(low, high, s->give[b]);
            }
}

// code[16] times the scale, in bfloat16, each in every second lane.
static inline halves scaled(const float *code, bfloat16 scale) {
    floats values;
    memcpy(&values, code, sizeof values);
    values *= widen(scale);
    const words bits = (words)values;
    return (halves)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// One output's 64 weights, from two codes in each lane and the value of every code.
static inline void look_up(bfloat16 *out, halves codes, halves values, const Shuffles *s) {
    const halves even = __builtin_shuffle(values, (codes & 15) * 2);
    const halves odd = __builtin_shuffle(values, (codes >> 8 & 15) * 2);
    const halves front = __builtin_shuffle(even, odd, s->front), back = __builtin_shuffle(even, odd, s->back);
    memcpy(out, &front, sizeof front);
    memcpy(out + 32, &back, sizeof back);
}

// packed[n / 32, k / 2, 32], scales[k / 64, n] and code[16] become out[n, k].
void unpack_nf4(const uint8_t *packed, const bfloat16 *scales, const float *code, bfloat16 *out, int64_t n, int64_t k) {
    const Shuffles shuffles = make_shuffles();
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t group = 0; group < n / 32; group++)
        for (int64_t block = 0; block < k / 64; block++) {
            const Shuffles s = shuffles;
            halves codes[16];
            memcpy(codes, packed + (group * k / 2 + block * 32) * 32, sizeof codes);
            transpose(codes, &s);
            for (int r = 0; r < 32; r++) {
                const int64_t output = group * 32 + r;
                const halves values = scaled(code, scales[block * n + output]);
                look_up(out + output * k + block * 64, r < 16 ? codes[r] : codes[r - 16] >> 4, values, &s);
            }
        }
}

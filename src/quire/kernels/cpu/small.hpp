// The small operations between linear layers, in bfloat16, each in one pass: norms, rotations of queries and keys, gates.
// They round where a model's own code rounds, operation by operation.
#pragma once
#include <algorithm>
#include <cmath>

#include "quire_cpu.h"
#include "vec.hpp"

namespace quire {

// To nearest, ties to even, as BF16::narrow.
QUIRE_INLINE Words narrowed(Floats x) {
    const Words u = (Words)x;
    const Words rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return (u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40 : rounded;
}
QUIRE_INLINE Floats rounded(Floats x) { return (Floats)(narrowed(x) << 16); }
QUIRE_INLINE void store_bf16(uint16_t* p, Floats x) {
#if defined(QUIRE_512)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)narrowed(x)));
#else
    typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
    *(HalvesAt*)p = __builtin_convertvector(narrowed(x), Halves);
#endif
}
inline float rounded(float x) { return BF16::one(BF16::narrow(x)); }

// So few numbers are worked on faster by one thread than others are woken.
inline bool too_few(int64_t numbers, int threads) { return threads < 2 || numbers < 65536; }

inline void norm_row(const quire_norm& n, const uint16_t* x, uint16_t* out) {
    const int d = n.d, whole = d / LANES * LANES;
    Floats sums[4] = {};
    int i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const Floats v = BF16::read(x + i + j * LANES);
            sums[j] += v * v;
        }
    for (; i < whole; i += LANES) {
        const Floats v = BF16::read(x + i);
        sums[0] += v * v;
    }
    float sum = added((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; i < d; i++) sum += BF16::one(x[i]) * BF16::one(x[i]);
    const float s = 1.0f / std::sqrt(sum / (float)d + n.eps);
    for (i = 0; i < whole; i += LANES) {
        const Floats v = BF16::read(x + i) * s, w = BF16::read(n.weight + i) + n.offset;
        store_bf16(out + i, (n.early ? rounded(v) : v) * w);
    }
    for (; i < d; i++) {
        const float v = BF16::one(x[i]) * s, w = BF16::one(n.weight[i]) + n.offset;
        out[i] = BF16::narrow((n.early ? rounded(v) : v) * w);
    }
}

inline int norm(const quire_norm& n, const uint16_t* x, uint16_t* out, int64_t rows, int threads) {
    const bool alone = too_few(rows * n.d, threads);
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : threads) if (!alone)
    for (int64_t r = 0; r < rows; r++) norm_row(n, x + r * n.d, out + r * n.d);
    return 0;
}

// One head of one token: pairs (m, m + d / 2) are turned.
inline void turn(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* out, int d) {
    const int half = d / 2;
    for (int side = 0; side < 2; side++) {
        const uint16_t *a = x + side * half, *b = x + (1 - side) * half, *c = cos + side * half, *s = sin + side * half;
        uint16_t* to = out + side * half;
        const float sign = side ? 1.0f : -1.0f;
        int i = 0;
        for (; i + LANES <= half; i += LANES)
            store_bf16(to + i, rounded(BF16::read(a + i) * BF16::read(c + i)) + rounded(BF16::read(b + i) * sign * BF16::read(s + i)));
        for (; i < half; i++)
            to[i] = BF16::narrow(rounded(BF16::one(a[i]) * BF16::one(c[i])) + rounded(sign * BF16::one(b[i]) * BF16::one(s[i])));
    }
}

inline int rotary(const quire_rotary_args& a) {
    const bool alone = too_few((int64_t)a.batch * a.tokens * (a.heads[0] + a.heads[1]) * a.d, a.threads);
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : a.threads) if (!alone)
    for (int64_t i = 0; i < (int64_t)a.batch * a.tokens; i++) {
        const int64_t b = i / a.tokens, t = i % a.tokens, at = (b * a.angles_batch + t) * a.d;
        for (int f = 0; f < 2; f++)
            for (int h = 0; h < a.heads[f]; h++)
                turn(a.x[f] + b * a.x_batch[f] + t * a.x_token[f] + h * a.x_head[f], a.cos + at, a.sin + at,
                     a.out[f] + ((b * a.tokens + t) * a.heads[f] + h) * a.d, a.d);
    }
    return 0;
}

// silu(gate) * up
inline int gated(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t n, int threads) {
    constexpr int64_t PIECE = 4096;
    const bool alone = too_few(n, threads);
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : threads) if (!alone)
    for (int64_t first = 0; first < n; first += PIECE) {
        const int64_t end = std::min(n, first + PIECE);
        int64_t i = first;
        for (; i + LANES <= end; i += LANES) {
            const Floats g = BF16::read(gate + i);
            const Floats size = (Floats)(g < 0.0f ? -g : g), e = exp2_of(size * -1.44269504088896341f);  // e^-|g|
            const Floats share = (Floats)(g < 0.0f ? e : all(1.0f)) / (1.0f + e);
            store_bf16(out + i, rounded(g * share) * BF16::read(up + i));
        }
        for (; i < end; i++) {
            const float g = BF16::one(gate[i]);
            out[i] = BF16::narrow(rounded(g / (1.0f + std::exp(-g))) * BF16::one(up[i]));
        }
    }
    return 0;
}

}  // namespace quire

// Fields of packed small integers, sixteen tokens a tile: keys with a lane per token, values with a lane per channel, so that
// nothing is added up across lanes. Codes become floats by a shift, a mask and a conversion; arithmetic is in float.
//
//   byte b of a 32-bit lane holds codes b, 4 + b, 8 + b, ... from its lowest bits on (ops/pack.py)
#pragma once
#include "chunk.hpp"

namespace quire {

// One query per head and what follows from it for a key field, kept while a piece is folded.
struct Query {
    alignas(64) float q[MAX_HEADS * MAX_DIM];
    alignas(64) float folded[MAX_HEADS * MAX_DIM];  // times the scales of `at`
    float sums[MAX_HEADS][MAX_DIM / 16];            // of q over each group of channels
    float zero[MAX_HEADS];                          // what `folded` adds for the minima
    const uint8_t* at = nullptr;
};

// Codes less half their range, as signed numbers: what minima and zero-points would take away again is never added, which
// keeps three bits of the sums. `centred` turns the top bit of every code of a word, `codes_at` takes one out.
template <int BITS>
constexpr float HALF = float(1 << (BITS - 1));

template <int BITS>
QUIRE_INLINE Words centred(Words x) {
    return x ^ (BITS == 8 ? 0x80808080u : BITS == 4 ? 0x88888888u : 0xaaaaaaaau);
}

template <int SHIFT, int BITS>
QUIRE_INLINE Floats codes_at(Words x) {
    return __builtin_convertvector((Ints)(x << (32 - SHIFT - BITS)) >> (32 - BITS), Floats);
}

// sum[g][b % P] += code * w(g)[...] for the 32 / BITS centred codes of a lane, in their order.
template <int BITS, int G, int P, int E, class W>
QUIRE_INLINE void add_codes(Words x, Floats (*sum)[P], const W& w) {
    if constexpr (E < 8 / BITS) {
        const Floats c0 = codes_at<BITS * E, BITS>(x), c1 = codes_at<8 + BITS * E, BITS>(x);
        const Floats c2 = codes_at<16 + BITS * E, BITS>(x), c3 = codes_at<24 + BITS * E, BITS>(x);
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            const float* p = w(g) + 4 * E;
            sum[g][0 % P] += c0 * p[0];
            sum[g][1 % P] += c1 * p[1];
            sum[g][2 % P] += c2 * p[2];
            sum[g][3 % P] += c3 * p[3];
        }
        add_codes<BITS, G, P, E + 1>(x, sum, w);
    }
}

template <int P>
QUIRE_INLINE Floats total(const Floats* sum) {
    if constexpr (P == 1) return sum[0];
    if constexpr (P == 2) return sum[0] + sum[1];
    if constexpr (P == 4) return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

typedef uint32_t WordsAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
QUIRE_INLINE Words words(const uint8_t* p) { return *(const WordsAt*)p; }

QUIRE_INLINE int groups_of(const quire_field& f, int d) { return f.scaled == QUIRE_BY_TOKEN ? d / f.group : 1; }

// What a centred code of zero stands for. Without minima that is zero: int8 stores q + 128.
template <int BITS>
QUIRE_INLINE Floats middle(const quire_field& f, Floats scale, const uint16_t* least) {
    return f.min < 0 ? Floats{} : F16::read(least) + scale * HALF<BITS>;
}

template <int G>
void prepare_tiles(const quire_field& f, int d, Query& q) {
    q.at = nullptr;
    const int groups = groups_of(f, d), width = d / groups;
    for (int g = 0; g < G; g++)
        for (int r = 0; r < groups; r++) {
            float sum = 0;
            for (int j = 0; j < width; j++) sum += q.q[g * d + r * width + j];
            q.sums[g][r] = sum;
        }
}

// Keys scaled by channel: the scales go into the query, once for all tokens that share them.
template <int BITS, int G>
void fold_scales(const quire_field& f, const uint8_t* block, int slot, int d, Query& q) {
    const int64_t row = f.scaled == QUIRE_BY_TILE ? 0 : (int64_t)(slot / f.group) * d;
    const uint16_t* scale = halves_at(block, f.scale) + row;
    if (q.at == (const uint8_t*)scale) return;
    q.at = (const uint8_t*)scale;
    const uint16_t* least = f.min < 0 ? nullptr : halves_at(block, f.min) + row;
    const bool one = f.scaled == QUIRE_BY_TILE;
    for (int g = 0; g < G; g++) {
        Floats zero = {};
        for (int j = 0; j < d; j += LANES) {
            const Floats x = load(q.q + g * d + j), s = one ? all(F16::one(scale[0])) : F16::read(scale + j);
            store(q.folded + g * d + j, x * s);
            if (least) zero += x * ((one ? all(F16::one(least[0])) : F16::read(least + j)) + s * HALF<BITS>);
        }
        q.zero[g] = added(zero);
    }
}

// S[g * CHUNK + t] = q[g] . k[t] for the sixteen slots of a step.
template <int BITS, int G>
void score_tiles(const quire_field& f, const Chunk& c, int at, int d, int block_tokens, Query& q, float* S) {
    constexpr int CHANNELS = 32 / BITS, P = G >= 4 ? 1 : 4 / G;
    const uint8_t* block = c.block[at];
    const int tile = c.step[at], slot = tile * STEP;
    const uint8_t* codes = block + f.codes + (int64_t)tile * 2 * d * BITS;
    const bool by_token = f.scaled == QUIRE_BY_TOKEN;
    if (!by_token) fold_scales<BITS, G>(f, block, slot, d, q);
    const float* query = by_token ? q.q : q.folded;
    const int groups = groups_of(f, d), width = d / groups;
    for (int w = 0; w < STEP; w += LANES) {
        Floats score[G] = {};
        for (int r = 0; r < groups; r++) {
            Floats sum[G][P] = {};
            for (int j = r * width; j < (r + 1) * width; j += CHANNELS)
                add_codes<BITS, G, P, 0>(centred<BITS>(words(codes + j / CHANNELS * 64 + w * 4)), sum,
                                         [&](int g) { return query + g * d + j; });
            if (by_token) {
                const Floats scale = F16::read(halves_at(block, f.scale) + r * block_tokens + slot + w);
                const Floats least = middle<BITS>(f, scale, halves_at(block, f.min) + r * block_tokens + slot + w);
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) score[g] += total<P>(sum[g]) * scale + least * q.sums[g][r];
            } else {
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) score[g] = total<P>(sum[g]) + q.zero[g];
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) store(S + g * CHUNK + at * STEP + w, score[g]);
    }
}

// For V vectors of channels from j on: sum[v][g] += weights[g] . codes, over one step.
template <int BITS, int G, int V>
QUIRE_INLINE void add_lanes(const quire_field& f, const Chunk& c, int at, int d, int j, const float* weights,
                            Floats (*sum)[G][1]) {
    constexpr int TOKENS = 32 / BITS;
    const uint8_t* p = c.block[at] + f.codes + (int64_t)c.step[at] * 2 * d * BITS + j * 4;
    const float* w = weights + at * STEP;
    for (int t = 0; t < STEP; t += TOKENS, p += d * 4)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
            add_codes<BITS, G, 1, 0>(centred<BITS>(words(p + v * LANES * 4)), sum[v], [&](int g) { return w + g * CHUNK + t; });
}

template <int BITS, int G, int V>
QUIRE_INLINE void add_channels(const quire_field& f, const Chunk& c, int d, int j, const float* weights, const float* zero,
                               float* acc, const Ahead& next) {
    Floats sum[V][G][1];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[v][g][0] = load(acc + g * d + j + v * LANES) + zero[g];
    for (int at = 0; at < c.steps(); at++) {
        if (!j) next.fetch(at);
        add_lanes<BITS, G, V>(f, c, at, d, j, weights, sum);
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(acc + g * d + j + v * LANES, sum[v][g][0]);
}

// Values scaled by channel: a step at a time, its sums times the scales.
template <int BITS, int G>
void add_by_channel(const quire_field& f, const Chunk& c, int at, int d, const float* S, float* acc) {
    const int64_t row = (int64_t)(c.step[at] * STEP / f.group) * d;
    const uint16_t* scale = halves_at(c.block[at], f.scale) + row;
    const uint16_t* least = halves_at(c.block[at], f.min) + row;
    float mass[G];
    for (int g = 0; g < G; g++) {
        mass[g] = 0;
        for (int t = 0; t < STEP; t++) mass[g] += S[g * CHUNK + at * STEP + t];
    }
    for (int j = 0; j < d; j += LANES) {
        Floats sum[1][G][1] = {};
        add_lanes<BITS, G, 1>(f, c, at, d, j, S, sum);
        const Floats s = F16::read(scale + j), m = middle<BITS>(f, s, least + j);
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) store(acc + g * d + j, load(acc + g * d + j) + sum[0][g][0] * s + m * mass[g]);
    }
}

// acc[g] += sum over t of S[g][t] * v[t].
template <int BITS, int G>
void add_tiles(const quire_field& f, const Chunk& c, int d, int block_tokens, const float* S, float* acc, const Ahead& next) {
    constexpr int V = G >= 4 ? 1 : 4 / G;
    if (f.scaled == QUIRE_BY_CHANNEL) {
        for (int at = 0; at < c.steps(); at++) {
            next.fetch(at);
            add_by_channel<BITS, G>(f, c, at, d, S, acc);
        }
        return;
    }
    alignas(64) float weights[G * CHUNK];
    float zero[G];
    const int groups = groups_of(f, d), width = d / groups;
    for (int r = 0; r < groups; r++) {
        Floats sum[G] = {};
        for (int at = 0; at < c.steps(); at++)
            for (int w = 0; w < STEP; w += LANES) {
                Floats scale, least;
                if (f.scaled == QUIRE_BY_TILE) {
                    scale = all(F16::one(halves_at(c.block[at], f.scale)[0]));
                    least = f.min < 0 ? Floats{} : F16::one(halves_at(c.block[at], f.min)[0]) + scale * HALF<BITS>;
                } else {
                    const int64_t slot = (int64_t)r * block_tokens + c.step[at] * STEP + w;
                    scale = F16::read(halves_at(c.block[at], f.scale) + slot);
                    least = middle<BITS>(f, scale, halves_at(c.block[at], f.min) + slot);
                }
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) {
                    const Floats p = load(S + g * CHUNK + at * STEP + w);
                    const Ints read = p != 0.0f;  // of what is not read the scale may be no number
                    store(weights + g * CHUNK + at * STEP + w, (Floats)(read ? p * scale : Floats{}));
                    sum[g] += (Floats)(read ? p * least : Floats{});
                }
            }
        for (int g = 0; g < G; g++) zero[g] = added(sum[g]);
        int j = r * width;
        for (; j + V * LANES <= (r + 1) * width; j += V * LANES)
            add_channels<BITS, G, V>(f, c, d, j, weights, zero, acc, next);
        for (; j < (r + 1) * width; j += LANES) add_channels<BITS, G, 1>(f, c, d, j, weights, zero, acc, next);
    }
}

// The normalised Hadamard rotation over every `width` channels, its own inverse.
inline void turn(float* x, int d, int width) {
    for (int step = 1; step < width; step *= 2)
        for (int i = 0; i < d; i += 2 * step)
            for (int j = i; j < i + step; j++) {
                const float a = x[j], b = x[j + step];
                x[j] = a + b;
                x[j + step] = a - b;
            }
    const float norm = 1.0f / __builtin_sqrtf((float)width);
    for (int j = 0; j < d; j++) x[j] *= norm;
}

}  // namespace quire

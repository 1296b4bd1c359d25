// Fields of packed small integers, sixteen tokens a tile: keys with a lane per token, values with a lane per channel, so that
// nothing is added up across lanes.
//
//   byte b of a 32-bit lane holds codes b, 4 + b, 8 + b, ... from its lowest bits on (ops/pack.py)
//
// Products are of integers, see wholes.hpp: one instruction multiplies two codes of every lane and adds them up.
#pragma once
#include <algorithm>

#include "chunk.hpp"
#include "rotate.hpp"
#include "wholes.hpp"

namespace quire {

typedef uint32_t WordsAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t PairAt __attribute__((aligned(2), may_alias));
QUIRE_INLINE Words words(const uint8_t* p) { return *(const WordsAt*)p; }

// One query per head and what follows from it for a key field, kept while a piece is folded.
struct Query {
    alignas(64) float q[MAX_HEADS * MAX_DIM];
    alignas(64) float folded[MAX_HEADS * MAX_DIM];  // times the scales of `at`
#if defined(QUIRE_MATRIX)
    alignas(64) Bytes2<MAX_DIM> whole;
    alignas(64) uint16_t parts[MAX_HEADS / 4 * MAX_DIM * 16 * 2];  // as matrix.hpp splits them
#else
    alignas(64) Shorts16<MAX_DIM> whole;
#endif
    int32_t wholes[MAX_HEADS][MAX_DIM / 16];  // summed over each group of channels
    float step[MAX_HEADS];
    float sums[MAX_HEADS][MAX_DIM / 16];  // of q over each group of channels
    float zero[MAX_HEADS];                // what `folded` adds for the minima
    const uint8_t* at = nullptr;
};

// ---- products ----------------------------------------------------------------------------------------------------------

// sum + a * b over the two halves of every lane.
QUIRE_INLINE Ints dot(Ints sum, Words a, Ints b) {
#if defined(QUIRE_512) && defined(__AVX512VNNI__)
    return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(QUIRE_512)
    return sum + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(QUIRE_256)
    return sum + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(QUIRE_128)
    return sum + (Ints)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + ((Ints)a << 16 >> 16) * (b << 16 >> 16) + ((Ints)a >> 16) * (b >> 16);
#endif
}

// Codes i and i + 2 of every lane, as halves of it: i = 4 * E + ODD.
template <int BITS, int E, int ODD>
QUIRE_INLINE Words pair(Words x) {
    constexpr int shift = 8 * ODD + BITS * E;
    if constexpr (shift + BITS == 16) {
        typedef uint16_t Halves __attribute__((vector_size(LANES * 4)));
        return (Words)((Halves)x >> shift);
    } else {
        return (x >> shift) & (((1u << BITS) - 1) * 0x00010001u);
    }
}

// sum[n][g] += codes of x[n] . w(g)[...], N vectors that share what they are multiplied with, G rows of it.
template <int BITS, int E, int G, int N, class W>
QUIRE_INLINE void add_codes(const Words* x, Ints (*sum)[G], const W& w) {
    if constexpr (E < 8 / BITS) {
        Words even[N], odd[N];
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) {
            even[n] = pair<BITS, E, 0>(x[n]);
            odd[n] = pair<BITS, E, 1>(x[n]);
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            const PairAt* p = (const PairAt*)(w(g) + 4 * E);
            const Ints a = Ints{} + p[0], b = Ints{} + p[1];
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                sum[n][g] = dot(sum[n][g], even[n], a);
                sum[n][g] = dot(sum[n][g], odd[n], b);
            }
        }
        add_codes<BITS, E + 1, G, N>(x, sum, w);
    }
}

// A query, or one times the scales of its keys' channels, in groups of `width` channels.
template <int G>
QUIRE_INLINE void split_query(const float* x, int d, int width, Query& q) {
    for (int g = 0; g < G; g++) {
        Ints sum = {};
        q.step[g] = as_wholes(x + g * d, d, [&](int j, Ints v) {
            q.whole.put(g, d, j, v);
            sum += v;
            if ((j + LANES) % width == 0) {
                q.wholes[g][j / width] = added(sum);
                sum = Ints{};
            }
        });
    }
}

QUIRE_INLINE int groups_of(const quire_field& f, int d) { return f.scaled == QUIRE_BY_TOKEN ? d / f.group : 1; }

// What a code of half the range stands for. Without minima that is zero: int8 stores q + 128.
template <int BITS>
QUIRE_INLINE Floats middle(const quire_field& f, Floats scale, const uint16_t* least) {
    return f.min < 0 ? Floats{} : F16::read(least) + scale * HALF<BITS>;
}

struct Scales {
    Floats scale, middle;
};

// Of LANES slots from `slot` on, for the r-th group of channels.
template <int BITS>
QUIRE_INLINE Scales scales_at(const quire_field& f, const uint8_t* block, int slot, int r, int block_tokens) {
    if (f.scaled == QUIRE_BY_TILE) {
        const Floats scale = all(F16::one(halves_at(block, f.scale)[0]));
        return {scale, f.min < 0 ? Floats{} : F16::one(halves_at(block, f.min)[0]) + scale * HALF<BITS>};
    }
    const int at = r * block_tokens + slot;
    const Floats scale = F16::read(halves_at(block, f.scale) + at);
    return {scale, middle<BITS>(f, scale, halves_at(block, f.min) + at)};
}

// ---- keys --------------------------------------------------------------------------------------------------------------

template <int G>
void prepare_tiles(const quire_field& f, int d, Query& q) {
    q.at = nullptr;
    const int groups = groups_of(f, d), width = d / groups;
    for (int g = 0; g < G; g++)
        for (int r = 0; r < groups; r++) {
            Floats sum = {};
            for (int j = 0; j < width; j += LANES) sum += load(q.q + g * d + r * width + j);
            q.sums[g][r] = added(sum);
        }
    if (f.scaled != QUIRE_BY_CHANNEL) split_query<G>(q.q, d, width, q);
}

// Whether two steps' channels have the same scales.
QUIRE_INLINE bool shares_scales(const quire_field& f, const Chunk& c, int a, int b) {
    return c.block[a] == c.block[b] && c.step[a] * STEP / f.group == c.step[b] * STEP / f.group;
}

// Keys scaled by channel: the scales go into the query, once for all tokens that share them.
template <int BITS, int G>
void fold_scales(const quire_field& f, const uint8_t* block, int slot, int d, Query& q) {
    const int64_t row = (int64_t)(slot / f.group) * d;
    const uint16_t* scale = halves_at(block, f.scale) + row;
    if (q.at == (const uint8_t*)scale) return;
    q.at = (const uint8_t*)scale;
    const uint16_t* least = halves_at(block, f.min) + row;
    for (int g = 0; g < G; g++) {
        Floats zero = {};
        for (int j = 0; j < d; j += LANES) {
            const Floats x = load(q.q + g * d + j), s = F16::read(scale + j);
            store(q.folded + g * d + j, x * s);
            zero += x * middle<BITS>(f, s, least + j);
        }
        q.zero[g] = added(zero);
    }
    split_query<G>(q.folded, d, d, q);
}

// A score so far, and what the sums over the r-th group of channels add to it.
template <int BITS>
QUIRE_INLINE Floats scored(Ints sum, const Scales& s, bool by_channel, const Query& q, int g, int r, Floats before) {
    const Floats product = __builtin_convertvector(sum - q.wholes[g][r] * (int)HALF<BITS>, Floats) * q.step[g];
    return by_channel ? product + q.zero[g] : before + product * s.scale + s.middle * q.sums[g][r];
}

#if !defined(QUIRE_MATRIX)  // else see matrix.hpp
// Vectors of tokens that share a load of the query.
constexpr int TOGETHER = 2;

// S[g * CHUNK + t] = q[g] . k[t] for TOGETHER vectors of slots from the w-th of step `at` on, up to those of step
// `last`. Fetches two stretches of values meanwhile.
template <int BITS, int G>
QUIRE_INLINE void score_lanes(const quire_field& f, const Chunk& c, int at, int w, int last, int d, int block_tokens,
                              const Query& q, float* S, Stretch v0, Stretch v1) {
    constexpr int VECTORS = STEP / LANES;  // of a step
    const uint8_t *block[TOGETHER], *codes[TOGETHER];
    int slot[TOGETHER];
#pragma GCC unroll 8
    for (int n = 0; n < TOGETHER; n++) {
        const int i = std::min(last, at + (w + n) / VECTORS), lane = (w + n) % VECTORS * LANES;
        block[n] = c.block[i];
        slot[n] = c.step[i] * STEP + lane;
        codes[n] = block[n] + f.codes + (int64_t)c.step[i] * 2 * d * BITS + lane * 4;
    }
    const bool by_channel = f.scaled == QUIRE_BY_CHANNEL;
    const int groups = groups_of(f, d), width = d / groups;
    const int few = v0.over(d * BITS / 32);
    Floats score[TOGETHER][G] = {};
    for (int r = 0; r < groups; r++) {
        Ints sum[TOGETHER][G] = {};
        for (int j = r * width; j < (r + 1) * width; j += 32 / BITS) {
            Words x[TOGETHER];
#pragma GCC unroll 8
            for (int n = 0; n < TOGETHER; n++) x[n] = words(codes[n] + j * 2 * BITS);
            v0.fetch(few);
            v1.fetch(few);
            add_codes<BITS, 0, G, TOGETHER>(x, sum, [&](int g) { return q.whole.row(g, d) + j; });
        }
#pragma GCC unroll 8
        for (int n = 0; n < TOGETHER; n++) {
            Scales s{};
            if (!by_channel) s = scales_at<BITS>(f, block[n], slot[n], r, block_tokens);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) score[n][g] = scored<BITS>(sum[n][g], s, by_channel, q, g, r, score[n][g]);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < TOGETHER && at + (w + n) / VECTORS <= last; n++)
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) store(S + g * CHUNK + at * STEP + (w + n) * LANES, score[n][g]);
}

// S[g * CHUNK + t] = q[g] . k[t] for the slots of steps [at, at + n), n one or two, whose values are fetched meanwhile.
template <int BITS, int G>
void score_tiles(const quire_field& f, const Chunk& c, int at, int n, int d, int block_tokens, Query& q, float* S,
                 const Stretch* values) {
    const int last = at + n - 1;
    if constexpr (STEP / LANES < TOGETHER) {  // a step is one vector, the other is of the next step
        const bool by_channel = f.scaled == QUIRE_BY_CHANNEL;
        if (by_channel) fold_scales<BITS, G>(f, c.block[at], c.step[at] * STEP, d, q);
        score_lanes<BITS, G>(f, c, at, 0, last, d, block_tokens, q, S, values[0], values[1]);
        if (n < 2 || !by_channel) return;
        const uint8_t* before = q.at;
        fold_scales<BITS, G>(f, c.block[last], c.step[last] * STEP, d, q);
        if (q.at != before) score_lanes<BITS, G>(f, c, last, 0, last, d, block_tokens, q, S, {}, {});
    } else {
        for (int i = 0; i < n; i++) {
            if (f.scaled == QUIRE_BY_CHANNEL) fold_scales<BITS, G>(f, c.block[at + i], c.step[at + i] * STEP, d, q);
            for (int w = 0; w < STEP / LANES; w += TOGETHER)
                score_lanes<BITS, G>(f, c, at + i, w, last, d, block_tokens, q, S, w ? Stretch{} : values[i], {});
        }
    }
}

#endif

// ---- values ------------------------------------------------------------------------------------------------------------

// The weights of a chunk's slots as whole numbers.
struct Weights {
    alignas(64) Shorts16<CHUNK> whole;
    float step[MAX_HEADS];
};

// A chunk's weights times the scales of a group of channels, as whole numbers.
template <int G>
struct Scaled {
    float step[G];      // what one stands for
    int32_t wholes[G];  // their sum
    float zero[G];      // what the minima add to the output
};

// Of the r-th group; `put(g, slot, v)` is called with each LANES of them.
template <int BITS, int G, class Put>
QUIRE_INLINE void scale_weights(const quire_field& f, const Chunk& c, int r, int block_tokens, const float* S, Scaled<G>& to,
                                const Put& put) {
    alignas(64) float scales[CHUNK], middles[CHUNK];
    const int slots = c.steps() * STEP;
    for (int t = 0; t < slots; t += LANES) {
        const Scales s = scales_at<BITS>(f, c.block[t / STEP], c.step[t / STEP] * STEP + t % STEP, r, block_tokens);
        const Ints read = load(S + t) != 0.0f;  // of what is not read the scale may be no number
        store(scales + t, (Floats)(read ? s.scale : Floats{}));
        store(middles + t, (Floats)(read ? s.middle : Floats{}));
    }
    for (int g = 0; g < G; g++) {
        const float* row = S + g * CHUNK;
        Floats high = {}, spoilt = {}, zero = {};
        for (int t = 0; t < slots; t += LANES) {
            const Floats p = load(row + t), w = p * load(scales + t);
            high = (Floats)(w > high ? w : high);
            spoilt += w * 0.0f;
            zero += p * load(middles + t);
        }
        const Step step = step_of(high, spoilt);
        Ints sum = {};
        for (int t = 0; t < slots; t += LANES) {
            const Ints v = step.whole(load(row + t) * load(scales + t));
            put(g, t, v);
            sum += v;
        }
        to.step[g] = step.one;
        to.wholes[g] = added(sum);
        to.zero[g] = added(zero);
    }
}

// Sums of weights times codes of steps [from, to) for V vectors of channels from j on.
template <int BITS, int G, int V>
QUIRE_INLINE void add_steps(const quire_field& f, const Chunk& c, int from, int to, int d, int j, const Weights& weights,
                            Ints (*sum)[G], const Ahead& next) {
    constexpr int TOKENS = 32 / BITS, WIDTH = V * LANES;
    const Ahead::Pass pass = next.pass(j / WIDTH, (d + WIDTH - 1) / WIDTH);
    for (int at = from; at < to; at++) {
        pass.fetch(at);
        const uint8_t* p = c.block[at] + f.codes + (int64_t)c.step[at] * 2 * d * BITS + j * 4;
#pragma GCC unroll 4
        for (int t = 0; t < STEP; t += TOKENS, p += d * 4) {
            Words x[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) x[v] = words(p + v * LANES * 4);
            add_codes<BITS, 0, G, V>(x, sum, [&](int g) { return weights.whole.row(g, CHUNK) + at * STEP + t; });
        }
    }
}

// What sums over slots whose scales are in the weights add to LANES channels of a head.
template <int BITS, int G>
QUIRE_INLINE void add_sum(Ints sum, const Scaled<G>& by, int g, float* out) {
    const Ints centred = sum - by.wholes[g] * (int)HALF<BITS>;
    store(out, load(out) + (__builtin_convertvector(centred, Floats) * by.step[g] + by.zero[g]));
}

// Values whose scales are in the weights: the chunk's steps for V vectors of channels from j on.
template <int BITS, int G, int V>
QUIRE_INLINE void add_slots(const quire_field& f, const Chunk& c, int d, int j, const Weights& weights, const Scaled<G>& by,
                            float* acc, const Ahead& next) {
    Ints sum[V][G] = {};
    add_steps<BITS, G, V>(f, c, 0, c.steps(), d, j, weights, sum, next);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
#pragma GCC unroll 8
        for (int g = 0; g < G; g++)
            add_sum<BITS, G>(sum[v][g], by, g, acc + g * d + j + v * LANES);
}

// Values scaled by channel: V vectors of channels from j on of the steps [from, to), which share their scales.
template <int BITS, int G, int V>
QUIRE_INLINE void add_channels(const quire_field& f, const Chunk& c, int from, int to, int d, int j, const Weights& weights,
                               const int32_t* wholes, const float* mass, float* acc, const Ahead& next) {
    const int64_t row = (int64_t)(c.step[from] * STEP / f.group) * d + j;
    Ints sum[V][G] = {};
    add_steps<BITS, G, V>(f, c, from, to, d, j, weights, sum, next);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
        const Floats s = F16::read(halves_at(c.block[from], f.scale) + row + v * LANES);
        const Floats m = middle<BITS>(f, s, halves_at(c.block[from], f.min) + row + v * LANES);
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            float* out = acc + g * d + j + v * LANES;
            const Ints centred = sum[v][g] - wholes[g] * (int)HALF<BITS>;
            store(out, load(out) + (__builtin_convertvector(centred, Floats) * (s * weights.step[g]) + m * mass[g]));
        }
    }
}

// Vectors of channels that share a load of the weights: what fits into the registers.
template <int G>
constexpr int WIDE = LANES == 16 ? (G >= 8 ? 2 : 4) : G >= 8 ? 1 : G >= 4 ? 2 : 4;

template <int BITS, int G>
void add_by_channel(const quire_field& f, const Chunk& c, int d, const float* S, float* acc, const Ahead& next) {
    Weights weights;
    int32_t sums[G][CHUNK / LANES];
    for (int g = 0; g < G; g++)
        weights.step[g] = as_wholes(S + g * CHUNK, c.steps() * STEP, [&](int j, Ints v) {
            weights.whole.put(g, CHUNK, j, v);
            sums[g][j / LANES] = added(v);
        });
    for (int from = 0, to; from < c.steps(); from = to) {
        for (to = from + 1; to < c.steps() && shares_scales(f, c, from, to);) to++;
        float mass[G];
        int32_t wholes[G];
        for (int g = 0; g < G; g++) {
            Floats sum = {};
            wholes[g] = 0;
            for (int t = from * STEP; t < to * STEP; t += LANES) {
                sum += load(S + g * CHUNK + t);
                wholes[g] += sums[g][t / LANES];
            }
            mass[g] = added(sum);
        }
        constexpr int V = WIDE<G>;
        int j = 0;
        for (; j + V * LANES <= d; j += V * LANES)
            add_channels<BITS, G, V>(f, c, from, to, d, j, weights, wholes, mass, acc, next);
        for (; j < d; j += LANES)
            add_channels<BITS, G, 1>(f, c, from, to, d, j, weights, wholes, mass, acc, next);
    }
}

// acc[g] += sum over t of S[g][t] * v[t]. Fetches the next chunk's keys.
template <int BITS, int G>
void add_tiles(const quire_field& f, const Chunk& c, int d, int block_tokens, const float* S, float* acc, const Ahead& next) {
    if (f.scaled == QUIRE_BY_CHANNEL) return add_by_channel<BITS, G>(f, c, d, S, acc, next);
    constexpr int V = WIDE<G>;
    Scaled<G> by;
    Weights weights;
    const int groups = groups_of(f, d), width = d / groups;
    for (int r = 0; r < groups; r++) {
        scale_weights<BITS, G>(f, c, r, block_tokens, S, by, [&](int g, int t, Ints v) { weights.whole.put(g, CHUNK, t, v); });
        int j = r * width;
        for (; j + V * LANES <= (r + 1) * width; j += V * LANES)
            add_slots<BITS, G, V>(f, c, d, j, weights, by, acc, next);
        for (; j < (r + 1) * width; j += LANES)
            add_slots<BITS, G, 1>(f, c, d, j, weights, by, acc, next);
    }
}

}  // namespace quire

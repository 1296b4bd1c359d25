// Sealed blocks encoded: rows of floats into codes, scales and minima, byte for byte as ops/quantise.py and the codecs do.
//
// Equal bytes need equal operations in an order that cannot matter: least and greatest values do not depend on it, the
// butterfly of the rotation has one, and divisions, float16 and codes are rounded once each, to nearest, ties to even.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "chunk.hpp"
#include "rotate.hpp"
#if defined(__SSE4_1__)
#include <smmintrin.h>
#endif

namespace quire {

constexpr int MAX_WIDE = 1024;  // channels of a latent
constexpr float HALF_MAX = 65504.0f;

// Words of at most 255 as bytes. Without AVX-512 GCC takes them out one by one.
QUIRE_INLINE void store_bytes(uint8_t* p, Words x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i w = (__m256i)x;
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(w), _mm256_extracti128_si256(w, 1));
    _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(halves, halves));
#elif defined(__SSE4_1__) && !defined(__AVX512F__)
    const __m128i halves = _mm_packus_epi32((__m128i)x, (__m128i)x);
    const int four = _mm_cvtsi128_si32(_mm_packus_epi16(halves, halves));
    memcpy(p, &four, 4);
#else
    typedef uint8_t Bytes __attribute__((vector_size(LANES)));
    *(BytesAt*)p = __builtin_convertvector(x, Bytes);
#endif
}

template <class T>
QUIRE_INLINE void widen_rows(const uint8_t* p, int n, float* x) {
    for (int j = 0; j < n; j += LANES) store(x + j, T::read((const typename T::Element*)p + j));
}

inline void read_tokens(int dtype, const uint8_t* rows, int first, int n, int d, float* x) {
    const uint8_t* p = rows + (int64_t)first * d * (dtype == QUIRE_F32 ? 4 : 2);
    if (dtype == QUIRE_F32) return widen_rows<F32>(p, n * d, x);
    if (dtype == QUIRE_BF16) return widen_rows<BF16>(p, n * d, x);
    widen_rows<F16>(p, n * d, x);
}

// ---- least and greatest: what is no number stays so --------------------------------------------------------------------

QUIRE_INLINE Floats lesser(Floats a, Floats b) { return (Floats)((b < a) | (b != b) ? b : a); }
QUIRE_INLINE Floats larger(Floats a, Floats b) { return (Floats)((b > a) | (b != b) ? b : a); }
QUIRE_INLINE Floats size_of(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// Over the lanes of a vector.
template <int H = LANES / 2>
QUIRE_INLINE float least_of(Floats v) {
    v = lesser(v, turned<H>(v, std::make_integer_sequence<int, LANES>{}));
    if constexpr (H > 1)
        return least_of<H / 2>(v);
    else
        return v[0];
}
template <int H = LANES / 2>
QUIRE_INLINE float greatest_of(Floats v) {
    v = larger(v, turned<H>(v, std::make_integer_sequence<int, LANES>{}));
    if constexpr (H > 1)
        return greatest_of<H / 2>(v);
    else
        return v[0];
}

QUIRE_INLINE uint16_t to_half(float x) {
    return F16::narrow(x > HALF_MAX ? HALF_MAX : x < -HALF_MAX ? -HALF_MAX : x);
}

// A group's scale and minimum as they are stored, and as the codes are made with them.
struct Fit {
    float scale, least;
    uint16_t scale_bits, least_bits;
};

// Symmetric: `high` is the greatest size. Of zeros with both signs either may be the least: + 0 makes them one.
QUIRE_INLINE Fit fit(bool affine, float low, float high, float levels) {
    Fit f = {};
    if (affine) {
        f.least_bits = to_half(low + 0.0f);
        f.least = F16::one(f.least_bits);
        const float reach = (high + 0.0f) - f.least;
        f.scale_bits = to_half((reach < 0.0f ? 0.0f : reach) / levels);
    } else {
        f.scale_bits = to_half(high / levels);
    }
    f.scale = F16::one(f.scale_bits);
    return f;
}

// ---- codes -----------------------------------------------------------------------------------------------------------

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number, in its lowest bits

// Affine: 0 to `top`; else -top to top, stored from 128 - top on. Where the scale is 0, or no number, the code is 0.
template <bool AFFINE>
QUIRE_INLINE Words code_of(Floats x, Floats scale, Floats least, float top) {
    Floats v = AFFINE ? (x - least) / scale : x / scale;
    v = (Floats)(scale > 0.0f ? v : Floats{});
    const Floats low = all(AFFINE ? 0.0f : -top), high = all(top);
    v = (Floats)(v < low ? low : v);
    v = (Floats)(v > high ? high : v);
    return (Words)(v + (AFFINE ? MAGIC : MAGIC + 128.0f)) & 255u;
}

// The nearest 8-bit float of what lies in its range.
template <int MANTISSA, int BIAS>
QUIRE_INLINE Words small_float(Floats x) {
    constexpr int CUT = 23 - MANTISSA;
    const Words u = (Words)x & 0x7fffffffu, sign = ((Words)x >> 24) & 0x80u;
    constexpr uint32_t NORMAL = (uint32_t)(128 - BIAS) << 23, SHIFT = (uint32_t)(127 - BIAS + CUT + 1) << 23;
    const Words normal = (u - ((uint32_t)(127 - BIAS) << 23) + ((1u << (CUT - 1)) - 1) + ((u >> CUT) & 1u)) >> CUT;
    const Words tiny = (Words)((Floats)u + as_float(SHIFT)) - SHIFT;
    const Words code = (Words)(u >= NORMAL ? normal : tiny);
    return sign | (Words)(u > 0x7f800000u ? Words{} + 0x7fu : code);
}

// Codes of sixteen tokens, [16][d] bytes, into one packed tile (ops/pack.py).
template <int BITS>
void pack_step(const uint8_t* codes, bool values, int d, uint8_t* tile) {
    constexpr int P = 8 / BITS, SIDE = 4 * P;
    if (values) {
        for (int t = 0; t < STEP; t += SIDE)
            for (int j = 0; j < d; j += LANES, tile += 4 * LANES) {
                Words lane = {};
#pragma GCC unroll 16
                for (int i = 0; i < SIDE; i++) lane |= widened(codes + (t + i) * d + j) << (i % 4 * 8 + i / 4 * BITS);
                memcpy(tile, &lane, sizeof lane);
            }
        return;
    }
    for (int j = 0; j < d; j += SIDE, tile += 4 * STEP) {
        uint32_t lanes[STEP];
#pragma GCC unroll 16
        for (int t = 0; t < STEP; t++) {
            uint32_t lane = 0;
#pragma GCC unroll 4
            for (int e = 0; e < P; e++) {
                uint32_t four;
                memcpy(&four, codes + t * d + j + 4 * e, 4);
                lane |= four << (BITS * e);
            }
            lanes[t] = lane;
        }
        memcpy(tile, lanes, sizeof lanes);
    }
}

inline void pack_step(int kind, const uint8_t* codes, bool values, int d, uint8_t* tile) {
    if (kind == QUIRE_TILES_8) return pack_step<8>(codes, values, d, tile);
    if (kind == QUIRE_TILES_4) return pack_step<4>(codes, values, d, tile);
    pack_step<2>(codes, values, d, tile);
}

// ---- one tile --------------------------------------------------------------------------------------------------------

// Memory that a thread encodes in.
struct Bench {
    alignas(64) float x[STEP * MAX_WIDE];
    alignas(64) float low[MAX_WIDE], high[MAX_WIDE];  // of each channel; then its minimum and scale
    alignas(64) uint8_t codes[STEP * MAX_WIDE];
};

struct Tile {
    const quire_encode_args& a;
    const uint8_t* rows;  // of the source
    uint8_t* out;         // the target's tile
    Bench& m;
    int bits() const { return bits_of(a.field.kind); }
    bool affine() const { return a.field.min >= 0; }
    float levels() const { return affine() ? (float)((1 << bits()) - 1) : 127.0f; }
    uint16_t* scales() const { return (uint16_t*)(out + a.field.scale); }
    uint16_t* minima() const { return (uint16_t*)(out + a.field.min); }
    // Tokens [first, first + n) as floats in the codec's basis.
    QUIRE_INLINE void read(int first, int n) const {
        read_tokens(a.dtype, rows, first, n, a.d, m.x);
        if (a.field.turned) turn_rows(m.x, n * a.d, a.field.turned);
    }
    QUIRE_INLINE void pack(int first) const {
        pack_step(a.field.kind, m.codes, a.values, a.d, out + a.field.codes + (int64_t)first * a.d * bits() / 8);
    }
};

template <bool AFFINE>
QUIRE_INLINE Fit fit_run(const float* x, int n, float levels) {
    Floats low = AFFINE ? load(x) : Floats{}, high = AFFINE ? load(x) : size_of(load(x));
    for (int j = LANES; j < n; j += LANES) {
        const Floats v = load(x + j);
        if (AFFINE) low = lesser(low, v);
        high = larger(high, AFFINE ? v : size_of(v));
    }
    return fit(AFFINE, AFFINE ? least_of(low) : 0.0f, greatest_of(high), levels);
}

// A scale (and a minimum) for every `group` channels of a token.
template <bool AFFINE>
void encode_by_token(const Tile& t) {
    const int d = t.a.d, group = t.a.field.group;
    const float levels = t.levels();
    for (int first = 0; first < t.a.block_tokens; first += STEP) {
        t.read(first, STEP);
        for (int i = 0; i < STEP; i++)
            for (int r = 0; r < d / group; r++) {
                const float* x = t.m.x + i * d + r * group;
                const Fit f = fit_run<AFFINE>(x, group, levels);
                const int64_t at = (int64_t)r * t.a.block_tokens + first + i;
                t.scales()[at] = f.scale_bits;
                if (AFFINE) t.minima()[at] = f.least_bits;
                const Floats s = all(f.scale), least = all(f.least);
                for (int j = 0; j < group; j += LANES)
                    store_bytes(t.m.codes + i * d + r * group + j, code_of<AFFINE>(load(x + j), s, least, levels));
            }
        t.pack(first);
    }
}

// Least and greatest value of every channel over tokens [from, to).
template <bool AFFINE>
void fit_channels(const Tile& t, int from, int to) {
    const int d = t.a.d;
    for (int first = from; first < to; first += STEP) {
        t.read(first, STEP);
        for (int j = 0; j < d; j += LANES) {
            const float* x = t.m.x + j;
            Floats low = load(first == from ? x : t.m.low + j), high = load(t.m.high + j);
            if (first == from) high = AFFINE ? low : Floats{};
            for (int i = 0; i < STEP; i++) {
                const Floats v = load(x + i * d);
                if (AFFINE) low = lesser(low, v);
                high = larger(high, AFFINE ? v : size_of(v));
            }
            store(t.m.low + j, low);
            store(t.m.high + j, high);
        }
    }
}

// Codes of tokens [from, to), with the channels' minima and scales in `low` and `high`.
template <bool AFFINE>
void code_channels(const Tile& t, int from, int to) {
    const int d = t.a.d;
    const float levels = t.levels();
    for (int first = from; first < to; first += STEP) {
        if (to - from > STEP) t.read(first, STEP);
        for (int i = 0; i < STEP; i++)
            for (int j = 0; j < d; j += LANES)
                store_bytes(t.m.codes + i * d + j,
                            code_of<AFFINE>(load(t.m.x + i * d + j), load(t.m.high + j), load(t.m.low + j), levels));
        t.pack(first);
    }
}

// A scale (and a minimum) for every channel of `group` tokens.
template <bool AFFINE>
void encode_by_channel(const Tile& t) {
    const int d = t.a.d, group = t.a.field.group;
    for (int first = 0; first < t.a.block_tokens; first += group) {
        fit_channels<AFFINE>(t, first, first + group);
        const int64_t at = (int64_t)(first / group) * d;
        for (int j = 0; j < d; j++) {
            const Fit f = fit(AFFINE, t.m.low[j], t.m.high[j], t.levels());
            t.scales()[at + j] = f.scale_bits;
            if (AFFINE) t.minima()[at + j] = f.least_bits;
            t.m.low[j] = f.least;
            t.m.high[j] = f.scale;
        }
        code_channels<AFFINE>(t, first, first + group);
    }
}

// One scale (and minimum) for the whole tile.
template <bool AFFINE>
void encode_by_tile(const Tile& t) {
    const int d = t.a.d;
    fit_channels<AFFINE>(t, 0, t.a.block_tokens);
    Floats low = load(t.m.low), high = load(t.m.high);
    for (int j = LANES; j < d; j += LANES) {
        low = lesser(low, load(t.m.low + j));
        high = larger(high, load(t.m.high + j));
    }
    const Fit f = fit(AFFINE, least_of(low), greatest_of(high), t.levels());
    t.scales()[0] = f.scale_bits;
    if (AFFINE) t.minima()[0] = f.least_bits;
    std::fill(t.m.low, t.m.low + d, f.least);
    std::fill(t.m.high, t.m.high + d, f.scale);
    code_channels<AFFINE>(t, 0, t.a.block_tokens);
}

// Rows of 8-bit floats, each token divided by its own scale where there are scales.
template <int MANTISSA, int BIAS>
void encode_small_floats(const Tile& t, float top) {
    const int d = t.a.d;
    for (int i = 0; i < t.a.block_tokens; i++) {
        t.read(i, 1);
        Fit f = {};
        const bool scaled = t.a.field.scaled == QUIRE_BY_TOKEN;
        if (scaled) {
            f = fit_run<false>(t.m.x, d, top);
            t.scales()[i] = f.scale_bits;
        }
        for (int j = 0; j < d; j += LANES) {
            Floats v = load(t.m.x + j);
            if (scaled) v = (Floats)(all(f.scale) > 0.0f ? v / f.scale : Floats{});
            v = (Floats)(v < -top ? all(-top) : v);
            v = (Floats)(v > top ? all(top) : v);
            store_bytes(t.out + t.a.field.codes + (int64_t)i * d + j, small_float<MANTISSA, BIAS>(v));
        }
    }
}

// Rows of plain floats: the other field of the block has a codec that rounds.
template <class T>
void encode_rows(const Tile& t) {
    typename T::Element* out = (typename T::Element*)(t.out + t.a.field.codes);
    for (int i = 0; i < t.a.block_tokens; i++) {
        t.read(i, 1);
        for (int j = 0; j < t.a.d; j++) out[(int64_t)i * t.a.d + j] = T::narrow(t.m.x[j]);
    }
}

template <bool AFFINE>
void encode_tiles(const Tile& t) {
    switch (t.a.field.scaled) {
        case QUIRE_BY_TOKEN: return encode_by_token<AFFINE>(t);
        case QUIRE_BY_CHANNEL: return encode_by_channel<AFFINE>(t);
        default: return encode_by_tile<AFFINE>(t);
    }
}

inline void encode_tile(const Tile& t) {
    switch (t.a.field.kind) {
        case QUIRE_ROWS_F32: return encode_rows<F32>(t);
        case QUIRE_ROWS_BF16: return encode_rows<BF16>(t);
        case QUIRE_ROWS_F16: return encode_rows<F16>(t);
        case QUIRE_ROWS_E4M3: return encode_small_floats<3, 7>(t, 448.0f);
        case QUIRE_ROWS_E5M2: return encode_small_floats<2, 15>(t, 57344.0f);
        default: return t.affine() ? encode_tiles<true>(t) : encode_tiles<false>(t);
    }
}

inline int encode(const quire_encode_args& a) {
    const int64_t n = (int64_t)a.n_blocks * a.n_heads;
    const bool alone = a.threads < 2 || n * a.block_tokens * a.d < 200000;
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
    {
        thread_local std::vector<Bench> bench(1);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; i++) {  // a block's heads side by side
            const int64_t b = i / a.n_heads, h = i % a.n_heads;
            encode_tile(Tile{a, a.arena + a.source[b] * 64 + a.source_first + h * a.source_tile,
                             a.arena + a.target[b] * 64 + a.target_first + h * a.target_tile, bench[0]});
        }
    }
    return 0;
}

}  // namespace quire

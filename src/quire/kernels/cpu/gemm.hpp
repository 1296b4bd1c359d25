// Linear layers in bfloat16 over weights that lie as a product reads them: out = x * weight^T + bias.
//
//   weight [n / panel][k / 2][panel][2]: a word holds two inputs' weights of one output, in bfloat16, or in int8 with a
//          scale per output; zeros at the edges
//   x      [tile][k / 2][row of the tile][2], float32, or bfloat16 where the processor multiplies that; made here
//
// A unit of work is 64 outputs of one layer by up to BLOCK_ROWS rows. Its sums stay in registers for one tile of rows, and pass
// through memory between stretches of k where there are several tiles, so that a stretch is fetched once. Every output
// adds its products in the order of k whatever rows stand beside it: a row's result does not depend on them.
#pragma once
#include <algorithm>
#include <vector>

#include "quire_cpu.h"
#include "unit.hpp"

namespace quire {

constexpr int UNIT = 64;          // outputs
constexpr int VECTORS = UNIT / LANES;
constexpr int STRETCH = 32;       // words of k, where there are several tiles
constexpr int BLOCK_ROWS = 96;    // of x at a time
constexpr int TILE_ROWS = LANES == 4 ? 3 : 6;
constexpr int AHEAD = 32;         // words of k that one tile alone asks for early; several share out the next stretch

// A word of weights is multiplied in as many parts as the processor needs; `Pair` holds what a row has for it.
#if defined(__AVX512BF16__)
constexpr int PARTS = 1;
struct Pair {
    uint32_t part[PARTS];
};
QUIRE_INLINE Pair pair_of(uint16_t a, uint16_t b) { return Pair{{(uint32_t)b << 16 | a}}; }
QUIRE_INLINE Floats added_to(Floats sum, Words w, uint32_t x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)(Words{} + x));
}
#else
constexpr int PARTS = 2;
struct Pair {
    float part[PARTS];
};
QUIRE_INLINE Pair pair_of(uint16_t a, uint16_t b) { return Pair{{BF16::one(a), BF16::one(b)}}; }
QUIRE_INLINE Floats added_to(Floats sum, Words w, float x) { return (Floats)w * x + sum; }
#endif

// Weights as they are stored: the words of LANES outputs at p, in the form that `added_to` takes.
struct Half {
    static constexpr int BYTES = 4;
    typedef uint32_t At __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
    template <int PART>
    static QUIRE_INLINE Words part(const uint8_t* p) {
        const Words w = *(const At*)p;
        return PARTS == 1 ? w : PART ? w & 0xffff0000u : w << 16;
    }
};

struct Int8 {
    static constexpr int BYTES = 2;
    typedef uint16_t At __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
    static QUIRE_INLINE Words wide(const uint8_t* p) {
#if defined(__AVX512F__)
        return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
        return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
        return __builtin_convertvector(*(const At*)p, Words);
#endif
    }
    template <int PART>
    static QUIRE_INLINE Words number(Words w) {
        return (Words)__builtin_convertvector((Ints)(w << (PART ? 16 : 24)) >> 24, Floats);
    }
    template <int PART>
    static QUIRE_INLINE Words part(const uint8_t* p) {
#if defined(__AVX512BF16__)  // up to 8 bits: exact in bfloat16
        const auto floats = [](const uint8_t* q) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q)));
        };
        return (Words)_mm512_cvtne2ps_pbh(floats(p + 16), floats(p));
#else
        return number<PART>(wide(p));
#endif
    }
};

template <class W, int PART, int R, int C>
QUIRE_INLINE void add_part(const uint8_t* const* w, int64_t at, const Pair* x, Floats (&sum)[R][C]) {
    Words part[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) part[c] = W::template part<PART>(w[c] + at);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sum[r][c] = added_to(sum[r][c], part[c], x[r].part[PART]);
}

// Tile `turn` of `of` that go over the same words, the one after the other. If the first asked for all that comes next,
// memory would idle while the others run: each asks for its share, as evenly as it multiplies.
struct Turn {
    int turn, of;
};

// R rows by C vectors of outputs over `n` words of k; `sums` has UNIT floats a row.
template <class W, int R, int C>
QUIRE_INLINE void tile(const uint8_t* const* weight, int64_t stride, const Pair* x, int n, float* sums, bool first,
                       Turn now) {
    constexpr int APART = 16 / LANES, LINES = C / APART;  // of cache, in a word of k
    const uint8_t* w[C];
    Floats sum[R][C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) w[c] = weight[c];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sum[r][c] = first ? Floats{} : load(sums + r * UNIT + c * LANES);
    int line = (now.turn * n * LINES + now.of - 1) / now.of;
    for (int i = 0; i < n; i++) {
        if (now.of == 1) {
#pragma GCC unroll 16
            for (int c = 0; c < C; c += APART) fetch_once(w[c] + (i + AHEAD) * stride);
        } else {
            for (; line * now.of < (now.turn * n + i + 1) * LINES; line++)
                fetch_once(w[line % LINES * APART] + (line / LINES + STRETCH) * stride);
        }
        add_part<W, 0>(w, i * stride, x + i * R, sum);
        if constexpr (PARTS > 1) add_part<W, PARTS - 1>(w, i * stride, x + i * R, sum);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) store(sums + r * UNIT + c * LANES, sum[r][c]);
}

// As many vectors at once as there are registers for: enough sums side by side to hide the time of an addition.
constexpr int vectors_at_once(int rows) {
    if (LANES == 16) return 4;
    if (LANES == 8) return rows == 1 ? 8 : rows <= 3 ? 4 : 2;
    return rows == 1 ? 8 : 4;
}

template <class W, int R>
void unit_of(const uint8_t* const* weight, int64_t stride, const Pair* x, int n, float* sums, bool first, Turn now) {
    constexpr int C = vectors_at_once(R);
    for (int c = 0; c < VECTORS; c += C) tile<W, R, C>(weight + c, stride, x, n, sums + c * LANES, first, now);
}

typedef void (*Unit)(const uint8_t* const*, int64_t, const Pair*, int, float*, bool, Turn);
template <class W>
Unit unit_for(int rows) {
    switch (rows) {
        case 1: return unit_of<W, 1>;
        case 2: return unit_of<W, 2>;
        case 3: return unit_of<W, 3>;
#if QUIRE_LANES > 4
        case 4: return unit_of<W, 4>;
        case 5: return unit_of<W, 5>;
        case 6: return unit_of<W, 6>;
#endif
    }
    return nullptr;
}

// The rows in tiles of nearly the same height.
struct Tiles {
    int rows, n;
    explicit Tiles(int rows) : rows(rows), n((rows + TILE_ROWS - 1) / TILE_ROWS) {}
    int begin(int t) const { return (int)((int64_t)rows * t / n); }
};

inline void arrange(const quire_linear_args& a, const Tiles& tiles, int t, Pair* out) {
    const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin, words = a.k_words;
    for (int r = 0; r < rows; r++) {
        const uint16_t* x = a.x + (begin + r) * a.x_row;
        Pair* to = out + (int64_t)begin * words + r;
        for (int i = 0; i < a.k / 2; i++) to[i * rows] = pair_of(x[2 * i], x[2 * i + 1]);
        if (a.k % 2) to[a.k / 2 * rows] = pair_of(x[a.k - 1], 0);
        for (int i = (a.k + 1) / 2; i < words; i++) to[i * rows] = pair_of(0, 0);
    }
}

// One of the units of all layers.
struct Place {
    const quire_linear_layer& layer;
    int unit;
    int width() const { return std::min(UNIT, layer.n - unit * UNIT); }
};

inline int units_of(const quire_linear_layer& l) { return (l.n + UNIT - 1) / UNIT; }

inline int units_of(const quire_linear_args& a) {
    int n = 0;
    for (int i = 0; i < a.n_layers; i++) n += units_of(a.layers[i]);
    return n;
}

inline Place place_of(const quire_linear_args& a, int unit) {
    const quire_linear_layer* l = a.layers;
    for (; unit >= units_of(*l); l++) unit -= units_of(*l);
    return {*l, unit};
}

// Waking the other threads takes as long as reading some ten thousand weights.
inline bool one_thread(const quire_linear_args& a) {
    int64_t n = 0;
    for (int i = 0; i < a.n_layers; i++) n += a.layers[i].n;
    return a.threads < 2 || a.rows * n * a.k < 65536;
}

// What is left to do with the sums of a row's UNIT outputs.
inline void finish(const Place& at, int row, float* sum) {
    const quire_linear_layer& l = at.layer;
    const int first = at.unit * UNIT, width = at.width();
    uint16_t* out = l.out + row * l.out_row + first;
    if (l.scales)
        for (int j = 0; j < width; j++) sum[j] *= l.scales[first + j];
    if (l.bias)
        for (int j = 0; j < width; j++) sum[j] += BF16::one(l.bias[first + j]);
    for (int j = 0; j < width; j++) out[j] = BF16::narrow(sum[j]);
}

// Rows [begin, end) in `tiles` of all rows, the outputs of one unit.
template <class W>
void multiply(const Place& place, int words, const Tiles& tiles, int begin, int end, const Pair* x) {
    const quire_linear_layer& l = place.layer;
    alignas(64) float sums[BLOCK_ROWS * UNIT];
    const uint8_t* weight[VECTORS];
    const int top = tiles.begin(begin);
    for (int c = 0; c < VECTORS; c++) {  // beyond the last output: the last one again, for nobody
        const int at = place.unit * UNIT + std::min(c * LANES, (place.width() - 1) / LANES * LANES);
        weight[c] = l.weight + ((int64_t)(at / l.panel) * words * l.panel + at % l.panel) * W::BYTES;
    }
    const int64_t stride = l.panel * W::BYTES;
    const int stretch = end - begin > 1 ? STRETCH : words;
    for (int i = 0; i < words; i += stretch) {
        const uint8_t* here[VECTORS];
        for (int c = 0; c < VECTORS; c++) here[c] = weight[c] + i * stride;
        for (int t = begin; t < end; t++) {
            const int row = tiles.begin(t), rows = tiles.begin(t + 1) - row;
            unit_for<W>(rows)(here, stride, x + (int64_t)row * words + (int64_t)i * rows, std::min(stretch, words - i),
                           sums + (row - top) * UNIT, i == 0, Turn{t - begin, end - begin});
        }
    }
    for (int row = top; row < tiles.begin(end); row++) finish(place, row, sums + (row - top) * UNIT);
}

#if defined(QUIRE_MATRIX)
typedef uint32_t WeightAt __attribute__((vector_size(64), aligned(64), may_alias));

// In the matrix unit: up to 16 rows by 64 outputs at once, or up to 32 rows by twice 32, so that a weight is loaded once for
// both. Weights of 8 bits are widened into a buffer first. Every output adds in the order of k.
struct MatrixLinear {
    static constexpr int ROWS = 16, DEPTH = 16;  // of a tile: rows of x, words of k
    const quire_linear_args& a;
    const int steps = (a.k_words + DEPTH - 1) / DEPTH;
    const int64_t x_row = (int64_t)steps * DEPTH * 2;

    // Tiles [SUMS] of sums are [TALL row tiles][SUMS / TALL vectors of outputs]; what is multiplied lies behind them.
    template <int TALL>
    Shape shape(int rows) const {
        Shape made(ROWS, LANES, DEPTH);
        for (int t = 0; t < TALL; t++) {
            const int n = std::min(ROWS, rows - t * ROWS);
            for (int c = 0; c < SUMS / TALL; c++) made.set(t * (SUMS / TALL) + c, n, 4 * LANES);
            made.set(LEFT + t, n, 4 * DEPTH);
        }
        return made;
    }

    // Some rows of x by n vectors of outputs, whose weights begin at `weight`, to `sums` of UNIT a row.
    template <class W, int TALL>
    void run(MatrixUnit& unit, const Shape& shape, const uint16_t* x, const uint8_t* const* weight, int64_t stride, int n,
             float* sums) const {
        constexpr int WIDE = SUMS / TALL, R0 = LEFT + TALL;
        alignas(64) uint8_t room[2][WIDE][DEPTH * 64];
        const uint8_t* right[2][WIDE];
        int64_t apart[2];
        const auto prepare = [&](int step) {  // what is written is read one step later, when it has left the store buffer
            const int words = std::min(DEPTH, a.k_words - step * DEPTH), at = step % 2;
            const bool copied = words < DEPTH || W::BYTES < Half::BYTES;  // beyond the weight may be no memory
            apart[at] = copied ? 64 : stride;
            for (int c = 0; c < n; c++) {
                const uint8_t* from = weight[c] + step * DEPTH * stride;
                right[at][c] = copied ? room[at][c] : from;
                for (int w = 0; w < words; w++) {
                    fetch(from + (w + 2 * DEPTH) * stride);
                    if (copied) *(WeightAt*)(room[at][c] + w * 64) = W::template part<0>(from + w * stride);
                }
                if (words < DEPTH) memset(room[at][c] + words * 64, 0, (DEPTH - words) * 64);
            }
        };
        unit.now = nullptr;
        unit.shape(shape);  // sums are zero
        prepare(0);
        for (int step = 0; step < steps; step++) {
            const int at = step % 2;
            if (step + 1 < steps) prepare(step + 1);
            tile_load<LEFT>(x + step * DEPTH * 2, x_row * 2);
            if constexpr (TALL == 2) tile_load<LEFT + 1>(x + ROWS * x_row + step * DEPTH * 2, x_row * 2);
            for_sums(n, [&](auto c) {
                constexpr int R = R0 + c % (8 - R0);
                tile_load<R>(right[at][c], apart[at]);
                tile_halves<c % WIDE, LEFT, R>();
                if constexpr (TALL == 2) tile_halves<WIDE + c % WIDE, LEFT + 1, R>();
            });
        }
        for_sums(n, [&](auto c) {
            tile_store<c % WIDE>(sums + c * LANES, UNIT * 4);
            if constexpr (TALL == 2) tile_store<WIDE + c % WIDE>(sums + ROWS * UNIT + c * LANES, UNIT * 4);
        });
    }

    template <class W, int TALL>
    void unit_of(MatrixUnit& unit, const uint16_t* x, int row, int rows, const Place& place) const {
        const quire_linear_layer& l = place.layer;
        constexpr int WIDE = SUMS / TALL;
        alignas(64) float sums[TALL * ROWS * UNIT];
        const Shape made = shape<TALL>(rows);
        const int vectors = (place.width() + LANES - 1) / LANES;
        for (int first = 0; first < vectors; first += WIDE) {
            const int n = std::min(WIDE, vectors - first);
            const uint8_t* weight[WIDE];
            for (int c = 0; c < n; c++) {
                const int out = place.unit * UNIT + (first + c) * LANES;
                weight[c] = l.weight + ((int64_t)(out / l.panel) * a.k_words * l.panel + out % l.panel) * W::BYTES;
            }
            run<W, TALL>(unit, made, x + row * x_row, weight, (int64_t)l.panel * W::BYTES, n, sums + first * LANES);
        }
        for (int r = 0; r < rows; r++) finish(place, row + r, sums + r * UNIT);
    }

    template <class W>
    void block(MatrixUnit& unit, const uint16_t* x, int row, int rows, const Place& place) const {
        if (rows > ROWS)
            unit_of<W, 2>(unit, x, row, rows, place);
        else
            unit_of<W, 1>(unit, x, row, rows, place);
    }

    int all() const {
        thread_local std::vector<uint16_t> room;
        const int tall = a.rows > ROWS ? 2 * ROWS : ROWS;
        const int units = units_of(a), blocks = (a.rows + tall - 1) / tall;
        if ((int64_t)room.size() < a.rows * x_row) room.resize(a.rows * x_row);
        uint16_t* x = room.data();
        const bool alone = one_thread(a);
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
        {
            MatrixUnit unit;
#pragma omp for schedule(static)
            for (int r = 0; r < a.rows; r++) {
                memcpy(x + r * x_row, a.x + r * a.x_row, a.k * sizeof(uint16_t));
                std::fill(x + r * x_row + a.k, x + (r + 1) * x_row, (uint16_t)0);
            }
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < units * blocks; i++) {  // a unit's blocks side by side: its weights stay in the cache
                const int row = i % blocks * tall, rows = std::min(tall, a.rows - row);
                const Place place = place_of(a, i / blocks);
                if (place.layer.scales)
                    block<Int8>(unit, x, row, rows, place);
                else
                    block<Half>(unit, x, row, rows, place);
            }
        }
        return 0;
    }
};
#endif

inline int linear(const quire_linear_args& a) {
#if defined(QUIRE_MATRIX)
    return MatrixLinear{a}.all();
#else
    thread_local std::vector<Pair> room;
    const Tiles tiles(a.rows);
    if ((int64_t)room.size() < (int64_t)a.rows * a.k_words) room.resize((int64_t)a.rows * a.k_words);
    Pair* x = room.data();
    const int per_block = BLOCK_ROWS / TILE_ROWS, blocks = (tiles.n + per_block - 1) / per_block;
    const int units = units_of(a);
    const bool alone = one_thread(a);
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
    {
#pragma omp for schedule(static)
        for (int t = 0; t < tiles.n; t++) arrange(a, tiles, t, x);
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < units * blocks; i++) {  // a unit's blocks side by side: its weights stay in the cache
            const int begin = i % blocks * per_block;
            const int end = std::min(begin + per_block, tiles.n);
            const Place place = place_of(a, i / blocks);
            (place.layer.scales ? multiply<Int8> : multiply<Half>)(place, a.k_words, tiles, begin, end, x);
        }
    }
    return 0;
#endif
}

}  // namespace quire

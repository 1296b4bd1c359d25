// Linear layers in bfloat16 over weights that lie as a product reads them: out = x * weight^T + bias.
//
//   weight in panels of outputs, words of two inputs; zeros at the edges: see weights.hpp
//   x      [tile][k / 2][row of the tile][2], float32, or bfloat16 where the processor multiplies that; made here
//
// A unit of work is 64 outputs of one layer by up to BLOCK_ROWS rows. Its sums stay in registers for one tile of rows, and pass
// through memory between stretches of k where there are several tiles, so that a stretch is fetched once. Every output
// adds its products in the order of k whatever rows stand beside it: a row's result does not depend on them.
#pragma once
#include <algorithm>
#include <vector>

#include "quire_cpu.h"
#include "shares.hpp"
#include "unit.hpp"
#include "weights.hpp"

namespace quire {

constexpr int UNIT = 64;          // outputs
constexpr int VECTORS = UNIT / LANES;
constexpr int STRETCH = 32;       // words of k, where there are several tiles
constexpr int BLOCK_ROWS = 96;    // of x at a time
constexpr int TILE_ROWS = LANES == 4 ? 3 : 6;
constexpr int AHEAD = 2048;       // bytes of a panel that one tile alone asks for early; several share out the next stretch

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

// What a unit reads: for each vector of outputs its weights and, where groups of inputs have them, its scales.
struct Panels {
    const uint8_t* weight[VECTORS];
    const uint16_t* scales[VECTORS];
    int64_t stride;  // bytes from a line of weights to the next
    int lines;       // until their end
    int64_t skip;    // bytes from there to what is read next
    int64_t scales_skip;
    // Where a line, or a group's scales, will be, be it behind the end.
    QUIRE_INLINE int64_t ahead(int64_t line) const { return line * stride + (line < lines ? 0 : skip); }
    QUIRE_INLINE int64_t scales_ahead(int64_t group, int in_group) const {
        return group * 16 + (group * in_group < lines ? 0 : scales_skip);
    }
};

// R rows by C vectors of outputs, from vector c0, over `n` words of k; `sums` has UNIT floats a row.
template <class W, int R, int C>
QUIRE_INLINE void tile(const Panels& from, int c0, const Pair* x, int n, float* sums, bool first, Turn now) {
    constexpr int APART = 16 / LANES, LINES = C / APART;  // of cache, in a word of k
    constexpr int EARLY = AHEAD / (16 * W::BYTES);
    const int64_t stride = from.stride;
    const uint8_t* w[C];
    Floats sum[R][C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) w[c] = from.weight[c0 + c];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sum[r][c] = first ? Floats{} : load(sums + r * UNIT + c * LANES);
    int line = (now.turn * n * LINES + now.of - 1) / now.of;
    for (int i = 0; i < n; i++) {
        if (now.of == 1) {
#pragma GCC unroll 16
            for (int c = 0; c < C; c += APART) fetch_once(w[c] + from.ahead(i + EARLY));
        } else {
            for (; line * now.of < (now.turn * n + i + 1) * LINES; line++)
                fetch_once(w[line % LINES * APART] + from.ahead(line / LINES + STRETCH));
        }
        add_part<W, 0>(w, i * stride, x + i * R, sum);
        if constexpr (PARTS > 1) add_part<W, PARTS - 1>(w, i * stride, x + i * R, sum);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) store(sums + r * UNIT + c * LANES, sum[r][c]);
}

template <class W, int WORD, int PART, int R, int C>
QUIRE_INLINE void add_word(const uint8_t* const* w, int64_t at, const Pair* x, Floats (&sum)[R][C]) {
    Words part[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) part[c] = W::template part<WORD, PART>(*(const typename W::At*)(w[c] + at));
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int c = 0; c < C; c++) sum[r][c] = added_to(sum[r][c], part[c], x[r].part[PART]);
}

template <class W, int R, int C, int WORD = 0>
QUIRE_INLINE void add_line(const uint8_t* const* w, int64_t at, const Pair* x, Floats (&sum)[R][C]) {
    if constexpr (WORD < W::WORDS) {
        add_word<W, WORD, 0>(w, at, x + WORD * R, sum);
        if constexpr (PARTS > 1) add_word<W, WORD, PARTS - 1>(w, at, x + WORD * R, sum);
        add_line<W, R, C, WORD + 1>(w, at, x, sum);
    }
}

// The same of weights in groups: a group is added up in registers, and its scaled sums in memory. One row has too few sums
// to hide the time of an addition: it adds up two groups at once, and scales them one after the other.
template <class W, int R, int C>
QUIRE_INLINE void tile_of_groups(const Panels& from, int c0, const Pair* x, int n, float* sums, bool first, Turn now) {
    constexpr int APART = 16 / LANES, LINES = C / APART, IN_GROUP = W::GROUP / W::WORDS;
    constexpr int EARLY = AHEAD / (16 * W::BYTES * W::WORDS);
    const uint8_t* w[C];
#pragma GCC unroll 16
    for (int c = 0; c < C; c++) w[c] = from.weight[c0 + c];
    const int lines = n / W::WORDS;
    int line = (now.turn * lines * LINES + now.of - 1) / now.of;
    const auto add = [&](auto many, int i) __attribute__((always_inline)) {  // so many groups from line i
        constexpr int G = decltype(many)::value;
        Floats sum[G][R][C] = {};
#pragma GCC unroll 4
        for (int j = i; j < i + IN_GROUP; j++)
#pragma GCC unroll 2
            for (int g = 0; g < G; g++) {
                const int at = j + g * IN_GROUP;
                if (now.of == 1) {
#pragma GCC unroll 16
                    for (int c = 0; c < C; c += APART) fetch_once(w[c] + from.ahead(at + EARLY));
                } else {
                    for (; line * now.of < (now.turn * lines + at + 1) * LINES; line++)
                        fetch_once(w[line % LINES * APART] + from.ahead(line / LINES + STRETCH / W::WORDS));
                }
                add_line<W, R, C>(w, at * from.stride, x + at * W::WORDS * R, sum[g]);
            }
        for (int g = 0; g < G; g++)
#pragma GCC unroll 16
            for (int c = 0; c < C; c++) {
                const int group = i / IN_GROUP + g;
                const uint16_t* scales = from.scales[c0 + c];
                if (now.of == 1 && c % APART == 0) fetch_once(scales + from.scales_ahead(group + EARLY / IN_GROUP, IN_GROUP));
                const Floats scale = BF16::read(scales + group * 16);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    float* to = sums + r * UNIT + c * LANES;
                    store(to, sum[g][r][c] * scale + (first && i + g == 0 ? Floats{} : load(to)));
                }
            }
    };
    constexpr int AT_ONCE = R == 1 ? 2 : 1;
    int i = 0;
    for (; i + AT_ONCE * IN_GROUP <= lines; i += AT_ONCE * IN_GROUP) add(std::integral_constant<int, AT_ONCE>{}, i);
    if constexpr (AT_ONCE > 1)
        if (i < lines) add(std::integral_constant<int, 1>{}, i);
}

// As many vectors at once as there are registers for: enough sums side by side to hide the time of an addition.
constexpr int vectors_at_once(int rows) {
    if (LANES == 16) return 4;
    if (LANES == 8) return rows == 1 ? 8 : rows <= 3 ? 4 : 2;
    return rows == 1 ? 8 : 4;
}

template <class W, int R>
void unit_of(const Panels& from, const Pair* x, int n, float* sums, bool first, Turn now) {
    constexpr int C = vectors_at_once(R);
    for (int c = 0; c < VECTORS; c += C) {
        if constexpr (W::WORDS > 1)
            tile_of_groups<W, R, C>(from, c, x, n, sums + c * LANES, first, now);
        else
            tile<W, R, C>(from, c, x, n, sums + c * LANES, first, now);
    }
}

typedef void (*Unit)(const Panels&, const Pair*, int, float*, bool, Turn);
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
    if (l.bits == 8)
        for (int j = 0; j < width; j++) sum[j] *= ((const float*)l.scales)[first + j];
    if (l.bias)
        for (int j = 0; j < width; j++) sum[j] += BF16::one(l.bias[first + j]);
    for (int j = 0; j < width; j++) out[j] = BF16::narrow(sum[j]);
}

// Rows [begin, end) in `tiles` of all rows, the outputs of one unit.
template <class W>
void multiply(const Place& place, int words, const Tiles& tiles, int begin, int end, const Pair* x) {
    const quire_linear_layer& l = place.layer;
    alignas(64) float sums[BLOCK_ROWS * UNIT];
    Panels all;
    all.stride = (int64_t)l.panel * W::BYTES * W::WORDS;
    all.lines = words / W::WORDS;
    const auto weight = [&](int out) {  // from where it has its words
        return (int64_t)(out / l.panel) * words * l.panel * W::BYTES + out % l.panel * W::APART;
    };
    const int first = place.unit * UNIT, top = tiles.begin(begin);
    const bool last = first + UNIT >= l.n;
    all.skip = last ? 0 : weight(first + UNIT) - weight(first) - all.lines * all.stride;
    if constexpr (W::WORDS > 1) all.scales_skip = last ? 0 : (int64_t)(UNIT / 16 - 1) * words / W::GROUP * 16;
    for (int c = 0; c < VECTORS; c++) {  // beyond the last output: the last one again, for nobody
        const int out = first + std::min(c * LANES, (place.width() - 1) / LANES * LANES);
        all.weight[c] = l.weight + weight(out);
        if constexpr (W::WORDS > 1) all.scales[c] = (const uint16_t*)l.scales + (int64_t)(out / 16) * words / W::GROUP * 16 + out % 16;
    }
    const int stretch = end - begin > 1 ? STRETCH : words;
    for (int i = 0; i < words; i += stretch) {
        Panels here = all;
        here.lines -= i / W::WORDS;
        for (int c = 0; c < VECTORS; c++) {
            here.weight[c] += i / W::WORDS * all.stride;
            if constexpr (W::WORDS > 1) here.scales[c] += i / W::GROUP * 16;
        }
        for (int t = begin; t < end; t++) {
            const int row = tiles.begin(t), rows = tiles.begin(t + 1) - row;
            unit_for<W>(rows)(here, x + (int64_t)row * words + (int64_t)i * rows, std::min(stretch, words - i),
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
                if (place.layer.bits == 8)
                    block<Int8>(unit, x, row, rows, place);
                else
                    block<Half>(unit, x, row, rows, place);
            }
        }
        return 0;
    }
};
#endif

inline bool any_of_4_bits(const quire_linear_args& a) {
    return std::any_of(a.layers, a.layers + a.n_layers, [](const quire_linear_layer& l) { return l.bits == 4; });
}

inline int linear_in_vectors(const quire_linear_args& a) {
    thread_local std::vector<Pair> room;
    const Tiles tiles(a.rows);
    if ((int64_t)room.size() < (int64_t)a.rows * a.k_words) room.resize((int64_t)a.rows * a.k_words);
    Pair* x = room.data();
    const int per_block = BLOCK_ROWS / TILE_ROWS, blocks = (tiles.n + per_block - 1) / per_block;
    const bool alone = one_thread(a);
    Shares shares(units_of(a) * blocks, alone ? 1 : a.threads);
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
    {
#pragma omp for schedule(static)
        for (int t = 0; t < tiles.n; t++) arrange(a, tiles, t, x);
        shares.run([&](int i) {  // a unit's blocks side by side: its weights stay in the cache
            const int begin = i % blocks * per_block;
            const int end = std::min(begin + per_block, tiles.n);
            const Place place = place_of(a, i / blocks);
            const auto multiplied = place.layer.bits == 4 ? multiply<Int4> : place.layer.bits == 8 ? multiply<Int8> : multiply<Half>;
            multiplied(place, a.k_words, tiles, begin, end, x);
        });
    }
    return 0;
}

inline int linear(const quire_linear_args& a) {
#if defined(QUIRE_MATRIX)
    if (!any_of_4_bits(a)) return MatrixLinear{a}.all();
    // The matrix unit cannot scale its sums by group; layers beside such ones are still its own, to the same bits as alone.
    std::vector<quire_linear_layer> in_unit, in_vectors;
    for (int i = 0; i < a.n_layers; i++) (a.layers[i].bits == 4 ? in_vectors : in_unit).push_back(a.layers[i]);
    quire_linear_args part = a;
    if (!in_unit.empty()) {
        part.layers = in_unit.data();
        part.n_layers = (int32_t)in_unit.size();
        MatrixLinear{part}.all();
    }
    part.layers = in_vectors.data();
    part.n_layers = (int32_t)in_vectors.size();
    return linear_in_vectors(part);
#else
    return linear_in_vectors(a);
#endif
}

}  // namespace quire

// Attention of many queries over keys and values that lie side by side, in bfloat16: a prompt's.
//
//   unit       some query tokens of a KV head, all its query heads: ROWS rows or fewer
//   block      BLOCK tokens of keys and values, laid out as weights of a linear layer (weights.hpp), once for all rows
//   scores     rows x keys, a product of the linear layers' kernel; masked, softmax online; what no row reads is left out
//   sums       weights x values, another such product, added to what earlier blocks gave
//
// Weights are rounded to bfloat16 where the processor multiplies that, their sum is not.
#pragma once
#include <limits>

#include "gemm.hpp"
#include "small.hpp"

namespace quire {

struct Attending {
    static constexpr int ROWS = 256, FEW = 48, BLOCK = 256, UNITS = BLOCK / UNIT;
    static constexpr float NOTHING = -std::numeric_limits<float>::infinity();
    const quire_attend_args& a;
    const int share = a.heads / a.kv_heads, words = a.d / 2, columns = (a.dv + UNIT - 1) / UNIT;
    const int tokens = std::max(1, std::min(ROWS / share, a.tokens));  // of a unit
    const int pieces = (a.tokens + tokens - 1) / tokens;

    // What a thread works in.
    struct Room {
        std::vector<Pair> q, p;
        std::vector<uint32_t> k, v;
        std::vector<float> scores, sums;
        std::vector<float> most, total;
        std::vector<uint8_t> any, all;  // [token][unit of the block]: whether it reads one of these keys, and all
        std::vector<uint8_t> used;      // [key of the block]: whether any token reads it; what nobody does may hold anything
    };
    // One of the units.
    struct Piece {
        int batch, kv, first, n;  // of query tokens
        int rows;
    };

    const uint16_t* key(const Piece& u, int t) const { return a.k + u.batch * a.k_batch + u.kv * a.k_head + t * a.k_token; }
    const uint16_t* value(const Piece& u, int t) const { return a.v + u.batch * a.v_batch + u.kv * a.v_head + t * a.v_token; }
    const uint8_t* mask(const Piece& u, int t) const { return a.mask + u.batch * a.mask_batch + (int64_t)(u.first + t) * a.mask_token; }
    int few(const Piece& u, int from) const { return std::min(FEW, u.rows - from); }

    void arrange_queries(const Piece& u, Room& r) const {
        for (int from = 0; from < u.rows; from += FEW) {
            const Tiles tiles(few(u, from));
            for (int t = 0; t < tiles.n; t++) {
                const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
                for (int i = 0; i < rows; i++) {
                    const int row = from + begin + i, head = u.kv * share + row / u.n, token = u.first + row % u.n;
                    const uint16_t* x = a.q + u.batch * a.q_batch + head * a.q_head + token * a.q_token;
                    Pair* to = r.q.data() + (int64_t)(from + begin) * words + i;
                    for (int w = 0; w < words; w++) to[w * rows] = pair_of(x[2 * w], x[2 * w + 1]);
                }
            }
        }
    }

    // Keys as [token / 16][word][16], a word two channels; values as [channel / 16][word][16], a word two tokens.
    void lay_out(const Piece& u, int first, int n, Room& r) const {
        const int whole = (n + UNIT - 1) / UNIT * UNIT;
        for (int t = 0; t < whole; t++) {
            uint32_t* to = r.k.data() + (int64_t)(t / 16) * words * 16 + t % 16;
            const uint16_t* from = key(u, first + std::min(t, n - 1));
            for (int w = 0; w < words; w++) {
                uint32_t x;
                memcpy(&x, from + 2 * w, 4);
                to[w * 16] = t < n ? x : 0;
            }
        }
        for (int j = 0; j < whole / 2; j++) {
            const uint16_t* one = value(u, first + std::min(2 * j, n - 1));
            const uint16_t* two = value(u, first + std::min(2 * j + 1, n - 1));
            const uint32_t low = r.used[2 * j] ? 0xffffu : 0, high = r.used[2 * j + 1] ? 0xffff0000u : 0;
            for (int c = 0; c < a.dv; c += 16) {
                uint32_t* to = r.v.data() + ((int64_t)(c / 16) * (BLOCK / 2) + j) * 16;
                for (int i = 0; i < 16; i++) to[i] = (one[c + i] & low) | (((uint32_t)two[c + i] << 16) & high);
            }
        }
    }

    // Which units of a block's keys each query token reads. Returns whether any does.
    bool look(const Piece& u, int first, int n, Room& r) const {
        bool some = false;
        std::fill(r.used.begin(), r.used.end(), (uint8_t)0);
        std::fill(r.used.begin(), r.used.begin() + n, (uint8_t)!a.mask);
        for (int t = 0; t < u.n; t++)
            for (int j = 0; j < UNITS; j++) {
                const int width = std::clamp(n - j * UNIT, 0, UNIT);
                uint8_t any = width > 0, all = width == UNIT;
                if (a.mask && width) {
                    const uint8_t* m = mask(u, t) + first + j * UNIT;
                    uint8_t* used = r.used.data() + j * UNIT;
                    int read = 0;
                    for (int i = 0; i < width; i++) {
                        read += m[i] != 0;
                        used[i] |= m[i];
                    }
                    any = read > 0;
                    all = read == UNIT;
                }
                r.any[t * UNITS + j] = any;
                r.all[t * UNITS + j] = all;
                some |= any;
            }
        return some;
    }

    Panels panels_of(const uint32_t* from, int first, int count, int n_words, int skip) const {
        Panels made;
        made.stride = 64;
        made.lines = n_words;  // what follows is in the cache
        made.skip = -(int64_t)n_words * made.stride;
        for (int c = 0; c < VECTORS; c++) {
            const int at = std::min(first + c * LANES, count - LANES);
            made.weight[c] = (const uint8_t*)(from + ((int64_t)(at / 16) * n_words + skip) * 16 + at % 16);
        }
        return made;
    }

    // Rows [from, from + n) of a unit over units [low, high) of a block's keys.
    void fold(const Piece& u, int from, int n, int low, int high, int first, int in_block, Room& r) const {
        const Tiles tiles(n);
        const int n_words = (high - low) * (UNIT / 2);
        for (int j = low; j < high; j++) {
            const Panels panels = panels_of(r.k.data(), j * UNIT, BLOCK, words, 0);
            for (int t = 0; t < tiles.n; t++) {
                const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
                unit_for<Half>(rows)(panels, r.q.data() + (int64_t)(from + begin) * words, words,
                                     r.scores.data() + ((j - low) * FEW + begin) * UNIT, true, Turn{0, 1});
            }
        }
        const float scale = a.scale * 1.44269504088896341f;
        for (int t = 0; t < tiles.n; t++) {
            const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
            for (int i = 0; i < rows; i++)
                weigh(u, from + begin + i, begin + i, low, high, first, in_block, scale,
                      r.p.data() + (int64_t)begin * n_words + i, rows, r);
        }
        for (int c = 0; c < columns; c++) {
            const Panels panels = panels_of(r.v.data(), c * UNIT, a.dv, BLOCK / 2, low * (UNIT / 2));
            for (int t = 0; t < tiles.n; t++) {
                const int begin = tiles.begin(t), rows = tiles.begin(t + 1) - begin;
                unit_for<Half>(rows)(panels, r.p.data() + (int64_t)begin * n_words, n_words,
                                     r.sums.data() + ((int64_t)c * ROWS + from + begin) * UNIT, false, Turn{0, 1});
            }
        }
    }

    // A row's scores to weights, pair by pair `step` apart; earlier sums are brought to the new greatest score.
    void weigh(const Piece& u, int row, int in_few, int low, int high, int first, int in_block, float scale, Pair* to,
               int step, Room& r) const {
        const int token = row % u.n;
        Floats greatest_of = all(NOTHING);
        for (int j = low; j < high; j++) {
            float* s = r.scores.data() + ((j - low) * FEW + in_few) * UNIT;
            const bool whole = r.all[token * UNITS + j], none = !r.any[token * UNITS + j];
            const uint8_t* m = a.mask ? mask(u, token) + first + j * UNIT : nullptr;
            const int width = std::min(UNIT, in_block - j * UNIT);
            alignas(64) uint8_t reads[UNIT];
            if (!whole && !none) {  // beyond the last key there may be no mask
                memset(reads, 0, UNIT);
                if (m)
                    memcpy(reads, m, width);
                else
                    memset(reads, 1, width);
            }
            for (int i = 0; i < UNIT; i += LANES) {
                Floats x = load(s + i) * scale;
                if (none) x = all(NOTHING);
                else if (!whole) x = (Floats)(widened(reads + i) != 0 ? x : all(NOTHING));
                store(s + i, x);
                greatest_of = (Floats)(x > greatest_of ? x : greatest_of);
            }
        }
        const float before = r.most[row], now = std::max(before, greatest(greatest_of));
        Floats sum = {};
        for (int j = low; j < high; j++) {
            const float* s = r.scores.data() + ((j - low) * FEW + in_few) * UNIT;
            for (int i = 0; i < UNIT; i += LANES, to += LANES / 2 * step) {
                const Floats x = load(s + i);
                const Floats p = (Floats)(x == NOTHING ? Floats{} : exp2_of(x - now));
                sum += p;
                put(p, to, step);
            }
        }
        if (now > before) {
            const float less = before == NOTHING ? 0.0f : exp2_of(all(before - now))[0];
            r.total[row] *= less;
            for (int c = 0; c < columns; c++) {
                float* o = r.sums.data() + ((int64_t)c * ROWS + row) * UNIT;
                for (int i = 0; i < UNIT; i += LANES) store(o + i, load(o + i) * less);
            }
            r.most[row] = now;
        }
        r.total[row] += added(sum);
    }

    static QUIRE_INLINE void put(Floats p, Pair* to, int step) {
        if constexpr (PARTS == 1) {
            alignas(64) uint32_t x[LANES];
            *(Words*)x = narrowed(p);
            for (int i = 0; i < LANES / 2; i++) {
                const uint32_t pair = x[2 * i] | x[2 * i + 1] << 16;
                memcpy(to + i * step, &pair, 4);
            }
        } else {
            alignas(64) float x[LANES];
            store(x, p);
            for (int i = 0; i < LANES / 2; i++) memcpy((void*)(to + i * step), x + 2 * i, sizeof(Pair));
        }
    }

    void finish(const Piece& u, const Room& r) const {
        for (int row = 0; row < u.rows; row++) {
            const int head = u.kv * share + row / u.n, token = u.first + row % u.n;
            uint16_t* out = a.out + (((int64_t)u.batch * a.tokens + token) * a.heads + head) * a.dv;
            const float by = r.total[row] == 0.0f ? 0.0f : 1.0f / r.total[row];
            for (int c = 0; c < a.dv; c += LANES)
                store_bf16(out + c, load(r.sums.data() + ((int64_t)(c / UNIT) * ROWS + row) * UNIT + c % UNIT) * by);
        }
    }

    void run(const Piece& u, Room& r) const {
        arrange_queries(u, r);
        std::fill(r.sums.begin(), r.sums.end(), 0.0f);
        std::fill(r.most.begin(), r.most.end(), NOTHING);
        std::fill(r.total.begin(), r.total.end(), 0.0f);
        for (int first = 0; first < a.keys; first += BLOCK) {
            const int n = std::min(BLOCK, a.keys - first);
            if (!look(u, first, n, r)) continue;
            lay_out(u, first, n, r);
            for (int from = 0; from < u.rows; from += FEW) {
                int low = UNITS, high = 0;
                for (int row = from; row < from + few(u, from); row++)
                    for (int j = 0; j < UNITS; j++)
                        if (r.any[row % u.n * UNITS + j]) low = std::min(low, j), high = std::max(high, j + 1);
                if (low < high) fold(u, from, few(u, from), low, high, first, n, r);
            }
        }
        finish(u, r);
    }

    int every() const {
        const int units = a.batch * a.kv_heads * pieces;
        const bool alone = a.threads < 2 || units < 2;
        Shares shares(units, alone ? 1 : a.threads);
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
        {
            thread_local Room r;
            r.q.resize(std::max(r.q.size(), (size_t)ROWS * words));
            r.p.resize(FEW * BLOCK / 2);
            r.k.resize(std::max(r.k.size(), (size_t)BLOCK * words));
            r.v.resize(std::max(r.v.size(), (size_t)BLOCK / 2 * a.dv));
            r.scores.resize(FEW * BLOCK);
            r.sums.resize((size_t)columns * ROWS * UNIT);
            r.most.resize(ROWS);
            r.total.resize(ROWS);
            r.any.resize(ROWS * UNITS);
            r.all.resize(ROWS * UNITS);
            r.used.resize(BLOCK);
            shares.run([&](int i) {
                Piece u;
                u.first = i % pieces * tokens;
                u.kv = i / pieces % a.kv_heads;
                u.batch = i / pieces / a.kv_heads;
                u.n = std::min(tokens, a.tokens - u.first);
                u.rows = u.n * share;
                run(u, r);
            });
        }
        return 0;
    }
};

inline int attend(const quire_attend_args& a) { return Attending{a}.every(); }

}  // namespace quire

// Decode attention: every query folds over its segments in pieces of PIECE slots, and the pieces are merged in order.
//
// What a query's result is made of depends on its own segments alone, never on the batch or the threads: the pieces are cut
// at fixed slots and merged from first to last.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "quire_cpu.h"
#include "rows.hpp"

namespace quire {

constexpr int PIECE = 512;
constexpr int MAX_DIM = 256;
constexpr float LOG2E = 1.4426950408889634f;

struct Piece {
    const quire_segment* segment;
    int lo, hi;
};

// Running maximum (of scores in base 2), sum and output of G query heads.
struct State {
    float *top, *total, *out;  // [G], [G], [G][d]
};

template <int G>
QUIRE_INLINE void soften(float* S, int n, float softcap) {
    const float peak = softcap * LOG2E;
    for (int i = 0; i < n * G; i += LANES) store(S + i, tanh_of(load(S + i)) * peak);
}

// Scores become weights; top, total and out are brought to the new maximum.
template <int G>
QUIRE_INLINE void weigh(float* S, int n, int d, State s) {
    for (int i = n * G; i % LANES; i++) S[i] = -INFINITY;
    alignas(64) float lanes[LANES];
    Floats high = load(S);
    for (int i = LANES; i < n * G; i += LANES) {
        const Floats x = load(S + i);
        high = (Floats)(x > high ? x : high);
    }
    store(lanes, high);
    float top[G], alpha[G];
    bool moved = false;
    for (int g = 0; g < G; g++) {
        top[g] = s.top[g];
        for (int i = g; i < LANES; i += G) top[g] = lanes[i] > top[g] ? lanes[i] : top[g];
        moved |= top[g] != s.top[g];
        alpha[g] = std::exp2(s.top[g] - top[g]);
    }
    for (int i = 0; i < LANES; i++) lanes[i] = top[i % G];
    const Floats base = load(lanes);
    Floats sum = {};
    for (int i = 0; i < n * G; i += LANES) {
        const Floats p = exp2_of(load(S + i) - base);
        store(S + i, p);
        sum += p;
    }
    store(lanes, sum);
    for (int g = 0; g < G; g++) {
        float total = s.total[g] * alpha[g];
        for (int i = g; i < LANES; i += G) total += lanes[i];
        s.total[g] = total;
        s.top[g] = top[g];
    }
    if (moved)
        for (int g = 0; g < G; g++)
            for (int j = 0; j < d; j += LANES) store(s.out + g * d + j, load(s.out + g * d + j) * alpha[g]);
}

template <class T, int G>
void fold(const quire_form& f, const uint8_t* base, const Piece& piece, int d, const float* q, float softcap, State s) {
    typedef Rows<T> Tiles;
    alignas(64) float S[CHUNK * G + LANES];
    typename Tiles::Chunk chunks[2];
    const uint8_t* keys = base + f.k;
    const int64_t to_values = f.v - f.k;
    const int64_t* table = piece.segment->table;
    int at = 0, n = std::min(CHUNK, piece.hi - piece.lo);
    Tiles::locate(chunks[0], keys, table, f.block_tokens, d, piece.lo, n);
    for (int lo = piece.lo; lo < piece.hi; lo += CHUNK) {
        const int ahead = std::min(CHUNK, std::max(0, piece.hi - lo - CHUNK));
        typename Tiles::Chunk &now = chunks[at], &next = chunks[at ^ 1];
        if (ahead)
            Tiles::locate(next, keys, table, f.block_tokens, d, lo + CHUNK, ahead);
        for (int i = ahead; i < n; i++) next.row[i] = now.row[i];
        Tiles::template scores<G>(now, n, d, q, S, to_values, lo == piece.lo);
        if (softcap > 0) soften<G>(S, n, softcap);
        weigh<G>(S, n, d, s);
        Tiles::template values<G>(now, next, n, d, S, s.out, to_values);
        at ^= 1;
        n = ahead;
    }
}

typedef void (*Fold)(const quire_form&, const uint8_t*, const Piece&, int, const float*, float, State);

template <int G>
Fold fold_of(int codec) {
    switch (codec) {
        case QUIRE_ROWS_F32: return fold<F32, G>;
        case QUIRE_ROWS_BF16: return fold<BF16, G>;
        case QUIRE_ROWS_F16: return fold<F16, G>;
    }
    return nullptr;
}

inline Fold fold_of(int codec, int heads) {
    switch (heads) {
        case 1: return fold_of<1>(codec);
        case 2: return fold_of<2>(codec);
        case 4: return fold_of<4>(codec);
        case 8:
            if constexpr (MAX_HEADS == 8) return fold_of<8>(codec);
    }
    return nullptr;
}

// Query heads that are folded together: `share` of them in `parts` groups of `heads`, the last filled up with zeros.
struct Grouping {
    int heads, parts;
    explicit Grouping(int share) {
        heads = 1;
        while (heads < share && heads < MAX_HEADS) heads *= 2;
        parts = (share + heads - 1) / heads;
    }
};

template <class T>
QUIRE_INLINE void read_query(const quire_decode_args& a, int64_t at, float factor, float* q) {
    const typename T::Element* p = (const typename T::Element*)a.q + at;
    for (int j = 0; j < a.d; j++) q[j] = T::one(p[j]) * factor;
}

template <class T>
QUIRE_INLINE void write_result(const quire_decode_args& a, int64_t at, float factor, const float* x) {
    typename T::Element* p = (typename T::Element*)a.out + at;
    for (int j = 0; j < a.d; j++) p[j] = T::narrow(x[j] * factor);
}

inline void read_query(const quire_decode_args& a, int64_t at, float factor, float* q) {
    if (a.dtype == QUIRE_F32) return read_query<F32>(a, at, factor, q);
    if (a.dtype == QUIRE_BF16) return read_query<BF16>(a, at, factor, q);
    read_query<F16>(a, at, factor, q);
}

inline void write_result(const quire_decode_args& a, int64_t at, float factor, const float* x) {
    if (a.dtype == QUIRE_F32) return write_result<F32>(a, at, factor, x);
    if (a.dtype == QUIRE_BF16) return write_result<BF16>(a, at, factor, x);
    write_result<F16>(a, at, factor, x);
}

// One piece for one KV head: all its query heads. `room` is top [n], total [n], out [n][d] for n = heads * parts.
inline void run_piece(const quire_decode_args& a, const Grouping& by, const Piece& piece, int head, float* room) {
    alignas(64) float q[MAX_HEADS * MAX_DIM];
    const quire_form& f = a.forms[piece.segment->form];
    const int n = by.heads * by.parts, d = a.d;
    float *top = room, *total = room + n, *out = room + 2 * n;
    std::fill(top, top + n, -INFINITY);
    std::fill(total, total + n * (d + 1), 0.0f);
    if (f.heads[head] < 0) return;
    const uint8_t* base = a.arena + f.first + f.heads[head] * f.tile_bytes;
    const float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * LOG2E;
    const Fold fold = fold_of(f.codec, by.heads);
    for (int part = 0; part < by.parts; part++) {
        const int first = part * by.heads, have = std::min(by.heads, a.share - first);
        std::fill(q, q + by.heads * d, 0.0f);
        for (int g = 0; g < have; g++)
            read_query(a, piece.segment->query * a.q_row + (head * a.share + first + g) * a.q_head, factor, q + g * d);
        fold(f, base, piece, d, q, a.softcap, State{top + first, total + first, out + first * d});
    }
}

// Merges a query head's pieces, first to last, and its sink logit.
inline void merge(const quire_decode_args& a, const Grouping& by, const float* room, int64_t step, int n_pieces, int query,
                  int head, int g) {
    alignas(64) float sum[MAX_DIM];
    const int n = by.heads * by.parts, d = a.d, q_head = head * a.share + g;
    float top = a.sinks ? a.sinks[q_head] * LOG2E : -INFINITY, total = a.sinks ? 1.0f : 0.0f;
    const float* from = nullptr;
    for (int i = 0; i < n_pieces; i++) {
        const float* p = room + i * step;
        const float its_top = p[g], its_total = p[n + g], *out = p + 2 * n + g * d;
        if (its_total == 0.0f) continue;
        const float high = its_top > top ? its_top : top;
        const float mine = std::exp2(top - high), its = std::exp2(its_top - high);
        if (!from && !a.sinks) {
            from = out;
        } else {
            if (!from)
                std::fill(sum, sum + d, 0.0f);
            else if (from != sum)
                std::copy(from, from + d, sum);
            from = sum;
            for (int j = 0; j < d; j++) sum[j] = sum[j] * mine + out[j] * its;
        }
        total = total * mine + its_total * its;
        top = high;
    }
    if (!from) {
        std::fill(sum, sum + d, 0.0f);
        from = sum;
        total = 1.0f;
    }
    write_result(a, query * a.out_row + q_head * a.out_head, 1.0f / total, from);
}

inline int decode(const quire_decode_args& a) {
    const Grouping by(a.share);
    thread_local std::vector<Piece> pieces;
    thread_local std::vector<int> firsts;  // first piece of each query
    thread_local std::vector<float> room;
    pieces.clear();
    firsts.clear();
    int64_t slots = 0;
    for (int i = 0; i < a.n_segments; i++) {
        const quire_segment& s = a.segments[i];
        if (!i || s.query != a.segments[i - 1].query) firsts.push_back((int)pieces.size());
        for (int lo = s.lo; lo < s.hi; lo += PIECE) pieces.push_back(Piece{&s, lo, std::min(s.hi, lo + PIECE)});
        slots += s.hi - s.lo;
    }
    firsts.push_back((int)pieces.size());
    const int64_t step = (int64_t)by.heads * by.parts * (a.d + 2);
    const int n = (int)pieces.size(), queries = (int)firsts.size() - 1;
    if ((int64_t)room.size() < n * a.kv_heads * step) room.resize(n * a.kv_heads * step);
    const Piece* all_pieces = pieces.data();
    const int* first = firsts.data();
    float* all_room = room.data();
    // Waking the other threads takes as long as a few thousand multiplications.
    const bool alone = a.threads < 2 || slots * a.kv_heads * a.share * a.d < 400000;
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < n * a.kv_heads; i++)  // a head's pieces side by side
            run_piece(a, by, all_pieces[i % n], i / n, all_room + i * step);
#pragma omp for schedule(static)
        for (int i = 0; i < queries * a.kv_heads; i++) {
            const int query = i / a.kv_heads, head = i % a.kv_heads, begin = first[query];
            for (int g = 0; g < a.share; g++)
                merge(a, by, all_room + ((int64_t)head * n + begin) * step, step, first[query + 1] - begin,
                      all_pieces[begin].segment->query, head, g);
        }
    }
    return 0;
}

// ---- writing plain rows ----------------------------------------------------------------------------------------------

template <class From, class To>
void write_field(const quire_write_args& a, int field) {
    const int width = a.width[field];
    const typename From::Element* source = (const typename From::Element*)a.source[field];
    for (int t = 0; t < a.n_tokens; t++) {
        const int64_t token = a.tokens ? a.tokens[t] : t;
        uint8_t* block = a.arena + a.units[t] * 64 + a.offset[field] + (int64_t)a.rows[t] * width * sizeof(typename To::Element);
        for (int h = 0; h < a.n_heads; h++) {
            const typename From::Element* from = source + token * a.source_row[field] + a.heads[h] * a.source_head[field];
            typename To::Element* to = (typename To::Element*)(block + h * a.tile_bytes);
            if constexpr (std::is_same_v<From, To>)
                memcpy(to, from, width * sizeof(*to));
            else
                for (int j = 0; j < width; j++) to[j] = To::narrow(From::one(from[j]));
        }
    }
}

template <class From>
int write_from(const quire_write_args& a) {
    for (int field = 0; field < 2; field++) switch (a.dtype) {
            case QUIRE_F32: write_field<From, F32>(a, field); break;
            case QUIRE_BF16: write_field<From, BF16>(a, field); break;
            case QUIRE_F16: write_field<From, F16>(a, field); break;
            default: return -1;
        }
    return 0;
}

inline int write(const quire_write_args& a) {
    switch (a.source_dtype) {
        case QUIRE_F32: return write_from<F32>(a);
        case QUIRE_BF16: return write_from<BF16>(a);
        case QUIRE_F16: return write_from<F16>(a);
    }
    return -1;
}

}  // namespace quire

// Decode attention: every query folds over its segments in pieces of PIECE slots, and the pieces are merged in order.
//
// What a query's result is made of depends on its own segments alone, never on the batch or the threads: the pieces are cut
// at fixed slots and merged from first to last.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "matrix.hpp"
#include "paid.hpp"

namespace quire {

// Running maximum (of scores in base 2), sum and output of G query heads.
struct State {
    float *top, *total, *out;  // [G], [G], [G][d]
};

template <int G>
QUIRE_INLINE void soften(float* S, int n, float softcap) {
    const float peak = softcap * LOG2E;
    for (int g = 0; g < G; g++)
        for (int t = 0; t < n; t += LANES) store(S + g * CHUNK + t, tanh_of(load(S + g * CHUNK + t)) * peak);
}

// Scores of slots [skip, n) become weights above zero, those of others zero; top, total and out are brought to the new maximum.
template <int G>
QUIRE_INLINE void weigh(float* S, int skip, int n, int whole, int d, State s) {
    for (int g = 0; g < G; g++) {
        float* row = S + g * CHUNK;
        for (int t = 0; t < skip; t++) row[t] = -INFINITY;
        for (int t = n; t < whole; t++) row[t] = -INFINITY;
        Floats high = load(row);
        for (int t = LANES; t < whole; t += LANES) {
            const Floats x = load(row + t);
            high = (Floats)(x > high ? x : high);
        }
        const float here = greatest(high), top = here > s.top[g] ? here : s.top[g];
        const Floats base = all(top);
        Floats sum = {};
        for (int t = 0; t < whole; t += LANES) {
            const Floats p = exp2_of(load(row + t) - base);
            store(row + t, p);
            sum += p;
        }
        std::fill(row, row + skip, 0.0f);
        std::fill(row + n, row + whole, 0.0f);
        const float total = added(sum);
        if (top != s.top[g]) {
            const float alpha = std::exp2(s.top[g] - top);
            s.total[g] *= alpha;
            for (int j = 0; j < d; j += LANES) store(s.out + g * d + j, load(s.out + g * d + j) * alpha);
            s.top[g] = top;
        }
        s.total[g] += total;
    }
}

// Scores of the slots of a step of rows.
template <class T, int G>
QUIRE_INLINE void score_each(const quire_form& f, const Chunk& c, int at, int n, int d, Query& q, float* S, const Stretch* v) {
    for (int i = 0; i < n; i++) score_rows<T, G>(f.k, c, at + i, d, q.q, S, v[i]);
}

// Scores of the slots of steps [at, at + n), n one or two; fetches their values.
template <int G>
QUIRE_INLINE void score_steps(const quire_form& f, const Chunk& c, int at, int n, int d, Query& q, float* S) {
    const Stretch v[2] = {stretch_of(f.v, c, at, d), n > 1 ? stretch_of(f.v, c, at + 1, d) : Stretch{}};
    switch (f.k.kind) {
        case QUIRE_ROWS_F32: return score_each<F32, G>(f, c, at, n, d, q, S, v);
        case QUIRE_ROWS_BF16: return score_each<BF16, G>(f, c, at, n, d, q, S, v);
        case QUIRE_ROWS_F16: return score_each<F16, G>(f, c, at, n, d, q, S, v);
        case QUIRE_ROWS_E4M3: return score_each<E4M3, G>(f, c, at, n, d, q, S, v);
        case QUIRE_ROWS_E5M2: return score_each<E5M2, G>(f, c, at, n, d, q, S, v);
#if !defined(QUIRE_MATRIX)  // whose unit takes all of them
        case QUIRE_TILES_8: return score_tiles<8, G>(f.k, c, at, n, d, f.block_tokens, q, S, v);
        case QUIRE_TILES_4: return score_tiles<4, G>(f.k, c, at, n, d, f.block_tokens, q, S, v);
        case QUIRE_TILES_2: return score_tiles<2, G>(f.k, c, at, n, d, f.block_tokens, q, S, v);
#endif
    }
}

template <int G>
QUIRE_INLINE void add_values(const quire_form& f, const Chunk& c, int d, float* S, float* acc, const Ahead& next) {
    switch (f.v.kind) {
        case QUIRE_ROWS_F32: return add_rows<F32, G>(f.v, c, d, S, acc, next);
        case QUIRE_ROWS_BF16: return add_rows<BF16, G>(f.v, c, d, S, acc, next);
        case QUIRE_ROWS_F16: return add_rows<F16, G>(f.v, c, d, S, acc, next);
        case QUIRE_ROWS_E4M3: return add_rows<E4M3, G>(f.v, c, d, S, acc, next);
        case QUIRE_ROWS_E5M2: return add_rows<E5M2, G>(f.v, c, d, S, acc, next);
        case QUIRE_TILES_8: return add_tiles<8, G>(f.v, c, d, f.block_tokens, S, acc, next);
        case QUIRE_TILES_4: return add_tiles<4, G>(f.v, c, d, f.block_tokens, S, acc, next);
        case QUIRE_TILES_2: return add_tiles<2, G>(f.v, c, d, f.block_tokens, S, acc, next);
    }
}

// What a thread will most likely fold next: its first keys are fetched with the last values of the piece before.
struct Next {
    const quire_form* form = nullptr;
    const uint8_t* base;
    const Piece* piece;
};

QUIRE_INLINE bool packed(const quire_form& f) { return f.k.kind >= QUIRE_TILES_8 || f.v.kind >= QUIRE_TILES_8; }

// The first chunk of a piece; tiles begin at multiples of STEP. Returns its first slot.
QUIRE_INLINE int open_piece(const quire_form& f, const uint8_t* base, const Piece& piece, Chunk& chunk) {
    const int lo = packed(f) ? piece.lo / STEP * STEP : piece.lo;
    chunk.locate(base, piece.segment->table, f.block_tokens, lo, std::min(CHUNK, piece.hi - lo));
    chunk.skip = piece.lo - lo;
    return lo;
}

// One piece for G query heads. While scores are computed their values are fetched, while values are added the next keys.
template <int G>
void fold(const quire_form& f, const uint8_t* base, const Piece& piece, int d, Query& q, float softcap, State s,
          float* scores, const Next& then) {
    alignas(64) float S[G * CHUNK];
    Chunk chunks[2];
    if (f.k.turned) turn_rows(q.q, G * d, f.k.turned);
    if (f.k.kind >= QUIRE_TILES_8) prepare_tiles<G>(f.k, d, q);
    MatrixUnit unit;
    matrix_prepare<G>(f, d, q);
    int at = 0;
    bool first = true;
    for (int lo = open_piece(f, base, piece, chunks[0]); lo < piece.hi; lo += CHUNK, at ^= 1, first = false) {
        Chunk &now = chunks[at], &next = chunks[at ^ 1];
        const quire_field* keys = &f.k;
        const int steps = now.steps();
        next.n = 0;
        if (lo + CHUNK < piece.hi) {
            next.locate(base, piece.segment->table, f.block_tokens, lo + CHUNK, std::min(CHUNK, piece.hi - lo - CHUNK));
        } else if (then.form) {
            open_piece(*then.form, then.base, *then.piece, next);
            keys = &then.form->k;
        }
        const bool scored = matrix_score<G>(unit, f, now, d, q, S);
        for (int i = 0, n; i < steps && !scored; i += n) {
            n = std::min(2, steps - i);
            if (first)
                for (int j = i + n; j < i + 2 * n; j++) stretch_of(f.k, now, j, d).fetch(step_bytes(f.k, d));
            score_steps<G>(f, now, i, n, d, q, S);
        }
        if (softcap > 0) soften<G>(S, steps * STEP, softcap);
        if (scores) keep_scores<G>(S, now, std::max(0, lo - piece.lo), scores);
        weigh<G>(S, now.skip, now.n, steps * STEP, d, s);
        const Ahead ahead{*keys, next, d};
        if (!matrix_add<G>(unit, f, now, d, S, s.out, ahead)) add_values<G>(f, now, d, S, s.out, ahead);
    }
    if (f.v.turned) turn_rows(s.out, G * d, f.v.turned);
}

typedef void (*Fold)(const quire_form&, const uint8_t*, const Piece&, int, Query&, float, State, float*, const Next&);

inline Fold fold_of(int heads) {
    switch (heads) {
        case 1: return fold<1>;
        case 2: return fold<2>;
        case 4: return fold<4>;
        case 8:
            if constexpr (MAX_HEADS == 8) return fold<8>;
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

QUIRE_INLINE const uint8_t* tiles_of(const quire_decode_args& a, const quire_form& f, int head) {
    return a.arena + f.first + f.heads[head] * f.tile_bytes;
}

// One piece for one KV head: all its query heads. `room` is top [n], total [n], out [n][d] for n = heads * parts.
inline void run_piece(const quire_decode_args& a, const Grouping& by, const Piece& piece, int head, float* room, float* scores,
                      const Next& then) {
    Query query;
    const quire_form& f = a.forms[piece.segment->form];
    const int n = by.heads * by.parts, d = a.d;
    float *top = room, *total = room + n, *out = room + 2 * n;
    std::fill(top, top + n, -INFINITY);
    std::fill(total, total + n * (d + 1), 0.0f);
    if (f.heads[head] < 0) return;
    const uint8_t* base = tiles_of(a, f, head);
    const float factor = a.softcap > 0 ? a.scale / a.softcap : a.scale * LOG2E;
    const Fold fold = fold_of(by.heads);
    for (int part = 0; part < by.parts; part++) {
        const int first = part * by.heads, have = std::min(by.heads, a.share - first);
        std::fill(query.q, query.q + by.heads * d, 0.0f);
        for (int g = 0; g < have; g++)
            read_query(a, piece.segment->query * a.q_row + (head * a.share + first + g) * a.q_head, factor,
                       query.q + g * d);
        fold(f, base, piece, d, query, a.softcap, State{top + first, total + first, out + first * d},
             scores ? scores + first * PIECE : nullptr, part + 1 < by.parts ? Next{} : then);
    }
}

// Merges a query head's pieces, first to last, and its sink logit.
inline void merge(const quire_decode_args& a, const Grouping& by, const float* room, int64_t step, int n_pieces, int query,
                  int head, int g, float* lse) {
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
    if (lse) lse[(int64_t)query * a.kv_heads * a.share + q_head] = total == 0.0f ? -INFINITY : top + std::log2(total);
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
    const bool wanted = a.lse || a.probs;
    thread_local std::vector<float> scores, lses;
    if (wanted) lses.resize(lse_count(a));
    if (a.probs && (int64_t)scores.size() < n * a.kv_heads * by.heads * by.parts * PIECE)
        scores.resize((int64_t)n * a.kv_heads * by.heads * by.parts * PIECE);
    float *lse = wanted ? lses.data() : nullptr, *all_scores = a.probs ? scores.data() : nullptr;
    const int64_t scores_step = (int64_t)by.heads * by.parts * PIECE;
    const Piece* all_pieces = pieces.data();
    const int* first = firsts.data();
    float* all_room = room.data();
    // Waking the other threads takes as long as a few thousand multiplications.
    const bool alone = a.threads < 2 || slots * a.kv_heads * a.share * a.d < 400000;
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < n * a.kv_heads; i++) {  // a head's pieces side by side
            Next then;
            const int j = i + (alone ? 1 : a.threads);
            if (j < n * a.kv_heads) {
                const quire_form& form = a.forms[all_pieces[j % n].segment->form];
                if (form.heads[j / n] >= 0) then = Next{&form, tiles_of(a, form, j / n), &all_pieces[j % n]};
            }
            run_piece(a, by, all_pieces[i % n], i / n, all_room + i * step, all_scores ? all_scores + i * scores_step : nullptr,
                      then);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < queries * a.kv_heads; i++) {
            const int query = i / a.kv_heads, head = i % a.kv_heads, begin = first[query];
            for (int g = 0; g < a.share; g++)
                merge(a, by, all_room + ((int64_t)head * n + begin) * step, step, first[query + 1] - begin,
                      all_pieces[begin].segment->query, head, g, lse);
        }
        if (all_scores) {
#pragma omp for schedule(static)
            for (int i = 0; i < n * a.kv_heads; i++)
                share_out(a, all_pieces[i % n], i / n, all_scores + i * scores_step, lse);
        }
    }
    if (a.lse) natural_lse(a, lse);
    return 0;
}

}  // namespace quire

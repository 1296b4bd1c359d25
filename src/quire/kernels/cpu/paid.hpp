// What a query paid to each slot: scores kept while pieces are folded become probabilities once their sum is known.
#pragma once
#include <algorithm>
#include <cmath>

#include "chunk.hpp"

namespace quire {

constexpr int PIECE = 512;
constexpr float LOG2E = 1.4426950408889634f;

struct Piece {
    const quire_segment* segment;
    int lo, hi;
};

// A chunk's scores, in base 2, to their place among those of the piece, [G][PIECE].
template <int G>
void keep_scores(const float* S, const Chunk& c, int first, float* scores) {
    for (int g = 0; g < G; g++) std::copy(S + g * CHUNK + c.skip, S + g * CHUNK + c.n, scores + g * PIECE + first);
}

// Logarithms of all queries, [queries][heads].
inline int64_t lse_count(const quire_decode_args& a) {
    int last = 0;
    for (int i = 0; i < a.n_segments; i++) last = std::max(last, a.segments[i].query);
    return (int64_t)(last + 1) * a.kv_heads * a.share;
}

// From base 2, for the queries that have segments.
inline void natural_lse(const quire_decode_args& a, const float* lse) {
    const int heads = a.kv_heads * a.share;
    for (int i = 0; i < a.n_segments; i++) {
        const int64_t at = (int64_t)a.segments[i].query * heads;
        if (!i || a.segments[i].query != a.segments[i - 1].query)
            for (int h = 0; h < heads; h++) a.lse[at + h] = lse[at + h] / LOG2E;
    }
}

// One piece and KV head: probabilities of its slots, folded over the query heads.
inline void share_out(const quire_decode_args& a, const Piece& piece, int head, const float* scores, const float* lse) {
    const quire_segment& s = *piece.segment;
    if (a.forms[s.form].heads[head] < 0) return;
    const int n = piece.hi - piece.lo;
    const quire_place& place = a.places[&s - a.segments];
    const float* tops = lse + ((int64_t)s.query * a.kv_heads + head) * a.share;
    float* out = a.probs + place.first + (piece.lo - s.lo) + place.head * (a.folded == QUIRE_EACH ? head * a.share : head);
    for (int t = 0; t < n; t += LANES) {
        Floats sum = {};
        const size_t bytes = std::min(LANES, n - t) * sizeof(float);
        for (int g = 0; g < a.share; g++) {
            const Floats p = exp2_of(load(scores + g * PIECE + t) - tops[g]);
            if (a.folded == QUIRE_EACH) memcpy(out + g * place.head + t, &p, bytes);
            sum = a.folded == QUIRE_MAX ? (Floats)((p > sum) | (p != p) ? p : sum) : sum + p;
        }
        if (a.folded == QUIRE_MEAN) sum /= (float)a.share;
        if (a.folded != QUIRE_EACH) memcpy(out + t, &sum, bytes);
    }
}

}  // namespace quire

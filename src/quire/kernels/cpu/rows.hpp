// Fields of plain rows [t][d] of floats: arithmetic in float, a row's lanes added up at the end.
#pragma once
#include "chunk.hpp"

namespace quire {

// Lanes [g * TOKENS, (g + 1) * TOKENS) of v to S[g * CHUNK...].
template <int G, int g = 0, int... I>
QUIRE_INLINE void store_parts(float* S, Floats v, std::integer_sequence<int, I...> each) {
    constexpr int TOKENS = sizeof...(I);
    if constexpr (TOKENS == 1) {
        S[g * CHUNK] = v[g];
    } else {
        typedef float Part __attribute__((vector_size(TOKENS * 4)));
        typedef float PartAt __attribute__((vector_size(TOKENS * 4), aligned(4), may_alias));
        *(PartAt*)(S + g * CHUNK) = (Part)__builtin_shufflevector(v, v, (g * TOKENS + I)...);
    }
    if constexpr (g + 1 < G) store_parts<G, g + 1>(S, v, each);
}

// S[g * CHUNK + t] = q[g] . k[t] for the slots of a step; what lies behind the chunk's last slot means nothing.
template <class T, int G>
void score_rows(const quire_field& f, const Chunk& c, int at, int d, const float* q, float* S, Stretch values) {
    typedef typename T::Element Element;
    constexpr int TOKENS = LANES / G;
    const int stop = c.n < (at + 1) * STEP ? c.n : (at + 1) * STEP;
    const int few = values.over(STEP / TOKENS);
    for (int t = at * STEP; t < stop; t += TOKENS) {
        values.fetch(few);
        const Element* row[TOKENS];
#pragma GCC unroll 16
        for (int u = 0; u < TOKENS; u++) row[u] = (const Element*)(c.row_block[t + u] + f.codes) + c.row[t + u] * d;
        Floats sum[LANES] = {};
        for (int j = 0; j < d; j += LANES) {
            Floats k[TOKENS];
#pragma GCC unroll 16
            for (int u = 0; u < TOKENS; u++) k[u] = T::read(row[u] + j);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) {
                const Floats x = load(q + g * d + j);
#pragma GCC unroll 16
                for (int u = 0; u < TOKENS; u++) sum[g * TOKENS + u] += x * k[u];
            }
        }
        store_parts<G>(S + t, sums(sum), std::make_integer_sequence<int, TOKENS>{});
    }
    if (f.scaled == QUIRE_BY_TOKEN)
        for (int t = at * STEP; t < stop; t++) {
            const float scale = F16::one(halves_at(c.row_block[t], f.scale)[c.row[t]]);
            for (int g = 0; g < G; g++) S[g * CHUNK + t] *= scale;
        }
}

// acc[g][j...] += sum over t of S[g][t] * v[t][j...] for V vectors of channels.
template <class T, int G, int V>
QUIRE_INLINE void add_slice(const quire_field& f, const Chunk& c, int d, int j, const float* S, float* acc,
                            const Ahead& next) {
    constexpr int WIDTH = V * LANES;
    const Ahead::Pass pass = next.pass(j / WIDTH, (d + WIDTH - 1) / WIDTH);
    typedef typename T::Element Element;
    Floats sum[G][V];
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sum[g][v] = load(acc + g * d + j + v * LANES);
    for (int t = c.skip; t < c.n; t++) {
        const Element* p = (const Element*)(c.row_block[t] + f.codes) + c.row[t] * d + j;
        if (t % STEP == 0 || t == c.skip) pass.fetch(t / STEP);
        Floats x[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) x[v] = T::read(p + v * LANES);
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            const Floats w = all(S[g * CHUNK + t]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[g][v] += w * x[v];
        }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; g++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(acc + g * d + j + v * LANES, sum[g][v]);
}

// acc[g] += sum over t of S[g][t] * v[t]; S is used up. Fetches the next chunk's keys.
template <class T, int G>
void add_rows(const quire_field& f, const Chunk& c, int d, float* S, float* acc, const Ahead& next) {
    constexpr int REGISTERS = LANES == 16 ? 16 : 8;
    constexpr int V = REGISTERS / G < 1 ? 1 : REGISTERS / G > 4 ? 4 : REGISTERS / G;
    if (f.scaled == QUIRE_BY_TOKEN)
        for (int t = 0; t < c.n; t++) {
            const float scale = F16::one(halves_at(c.row_block[t], f.scale)[c.row[t]]);
            for (int g = 0; g < G; g++) S[g * CHUNK + t] *= scale;
        }
    int j = 0;
    for (; j + V * LANES <= d; j += V * LANES) add_slice<T, G, V>(f, c, d, j, S, acc, next);
    for (; j < d; j += LANES) add_slice<T, G, 1>(f, c, d, j, S, acc, next);
}

}  // namespace quire

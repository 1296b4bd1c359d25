// Tiles of plain rows: keys [t][d] and values [t][d] of float, bf16 or fp16, arithmetic in float.
//
// A chunk's scores lie as [t][G], G query heads side by side: one vector holds LANES / G tokens.
#pragma once
#include "vec.hpp"

namespace quire {

constexpr int CHUNK = 128;  // slots whose scores are at hand together
constexpr int MAX_HEADS = LANES < 8 ? LANES : 8;

template <class T>
struct Rows {
    typedef typename T::Element Element;

    // What a chunk reads: a pointer per slot, and where its values and the next chunk's keys are.
    struct Chunk {
        const uint8_t* row[CHUNK + LANES];
    };

    static QUIRE_INLINE void locate(Chunk& c, const uint8_t* base, const int64_t* table, int block_tokens, int d, int lo,
                                    int n) {
        const int64_t bytes = (int64_t)d * sizeof(Element);
        for (int i = 0; i < n;) {
            const int slot = lo + i, in = slot % block_tokens;
            const int run = block_tokens - in < n - i ? block_tokens - in : n - i;
            const uint8_t* first = base + table[slot / block_tokens] * 64 + in * bytes;
            for (int j = 0; j < run; j++) c.row[i + j] = first + j * bytes;
            i += run;
        }
        for (int i = n; i < n + LANES; i++) c.row[i] = n ? c.row[n - 1] : base;
    }

    static QUIRE_INLINE void fetch_row(const uint8_t* p, int d) {
        for (int b = 0; b < d * (int)sizeof(Element); b += 64) fetch(p + b);
    }

    // S[t * G + g] = q[g] . k[t], for whole vectors of them. Fetches the same slots' values, and of a cold chunk, whose keys
    // nothing has fetched yet, those a few rows ahead.
    template <int G>
    static QUIRE_INLINE void scores(const Chunk& c, int n, int d, const float* q, float* S, int64_t to_values, bool cold) {
        constexpr int TOKENS = LANES / G, AHEAD = 2 * LANES;
        for (int t = 0; t < n; t += TOKENS) {
            Floats sum[LANES] = {};
            for (int u = 0; u < TOKENS; u++) fetch_row(c.row[t + u] + to_values, d);
            if (cold && t + AHEAD < n)
                for (int u = 0; u < TOKENS; u++) fetch_row(c.row[t + AHEAD + u], d);
            for (int j = 0; j < d; j += LANES) {
                Floats k[TOKENS];
#pragma GCC unroll 16
                for (int u = 0; u < TOKENS; u++) {
                    const Element* p = (const Element*)c.row[t + u] + j;
                    k[u] = T::read(p);
                }
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) {
                    const Floats x = load(q + g * d + j);
#pragma GCC unroll 16
                    for (int u = 0; u < TOKENS; u++) sum[u * G + g] += x * k[u];
                }
            }
            store(S + t * G, sums(sum));
        }
    }

    // acc[g][j...] += sum over t of S[t * G + g] * v[t][j...] for V vectors of channels. Fetches the next chunk's keys.
    template <int G, int V>
    static QUIRE_INLINE void slice(const Chunk& c, const Chunk& next, int n, int d, int j, const float* S, float* acc,
                                   int64_t to_values) {
        Floats sum[G][V];
#pragma GCC unroll 8
        for (int g = 0; g < G; g++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sum[g][v] = load(acc + g * d + j + v * LANES);
        for (int t = 0; t < n; t++) {
            const Element* p = (const Element*)(c.row[t] + to_values) + j;
            if (j == 0) fetch_row(next.row[t], d);
            Floats x[V];
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) x[v] = T::read(p + v * LANES);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) {
                const Floats w = all(S[t * G + g]);
#pragma GCC unroll 8
                for (int v = 0; v < V; v++) sum[g][v] += w * x[v];
            }
        }
#pragma GCC unroll 8
        for (int g = 0; g < G; g++)
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) store(acc + g * d + j + v * LANES, sum[g][v]);
    }

    template <int G>
    static QUIRE_INLINE void values(const Chunk& c, const Chunk& next, int n, int d, const float* S, float* acc,
                                    int64_t to_values) {
        constexpr int REGISTERS = LANES == 16 ? 16 : 8;
        constexpr int V = REGISTERS / G < 1 ? 1 : REGISTERS / G > 4 ? 4 : REGISTERS / G;
        int j = 0;
        for (; j + V * LANES <= d; j += V * LANES) slice<G, V>(c, next, n, d, j, S, acc, to_values);
        for (; j < d; j += LANES) slice<G, 1>(c, next, n, d, j, S, acc, to_values);
    }
};

}  // namespace quire

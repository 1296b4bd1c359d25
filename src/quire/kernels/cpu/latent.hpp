// Absorbed latent attention (MLA): all heads read one latent, which is key and value at once, beside a rotary part.
//
//   query [heads][d + d_rope] ── . [latent | rotary] ──> scores ──> weights ── . latent ──> out [heads][d]
//
// With 16 to 128 heads on one key there are 30 to 240 operations a byte: tokens become floats once a part of the heads, and
// two small products, blocked for registers and the first-level cache, do the rest in float32.
#pragma once
#include "decode.hpp"
#include "gather.hpp"

namespace quire {

constexpr int MAX_LATENT = 1024, MAX_ROTARY = 256;
constexpr int AT_ONCE = 64;     // tokens that are floats at a time
constexpr int PART_HEADS = 32;  // heads whose queries and sums stay in the second-level cache
constexpr int HEADS = 4;        // that share a load of a value
constexpr int TOKENS = LANES >= 8 ? 4 : 2;

struct alignas(64) Line {
    float x[16];
};

// Memory of a thread: floats of AT_ONCE tokens, queries and scores of PART_HEADS heads.
struct LatentBench {
    std::vector<Line> lines;
    float *latent, *rotary, *q, *S;
    void fit(int d, int d_rope) {
        const int64_t sizes[] = {(int64_t)AT_ONCE * d, (int64_t)AT_ONCE * d_rope, (int64_t)PART_HEADS * (d + d_rope),
                                 (int64_t)PART_HEADS * CHUNK};
        const size_t n = (sizes[0] + sizes[1] + sizes[2] + sizes[3]) / 16;
        if (lines.size() < n) lines.resize(n);
        latent = lines.data()->x;
        rotary = latent + sizes[0];
        q = rotary + sizes[1];
        S = q + sizes[2];
    }
};

// ---- tokens as floats, in the basis in which they are stored -----------------------------------------------------------

template <class T>
void rows_as_floats(const quire_field& f, const Chunk& c, int d, float* x) {
    for (int t = c.skip; t < c.n; t++) {
        const typename T::Element* p = (const typename T::Element*)(c.row_block[t] + f.codes) + (int64_t)c.row[t] * d;
        const float scale = f.scaled ? F16::one(halves_at(c.row_block[t], f.scale)[c.row[t]]) : 1.0f;
        for (int j = 0; j < d; j += LANES) store(x + t * d + j, f.scaled ? T::read(p + j) * scale : T::read(p + j));
    }
}

template <int BITS>
void tiles_as_floats(const quire_field& f, const Chunk& c, int d, int block_tokens, float* x) {
    for (int at = 0; at < c.steps(); at++) {
        float* to = x + at * STEP * d;
        unpack<BITS>(c.block[at] + f.codes + (int64_t)c.step[at] * 2 * d * BITS, false, d, to);
        rescale(f, c.block[at], c.step[at] * STEP, d, block_tokens, true, to);
    }
}

inline void as_floats(const quire_field& f, const Chunk& c, int d, int block_tokens, float* x) {
    switch (f.kind) {
        case QUIRE_ROWS_F32: return rows_as_floats<F32>(f, c, d, x);
        case QUIRE_ROWS_BF16: return rows_as_floats<BF16>(f, c, d, x);
        case QUIRE_ROWS_F16: return rows_as_floats<F16>(f, c, d, x);
        case QUIRE_ROWS_E4M3: return rows_as_floats<E4M3>(f, c, d, x);
        case QUIRE_ROWS_E5M2: return rows_as_floats<E5M2>(f, c, d, x);
        case QUIRE_TILES_8: return tiles_as_floats<8>(f, c, d, block_tokens, x);
        case QUIRE_TILES_4: return tiles_as_floats<4>(f, c, d, block_tokens, x);
        case QUIRE_TILES_2: return tiles_as_floats<2>(f, c, d, block_tokens, x);
    }
}

// ---- the two products --------------------------------------------------------------------------------------------------

template <int H>
QUIRE_INLINE void add_products(const float* q, int64_t q_step, const float* k, int d, Floats* sum) {
    for (int j = 0; j < d; j += LANES) {
        Floats x[TOKENS];
#pragma GCC unroll 4
        for (int u = 0; u < TOKENS; u++) x[u] = load(k + u * d + j);
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
            const Floats y = load(q + h * q_step + j);
#pragma GCC unroll 4
            for (int u = 0; u < TOKENS; u++) sum[h * TOKENS + u] += y * x[u];
        }
    }
}

// S[h][t] = q[h] . (latent, rotary)[t] for tokens [0, n), eight at a time while they are in the first-level cache.
inline void score_latents(const LatentBench& m, int heads, int n, int d, int d_rope) {
    constexpr int H = LANES / TOKENS;
    const int64_t q_step = d + d_rope;
    for (int first = 0; first < n; first += 8)
        for (int h = 0; h < heads; h += H)
            for (int t = first; t < std::min(first + 8, n); t += TOKENS) {
                Floats sum[LANES] = {};
                add_products<H>(m.q + h * q_step, q_step, m.latent + (int64_t)t * d, d, sum);
                add_products<H>(m.q + h * q_step + d, q_step, m.rotary + (int64_t)t * d_rope, d_rope, sum);
                store_parts<H>(m.S + h * CHUNK + t, sums(sum), std::make_integer_sequence<int, TOKENS>{});
            }
}

// out[h][j...] += sum over tokens [from, n) of S[h][t] * latent[t][j...] for V vectors of channels.
template <int V>
QUIRE_INLINE void add_latent_slice(const LatentBench& m, int heads, int from, int n, int d, int j, float* out) {
    for (int h = 0; h < heads; h += HEADS) {
        Floats sum[HEADS][V];
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sum[g][v] = load(out + (h + g) * d + j + v * LANES);
        for (int t = from; t < n; t++) {
            Floats x[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) x[v] = load(m.latent + (int64_t)t * d + j + v * LANES);
#pragma GCC unroll 4
            for (int g = 0; g < HEADS; g++) {
                const Floats w = all(m.S[(h + g) * CHUNK + t]);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) sum[g][v] += w * x[v];
            }
        }
#pragma GCC unroll 4
        for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) store(out + (h + g) * d + j + v * LANES, sum[g][v]);
    }
}

inline void add_latents(const LatentBench& m, int heads, int from, int n, int d, float* out) {
    constexpr int V = LANES == 16 ? 4 : 2;
    int j = 0;
    for (; j + V * LANES <= d; j += V * LANES) add_latent_slice<V>(m, heads, from, n, d, j, out);
    for (; j < d; j += LANES) add_latent_slice<1>(m, heads, from, n, d, j, out);
}

// ---- one piece for some heads ------------------------------------------------------------------------------------------

template <class T>
QUIRE_INLINE void read_floats(const void* p, int64_t at, int n, float factor, float* x) {
    for (int j = 0; j < n; j++) x[j] = T::one(((const typename T::Element*)p + at)[j]) * factor;
}

// `room` is top [n], total [n], out [n][d] for n heads, a multiple of HEADS; those behind `have` are zeros.
inline void run_latents(const quire_latent_args& a, const Piece& piece, int first_head, int have, int n, float* room) {
    thread_local LatentBench m;
    m.fit(a.d, a.d_rope);
    const quire_form& f = a.forms[piece.segment->form];
    const int width = a.d + a.d_rope;
    float *top = room, *total = room + n, *out = room + 2 * n;
    std::fill(top, top + n, -INFINITY);
    std::fill(total, total + (int64_t)n * (a.d + 1), 0.0f);
    if (f.heads[0] < 0) return;
    std::fill(m.q, m.q + n * width, 0.0f);
    for (int h = 0; h < have; h++) {
        const int64_t at = piece.segment->query * a.q_row + (first_head + h) * a.q_head;
        const float factor = a.scale * LOG2E;
        float* q = m.q + h * width;
        if (a.dtype == QUIRE_F32)
            read_floats<F32>(a.q, at, width, factor, q);
        else if (a.dtype == QUIRE_BF16)
            read_floats<BF16>(a.q, at, width, factor, q);
        else
            read_floats<F16>(a.q, at, width, factor, q);
        if (f.k.turned) turn_rows(q, a.d, f.k.turned);
        if (f.v.turned) turn_rows(q + a.d, a.d_rope, f.v.turned);
    }
    const uint8_t* base = a.arena + f.first + f.heads[0] * f.tile_bytes;
    const bool packed = f.k.kind >= QUIRE_TILES_8 || f.v.kind >= QUIRE_TILES_8;
    Chunk c;
    for (int lo = packed ? piece.lo / STEP * STEP : piece.lo; lo < piece.hi; lo += AT_ONCE) {
        c.locate(base, piece.segment->table, f.block_tokens, lo, std::min(AT_ONCE, piece.hi - lo));
        c.skip = std::max(0, piece.lo - lo);
        as_floats(f.k, c, a.d, f.block_tokens, m.latent);
        as_floats(f.v, c, a.d_rope, f.block_tokens, m.rotary);
        score_latents(m, n, c.n, a.d, a.d_rope);
        const int whole = (c.n + LANES - 1) / LANES * LANES;
        for (int h = 0; h < n; h++)
            weigh<1>(m.S + h * CHUNK, c.skip, c.n, whole, a.d, State{top + h, total + h, out + (int64_t)h * a.d});
        add_latents(m, n, c.skip, c.n, a.d, out);
    }
    if (f.k.turned)
        for (int h = 0; h < have; h++) turn_rows(out + (int64_t)h * a.d, a.d, f.k.turned);
}

template <class T>
QUIRE_INLINE void write_floats(void* p, int64_t at, int n, float factor, const float* x) {
    for (int j = 0; j < n; j++) ((typename T::Element*)p + at)[j] = T::narrow(x[j] * factor);
}

// A head's pieces, first to last, into the first that saw anything; `room` is that of the first piece and the head.
inline void merge_latents(const quire_latent_args& a, float* room, int64_t step, int n_pieces, int n, int g, int64_t at) {
    float *sum = nullptr, top = -INFINITY, total = 0.0f;
    for (int i = 0; i < n_pieces; i++) {
        float *p = room + i * step, *out = p + 2 * n + (int64_t)g * a.d;
        const float its_top = p[g], its_total = p[n + g];
        if (its_total == 0.0f) continue;
        if (!sum) {
            sum = out;
            top = its_top;
            total = its_total;
            continue;
        }
        const float high = its_top > top ? its_top : top, mine = std::exp2(top - high), its = std::exp2(its_top - high);
        for (int j = 0; j < a.d; j += LANES) store(sum + j, load(sum + j) * mine + load(out + j) * its);
        total = total * mine + its_total * its;
        top = high;
    }
    if (!sum) {
        sum = room + 2 * n + (int64_t)g * a.d;  // zeros
        total = 1.0f;
    }
    if (a.dtype == QUIRE_F32) return write_floats<F32>(a.out, at, a.d, 1.0f / total, sum);
    if (a.dtype == QUIRE_BF16) return write_floats<BF16>(a.out, at, a.d, 1.0f / total, sum);
    write_floats<F16>(a.out, at, a.d, 1.0f / total, sum);
}

inline int latent(const quire_latent_args& a) {
    thread_local std::vector<Piece> pieces;
    thread_local std::vector<int> firsts;
    thread_local std::vector<Line> lines;
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
    const int n_pieces = (int)pieces.size(), queries = (int)firsts.size() - 1;
    // Heads do not know of each other: how they are parted changes no result.
    int part = std::min(PART_HEADS, (a.heads + HEADS - 1) / HEADS * HEADS);
    while (part > 2 * HEADS && part % (2 * HEADS) == 0 && n_pieces * ((a.heads + part - 1) / part) < 2 * a.threads) part /= 2;
    const int parts = (a.heads + part - 1) / part;
    const int64_t step = ((int64_t)part * (a.d + 2) + 15) / 16 * 16;
    if ((int64_t)lines.size() < n_pieces * parts * step / 16) lines.resize(n_pieces * parts * step / 16);
    float* room = lines.data()->x;
    const Piece* all_pieces = pieces.data();
    const int* first = firsts.data();
    const bool alone = a.threads < 2 || slots * a.heads * a.d < 400000;
#pragma omp parallel num_threads(alone ? 1 : a.threads) if (!alone)
    {
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < n_pieces * parts; i++) {  // a part's pieces side by side
            const int begin = i / n_pieces * part;
            run_latents(a, all_pieces[i % n_pieces], begin, std::min(part, a.heads - begin), part, room + i * step);
        }
#pragma omp for schedule(static)
        for (int i = 0; i < queries * a.heads; i++) {
            const int query = i / a.heads, head = i % a.heads, begin = first[query];
            merge_latents(a, room + ((int64_t)(head / part) * n_pieces + begin) * step, step, first[query + 1] - begin, part,
                          head % part, all_pieces[begin].segment->query * a.out_row + head * a.out_head);
        }
    }
    return 0;
}

}  // namespace quire

// Products in the processor's matrix unit (AMX): sixteen tokens, or channels, times all queries of a KV head at once.
//
//   codes  left: whole numbers as two signed bytes, two rows a head; right: codes as they lie, or unpacked into bytes.
//          The same whole numbers as in tiles.hpp, so that results are equal bit for bit
//   rows   of bfloat16, and of what is exact in it: a float is split into three bfloat16 that add up to it. Keys are left
//          as they lie and queries right, three columns a head; values are right, in pairs of tokens, and weights left
#pragma once
#include "rows.hpp"
#include "tiles.hpp"
#include "unit.hpp"

#if defined(QUIRE_MATRIX)
namespace quire {

// ---- codes -------------------------------------------------------------------------------------------------------------

template <int G>
QUIRE_INLINE const Shape& codes_shape(int words) {
    return words == 16 ? SHAPE<2 * G, 16, 16> : words == 8 ? SHAPE<2 * G, 16, 8> : SHAPE<2 * G, 16, 4>;
}

// The most bytes at once that a width is made of.
constexpr int slab_of(int width) { return width % 64 == 0 ? 64 : width % 32 == 0 ? 32 : 16; }

// One line of packed codes to 8 / BITS lines of bytes, `step` bytes apart.
template <int BITS>
QUIRE_INLINE void unpack(const uint8_t* from, uint8_t* to, int step) {
    const Words x = words(from);
    constexpr uint32_t mask = ((1u << BITS) - 1) * 0x01010101u;
#pragma GCC unroll 4
    for (int e = 0; e < 8 / BITS; e++) *(WordsAt*)(to + e * step) = (x >> (BITS * e)) & mask;
}

// The sums of a head, of both its bytes.
QUIRE_INLINE Ints both(const int32_t* sums, int g) {
    typedef int32_t At __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
    const int32_t* p = sums + 2 * g * LANES;
    return (*(const At*)p << 8) + *(const At*)(p + LANES);
}

// S[g * CHUNK + t] = q[g] . k[t] for the chunk's slots. Fetches their values.
template <int BITS, int G>
void matrix_scores(MatrixUnit& unit, const quire_form& form, const Chunk& c, int d, Query& q, float* S) {
    const quire_field& f = form.k;
    const bool by_channel = f.scaled == QUIRE_BY_CHANNEL;
    const int groups = groups_of(f, d), width = d / groups, slab = slab_of(width), lines = slab * BITS / 32, steps = c.steps();
    alignas(64) uint8_t room[BITS < 8 ? SUMS * 16 * 64 : 1];
    alignas(64) int32_t sums[SUMS][2 * G * LANES];
    unit.shape(codes_shape<G>(slab / 4));
    for (int at = 0, n; at < steps; at += n) {
        n = std::min(SUMS, steps - at);
        if (by_channel) {
            fold_scales<BITS, G>(f, c.block[at], c.step[at] * STEP, d, q);
            for (int i = 1; i < n; i++)
                if (!shares_scales(f, c, at, at + i)) n = i;
        }
        Stretch values[SUMS];
        for (int i = 0; i < n; i++) values[i] = stretch_of(form.v, c, at + i, d);
        const int few = values[0].over(d / slab);
        for (int r = 0; r < groups; r++) {
            for_sums(n, [&](auto i) { tile_zero<i>(); });
            for (int j = r * width; j < (r + 1) * width; j += slab) {
                const uint8_t* right[SUMS];
                for (int i = 0; i < n; i++) {
                    right[i] = c.block[at + i] + f.codes + (int64_t)c.step[at + i] * 2 * d * BITS + j * 2 * BITS;
                    values[i].fetch(few);
                    if constexpr (BITS < 8) {
                        for (int line = 0; line < lines; line++)
                            unpack<BITS>(right[i] + line * 64, room + (i * 16 + line * (8 / BITS)) * 64, 64);
                        right[i] = room + i * 16 * 64;
                    }
                }
                tile_load<LEFT>(q.whole.at + j, d);
                for_sums(n, [&](auto i) {
                    constexpr int R = RIGHT + i % 3;
                    tile_load<R>(right[i], 64);
                    tile_codes<i, LEFT, R>();
                });
            }
            for_sums(n, [&](auto i) { tile_store<i>(sums[i], LANES * 4); });
            for (int i = 0; i < n; i++) {
                Scales s{};
                if (!by_channel) s = scales_at<BITS>(f, c.block[at + i], c.step[at + i] * STEP, r, form.block_tokens);
#pragma GCC unroll 8
                for (int g = 0; g < G; g++) {
                    float* to = S + g * CHUNK + (at + i) * STEP;
                    store(to, scored<BITS>(both(sums[i], g), s, by_channel, q, g, r, r ? load(to) : Floats{}));
                }
            }
        }
    }
}

// Slots of a chunk that lie side by side in their block, and as many in every chunk: 64, 32 or 16.
QUIRE_INLINE int side_by_side(const Chunk& c, int block_tokens) {
    for (int n = 4; n > 1; n /= 2) {
        bool fits = block_tokens % (n * STEP) == 0;
        for (int at = 0; at < c.steps() && fits; at++)
            fits = at % n ? c.block[at] == c.block[at - 1] && c.step[at] == c.step[at - 1] + 1 : c.step[at] % n == 0;
        if (fits) return n * STEP;
    }
    return STEP;
}

// acc[g] += sum over t of S[g][t] * v[t], of values that are not scaled by channel. Fetches the next chunk's keys.
template <int BITS, int G>
void matrix_values(MatrixUnit& unit, const quire_form& form, const Chunk& c, int d, const float* S, float* acc,
                   const Ahead& next) {
    const quire_field& f = form.v;
    alignas(64) Bytes2<CHUNK> whole;
    alignas(64) uint8_t room[BITS < 8 ? SUMS * 16 * 64 : 1];
    alignas(64) int32_t sums[SUMS][2 * G * LANES];
    Scaled<G> by;
    const int groups = groups_of(f, d), width = d / groups, slots = c.steps() * STEP;
    const int slab = BITS < 8 ? 64 : side_by_side(c, form.block_tokens);
    for (int r = 0; r < groups; r++) {
        scale_weights<BITS, G>(f, c, r, form.block_tokens, S, by, [&](int g, int t, Ints v) { whole.put(g, CHUNK, t, v); });
        for (int t = slots; t % slab; t += STEP)
            for (int g = 0; g < G; g++) whole.put(g, CHUNK, t, Ints{});
        unit.shape(codes_shape<G>(slab / 4));
        for (int j = r * width, n; j < (r + 1) * width; j += n * LANES) {
            n = std::min(SUMS, ((r + 1) * width - j) / LANES);
            const Ahead::Pass pass = next.pass(j / (SUMS * LANES), (d + SUMS * LANES - 1) / (SUMS * LANES));
            for_sums(n, [&](auto i) { tile_zero<i>(); });
            for (int t = 0; t < slots; t += slab) {
                const uint8_t* right = room;
                int64_t stride = 64, apart = 16 * 64;
                for (int at = t / STEP; at < std::min(t + slab, slots) / STEP; at++) {
                    pass.fetch(at);
                    if constexpr (BITS < 8) {
                        const uint8_t* from = c.block[at] + f.codes + (int64_t)c.step[at] * 2 * d * BITS + j * 4;
                        uint8_t* to = room + (at * STEP - t) / 4 * 64;
                        for (int line = 0; line < BITS / 2; line++, from += d * 4, to += 8 / BITS * 64)
                            for (int i = 0; i < n; i++) unpack<BITS>(from + i * 64, to + i * 16 * 64, 64);
                    }
                }
                if constexpr (BITS == 8) {
                    right = c.block[t / STEP] + f.codes + (int64_t)c.step[t / STEP] * 2 * d * BITS + j * 4;
                    stride = d * 4;
                    apart = 64;
                }
                tile_load<LEFT>(whole.at + t, CHUNK);
                for_sums(n, [&](auto i) {
                    constexpr int R = RIGHT + i % 3;
                    tile_load<R>(right + i * apart, stride);
                    tile_codes<i, LEFT, R>();
                });
            }
            for_sums(n, [&](auto i) { tile_store<i>(sums[i], LANES * 4); });
            for (int i = 0; i < n; i++)
#pragma GCC unroll 8
                for (int g = 0; g < G; g++)
                    add_sum<BITS, G>(both(sums[i], g), by, g, acc + g * d + j + i * LANES);
        }
    }
}

// ---- rows --------------------------------------------------------------------------------------------------------------

constexpr int PARTS3 = 3;  // bfloat16 numbers that a float is made of

// Cut, not rounded: what is left is exact, and nothing grows beyond the largest number.
QUIRE_INLINE void split3(Floats x, Words (&part)[PARTS3]) {
    for (int p = 0; p < PARTS3; p++) {
        part[p] = (Words)x & 0xffff0000u;
        x -= (Floats)part[p];
    }
}

// Heads at once: three columns each, sixteen at most.
template <int G>
constexpr int HEADS_IN_TILE = G < 4 ? G : 4;

// Queries as right sides: [d / 2 pairs][16 columns][2], the heads' first parts, their second, their third.
template <int G>
void split_rows(const float* q, int d, uint16_t* right) {
    constexpr int N = HEADS_IN_TILE<G>;
    for (int half = 0; half < G / N; half++, right += d * 16)
        for (int g = 0; g < N; g++)
            for (int j = 0; j < d; j += LANES) {
                Words part[PARTS3];
                split3(load(q + (half * N + g) * d + j), part);
                for (int p = 0; p < PARTS3; p++) {
                    const __m512i x = (__m512i)part[p];  // a channel's upper half beside the next one's
                    const __m256i pairs = _mm512_cvtepi64_epi32(_mm512_or_si512(_mm512_srli_epi64(x, 16), _mm512_srli_epi64(x, 32)));
                    alignas(32) uint32_t pair[LANES / 2];
                    _mm256_store_si256((__m256i*)pair, pairs);
                    for (int i = 0; i < LANES / 2; i++) memcpy(right + ((j / 2 + i) * 16 + p * N + g) * 2, pair + i, 4);
                }
            }
}

// [16 tokens][3 * N parts], a line a token, to S[g * CHUNK + t].
template <int N>
QUIRE_INLINE void store_scores(const float* sums, float* S) {
    if constexpr (N == 4) {
        __m512 four[4];  // tokens of four heads each
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            __m128 x[4];
#pragma GCC unroll 4
            for (int t = 0; t < 4; t++) {
                const float* p = sums + (4 * i + t) * 16;
                x[t] = _mm_add_ps(_mm_load_ps(p), _mm_add_ps(_mm_load_ps(p + 4), _mm_load_ps(p + 8)));
            }
            const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(x[0]), x[1], 1);
            const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(x[2]), x[3], 1);
            four[i] = _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
        }
        const __m512i first = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
        const __m512i second = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
        const __m512 a = _mm512_permutex2var_ps(four[0], first, four[1]), b = _mm512_permutex2var_ps(four[2], first, four[3]);
        const __m512 e = _mm512_permutex2var_ps(four[0], second, four[1]), h = _mm512_permutex2var_ps(four[2], second, four[3]);
        store(S, (Floats)_mm512_shuffle_f32x4(a, b, 0x44));
        store(S + CHUNK, (Floats)_mm512_shuffle_f32x4(a, b, 0xee));
        store(S + 2 * CHUNK, (Floats)_mm512_shuffle_f32x4(e, h, 0x44));
        store(S + 3 * CHUNK, (Floats)_mm512_shuffle_f32x4(e, h, 0xee));
    } else {
        const __m512i rows = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
        for (int g = 0; g < N; g++) {
            __m512 sum = _mm512_i32gather_ps(rows, sums + g, 4);
            for (int p = 1; p < PARTS3; p++) sum = _mm512_add_ps(sum, _mm512_i32gather_ps(rows, sums + p * N + g, 4));
            store(S + g * CHUNK, (Floats)sum);
        }
    }
}

// Sixteen rows of keys: as they lie where they lie side by side, else copied to `room`.
QUIRE_INLINE const uint8_t* rows_at(const quire_field& f, const Chunk& c, int at, int d, int block_tokens, uint8_t* room) {
    const int t = at * STEP, bytes = 2 * d;
    const uint8_t* first = c.row_block[t] + f.codes + (int64_t)c.row[t] * bytes;
    if (c.row[t] + STEP <= block_tokens) return first;
    for (int i = 0; i < STEP; i++) {
        const int from = std::min(t + i, c.n - 1);
        memcpy(room + i * bytes, c.row_block[from] + f.codes + (int64_t)c.row[from] * bytes, bytes);
    }
    return room;
}

// Channels that are multiplied at once.
constexpr int depth_of(int d) { return d % 32 ? 16 : 32; }

// S[g * CHUNK + t] = q[g] . k[t] for the chunk's slots, of rows of bfloat16. Fetches their values.
template <int G>
void matrix_score_rows(MatrixUnit& unit, const quire_form& form, const Chunk& c, int d, const uint16_t* right, float* S) {
    constexpr int N = HEADS_IN_TILE<G>;
    const int depth = depth_of(d), steps = c.steps();
    alignas(64) uint8_t room[SUMS][STEP * MAX_DIM * 2];
    alignas(64) float sums[SUMS][STEP * 16];
    unit.shape(depth == 32 ? SHAPE<STEP, PARTS3 * N, 16> : SHAPE<STEP, PARTS3 * N, 8>);
    for (int at = 0, n; at < steps; at += n) {
        n = std::min(SUMS, steps - at);
        const uint8_t* left[SUMS];
        Stretch values[SUMS];
        for (int i = 0; i < n; i++) {
            left[i] = rows_at(form.k, c, at + i, d, form.block_tokens, room[i]);
            values[i] = stretch_of(form.v, c, at + i, d);
        }
        const int few = values[0].over(d / depth * (G / N));
        for (int half = 0; half < G / N; half++) {
            for_sums(n, [&](auto i) { tile_zero<i>(); });
            for (int j = 0; j < d; j += depth) {
                tile_load<RIGHT>(right + half * d * 16 + j * 16, 64);
                for_sums(n, [&](auto i) {
                    values[i].fetch(few);
                    tile_load<LEFT>(left[i] + j * 2, 2 * d);
                    tile_halves<i, LEFT, RIGHT>();
                });
            }
            for_sums(n, [&](auto i) { tile_store<i>(sums[i], 64); });
            for (int i = 0; i < n; i++) store_scores<N>(sums[i], S + half * N * CHUNK + (at + i) * STEP);
        }
    }
}

// Two rows of 32 channels, word for word: channels 0-3, 8-11, 16-19, 24-27 to `low`, the others to `high`.
QUIRE_INLINE void pair_rows(const uint8_t* a, const uint8_t* b, uint8_t* low, uint8_t* high) {
    const __m512i x = a ? _mm512_loadu_si512(a) : _mm512_setzero_si512(), y = b ? _mm512_loadu_si512(b) : _mm512_setzero_si512();
    _mm512_store_si512(low, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(high, _mm512_unpackhi_epi16(x, y));
}

// acc[g] += sum over t of S[g][t] * v[t], of rows of bfloat16. Fetches the next chunk's keys.
template <int G>
void matrix_add_rows(MatrixUnit& unit, const quire_form& form, const Chunk& c, int d, float* S, float* acc, const Ahead& next) {
    constexpr int N = HEADS_IN_TILE<G>, DEPTH = 32;
    const quire_field& f = form.v;
    alignas(64) uint16_t left[G / N][PARTS3 * N][CHUNK];
    alignas(64) uint8_t room[SUMS][16 * 64];
    alignas(64) float sums[SUMS][PARTS3 * N * LANES];
    const int slots = (c.n + DEPTH - 1) / DEPTH * DEPTH;
    for (int g = 0; g < G; g++)
        for (int t = 0; t < slots; t += LANES) {
            Words part[PARTS3];
            split3(t < c.steps() * STEP ? load(S + g * CHUNK + t) : Floats{}, part);
            for (int p = 0; p < PARTS3; p++)
                _mm256_store_si256((__m256i*)(left[g / N][p * N + g % N] + t), _mm512_cvtepi32_epi16((__m512i)(part[p] >> 16)));
        }
    const uint8_t* rows[CHUNK];
    for (int t = 0; t < slots; t++)
        rows[t] = t < c.skip || t >= c.n ? nullptr : c.row_block[t] + f.codes + (int64_t)c.row[t] * d * 2;
    unit.shape(SHAPE<PARTS3 * N, 16, 16>);
    const int wide = d / 32 * 32;
    for (int j = 0, n; j < wide; j += n * LANES) {
        n = std::min(SUMS, (wide - j) / LANES);
        const Ahead::Pass pass = next.pass(j / (SUMS * LANES), (d + SUMS * LANES - 1) / (SUMS * LANES));
        for (int half = 0; half < G / N; half++) {
            for_sums(n, [&](auto i) { tile_zero<i>(); });
            for (int t = 0; t < slots; t += DEPTH) {
                for (int u = 0; u < DEPTH; u += 2) {
                    if (u % STEP == 0 && !half) pass.fetch((t + u) / STEP);
                    const uint8_t *a = rows[t + u], *b = rows[t + u + 1];
                    for (int i = 0; i < n; i += 2)
                        pair_rows(a ? a + (j + i * LANES) * 2 : a, b ? b + (j + i * LANES) * 2 : b, room[i] + u * 32,
                                  room[i + 1] + u * 32);
                }
                tile_load<LEFT>(left[half][0] + t, CHUNK * 2);
                for_sums(n, [&](auto i) {
                    constexpr int R = RIGHT + i % 3;
                    tile_load<R>(room[i], 64);
                    tile_halves<i, LEFT, R>();
                });
            }
            for_sums(n, [&](auto i) { tile_store<i>(sums[i], 64); });
            const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
            const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
            for (int i = 0; i < n; i += 2)
                for (int g = 0; g < N; g++) {
                    Floats low = {}, high = {};
                    for (int p = PARTS3 - 1; p >= 0; p--) {
                        low += load(sums[i] + (p * N + g) * LANES);
                        high += load(sums[i + 1] + (p * N + g) * LANES);
                    }
                    float* out = acc + (half * N + g) * d + j + i * LANES;
                    store(out, load(out) + (Floats)_mm512_permutex2var_ps((__m512)low, first, (__m512)high));
                    store(out + LANES, load(out + LANES) + (Floats)_mm512_permutex2var_ps((__m512)low, second, (__m512)high));
                }
        }
    }
    for (int j = wide; j < d; j += LANES) add_slice<BF16, G, 1>(f, c, d, j, S, acc, next);
}

// ---- what the unit serves ----------------------------------------------------------------------------------------------

template <int G>
QUIRE_INLINE void matrix_prepare(const quire_form& f, int d, Query& q) {
    if (f.k.kind == QUIRE_ROWS_BF16) split_rows<G>(q.q, d, q.parts);
}

// Scores of a chunk's slots; false, and nothing done, where the keys' form is not the unit's.
template <int G>
QUIRE_INLINE bool matrix_score(MatrixUnit& unit, const quire_form& f, const Chunk& c, int d, Query& q, float* S) {
    switch (f.k.kind) {
        case QUIRE_TILES_8: return matrix_scores<8, G>(unit, f, c, d, q, S), true;
        case QUIRE_TILES_4: return matrix_scores<4, G>(unit, f, c, d, q, S), true;
        case QUIRE_TILES_2: return matrix_scores<2, G>(unit, f, c, d, q, S), true;
        case QUIRE_ROWS_BF16: return matrix_score_rows<G>(unit, f, c, d, q.parts, S), true;
        default: return false;
    }
}

template <int G>
QUIRE_INLINE bool matrix_add(MatrixUnit& unit, const quire_form& f, const Chunk& c, int d, float* S, float* acc, const Ahead& next) {
    if (f.v.kind == QUIRE_ROWS_BF16) return matrix_add_rows<G>(unit, f, c, d, S, acc, next), true;
    if (f.v.scaled == QUIRE_BY_CHANNEL) return false;
    switch (f.v.kind) {
        case QUIRE_TILES_8: return matrix_values<8, G>(unit, f, c, d, S, acc, next), true;
        case QUIRE_TILES_4: return matrix_values<4, G>(unit, f, c, d, S, acc, next), true;
        case QUIRE_TILES_2: return matrix_values<2, G>(unit, f, c, d, S, acc, next), true;
        default: return false;
    }
}

}  // namespace quire

#else
namespace quire {

struct MatrixUnit {};
template <int G>
QUIRE_INLINE void matrix_prepare(const quire_form&, int, Query&) {}
template <int G>
QUIRE_INLINE bool matrix_score(MatrixUnit&, const quire_form&, const Chunk&, int, Query&, float*) {
    return false;
}
template <int G>
QUIRE_INLINE bool matrix_add(MatrixUnit&, const quire_form&, const Chunk&, int, float*, float*, const Ahead&) {
    return false;
}

}  // namespace quire
#endif

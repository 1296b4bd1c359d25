// Blocks of a field decoded into rows of floats, in the model's basis: what chunks of queries multiply with.
#pragma once
#include "chunk.hpp"
#include "tiles.hpp"

namespace quire {

// Codes of sixteen tokens, [16][d], as unsigned numbers.
template <int BITS>
void unpack(const uint8_t* tile, bool values, int d, float* x) {
    constexpr int SIDE = 32 / BITS;  // neighbours in a lane: channels of a key, tokens of a value
    constexpr uint32_t MASK = (1u << BITS) - 1;
    const uint32_t* lane = (const uint32_t*)tile;
    if (values) {
        for (int t = 0; t < STEP; t += SIDE, lane += d)
            for (int i = 0; i < SIDE; i++) {
                const int shift = i % 4 * 8 + i / 4 * BITS;
                for (int j = 0; j < d; j++) x[(t + i) * d + j] = (float)(int)((lane[j] >> shift) & MASK);
            }
    } else {
        for (int j = 0; j < d; j += SIDE, lane += STEP)
            for (int t = 0; t < STEP; t++)
                for (int i = 0; i < SIDE; i++)
                    x[t * d + j + i] = (float)(int)((lane[t] >> (i % 4 * 8 + i / 4 * BITS)) & MASK);
    }
}

// Codes times scales, plus minima: the sixteen tokens from `slot` on.
inline void rescale(const quire_field& f, const uint8_t* tile, int slot, int d, int block_tokens, bool packed, float* x) {
    const float zero = packed && f.min < 0 ? -128.0f : 0.0f;
    for (int t = 0; t < STEP; t++)
        for (int j = 0; j < d;) {
            int64_t at = 0;
            int run = d;
            if (f.scaled == QUIRE_BY_TOKEN) {
                at = (int64_t)(j / f.group) * block_tokens + slot + t;
                run = f.group;
            } else if (f.scaled == QUIRE_BY_CHANNEL) {
                const int64_t row = (int64_t)((slot + t) / f.group) * d;
                const uint16_t *scale = halves_at(tile, f.scale) + row, *least = halves_at(tile, f.min) + row;
                for (; j < d; j += LANES) {
                    float* p = x + t * d + j;
                    const Floats low = f.min < 0 ? Floats{} : F16::read(least + j);
                    store(p, (load(p) + zero) * F16::read(scale + j) + low);
                }
                break;
            }
            const float scale = F16::one(halves_at(tile, f.scale)[at]);
            const float low = f.min < 0 ? 0.0f : F16::one(halves_at(tile, f.min)[at]);
            for (int i = j; i < j + run; i++) x[t * d + i] = (x[t * d + i] + zero) * scale + low;
            j += run;
        }
}

template <class T>
QUIRE_INLINE void read_rows(const uint8_t* p, int n, float* x) {
    for (int j = 0; j < n; j++) x[j] = T::one(((const typename T::Element*)p)[j]);
}

template <class T>
QUIRE_INLINE void write_rows(const float* x, int n, uint8_t* p) {
    for (int j = 0; j < n; j++) ((typename T::Element*)p)[j] = T::narrow(x[j]);
}

// Sixteen slots of one head's tile.
inline void decode_step(const quire_gather_args& a, const uint8_t* tile, int slot, int count, uint8_t* out) {
    alignas(64) float x[STEP * MAX_DIM];
    const quire_field& f = a.field;
    const int d = a.d;
    const bool packed = f.kind >= QUIRE_TILES_8;
    const uint8_t* p = tile + f.codes + (packed ? (int64_t)slot * d * bits_of(f.kind) / 8 : (int64_t)slot * row_bytes(f.kind, d));
    switch (f.kind) {
        case QUIRE_ROWS_F32: read_rows<F32>(p, count * d, x); break;
        case QUIRE_ROWS_BF16: read_rows<BF16>(p, count * d, x); break;
        case QUIRE_ROWS_F16: read_rows<F16>(p, count * d, x); break;
        case QUIRE_ROWS_E4M3: read_rows<E4M3>(p, count * d, x); break;
        case QUIRE_ROWS_E5M2: read_rows<E5M2>(p, count * d, x); break;
        case QUIRE_TILES_8: unpack<8>(p, a.values, d, x); break;
        case QUIRE_TILES_4: unpack<4>(p, a.values, d, x); break;
        case QUIRE_TILES_2: unpack<2>(p, a.values, d, x); break;
    }
    if (f.scaled) rescale(f, tile, slot, d, a.block_tokens, packed, x);
    if (f.turned) turn_rows(x, count * d, f.turned);
    switch (a.dtype) {
        case QUIRE_F32: return write_rows<F32>(x, count * d, out);
        case QUIRE_BF16: return write_rows<BF16>(x, count * d, out);
        default: return write_rows<F16>(x, count * d, out);
    }
}

inline int gather(const quire_gather_args& a) {
    const int64_t row = (int64_t)a.d * (a.dtype == QUIRE_F32 ? 4 : 2), block = row * a.block_tokens;
    const bool alone = a.threads < 2 || (int64_t)a.n_rows * a.n_blocks * a.n_heads * a.block_tokens * a.d < 100000;
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : a.threads) if (!alone)
    for (int64_t i = 0; i < (int64_t)a.n_rows * a.n_heads * a.n_blocks; i++) {
        const int64_t b = i % a.n_blocks, h = i / a.n_blocks % a.n_heads, r = i / a.n_blocks / a.n_heads;
        const uint8_t* tile = a.arena + a.units[r * a.n_blocks + b] * 64 + a.first + h * a.tile_bytes;
        for (int slot = 0; slot < a.block_tokens; slot += STEP)
            decode_step(a, tile, slot, std::min(STEP, a.block_tokens - slot), (uint8_t*)a.out + i * block + slot * row);
    }
    return 0;
}

}  // namespace quire

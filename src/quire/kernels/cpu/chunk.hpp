// What is at hand together: up to CHUNK slots of a block table, in steps of sixteen, for one KV head.
#pragma once
#include "quire_cpu.h"
#include "vec.hpp"

namespace quire {

constexpr int STEP = 16;     // slots of a step: the tokens of a packed tile
constexpr int CHUNK = 128;   // slots whose scores are at hand together
constexpr int MAX_HEADS = LANES < 8 ? LANES : 8;
constexpr int MAX_DIM = 256;

// Slots [lo, lo + n) of a table. `block` and `step` say where each step's tile lies; `slot` is each slot's place in its
// block, which rows need, as their slots may begin anywhere.
struct Chunk {
    int n = 0;
    int skip = 0;  // slots before this one are there to begin at a tile, and not read
    const uint8_t* block[CHUNK / STEP];
    int step[CHUNK / STEP];
    const uint8_t* row_block[CHUNK + LANES];
    int row[CHUNK + LANES];

    int steps() const { return (n + STEP - 1) / STEP; }

    // Tiles begin at multiples of STEP, and so must `lo` where a field is packed.
    void locate(const uint8_t* base, const int64_t* table, int block_tokens, int lo, int count) {
        n = count;
        skip = 0;
        for (int i = 0; i < n;) {
            const int slot = lo + i, in = slot % block_tokens;
            const int run = block_tokens - in < n - i ? block_tokens - in : n - i;
            const uint8_t* first = base + table[slot / block_tokens] * 64;
            for (int j = 0; j < run; j++) {
                row_block[i + j] = first;
                row[i + j] = in + j;
                if ((i + j) % STEP == 0) {
                    block[(i + j) / STEP] = first;
                    step[(i + j) / STEP] = (in + j) / STEP;
                }
            }
            i += run;
        }
        for (int i = n; i < n + LANES && n; i++) {
            row_block[i] = row_block[n - 1];
            row[i] = row[n - 1];
        }
    }
};

constexpr int bits_of(int kind) { return kind == QUIRE_TILES_8 ? 8 : kind == QUIRE_TILES_4 ? 4 : 2; }
constexpr int row_bytes(int kind, int d) {
    return kind == QUIRE_ROWS_F32 ? 4 * d : kind <= QUIRE_ROWS_F16 ? 2 * d : d;
}

// Fetches one step of a field: sixteen rows, or one packed tile.
QUIRE_INLINE void fetch_step(const quire_field& f, const Chunk& c, int at, int d) {
    if (f.kind >= QUIRE_TILES_8) {
        const int bytes = 2 * d * bits_of(f.kind);
        const uint8_t* p = c.block[at] + f.codes + (int64_t)c.step[at] * bytes;
        for (int b = 0; b < bytes; b += 64) fetch(p + b);
        return;
    }
    const int bytes = row_bytes(f.kind, d), stop = c.n < (at + 1) * STEP ? c.n : (at + 1) * STEP;
    for (int i = at * STEP; i < stop; i++) {
        const uint8_t* p = c.row_block[i] + f.codes + (int64_t)c.row[i] * bytes;
        for (int b = 0; b < bytes; b += 64) fetch(p + b);
    }
}

// The keys that are fetched while a chunk's values are added: those of the next one.
struct Ahead {
    const quire_field& keys;
    const Chunk& chunk;
    int d;
    QUIRE_INLINE void fetch(int at) const {
        if (at < chunk.steps()) fetch_step(keys, chunk, at, d);
    }
};

// One value's worth of scales in float16.
QUIRE_INLINE const uint16_t* halves_at(const uint8_t* block, int64_t offset) { return (const uint16_t*)(block + offset); }

}  // namespace quire

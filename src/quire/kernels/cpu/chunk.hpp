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

// Memory whose lines are fetched a few at a time while others are worked on: many at once would wait for one another.
struct Stretch {
    const uint8_t* at = nullptr;
    int lines = 0;

    // The next few of them.
    QUIRE_INLINE void fetch(int few) {
        if (few > lines) few = lines;
        for (int i = 0; i < few; i++) quire::fetch(at + i * 64);
        at += few * 64;
        lines -= few;
    }
    QUIRE_INLINE Stretch from(int line) const { return line < lines ? Stretch{at + line * 64, lines - line} : Stretch{}; }
    // How many at a time, where there are so many times.
    QUIRE_INLINE int over(int times) const { return (lines + times - 1) / times; }
};

// One step of a field: sixteen rows, or one packed tile. Rows in more than one block are taken to lie in the first.
QUIRE_INLINE int step_bytes(const quire_field& f, int d) {
    return f.kind >= QUIRE_TILES_8 ? 2 * d * bits_of(f.kind) : STEP * row_bytes(f.kind, d);
}
QUIRE_INLINE Stretch stretch_of(const quire_field& f, const Chunk& c, int at, int d) {
    if (at >= c.steps()) return {};
    const int bytes = step_bytes(f, d), before = f.kind >= QUIRE_TILES_8 ? c.step[at] * bytes : c.row[at * STEP] * (bytes / STEP);
    return {c.block[at] + f.codes + before, bytes / 64};
}

// The keys that are fetched while a chunk's values are added, a part of every step with each pass over the chunk.
struct Ahead {
    const quire_field& keys;
    const Chunk& chunk;
    int d;
    struct Pass {
        const Ahead& ahead;
        int first, few;
        QUIRE_INLINE void fetch(int at) const {
            stretch_of(ahead.keys, ahead.chunk, at, ahead.d).from(first).fetch(few);
        }
    };
    QUIRE_INLINE Pass pass(int i, int n) const {
        const int few = Stretch{nullptr, step_bytes(keys, d) / 64}.over(n);
        return {*this, i * few, few};
    }
};

// One value's worth of scales in float16.
QUIRE_INLINE const uint16_t* halves_at(const uint8_t* block, int64_t offset) { return (const uint16_t*)(block + offset); }

}  // namespace quire

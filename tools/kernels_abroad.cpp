// The CPU kernels on a processor that is not at hand: one line a case, to be compared with another processor's.
//
//   cd src/quire/kernels/cpu
//   F="-std=c++17 -O3 -fno-math-errno -fno-trapping-math -I. ../../../../tools/kernels_abroad.cpp"
//   c++ $F -march=x86-64-v2 -o here
//   aarch64-linux-gnu-g++ $F -static -march=armv8-a -o there
//   diff <(./here) <(qemu-aarch64-static ./there) && echo equal
//
// Encoded bytes and gathered rows must be equal; attention is printed to four digits of its norm and of one element.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#define quire abroad
#include "decode.hpp"
#include "encode.hpp"
#include "gather.hpp"
#include "latent.hpp"
#undef quire

using namespace abroad;

static uint32_t seed = 1;
static float drawn() {
    seed = seed * 1664525u + 1013904223u;
    return (float)(seed >> 8) / (1 << 23) - 1.0f;
}

static uint64_t hash(const uint8_t* p, size_t n) {
    uint64_t h = 1469598103934665603ull;
    for (size_t i = 0; i < n; i++) h = (h ^ p[i]) * 1099511628211ull;
    return h;
}

struct Kind {
    const char* name;
    int kind, scaled, group, turned;
    bool least;
};

static const int D = 64, B = 32, BLOCKS = 3, SHARE = 4;
static const Kind KINDS[] = {
    {"bf16", QUIRE_ROWS_BF16, QUIRE_UNSCALED, 0, 0, false},  {"e4m3", QUIRE_ROWS_E4M3, QUIRE_UNSCALED, 0, 0, false},
    {"e5m2", QUIRE_ROWS_E5M2, QUIRE_BY_TOKEN, D, 0, false},  {"int8", QUIRE_TILES_8, QUIRE_BY_TOKEN, D, 0, false},
    {"int8c", QUIRE_TILES_8, QUIRE_BY_CHANNEL, B, 0, false}, {"int8t", QUIRE_TILES_8, QUIRE_BY_TILE, B, 0, false},
    {"int4", QUIRE_TILES_4, QUIRE_BY_TOKEN, D, D, true},     {"int4g", QUIRE_TILES_4, QUIRE_BY_TOKEN, 32, 0, true},
    {"kivi2", QUIRE_TILES_2, QUIRE_BY_CHANNEL, B, 0, true},  {"kivi4", QUIRE_TILES_4, QUIRE_BY_CHANNEL, 16, 0, true},
};

// A field of width d at `at` bytes within a tile.
static quire_field placed(const Kind& k, int d, int64_t at) {
    quire_field f = {};
    f.codes = at;
    f.scale = at + 4 * B * d;
    f.min = k.least ? f.scale + 2 * B * d : -1;
    f.kind = k.kind;
    f.scaled = k.scaled;
    f.group = k.scaled == QUIRE_BY_TOKEN && k.group > d ? d : k.group;
    f.turned = k.turned > d ? d : k.turned;
    return f;
}

int main() {
    const int64_t tile = 1 << 16, raw = BLOCKS * tile;
    static uint8_t arena[2 * BLOCKS << 16] __attribute__((aligned(64)));
    for (const Kind& k : KINDS) {
        memset(arena, 0, sizeof arena);
        int64_t source[BLOCKS], table[BLOCKS];
        for (int b = 0; b < BLOCKS; b++) {
            table[b] = b * tile / 64;
            source[b] = (raw + b * tile) / 64;
            for (int i = 0; i < B * (D + D); i++) ((float*)(arena + raw + b * tile))[i] = drawn() * (i % 7 ? 1.0f : 9.0f);
        }
        quire_form form = {};
        const int32_t head[] = {0};
        form.heads = head;
        form.tile_bytes = tile;
        form.block_tokens = B;
        form.k = placed(k, D, 0);
        form.v = placed(k, D, tile / 2);
        for (int values = 0; values < 2; values++) {
            quire_encode_args e = {};
            e.arena = arena;
            e.source = source;
            e.target = table;
            e.source_first = values * B * D * 4;
            e.field = values ? form.v : form.k;
            e.n_blocks = BLOCKS;
            e.n_heads = 1;
            e.block_tokens = B;
            e.d = D;
            e.values = values;
            e.dtype = QUIRE_F32;
            if (encode(e)) return 1;
        }
        printf("%s encoded %016llx\n", k.name, (unsigned long long)hash(arena, raw));
        static float rows[BLOCKS * B * D], q[SHARE * 2 * D], out[SHARE * D];
        quire_gather_args g = {};
        g.arena = arena;
        g.units = table;
        g.out = rows;
        g.field = form.v;
        g.n_rows = g.n_heads = 1;
        g.n_blocks = BLOCKS;
        g.block_tokens = B;
        g.d = D;
        g.values = 1;
        if (gather(g)) return 1;
        double norm = 0;
        for (float x : rows) norm += (double)x * x;
        printf("%s gathered %.4g\n", k.name, norm);
        for (float& x : q) x = drawn();
        const quire_segment segment = {table, 0, 0, 5, BLOCKS * B - 3};
        quire_decode_args d = {};
        d.arena = arena;
        d.forms = &form;
        d.segments = &segment;
        d.q = q;
        d.out = out;
        d.q_row = d.out_row = SHARE * D;
        d.q_head = d.out_head = D;
        d.n_segments = d.kv_heads = 1;
        d.share = SHARE;
        d.d = D;
        d.scale = 0.3f;
        if (decode(d)) return 1;
        norm = 0;
        for (float x : out) norm += (double)x * x;
        printf("%s decode %.4g %.4g\n", k.name, norm, out[17]);
        // the values' bytes, read as a rotary part that is packed as keys
        quire_latent_args l = {};
        l.arena = arena;
        l.forms = &form;
        l.segments = &segment;
        l.q = q;
        l.out = out;
        l.q_row = SHARE * 2 * D;
        l.q_head = 2 * D;
        l.out_row = SHARE * D;
        l.out_head = D;
        l.n_segments = 1;
        l.heads = SHARE;
        l.d = l.d_rope = D;
        l.scale = 0.3f;
        if (latent(l)) return 1;
        norm = 0;
        for (float x : out) norm += (double)x * x;
        printf("%s latent %.4g %.4g\n", k.name, norm, out[17]);
    }
}

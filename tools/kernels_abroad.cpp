// The CPU kernels on a processor that is not at hand: one line a case, to be compared with another processor's.
//
//   cd src/quire/kernels/cpu
//   F="-std=c++17 -O3 -fno-math-errno -fno-trapping-math -I. ../../../../tools/kernels_abroad.cpp"
//   c++ $F -march=x86-64-v2 -o here
//   aarch64-linux-gnu-g++ $F -static -march=armv8-a -o there
//   diff <(./here) <(qemu-aarch64-static ./there) && echo equal
//
// Encoded bytes and gathered rows must be equal; attention is printed to four digits of its norm and of one element, what
// is in bfloat16 to three.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#define quire abroad
#include "attend.hpp"
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

static uint16_t numbers[1 << 16];
static const uint16_t* half(int at) { return numbers + at; }

static void tell(const char* what, const uint16_t* x, int n) {
    double norm = 0;
    for (int i = 0; i < n; i++) norm += (double)BF16::one(x[i]) * BF16::one(x[i]);
    printf("%s %.3g %.3g\n", what, norm, BF16::one(x[17]));
}

// What lies between and beside attention: linear layers, norms, rotations, gates, and a prompt's attention.
static int layers() {
    for (uint16_t& x : numbers) x = BF16::narrow(drawn());
    static uint16_t out[1 << 15];
    static float scales[64];
    for (float& x : scales) x = 0.01f;
    for (const int bits : {16, 8, 4})
        for (const int rows : {1, 7}) {
            quire_linear_layer l = {};
            l.weight = (const uint8_t*)half(4096);
            l.scales = bits == 4 ? (const void*)half(64) : bits == 8 ? scales : nullptr;
            l.bias = half(128);
            l.out = out;
            l.out_row = l.n = 50;
            l.panel = 16;
            l.bits = bits;
            quire_linear_args a = {};
            a.layers = &l;
            a.x = half(200);
            a.x_row = a.k = 64;
            a.n_layers = 1;
            a.rows = rows;
            a.k_words = 32;
            if (linear(a)) return 1;
            printf("%d bits, %d rows: ", bits, rows);
            tell("linear", out, rows * 50);
        }
    const quire_norm n = {half(0), 70, 1, 0, 1e-5f, 1.0f};
    if (norm(n, half(100), out, 3, 1)) return 1;
    tell("norm", out, 210);
    if (gated(half(0), half(500), out, 333, 1)) return 1;
    tell("gated", out, 333);
    quire_rotary_args r = {};
    for (int f = 0; f < 2; f++) {
        r.x[f] = half(1000 * f);
        r.out[f] = out + 4096 * f;
        r.x_token[f] = 2 * 36;
        r.x_head[f] = 36;
        r.heads[f] = 2;
    }
    r.cos = half(2000);
    r.sin = half(3000);
    r.batch = 1;
    r.tokens = 5;
    r.d = 36;
    if (rotary(r)) return 1;
    tell("rotary", out, 360);
    static uint8_t mask[40 * 300];
    for (int t = 0; t < 40; t++)
        for (int i = 0; i < 300; i++) mask[t * 300 + i] = i <= t + 260 && i % 5;
    quire_attend_args a = {};
    a.q = half(0);
    a.k = half(8192);
    a.v = half(32768);
    a.out = out;
    a.mask = mask;
    a.q_head = a.k_token = a.v_token = 32;
    a.q_token = 4 * 32;
    a.k_head = a.v_head = 300 * 32;
    a.mask_token = 300;
    a.batch = 1;
    a.heads = 4;
    a.kv_heads = 2;
    a.tokens = 40;
    a.keys = 300;
    a.d = a.dv = 32;
    a.threads = 1;
    a.scale = 2.0f;
    if (attend(a)) return 1;
    tell("attend", out, 40 * 4 * 32);
    return 0;
}

int main() {
    if (layers()) return 1;
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

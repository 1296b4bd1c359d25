// The C interface of the CPU kernels. Plain structures of integers and pointers; kernels/native.py mirrors them.
//
//   q of one token ──┐   segment: slots [lo, hi) of a block table, in one form
//                    ├─> fold over the segments of that token ──> out of that token
//   blocks ──────────┘   form: how a codec lays a tile out, and which KV heads it holds
//
// Memory is addressed as the store does: a block begins at `table[i]` units of 64 bytes in the arena, a layer's first
// tile lies `first` bytes behind that, the tiles of its heads follow one another.
#pragma once
#include <cstdint>

#define QUIRE_PUBLIC __attribute__((visibility("default")))

extern "C" {

enum quire_dtype : int32_t { QUIRE_F32 = 0, QUIRE_BF16 = 1, QUIRE_F16 = 2 };

// How the elements of a field lie. Rows are [t][d]; tiles are packed small integers, sixteen tokens at a time
// (ops/pack.py): keys [t / 16][d / 4p][16 t][4], values [t / 4p][d][4], p of them in a byte.
enum quire_kind : int32_t {
    QUIRE_ROWS_F32 = 0,
    QUIRE_ROWS_BF16 = 1,
    QUIRE_ROWS_F16 = 2,
    QUIRE_ROWS_E4M3 = 3,
    QUIRE_ROWS_E5M2 = 4,
    QUIRE_TILES_8 = 5,
    QUIRE_TILES_4 = 6,
    QUIRE_TILES_2 = 7,
};

// What a scale (and a minimum) in float16 is for: value = code * scale + min; without a minimum (code - 128) * scale.
enum quire_scaled : int32_t {
    QUIRE_UNSCALED = 0,
    QUIRE_BY_TOKEN = 1,    // [d / group][t]: `group` channels of a token
    QUIRE_BY_CHANNEL = 2,  // [t / group][d]: a channel of `group` tokens
    QUIRE_BY_TILE = 3,     // [1]
};

struct quire_field {
    int64_t codes, scale, min;  // bytes from the tile's begin; min -1: none
    int32_t kind, scaled, group;
    int32_t turned;  // stored in the basis of a Hadamard rotation over so many channels; 0: in the model's
};

struct quire_form {
    int64_t first;         // bytes from a block's begin to the layer's first tile
    int64_t tile_bytes;    // from one head's tile to the next
    const int32_t* heads;  // [kv_heads]: which tile of the layer is the head's, -1 where the form does not hold it
    quire_field k, v;
    int32_t block_tokens;
    int32_t unused;
};

struct quire_segment {
    const int64_t* table;  // units of 64 bytes, one per block
    int32_t form;
    int32_t query;   // row of q and out; segments of one query stand side by side
    int32_t lo, hi;  // slots that the query reads, lo < hi
};

// Where the probabilities of a segment go: its first slot, and the step from one head's row to the next, in floats.
struct quire_place {
    int64_t first, head;
};

// Over the query heads of a KV head.
enum quire_fold : int32_t { QUIRE_EACH = 0, QUIRE_MEAN = 1, QUIRE_MAX = 2 };

struct quire_decode_args {
    const uint8_t* arena;
    const quire_form* forms;
    const quire_segment* segments;
    const void* q;       // [queries, kv_heads * share, d]
    void* out;           // the same shape and dtype
    const float* sinks;  // [kv_heads * share] or null
    float* lse;          // [queries, kv_heads * share] or null: natural logarithm of the sum of exponentials, sinks included
    float* probs;        // or null: softmax probabilities, rows of KV heads, or of query heads under QUIRE_EACH
    const quire_place* places;  // [n_segments] within probs
    int64_t q_row, q_head, out_row, out_head;  // strides in elements
    int32_t n_segments, kv_heads, share, d;
    int32_t dtype;    // of q and out
    int32_t threads;  // at most
    int32_t isa;      // 0: the best that this processor has
    int32_t folded;   // quire_fold
    float scale, softcap;  // softcap 0: none
};

struct quire_latent_args {
    const uint8_t* arena;
    const quire_form* forms;  // k: the latents, v: the rotary part of keys; heads[0] is the tile
    const quire_segment* segments;
    const void* q;  // [queries, heads, d + d_rope]
    void* out;      // [queries, heads, d] of the same dtype
    int64_t q_row, q_head, out_row, out_head;  // strides in elements
    int32_t n_segments, heads, d, d_rope;
    int32_t dtype, threads, isa;
    float scale;
};

struct quire_gather_args {
    const uint8_t* arena;
    const int64_t* units;  // [rows][blocks]
    void* out;             // [rows][heads][blocks][block_tokens][d] of `dtype`
    int64_t first, tile_bytes;
    quire_field field;
    int32_t n_rows, n_heads, n_blocks, block_tokens, d;
    int32_t values;  // packed as values, not as keys
    int32_t dtype, threads;
};

struct quire_write_args {
    uint8_t* arena;
    const int64_t* units;   // [tokens]
    const int32_t* rows;    // [tokens]: row within the block
    const int32_t* tokens;  // [tokens]: row of the source, null for all in order
    const int32_t* heads;   // [heads]: head of the source for each tile
    const void* source[2];  // keys and values, or any two fields
    int64_t source_row[2], source_head[2];  // strides in elements
    int64_t offset[2];                      // of the field in the layer's first tile, from the block's begin
    int64_t tile_bytes;
    int32_t width[2];  // elements of one token and head
    int32_t n_tokens, n_heads;
    int32_t source_dtype, dtype;
};

struct quire_encode_args {
    uint8_t* arena;
    const int64_t* source;  // [blocks]: units of the plain rows
    const int64_t* target;  // [blocks]: and of what they become
    int64_t source_first, source_tile;  // bytes from a block's begin to the field in the layer's first tile; from head to head
    int64_t target_first, target_tile;  // bytes from a block's begin to the layer's first tile; from one tile to the next
    quire_field field;                  // of the target; with a minimum affine, without one symmetric
    int32_t n_blocks, n_heads, block_tokens, d;
    int32_t values;  // packed as values, not as keys
    int32_t dtype;   // of the rows
    int32_t threads, isa;
};

// out = x * weight^T + bias in bfloat16, sums in float32, for all layers that share an input. A weight lies in panels of
// outputs, pairs of inputs side by side, zeros at the edges: [ceil(n / panel)][k_words][panel][2]; of 4 bits as weights.hpp says.
struct quire_linear_layer {
    const uint8_t* weight;
    const void* scales;    // 8 bits: [n] float32; 4 bits: [ceil(n / 16)][k_words / 16][16] bfloat16; 16 bits: null
    const uint16_t* bias;  // [n] or null
    uint16_t* out;         // [rows][n]
    int64_t out_row;       // stride in elements
    int32_t n;
    int32_t panel;  // a multiple of 16; of 4 bits: 16
    int32_t bits;   // of a weight: 16 (bfloat16), 8 or 4
    int32_t unused;
};

struct quire_linear_args {
    const quire_linear_layer* layers;  // [n_layers]
    const uint16_t* x;                 // [rows][k]
    int64_t x_row;                     // stride in elements
    int32_t n_layers, rows, k, k_words;  // k_words >= ceil(k / 2)
    int32_t threads, isa;                // as in quire_decode_args
};

// Attention of many queries, in bfloat16, over keys and values that lie side by side. Strides in elements; channels lie
// side by side. A query that reads nothing gives zeros.
struct quire_attend_args {
    const uint16_t *q, *k, *v;
    uint16_t* out;        // [batch][tokens][heads][dv]
    const uint8_t* mask;  // [batch][tokens][keys], not 0 where a key is read; null: all are
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, mask_batch, mask_token;
    int32_t batch, heads, kv_heads, tokens, keys, d, dv;
    int32_t threads, isa;
    float scale;
};

// The small operations between linear layers, in bfloat16.

// out = x / rms(x) * (weight + offset), of rows of d numbers side by side.
struct quire_norm {
    const uint16_t* weight;  // [d]
    int32_t d;
    int32_t early;  // the normalised row is rounded before the weight is multiplied
    int32_t isa;
    float eps, offset;
};

// Queries and keys turned by their positions, in pairs (m, m + d / 2); out lies [batch][tokens][heads][d].
struct quire_rotary_args {
    const uint16_t* x[2];
    uint16_t* out[2];
    const uint16_t *cos, *sin;                  // [batch or 1][tokens][d]
    int64_t x_batch[2], x_token[2], x_head[2];  // strides in elements
    int32_t heads[2];
    int32_t batch, tokens, d;
    int32_t angles_batch;  // tokens from one batch's angles to the next: 0 where they share them
    int32_t threads, isa;
};

// All return 0, or -1 where an argument is outside what the kernels serve.
QUIRE_PUBLIC int quire_decode(const quire_decode_args*);
QUIRE_PUBLIC int quire_latent(const quire_latent_args*);
QUIRE_PUBLIC int quire_gather(const quire_gather_args*);
QUIRE_PUBLIC int quire_write(const quire_write_args*);
QUIRE_PUBLIC int quire_encode(const quire_encode_args*);
QUIRE_PUBLIC int quire_linear(const quire_linear_args*);
QUIRE_PUBLIC int quire_attend(const quire_attend_args*);
QUIRE_PUBLIC int quire_rms_norm(const quire_norm*, const uint16_t* x, uint16_t* out, int64_t rows, int32_t threads);
QUIRE_PUBLIC int quire_rotary(const quire_rotary_args*);
QUIRE_PUBLIC int quire_gated(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t n, int32_t threads, int32_t isa);  // silu
QUIRE_PUBLIC int quire_best_isa(void);  // 2, 3, 4: x86-64-v2, v3, v4; 5: v4 with vnni and bf16; 6: and a matrix unit; 1: the compiler's baseline
QUIRE_PUBLIC int quire_abi(void);
}

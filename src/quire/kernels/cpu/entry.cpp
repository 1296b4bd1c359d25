// What the library exports: checks, and the choice of the instruction-set level, made once.
#include "quire_cpu.h"

#define QUIRE_ABI 5

#define LEVEL(name)                                               \
    extern "C" int quire_decode_##name(const quire_decode_args*); \
    extern "C" int quire_gather_##name(const quire_gather_args*); \
    extern "C" int quire_write_##name(const quire_write_args*);   \
    extern "C" int quire_encode_##name(const quire_encode_args*); \
    extern "C" int quire_latent_##name(const quire_latent_args*); \
    extern "C" int quire_linear_##name(const quire_linear_args*);

#if defined(__x86_64__)
LEVEL(v2)
LEVEL(v3)
LEVEL(v4)
LEVEL(v4x)
#else
LEVEL(base)
#endif

static int best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") ? 5 : 4;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 3;
    return 2;
#else
    return 1;
#endif
}

extern "C" int quire_best_isa(void) {
    static const int best = best_isa();
    return best;
}

extern "C" int quire_abi(void) { return QUIRE_ABI; }

extern "C" int quire_decode(const quire_decode_args* a) {
    if (a->d < 16 || a->d > 256 || a->d % 16 || a->kv_heads < 1 || a->share < 1) return -1;
    if (a->dtype < QUIRE_F32 || a->dtype > QUIRE_F16 || a->isa > quire_best_isa()) return -1;
#if defined(__x86_64__)
    switch (a->isa ? a->isa : quire_best_isa()) {
        case 5: return quire_decode_v4x(a);
        case 4: return quire_decode_v4(a);
        case 3: return quire_decode_v3(a);
        default: return quire_decode_v2(a);
    }
#else
    return quire_decode_base(a);
#endif
}

extern "C" int quire_write(const quire_write_args* a) {
#if defined(__x86_64__)
    switch (quire_best_isa()) {
        case 5: return quire_write_v4x(a);
        case 4: return quire_write_v4(a);
        case 3: return quire_write_v3(a);
        default: return quire_write_v2(a);
    }
#else
    return quire_write_base(a);
#endif
}

extern "C" int quire_gather(const quire_gather_args* a) {
    if (a->d < 16 || a->d > 256 || a->d % 16 || a->dtype < QUIRE_F32 || a->dtype > QUIRE_F16) return -1;
    if (a->field.kind >= QUIRE_TILES_8 && a->block_tokens % 16) return -1;
#if defined(__x86_64__)
    switch (quire_best_isa()) {
        case 5: return quire_gather_v4x(a);
        case 4: return quire_gather_v4(a);
        case 3: return quire_gather_v3(a);
        default: return quire_gather_v2(a);
    }
#else
    return quire_gather_base(a);
#endif
}

extern "C" int quire_encode(const quire_encode_args* a) {
    if (a->d < 16 || a->d > 1024 || a->d % 16 || a->dtype < QUIRE_F32 || a->dtype > QUIRE_F16) return -1;
    if (a->field.kind >= QUIRE_TILES_8 && a->block_tokens % 16) return -1;
    if (a->isa > quire_best_isa()) return -1;
#if defined(__x86_64__)
    switch (a->isa ? a->isa : quire_best_isa()) {
        case 5: return quire_encode_v4x(a);
        case 4: return quire_encode_v4(a);
        case 3: return quire_encode_v3(a);
        default: return quire_encode_v2(a);
    }
#else
    return quire_encode_base(a);
#endif
}

extern "C" int quire_latent(const quire_latent_args* a) {
    if (a->d < 16 || a->d > 1024 || a->d % 16 || a->d_rope < 16 || a->d_rope > 256 || a->d_rope % 16) return -1;
    if (a->heads < 1 || a->dtype < QUIRE_F32 || a->dtype > QUIRE_F16 || a->isa > quire_best_isa()) return -1;
#if defined(__x86_64__)
    switch (a->isa ? a->isa : quire_best_isa()) {
        case 5: return quire_latent_v4x(a);
        case 4: return quire_latent_v4(a);
        case 3: return quire_latent_v3(a);
        default: return quire_latent_v2(a);
    }
#else
    return quire_latent_base(a);
#endif
}

extern "C" int quire_linear(const quire_linear_args* a) {
    if (a->rows < 1 || a->n < 1 || a->k < 1 || a->k_words < (a->k + 1) / 2 || a->isa > quire_best_isa()) return -1;
    if (a->panel < 16 || a->panel % 16) return -1;
#if defined(__x86_64__)
    switch (a->isa ? a->isa : quire_best_isa()) {
        case 5: return quire_linear_v4x(a);
        case 4: return quire_linear_v4(a);
        case 3: return quire_linear_v3(a);
        default: return quire_linear_v2(a);
    }
#else
    return quire_linear_base(a);
#endif
}

// What the library exports: checks, and the choice of the instruction-set level, made once.
#include "quire_cpu.h"

#include <initializer_list>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define QUIRE_ABI 8

#define LEVEL(name)                                                                                    \
    extern "C" int quire_decode_##name(const quire_decode_args*);                                      \
    extern "C" int quire_gather_##name(const quire_gather_args*);                                      \
    extern "C" int quire_write_##name(const quire_write_args*);                                        \
    extern "C" int quire_encode_##name(const quire_encode_args*);                                      \
    extern "C" int quire_latent_##name(const quire_latent_args*);                                      \
    extern "C" int quire_linear_##name(const quire_linear_args*);                                      \
    extern "C" int quire_attend_##name(const quire_attend_args*);                                      \
    extern "C" int quire_norm_##name(const quire_norm*, const uint16_t*, uint16_t*, int64_t, int32_t); \
    extern "C" int quire_rotary_##name(const quire_rotary_args*);                                      \
    extern "C" int quire_gated_##name(const uint16_t*, const uint16_t*, uint16_t*, int64_t, int32_t);

#if defined(__x86_64__)
LEVEL(v2)
LEVEL(v3)
LEVEL(v4)
LEVEL(v4x)
#if defined(QUIRE_WITH_V4M)
LEVEL(v4m)
#endif
#else
LEVEL(base)
#endif

// The level `isa`, or the best one, of a kernel with the arguments that follow.
#if defined(QUIRE_WITH_V4M)
#define CASE_6(kernel, ...) \
    case 6: return quire_##kernel##_v4m(__VA_ARGS__);
#else
#define CASE_6(kernel, ...)
#endif
#if defined(__x86_64__)
#define AT_LEVEL(isa, kernel, ...)                             \
    switch (isa ? isa : quire_best_isa()) {                    \
        CASE_6(kernel, __VA_ARGS__)                            \
        case 5: return quire_##kernel##_v4x(__VA_ARGS__);      \
        case 4: return quire_##kernel##_v4(__VA_ARGS__);       \
        case 3: return quire_##kernel##_v3(__VA_ARGS__);       \
        default: return quire_##kernel##_v2(__VA_ARGS__);      \
    }
#else
#define AT_LEVEL(isa, kernel, ...) return quire_##kernel##_base(__VA_ARGS__);
#endif

#if defined(QUIRE_WITH_V4M)
// The matrix unit: the processor has it, and the system lets this process use it, which has to be asked for once.
static bool matrix_unit() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    for (const int bit : {22, 24, 25})  // amx-bf16, amx-tile, amx-int8
        if (!(d >> bit & 1)) return false;
    constexpr long ASK = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}
#endif

static int best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        if (!__builtin_cpu_supports("avx512vnni") || !__builtin_cpu_supports("avx512bf16")) return 4;
#if defined(QUIRE_WITH_V4M)
        if (matrix_unit()) return 6;
#endif
        return 5;
    }
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
    AT_LEVEL(a->isa, decode, a)
}

extern "C" int quire_write(const quire_write_args* a) {
    AT_LEVEL(0, write, a)
}

extern "C" int quire_gather(const quire_gather_args* a) {
    if (a->d < 16 || a->d > 256 || a->d % 16 || a->dtype < QUIRE_F32 || a->dtype > QUIRE_F16) return -1;
    if (a->field.kind >= QUIRE_TILES_8 && a->block_tokens % 16) return -1;
    AT_LEVEL(0, gather, a)
}

extern "C" int quire_encode(const quire_encode_args* a) {
    if (a->d < 16 || a->d > 1024 || a->d % 16 || a->dtype < QUIRE_F32 || a->dtype > QUIRE_F16) return -1;
    if (a->field.kind >= QUIRE_TILES_8 && a->block_tokens % 16) return -1;
    if (a->isa > quire_best_isa()) return -1;
    AT_LEVEL(a->isa, encode, a)
}

extern "C" int quire_latent(const quire_latent_args* a) {
    if (a->d < 16 || a->d > 1024 || a->d % 16 || a->d_rope < 16 || a->d_rope > 256 || a->d_rope % 16) return -1;
    if (a->heads < 1 || a->dtype < QUIRE_F32 || a->dtype > QUIRE_F16 || a->isa > quire_best_isa()) return -1;
    AT_LEVEL(a->isa, latent, a)
}

extern "C" int quire_linear(const quire_linear_args* a) {
    if (a->n_layers < 1 || a->rows < 1 || a->k < 1 || a->k_words < (a->k + 1) / 2 || a->isa > quire_best_isa()) return -1;
    for (int i = 0; i < a->n_layers; i++) {
        const quire_linear_layer& l = a->layers[i];
        if (l.n < 1 || l.panel < 16 || l.panel % 16 || (l.bits != 16 && !l.scales)) return -1;
        if (l.bits != 16 && l.bits != 8 && !(l.bits == 4 && l.panel == 16 && a->k_words % 16 == 0)) return -1;
    }
    AT_LEVEL(a->isa, linear, a)
}

extern "C" int quire_attend(const quire_attend_args* a) {
    if (a->d < 16 || a->d % 16 || a->dv < 16 || a->dv % 16 || a->batch < 1 || a->tokens < 1 || a->keys < 0) return -1;
    if (a->kv_heads < 1 || a->heads < a->kv_heads || a->heads % a->kv_heads || a->heads / a->kv_heads > 256) return -1;
    if (a->isa > quire_best_isa()) return -1;
    AT_LEVEL(a->isa, attend, a)
}

extern "C" int quire_rms_norm(const quire_norm* n, const uint16_t* x, uint16_t* out, int64_t rows, int32_t threads) {
    if (n->d < 1 || rows < 0 || n->isa > quire_best_isa()) return -1;
    AT_LEVEL(n->isa, norm, n, x, out, rows, threads)
}

extern "C" int quire_rotary(const quire_rotary_args* a) {
    if (a->d < 2 || a->d % 2 || a->isa > quire_best_isa()) return -1;
    AT_LEVEL(a->isa, rotary, a)
}

extern "C" int quire_gated(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t n, int32_t threads, int32_t isa) {
    if (n < 0 || isa > quire_best_isa()) return -1;
    AT_LEVEL(isa, gated, gate, up, out, n, threads)
}

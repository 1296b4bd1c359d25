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
#if defined(QUIRE_WITH_V4M)
LEVEL(v4m)
#endif
#else
LEVEL(base)
#endif

#if defined(QUIRE_WITH_V4M)
#define CASE_V4M(kernel) \
    case 6: return quire_##kernel##_v4m(a);
#else
#define CASE_V4M(kernel)
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
#if defined(__x86_64__)
    switch (a->isa ? a->isa : quire_best_isa()) {
        CASE_V4M(decode)
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
        CASE_V4M(write)
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
        CASE_V4M(gather)
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
        CASE_V4M(encode)
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
        CASE_V4M(latent)
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
    if (a->n_layers < 1 || a->rows < 1 || a->k < 1 || a->k_words < (a->k + 1) / 2 || a->isa > quire_best_isa()) return -1;
    for (int i = 0; i < a->n_layers; i++) {
        const quire_linear_layer& l = a->layers[i];
        if (l.n < 1 || l.panel < 16 || l.panel % 16 || (l.bits != 16 && !l.scales)) return -1;
        if (l.bits != 16 && l.bits != 8 && !(l.bits == 4 && l.panel == 16 && a->k_words % 16 == 0)) return -1;
    }
#if defined(__x86_64__)
    switch (a->isa ? a->isa : quire_best_isa()) {
        CASE_V4M(linear)
        case 5: return quire_linear_v4x(a);
        case 4: return quire_linear_v4(a);
        case 3: return quire_linear_v3(a);
        default: return quire_linear_v2(a);
    }
#else
    return quire_linear_base(a);
#endif
}

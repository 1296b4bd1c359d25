// Vectors of LANES floats in GCC's and clang's vector extensions: the same source for SSE, AVX2, AVX-512 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if !defined(QUIRE_LANES)  // given: another width than the processor's, by what the compiler makes of it
#if defined(__AVX512F__)
#define QUIRE_LANES 16
#elif defined(__AVX2__)
#define QUIRE_LANES 8
#else
#define QUIRE_LANES 4
#endif
#endif
#if QUIRE_LANES == 16 && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define QUIRE_512 1
#elif QUIRE_LANES == 8 && defined(__AVX2__)
#define QUIRE_256 1
#elif QUIRE_LANES == 4 && defined(__SSE2__)
#define QUIRE_128 1
#endif
#if defined(QUIRE_512) && defined(__AMX_INT8__) && defined(__AMX_BF16__)
#define QUIRE_MATRIX 1
#endif
#define QUIRE_INLINE inline __attribute__((always_inline))

namespace quire {

constexpr int LANES = QUIRE_LANES;
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
// The same in memory, anywhere. GCC copies them well through a pointer, badly through memcpy.
typedef float FloatsAt __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t HalvesAt __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

typedef uint8_t BytesAt __attribute__((vector_size(LANES), aligned(1), may_alias));

QUIRE_INLINE Floats all(float x) { return Floats{} + x; }
QUIRE_INLINE Floats load(const float* p) { return *(const FloatsAt*)p; }
QUIRE_INLINE void store(float* p, Floats v) { *(FloatsAt*)p = v; }
QUIRE_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 3); }
// Of what is read once in a pass over memory that no cache holds: it need not displace what a cache does hold.
QUIRE_INLINE void fetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }

// ---- 16-bit floats -------------------------------------------------------------------------------------------------

struct F32 {
    typedef float Element;
    static QUIRE_INLINE Floats read(const float* p) { return load(p); }
    static QUIRE_INLINE float one(float x) { return x; }
    static QUIRE_INLINE float narrow(float x) { return x; }
};

QUIRE_INLINE float as_float(uint32_t u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
QUIRE_INLINE uint32_t as_word(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

struct BF16 {
    typedef uint16_t Element;
    static QUIRE_INLINE Floats read(const uint16_t* p) {
#if defined(QUIRE_512)  // GCC widens in two halves
        return (Floats)((Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(QUIRE_256)
        return (Floats)((Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
        return (Floats)(__builtin_convertvector(*(const HalvesAt*)p, Words) << 16);
#endif
    }
    static QUIRE_INLINE float one(uint16_t x) { return as_float((uint32_t)x << 16); }
    static QUIRE_INLINE uint16_t narrow(float x) {  // to nearest, ties to even; NaN stays NaN
        uint32_t u = as_word(x);
        if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40);
        return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
    }
};

struct F16 {
    typedef uint16_t Element;
    static QUIRE_INLINE float one(uint16_t h) {
        const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
        if ((h & 0x7c00) == 0x7c00) return as_float(sign | rest | 0x7f800000u);
        return as_float(sign | as_word(as_float(rest) * as_float(0x77800000u)));  // times 2^112
    }
    static QUIRE_INLINE uint16_t narrow(float x) {
        const uint32_t sign = (as_word(x) >> 16) & 0x8000, u = as_word(x) & 0x7fffffffu;
        if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
        if (u >= 0x477ff000u) return (uint16_t)(sign | 0x7c00);  // rounds to 2^16 or more
        if (u < 0x38800000u) {                                   // below 2^-14: adding 0.5 rounds at 2^-24
            const float shifted = as_float(u) + 0.5f;
            return (uint16_t)(sign | (as_word(shifted) - as_word(0.5f)));
        }
        return (uint16_t)(sign | ((u + 0xfff + ((u >> 13) & 1) - 0x38000000u) >> 13));
    }
    static QUIRE_INLINE Floats read(const uint16_t* p) {
#if defined(QUIRE_512)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(QUIRE_256) && defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        Floats v;
        for (int i = 0; i < LANES; i++) v[i] = one(p[i]);
        return v;
#endif
    }
};

QUIRE_INLINE Words widened(const uint8_t* p) {
#if defined(QUIRE_512)
    return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(QUIRE_256)
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    return __builtin_convertvector(*(const BytesAt*)p, Words);
#endif
}

// 8-bit floats are shifted into place; NaN stays NaN.
struct E4M3 {
    typedef uint8_t Element;
    static QUIRE_INLINE Floats read(const uint8_t* p) {
        const Words x = widened(p), rest = x & 0x7f;
        // Below 2^-6 a code counts 2^-9s. As bits of a float it would be a denormal, which some processors take long over.
        const Words small = (Words)(__builtin_convertvector((Ints)rest, Floats) * as_float(0x3b000000u));
        const Words size = rest < 8 ? small : (rest << 20) + (120u << 23);
        return (Floats)(((x & 0x80) << 24) | (rest == 0x7f ? Words{} + 0x7fc00000u : size));
    }
    static QUIRE_INLINE float one(uint8_t x) {
        if ((x & 0x7f) == 0x7f) return as_float(0x7fc00000u);
        return as_float(((uint32_t)(x & 0x80) << 24) | ((uint32_t)(x & 0x7f) << 20)) * as_float(0x7b800000u);
    }
};

struct E5M2 {
    typedef uint8_t Element;
    static QUIRE_INLINE Floats read(const uint8_t* p) {
        const Words x = widened(p);
        const Floats v = (Floats)(((x & 0x80) << 24) | ((x & 0x7f) << 21)) * as_float(0x77800000u);  // times 2^112
        return (Floats)((x & 0x7c) == 0x7c ? (Words)v | 0x7f800000u : (Words)v);
    }
    static QUIRE_INLINE float one(uint8_t x) { return F16::one((uint16_t)(x << 8)); }
};

// ---- sums of whole vectors, many at once -----------------------------------------------------------------------------

// Sums the two halves of every group of 2h lanes of a and of b: a's results in the lower h lanes, b's in the upper.
template <int H, int... I>
QUIRE_INLINE Floats halves(Floats a, Floats b, std::integer_sequence<int, I...>) {
    const Floats low = __builtin_shufflevector(a, b, (I % (2 * H) < H ? I : LANES + I - H)...);
    const Floats high = __builtin_shufflevector(a, b, (I % (2 * H) < H ? I + H : LANES + I)...);
    return low + high;
}

template <int H>
QUIRE_INLINE Floats sums_from(Floats* v) {  // v holds 2H vectors; destroyed
    for (int i = 0; i < H; i++) v[i] = halves<H>(v[i], v[i + H], std::make_integer_sequence<int, LANES>{});
    if constexpr (H > 1)
        return sums_from<H / 2>(v);
    else
        return v[0];
}

// Lane i of the result is the sum over the lanes of v[i].
QUIRE_INLINE Floats sums(Floats* v) { return sums_from<LANES / 2>(v); }

// Over the lanes of one vector, of floats or of whole numbers.
template <int H, class V, int... I>
QUIRE_INLINE V turned(V v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, ((I + H) % LANES)...);
}
template <int H = LANES / 2, class V>
QUIRE_INLINE auto added(V v) {
    v += turned<H>(v, std::make_integer_sequence<int, LANES>{});
    if constexpr (H > 1)
        return added<H / 2>(v);
    else
        return v[0];
}
template <int H = LANES / 2>
QUIRE_INLINE float greatest(Floats v) {
    const Floats other = turned<H>(v, std::make_integer_sequence<int, LANES>{});
    v = (Floats)(other > v ? other : v);
    if constexpr (H > 1)
        return greatest<H / 2>(v);
    else
        return v[0];
}

// ---- functions -------------------------------------------------------------------------------------------------------

// 2^x for x <= 0 (and not far above): error 2e-7; below 2^-126 it stays there; NaN stays NaN.
QUIRE_INLINE Floats exp2_of(Floats x) {
    const Floats low = all(-126.0f);
    x = (Floats)(x < low ? low : x);
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const Floats shifted = x + magic;
    const Floats n = shifted - magic;
    const Floats f = x - n;  // -0.5 to 0.5: the series of e^(f ln 2)
    Floats p = all(1.5252733e-5f);
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 2.4022651e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    const Ints power = __builtin_convertvector(n, Ints) + 127;
    return p * (Floats)(power << 23);
}

// Lambert's continued fraction near zero, by the exponential elsewhere.
QUIRE_INLINE Floats tanh_of(Floats x) {
    const Floats x2 = x * x;
    const Floats near = x * (x2 * (x2 * 21.0f + 1260.0f) + 10395.0f) / (x2 * (x2 * (x2 + 210.0f) + 4725.0f) + 10395.0f);
    Floats a = (Floats)(x < 0.0f ? -x : x);
    a = (Floats)(a > 20.0f ? all(20.0f) : a);
    const Floats e = exp2_of(a * -2.8853900817779268f);  // e^(-2a)
    const Floats far = (1.0f - e) / (1.0f + e);
    return (Floats)(x2 < 0.36f ? near : (Floats)(x < 0.0f ? -far : far));
}

}  // namespace quire

// How the weights of a linear layer are stored, and the registers that a product takes them from.
//
//   bfloat16   [n / panel][k / 2][panel][2]: a word holds two inputs' weights of one output
//   8 bits     the same of int8, and a float32 scale per output
//   4 bits     [n / 16][k / 8][16][4]: a line holds four words of sixteen outputs; an output's 32 bits hold the first
//              inputs of its words in the lower half, the second in the upper, from the lowest bit; two's complement.
//              32 inputs of an output share a scale in bfloat16: [n / 16][k / 32][16]
#pragma once
#include "vec.hpp"

namespace quire {

// A word of weights is multiplied in as many parts as the processor needs; `Pair` holds what a row has for it.
#if defined(__AVX512BF16__)
constexpr int PARTS = 1;
struct Pair {
    uint32_t part[PARTS];
};
QUIRE_INLINE Pair pair_of(uint16_t a, uint16_t b) { return Pair{{(uint32_t)b << 16 | a}}; }
QUIRE_INLINE Floats added_to(Floats sum, Words w, uint32_t x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)(Words{} + x));
}
#else
constexpr int PARTS = 2;
struct Pair {
    float part[PARTS];
};
QUIRE_INLINE Pair pair_of(uint16_t a, uint16_t b) { return Pair{{BF16::one(a), BF16::one(b)}}; }
QUIRE_INLINE Floats added_to(Floats sum, Words w, float x) { return (Floats)w * x + sum; }
#endif

// Weights as they are stored: the words of LANES outputs at p, in the form that `added_to` takes.
struct Half {
    static constexpr int BYTES = 4, WORDS = 1, APART = BYTES;
    typedef uint32_t At __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
    template <int PART>
    static QUIRE_INLINE Words part(const uint8_t* p) {
        const Words w = *(const At*)p;
        return PARTS == 1 ? w : PART ? w & 0xffff0000u : w << 16;
    }
};

struct Int8 {
    static constexpr int BYTES = 2, WORDS = 1, APART = BYTES;
    typedef uint16_t At __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
    static QUIRE_INLINE Words wide(const uint8_t* p) {
#if defined(__AVX512F__)
        return (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
        return (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
        return __builtin_convertvector(*(const At*)p, Words);
#endif
    }
    template <int PART>
    static QUIRE_INLINE Words number(Words w) {
        return (Words)__builtin_convertvector((Ints)(w << (PART ? 16 : 24)) >> 24, Floats);
    }
    template <int PART>
    static QUIRE_INLINE Words part(const uint8_t* p) {
#if defined(__AVX512BF16__)  // up to 8 bits: exact in bfloat16
        const auto floats = [](const uint8_t* q) {
            return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)q)));
        };
        return (Words)_mm512_cvtne2ps_pbh(floats(p + 16), floats(p));
#else
        return number<PART>(wide(p));
#endif
    }
};

// A line of weights gives four words; what shares a scale is added up before it is scaled.
struct Int4 {
    static constexpr int BYTES = 1, WORDS = 4, APART = 4;  // of a word; words in a line; from one output's bits to the next's
    static constexpr int GROUP = 16;                       // words that share a scale
    typedef uint32_t At __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
#if defined(__AVX512BF16__)
    static QUIRE_INLINE __m512i numbers() {  // 0 to 7, -8 to -1 in bfloat16, twice: an index has five bits
        return _mm512_broadcast_i64x4(_mm256_setr_epi16(0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                                        (short)0xc100, (short)0xc0e0, (short)0xc0c0, (short)0xc0a0,
                                                        (short)0xc080, (short)0xc040, (short)0xc000, (short)0xbf80));
    }
#endif
    template <int WORD, int PART>
    static QUIRE_INLINE Words part(Words line) {
#if defined(__AVX512BF16__)
        return (Words)_mm512_permutexvar_epi16((__m512i)(line >> (4 * WORD)), numbers());
#else
        return (Words)__builtin_convertvector((Ints)(line << (28 - 4 * WORD - 16 * PART)) >> 28, Floats);
#endif
    }
};

}  // namespace quire

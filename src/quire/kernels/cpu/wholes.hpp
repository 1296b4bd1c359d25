// Whole numbers that codes are multiplied with.
//
// A query, or the weights of a chunk's slots, becomes whole numbers of sixteen bits, x = step * n with |n| <= 32639. That is
// out by 2^-16 of the largest |x|; a byte would be out by a hundredth. Sums of products with codes are exact: what is left
// once half the codes' range is taken off them is below 128 * 32639 * 256 < 2^31, and what wraps around on the way wraps back.
#pragma once
#include "chunk.hpp"

namespace quire {

constexpr float WHOLE = 127 * 256 + 127;  // two signed bytes hold it: 256 * high + low

typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef int16_t ShortsAt __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

// Codes less half their range stand for numbers about zero: what minima and zero-points would take away again is never added.
template <int BITS>
constexpr float HALF = float(1 << (BITS - 1));

// Of every four lanes the second and the third change places: halves of a lane are codes i and i + 2.
template <int... I>
QUIRE_INLINE Ints paired(Ints v, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(v, v, (I % 4 == 1 || I % 4 == 2 ? I ^ 3 : I)...);
}

// Those of all heads, n of each side by side, in 16 bits.
template <int N>
struct Shorts16 {
    int16_t at[MAX_HEADS * N];
    QUIRE_INLINE const int16_t* row(int g, int n) const { return at + g * n; }
    QUIRE_INLINE void put(int g, int n, int j, Ints v) {
        *(ShortsAt*)(at + g * n + j) = __builtin_convertvector(paired(v, std::make_integer_sequence<int, LANES>{}), Shorts);
    }
};

#if defined(QUIRE_MATRIX)
// The same in two signed bytes: a row of high ones and a row of low ones for each head.
template <int N>
struct Bytes2 {
    int8_t at[2 * MAX_HEADS * N];
    QUIRE_INLINE void put(int g, int n, int j, Ints v) {
        int8_t* high = at + 2 * g * n + j;
        _mm_storeu_si128((__m128i*)high, _mm512_cvtepi32_epi8((__m512i)((v + 128) >> 8)));
        _mm_storeu_si128((__m128i*)(high + n), _mm512_cvtepi32_epi8((__m512i)v));
    }
};
#endif

// How numbers become whole ones.
struct Step {
    float one;  // what one stands for; no number where one of them is none
    float factor;
    QUIRE_INLINE Ints whole(Floats x) const {
        return (Ints)(x * factor + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23: rounded to a whole number
    }
};

// high: the largest sizes; spoilt: zero times all of them.
QUIRE_INLINE Step step_of(Floats high, Floats spoilt) {
    const float top = greatest(high);
    const bool any = top > 1e-30f;
    return {(any ? top / WHOLE : 0.0f) + added(spoilt), any ? WHOLE / top : 0.0f};
}

// n numbers, a multiple of sixteen, as whole numbers; `put` is called with each LANES of them. Returns what one stands for.
template <class Put>
QUIRE_INLINE float as_wholes(const float* x, int n, const Put& put) {
    Floats high = {}, spoilt = {};
    for (int j = 0; j < n; j += LANES) {
        const Floats v = load(x + j), a = (Floats)((Ints)v & 0x7fffffff);
        high = (Floats)(a > high ? a : high);
        spoilt += v * 0.0f;
    }
    const Step step = step_of(high, spoilt);
    for (int j = 0; j < n; j += LANES) put(j, step.whole(load(x + j)));
    return step.one;
}

}  // namespace quire

// The processor's matrix unit (AMX), where a level has it.
//
// A tile holds sixteen rows of 64 bytes. One instruction adds to every place of `sums` the products of a row of `left` with
// a column of `right`, which lies in words of four bytes or two bfloat16 side by side.
#pragma once
#include "vec.hpp"

#if defined(QUIRE_MATRIX)
namespace quire {

constexpr int SUMS = 4, LEFT = 4, RIGHT = 5;  // tiles: four of sums, and what is multiplied

// What the unit is told of its tiles; written once for each shape, as the order that reads it waits for writes.
struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, unused[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    constexpr void set(int tile, int n_rows, int n_bytes) {
        rows[tile] = (uint8_t)n_rows;
        bytes[tile] = (uint16_t)n_bytes;
    }
    // `depth` words of four bytes are multiplied; sums are [n][m].
    constexpr Shape(int n, int m, int depth) {
        for (int i = 0; i < SUMS; i++) set(i, n, 4 * m);
        set(LEFT, n, 4 * depth);
        for (int i = RIGHT; i < 8; i++) set(i, depth, 4 * m);
    }
};
template <int N, int M, int DEPTH>
constexpr Shape SHAPE{N, M, DEPTH};

// Whoever used the unit leaves it empty: a switch of threads would carry its eight KiB along.
struct MatrixUnit {
    const Shape* now = nullptr;
    QUIRE_INLINE void shape(const Shape& wanted) {
        if (now == &wanted) return;
        asm volatile("ldtilecfg %0" ::"m"(wanted));
        now = &wanted;
    }
    ~MatrixUnit() {
        if (now) asm volatile("tilerelease");
    }
};

template <int T>
QUIRE_INLINE void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
QUIRE_INLINE void tile_load(const void* p, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
QUIRE_INLINE void tile_store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int SUM, int L, int R>
QUIRE_INLINE void tile_codes(void) {  // signed bytes times unsigned ones
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(L), "i"(R));
}
template <int SUM, int L, int R>
QUIRE_INLINE void tile_halves(void) {  // bfloat16
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(L), "i"(R));
}

// Calls each(integral_constant<i>) for the first n of the SUMS.
template <int I = 0, class F>
QUIRE_INLINE void for_sums(int n, const F& each) {
    if constexpr (I < SUMS) {
        if (I >= n) return;
        each(std::integral_constant<int, I>{});
        for_sums<I + 1>(n, each);
    }
}

}  // namespace quire
#endif

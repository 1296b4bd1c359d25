// The normalised Hadamard rotation over every `width` channels, its own inverse, in the order of ops/rotate.py.
#pragma once
#include <cmath>

#include "vec.hpp"

namespace quire {

// One level among the lanes of a vector: the lower of two gets their sum, the upper their difference.
template <int H, int... I>
QUIRE_INLINE Floats butterfly(Floats v, std::integer_sequence<int, I...>) {
    const Floats other = __builtin_shufflevector(v, v, (I ^ H)...);
    const Words sign = {(I & H ? 0x80000000u : 0u)...};
    return other + (Floats)((Words)v ^ sign);
}
template <int H = 1>
QUIRE_INLINE Floats turn_lanes(Floats v) {
    v = butterfly<H>(v, std::make_integer_sequence<int, LANES>{});
    if constexpr (2 * H < LANES)
        return turn_lanes<2 * H>(v);
    else
        return v;
}

// n floats in groups of `width`, a power of two of at least LANES.
inline void turn_rows(float* x, int n, int width) {
    for (int j = 0; j < n; j += LANES) store(x + j, turn_lanes(load(x + j)));
    for (int step = LANES; step < width; step *= 2)
        for (int i = 0; i < n; i += 2 * step)
            for (int j = i; j < i + step; j += LANES) {
                const Floats a = load(x + j), b = load(x + j + step);
                store(x + j, a + b);
                store(x + j + step, a - b);
            }
    const float norm = (float)(1.0 / std::sqrt((double)width));
    for (int j = 0; j < n; j += LANES) store(x + j, load(x + j) * norm);
}

}  // namespace quire

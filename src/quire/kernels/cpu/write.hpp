// Rows of new tokens into their blocks, converted where the store's dtype is another.
#pragma once
#include <type_traits>

#include "quire_cpu.h"
#include "vec.hpp"

namespace quire {

template <class From, class To>
void write_field(const quire_write_args& a, int field) {
    const int width = a.width[field];
    const typename From::Element* source = (const typename From::Element*)a.source[field];
    for (int t = 0; t < a.n_tokens; t++) {
        const int64_t token = a.tokens ? a.tokens[t] : t;
        uint8_t* block = a.arena + a.units[t] * 64 + a.offset[field] + (int64_t)a.rows[t] * width * sizeof(typename To::Element);
        for (int h = 0; h < a.n_heads; h++) {
            const typename From::Element* from = source + token * a.source_row[field] + a.heads[h] * a.source_head[field];
            typename To::Element* to = (typename To::Element*)(block + h * a.tile_bytes);
            if constexpr (std::is_same_v<From, To>)
                memcpy(to, from, width * sizeof(*to));
            else
                for (int j = 0; j < width; j++) to[j] = To::narrow(From::one(from[j]));
        }
    }
}

template <class From>
int write_from(const quire_write_args& a) {
    for (int field = 0; field < 2; field++) switch (a.dtype) {
            case QUIRE_F32: write_field<From, F32>(a, field); break;
            case QUIRE_BF16: write_field<From, BF16>(a, field); break;
            case QUIRE_F16: write_field<From, F16>(a, field); break;
            default: return -1;
        }
    return 0;
}

inline int write(const quire_write_args& a) {
    switch (a.source_dtype) {
        case QUIRE_F32: return write_from<F32>(a);
        case QUIRE_BF16: return write_from<BF16>(a);
        case QUIRE_F16: return write_from<F16>(a);
    }
    return -1;
}

}  // namespace quire

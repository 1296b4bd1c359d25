// One instruction-set level: compiled several times, with -DQUIRE_LEVEL and the level's -march.
#define quire QUIRE_LEVEL  // each level's templates are its own: the linker must not mix them
#include "attend.hpp"
#include "decode.hpp"
#include "encode.hpp"
#include "gather.hpp"
#include "gemm.hpp"
#include "latent.hpp"
#include "small.hpp"
#include "write.hpp"
#undef quire

#define QUIRE_JOIN(a, b) a##b
#define QUIRE_NAME(a, b) QUIRE_JOIN(a, b)

extern "C" int QUIRE_NAME(quire_decode_, QUIRE_LEVEL)(const quire_decode_args* a) { return QUIRE_LEVEL::decode(*a); }
extern "C" int QUIRE_NAME(quire_write_, QUIRE_LEVEL)(const quire_write_args* a) { return QUIRE_LEVEL::write(*a); }
extern "C" int QUIRE_NAME(quire_gather_, QUIRE_LEVEL)(const quire_gather_args* a) { return QUIRE_LEVEL::gather(*a); }
extern "C" int QUIRE_NAME(quire_encode_, QUIRE_LEVEL)(const quire_encode_args* a) { return QUIRE_LEVEL::encode(*a); }
extern "C" int QUIRE_NAME(quire_latent_, QUIRE_LEVEL)(const quire_latent_args* a) { return QUIRE_LEVEL::latent(*a); }
extern "C" int QUIRE_NAME(quire_linear_, QUIRE_LEVEL)(const quire_linear_args* a) { return QUIRE_LEVEL::linear(*a); }
extern "C" int QUIRE_NAME(quire_rotary_, QUIRE_LEVEL)(const quire_rotary_args* a) { return QUIRE_LEVEL::rotary(*a); }
extern "C" int QUIRE_NAME(quire_norm_, QUIRE_LEVEL)(const quire_norm* n, const uint16_t* x, uint16_t* out, int64_t rows, int32_t threads) {
    return QUIRE_LEVEL::norm(*n, x, out, rows, threads);
}
extern "C" int QUIRE_NAME(quire_gated_, QUIRE_LEVEL)(const uint16_t* gate, const uint16_t* up, uint16_t* out, int64_t n, int32_t threads) {
    return QUIRE_LEVEL::gated(gate, up, out, n, threads);
}
extern "C" int QUIRE_NAME(quire_attend_, QUIRE_LEVEL)(const quire_attend_args* a) { return QUIRE_LEVEL::attend(*a); }

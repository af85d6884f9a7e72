// Numbers of 16 bits, in which activations and weights may be stored. Sums are of fp32: a load widens, and a store rounds
// to the nearest, ties to even; NaN stays NaN.
#pragma once
#include <cstring>

#include "simd.h"

// The same bits.
template <class To, class From>
INLINE To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// Formats: from the lower half of U to F (fp32), and back; of one number, or of vectors.
struct BrainFormat {  // the upper half of an fp32
    template <class F, class U>
    static INLINE F widened(U bits) {
        return as<F>(bits << 16);
    }
    template <class U, class F>
    static INLINE U rounded(F value) {
        const U bits = as<U>(value);
        return value != value ? U{} + 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    }
};
struct HalfFormat {  // 5 bits of exponent, of which 0 means multiples of 2^-24, and 31 infinity or NaN
    template <class F, class U>
    static INLINE F widened(U bits) {
        const U exponent = bits & 0x7c00, wide = ((bits & 0x7fff) << 13) + 0x38000000;
        const U tiny = as<U>(as<F>(wide + 0x800000) - 0x1p-14f);
        const U size = exponent == 0 ? tiny : exponent == 0x7c00 ? wide + 0x38000000 : wide;
        return as<F>(size | (bits & 0x8000) << 16);
    }
    template <class U, class F>
    static INLINE U rounded(F value) {
        const U bits = as<U>(value), size = bits & 0x7fffffff;
        const U tiny = as<U>(as<F>(size) + 0.5f) - 0x3f000000;  // the last bit of such a sum is 2^-24
        const U usual = (size + 0xc8000fff + (size >> 13 & 1)) >> 13;
        const U number = size < 0x38800000 ? tiny : size < 0x477ff000 ? usual : U{} + 0x7c00;
        return (value != value ? U{} + 0x7e00 : number) | (bits >> 16 & 0x8000);
    }
};

template <class Format>
struct Stored {
    Stored() = default;
    INLINE Stored(float value) : bits(uint16_t(Format::template rounded<uint32_t>(value))) {}
    INLINE operator float() const { return Format::template widened<float>(uint32_t(bits)); }
    uint16_t bits;
};
using Bfloat16 = Stored<BrainFormat>;
using Float16 = Stored<HalfFormat>;

typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

template <class T, class Format>
INLINE Vec<T> load(const Stored<Format>* p) {
    return Format::template widened<Vec<T>>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Words));
}
template <class T, class Format>
INLINE void store(Stored<Format>* p, Vec<T> v) {
    *reinterpret_cast<Halves*>(p) = __builtin_convertvector(Format::template rounded<Words>(v), Halves);
}

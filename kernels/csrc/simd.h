// The widest vector of the instruction set this file is compiled for, as GCC/Clang vector extensions.
#pragma once
#include <cmath>
#include <cstdint>
#include <utility>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of a number or a vector of them. NaN stays NaN, which std::max would drop.
template <class V>
INLINE V relu_of(V v) {
    return v < 0 ? V{} : v;
}

constexpr int kLanes = 16;  // packed activations are padded to this many columns, whatever the vector width

template <class T>
struct Simd;
template <>
struct Simd<float> {
    typedef float V __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
    typedef float Lane __attribute__((vector_size(16), aligned(4), may_alias));
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
    typedef double Lane __attribute__((vector_size(16), aligned(8), may_alias));
    typedef int64_t I __attribute__((vector_size(VECTOR_BYTES)));
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
constexpr int kWidth = VECTOR_BYTES / sizeof(T);  // elements per vector
template <class T>
constexpr int kUnit = 16 / sizeof(T);  // elements of 128 bits: of a unit

template <class T>
INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
INLINE void store(T* p, Vec<T> v) {
    *reinterpret_cast<Vec<T>*>(p) = v;
}

// Holds a loaded vector in a register: without it GCC folds the load into each of its uses.
template <class T>
INLINE void hold(Vec<T>& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#elif defined(__x86_64__)
    asm("" : "+x"(v));
#elif defined(__aarch64__)
    asm("" : "+w"(v));
#endif
}

// Keeps a scalar loop scalar.
template <class T>
INLINE void keep_scalar(T& value) {
#if defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#endif
}

template <class T>
INLINE Vec<T> square_roots(Vec<T> v) {
    constexpr bool single = sizeof(T) == 4;
#if VECTOR_BYTES == 64
    if constexpr (single) return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
    else return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
#elif VECTOR_BYTES == 32
    if constexpr (single) return (Vec<T>)_mm256_sqrt_ps((__m256)v);
    else return (Vec<T>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__x86_64__)
    if constexpr (single) return (Vec<T>)_mm_sqrt_ps((__m128)v);
    else return (Vec<T>)_mm_sqrt_pd((__m128d)v);
#else
    (void)single;
    for (int l = 0; l < kWidth<T>; ++l) v[l] = std::sqrt(v[l]);
    return v;
#endif
}

// e to the power of v, within 2 ulp; in fp32 from -87 to 88, and for less what it is there.
template <class T>
INLINE Vec<T> exponentials(Vec<T> v) {
    if constexpr (sizeof(T) == 8) {
        for (int l = 0; l < kWidth<T>; ++l) v[l] = std::exp(v[l]);
        return v;
    } else {
        typedef typename Simd<T>::I I;
        constexpr T magic = 12582912;  // 1.5 * 2^23: what is added to it rounds to an integer, in its lowest bits
        v = v < T(-87) ? Vec<T>{} - T(87) : v;
        const Vec<T> shifted = v * T(1.44269504089) + magic, n = shifted - magic;
        const Vec<T> r = v - n * T(0.693145751953125) - n * T(1.42860682030941723212e-6);
        Vec<T> p = Vec<T>{} + T(1.9875691500e-4);
        for (const T c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
            p = p * r + c;
        return (Vec<T>)((I)(p * r * r + r + T(1)) + ((I)shifted << 23));  // times 2^n
    }
}

// Elements Pick::at(0), Pick::at(1), ... of a and b, which are counted through. GCC before 12 has but its own word for it.
template <class T, class Pick, int... L>
INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, std::integer_sequence<int, L...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, Pick::at(L)...);
#else
    return __builtin_shuffle(a, b, typename Simd<T>::I{Pick::at(L)...});
#endif
}
template <class T, class Pick>
INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
    return shuffle<T, Pick>(a, b, std::make_integer_sequence<int, kWidth<T>>());
}

// The halves of all lanes, the lower or the UPPER, interleaved.
template <class T, bool UPPER>
struct Interleaved {
    static constexpr int at(int l) {
        constexpr int W = kWidth<T>, E = 16 / sizeof(T);
        return (l & 1 ? W : 0) + l / E * E + l % E / 2 + (UPPER ? E / 2 : 0);
    }
};

// The even units of (a, b), or the ODD: units are elements within 128-bit lanes (two shuffles a cycle), or where ACROSS the
// lanes themselves.
template <class T, bool ACROSS, bool ODD>
struct Alternate {
    static constexpr int at(int l) {
        constexpr int W = kWidth<T>, E = 16 / sizeof(T), units = ACROSS ? W / E : E, size = ACROSS ? E : 1;
        const int unit = l / size % units, rest = l - unit * size;  // rest: lane offset, or place within the unit
        return rest + (unit < units / 2 ? 0 : W) + (2 * unit % units + ODD) * size;
    }
};

// from(i)[j] -> to(j)[i], a block of kWidth x kWidth. Rows are read whole, once: a power of two apart, they share a set of L1.
template <class T, class From, class To>
INLINE void transpose(From from, To to) {
    constexpr int W = kWidth<T>, E = 16 / sizeof(T), L = W / E;
    Vec<T> v[W], next[E];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load<T>(from(i));
#pragma GCC unroll 4
    for (int q = 0; q < W; q += E)  // within lanes, E rows at a time
#pragma GCC unroll 2
        for (int stage = 1; stage < E; stage *= 2) {
#pragma GCC unroll 4
            for (int k = 0; k < E / 2; ++k) {
                next[2 * k] = shuffle<T, Interleaved<T, false>>(v[q + k], v[q + k + E / 2]);
                next[2 * k + 1] = shuffle<T, Interleaved<T, true>>(v[q + k], v[q + k + E / 2]);
            }
#pragma GCC unroll 4
            for (int k = 0; k < E; ++k) v[q + k] = next[k];
        }
    const auto even = [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return shuffle<T, Alternate<T, (L > 1), false>>(a, b); };
    const auto odd = [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) { return shuffle<T, Alternate<T, (L > 1), true>>(a, b); };
#pragma GCC unroll 4
    for (int j = 0; j < E; ++j)  // lane p of v[q E + j] goes to lane q of column p E + j
        if constexpr (L == 1) {
            store<T>(to(j), v[j]);
        } else if constexpr (L == 2) {
            store<T>(to(j), even(v[j], v[E + j]));
            store<T>(to(E + j), odd(v[j], v[E + j]));
        } else {
            const Vec<T> a = even(v[j], v[E + j]), b = even(v[2 * E + j], v[3 * E + j]);
            const Vec<T> c = odd(v[j], v[E + j]), d = odd(v[2 * E + j], v[3 * E + j]);
            store<T>(to(j), even(a, b));
            store<T>(to(E + j), even(c, d));
            store<T>(to(2 * E + j), odd(a, b));
            store<T>(to(3 * E + j), odd(c, d));
        }
}

// (a, b) -> sums of neighbouring units of a, then of b.
template <class T, bool ACROSS>
INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b) {
    return shuffle<T, Alternate<T, ACROSS, false>>(a, b) + shuffle<T, Alternate<T, ACROSS, true>>(a, b);
}

// f of the places of a unit, in turn, as constants.
template <int I>
using Place = std::integral_constant<int, I>;
template <class F, int... I>
INLINE void each_place(F f, std::integer_sequence<int, I...>) { (f(Place<I>()), ...); }
template <class T, class F>
INLINE void each_place(F f) { each_place(f, std::make_integer_sequence<int, kUnit<T>>()); }

// Of every unit the lower half of a and the upper one of b; or, if OTHER, the upper half of a and the lower one of b.
template <class T, bool OTHER>
struct Crossed {
    static constexpr int at(int l) {
        const bool lower = l % kUnit<T> < kUnit<T> / 2;
        return l + (lower ? 0 : kWidth<T>) + (OTHER ? (lower ? 1 : -1) * kUnit<T> / 2 : 0);
    }
};

// kUnit vectors -> one, in each unit of which element i is a part of the sum of vector i.
template <class T>
INLINE Vec<T> fold(const Vec<T>* v) {
    const auto crossed = [](Vec<T> a, Vec<T> b) __attribute__((always_inline)) {
        return shuffle<T, Crossed<T, false>>(a, b) + shuffle<T, Crossed<T, true>>(a, b);
    };
    if constexpr (kUnit<T> == 2) return add_neighbours<T, false>(v[0], v[1]);
    else return add_neighbours<T, false>(crossed(v[0], v[1]), crossed(v[2], v[3]));
}

// The sum of a vector's units.
template <class T>
INLINE typename Simd<T>::Lane add_units(Vec<T> v) {
#if VECTOR_BYTES == 64
    typedef T Half __attribute__((vector_size(32), may_alias));
    const Half h = reinterpret_cast<const Half&>(v) + (Half)_mm512_maskz_extractf32x8_ps(0xff, (__m512)v, 1);
#else
    const Vec<T> h = v;
#endif
#if VECTOR_BYTES >= 32
    typedef typename Simd<T>::Lane Lane;
    return (Lane)_mm256_castps256_ps128((__m256)h) + (Lane)_mm256_extractf128_ps((__m256)h, 1);
#else
    return h;
#endif
}

// A unit of values, by one load. Where each multiply-add has a load of its own, loads are what is short.
template <class T>
class Unit {
  public:
    INLINE explicit Unit(const T* p) {
#if VECTOR_BYTES == 64
        v_ = (Vec<T>)_mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(reinterpret_cast<const float*>(p)));
#elif VECTOR_BYTES == 32
        v_ = (Vec<T>)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
        v_ = load<T>(p);
#endif
        hold<T>(v_);
    }
    // Element J, for all lanes.
    template <int J>
    INLINE auto all() const {
        if constexpr (kUnit<T> == kWidth<T>) return v_[J];
        else return shuffle<T, Filled<J>>(v_, v_);
    }

  private:
    template <int J>
    struct Filled {
        static constexpr int at(int l) { return l / kUnit<T> * kUnit<T> + J; }
    };
    Vec<T> v_;
};

template <class T>
INLINE T sum(Vec<T> v) {
    T total = 0;
    for (int l = 0; l < kWidth<T>; ++l) total += v[l];
    return total;
}

// The widest vector of the instruction set this file is compiled for, as GCC/Clang vector extensions.
#pragma once
#include <cstdint>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif

#define INLINE inline __attribute__((always_inline))

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

// One 128-bit lane from each of row(0) + at, row(1) + at, ...: the loads do what would else take shuffles.
template <class T, class Row>
INLINE Vec<T> load_lanes(Row row, int64_t at) {
    typedef typename Simd<T>::Lane Lane;
    auto lane = [&](int i) __attribute__((always_inline)) { return *reinterpret_cast<const Lane*>(row(i) + at); };
#if VECTOR_BYTES == 64
    __m512 v = _mm512_castps128_ps512((__m128)lane(0));
    v = _mm512_insertf32x4(v, (__m128)lane(1), 1);
    v = _mm512_insertf32x4(v, (__m128)lane(2), 2);
    return (Vec<T>)_mm512_insertf32x4(v, (__m128)lane(3), 3);
#elif VECTOR_BYTES == 32
    return (Vec<T>)_mm256_insertf128_ps(_mm256_castps128_ps256((__m128)lane(0)), (__m128)lane(1), 1);
#else
    return (Vec<T>)lane(0);
#endif
}

// from(i)[j] -> to(j)[i], a block of kWidth x kWidth.
template <class T, class From, class To>
INLINE void transpose(From from, To to) {
    typedef typename Simd<T>::I I;
    constexpr int W = kWidth<T>, E = 16 / sizeof(T);
    I lo, hi;  // interleave the lower and the upper halves of lanes
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) {
        lo[l] = (l & 1 ? W : 0) + l / E * E + l % E / 2;
        hi[l] = lo[l] + E / 2;
    }
#pragma GCC unroll 4
    for (int c = 0; c < W; c += E) {  // lane q of v[k] holds columns c.. of row q E + k: transpose within lanes
        Vec<T> v[E], next[E];
#pragma GCC unroll 4
        for (int k = 0; k < E; ++k) v[k] = load_lanes<T>([&](int q) { return from(q * E + k); }, c);
#pragma GCC unroll 2
        for (int stage = 1; stage < E; stage *= 2) {
#pragma GCC unroll 4
            for (int k = 0; k < E / 2; ++k) {
                next[2 * k] = __builtin_shuffle(v[k], v[k + E / 2], lo);
                next[2 * k + 1] = __builtin_shuffle(v[k], v[k + E / 2], hi);
            }
#pragma GCC unroll 4
            for (int k = 0; k < E; ++k) v[k] = next[k];
        }
#pragma GCC unroll 4
        for (int k = 0; k < E; ++k) store<T>(to(c + k), v[k]);
    }
}

// (a, b) -> sums of neighbouring units of a, then of b: units are elements within 128-bit lanes (two shuffles a cycle),
// or where ACROSS the lanes themselves.
template <class T, bool ACROSS>
INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b) {
    typedef typename Simd<T>::I I;
    constexpr int W = kWidth<T>, E = 16 / sizeof(T), units = ACROSS ? W / E : E, size = ACROSS ? E : 1;
    I even, odd;
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) {
        const int unit = l / size % units, rest = l - unit * size;  // rest: lane offset, or place within the unit
        const int from = rest + (unit < units / 2 ? 0 : W) + 2 * unit % units * size;
        even[l] = from;
        odd[l] = from + size;
    }
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// kWidth vectors -> one vector whose lane i is the sum of vector i.
template <class T>
INLINE Vec<T> sums(const T* vectors) {
    constexpr int W = kWidth<T>, E = 16 / sizeof(T);
    Vec<T> v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) v[i] = load<T>(vectors + i * W);
#pragma GCC unroll 4
    for (int n = W / 2; n; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; ++i)
            v[i] = n * E >= W ? add_neighbours<T, false>(v[2 * i], v[2 * i + 1])
                              : add_neighbours<T, true>(v[2 * i], v[2 * i + 1]);
    return v[0];
}

template <class T>
INLINE T sum(Vec<T> v) {
    T total = 0;
    for (int l = 0; l < kWidth<T>; ++l) total += v[l];
    return total;
}

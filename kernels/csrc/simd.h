// The widest vector of the instruction set this file is compiled for, as GCC/Clang vector extensions.
#pragma once
#include <cstdint>

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
    typedef int32_t I __attribute__((vector_size(VECTOR_BYTES)));
};
template <>
struct Simd<double> {
    typedef double V __attribute__((vector_size(VECTOR_BYTES), aligned(8), may_alias));
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

// v[i][j] -> v[j][i] for kWidth vectors, by exchanging off-diagonal halves, quarters, ...
template <class T>
INLINE void transpose(Vec<T>* v) {
    typedef typename Simd<T>::I I;
    constexpr int W = kWidth<T>;
#pragma GCC unroll 4
    for (int h = W / 2; h; h /= 2) {
        I lo, hi;
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) {
            lo[l] = l & h ? W + l - h : l;
            hi[l] = l & h ? W + l : l + h;
        }
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i)
            if (!(i & h)) {
                const Vec<T> a = v[i], b = v[i + h];
                v[i] = __builtin_shuffle(a, b, lo);
                v[i + h] = __builtin_shuffle(a, b, hi);
            }
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

// Rows of W times few samples, straight from CSR: at batch 1 to 4 a call is limited by how fast values and columns come
// from memory, and a copy of the values in another order would have to be made anew whenever they change.
//
// One sample: lanes are entries of a row, their x loaded one by one, or gathered where the processor does that faster.
// 2 to kFew samples: lanes are samples, x is (features, kFew), and an entry costs three loads whatever their number.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

#if VECTOR_BYTES == 64
#include <cpuid.h>
#endif

constexpr int kFew = 4;  // samples
constexpr int kStream = 512;  // entries ahead that are asked for: of rows to come

typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));

// 16 bits of `all` from bit FROM. What limits these kernels is the number of instructions, and GCC makes three of this one.
template <int FROM>
INLINE uint64_t bits16(uint64_t all) {
#ifdef __BMI__
    uint64_t bits;
    asm("bextr %2, %1, %0" : "=r"(bits) : "r"(all), "r"(uint64_t(16 << 8 | FROM)) : "cc");
    return bits;
#else
    return all >> FROM & 65535;
#endif
}

// x at four columns. 64 bits of columns are one load.
template <class Index>
INLINE Four four(const float* x, const Index* c) {
    if constexpr (sizeof(Index) == 2) {
        uint64_t all;
        std::memcpy(&all, c, 8);
        return Four{x[all & 65535], x[bits16<16>(all)], x[bits16<32>(all)], x[all >> 48]};
    } else {
        return Four{x[c[0]], x[c[1]], x[c[2]], x[c[3]]};
    }
}

INLINE float across(Four sums) { return (sums[0] + sums[2]) + (sums[1] + sums[3]); }

template <class S, class Index>
INLINE void expect_entries(const S* values, const Index* columns) {
    __builtin_prefetch(values + kStream);
    __builtin_prefetch(columns + kStream);
}

// Σ values * x[columns] -> *y.
template <class T, class Index>
__attribute__((noinline)) void dot(const T* values, const Index* columns, int64_t n, const T* x, T* y) {
    const T* const end = values + n;
    T total = 0;
    if constexpr (sizeof(T) == 4) {
        Four low = {}, high = {};
        for (; values + 8 <= end; values += 8, columns += 8) {
            expect_entries(values, columns);
            low += four(x, columns) * *reinterpret_cast<const Four*>(values);
            high += four(x, columns + 4) * *reinterpret_cast<const Four*>(values + 4);
        }
        total = across(low + high);
    } else {
        T chains[4] = {};
        for (; values + 4 <= end; values += 4, columns += 4)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                chains[i] += values[i] * x[columns[i]];
                keep_scalar(chains[i]);
            }
        total = (chains[0] + chains[1]) + (chains[2] + chains[3]);
    }
    for (; values < end; ++values, ++columns) total += *values * x[*columns];
    *y = total;
}

// The same of samples 0 to kFew - 1, to y[0] to y[kFew - 1]. S: what values are stored in.
template <class T, class S, class Index>
__attribute__((noinline)) void dot_few(const S* values, const Index* columns, int64_t n, const T* x, T* y) {
    typedef T V __attribute__((vector_size(kFew * sizeof(T)), aligned(sizeof(T)), may_alias));
    V acc[4] = {};
    const auto entry = [&](int64_t k, V& to) __attribute__((always_inline)) {
        to += T(values[k]) * *reinterpret_cast<const V*>(x + int64_t(kFew) * columns[k]);
    };
    int64_t k = 0;
    for (; k + 8 <= n; k += 8) {
        expect_entries(values + k, columns + k);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) entry(k + i, acc[i % 4]);
    }
    for (; k < n; ++k) entry(k, acc[0]);
    *reinterpret_cast<V*>(y) = (acc[0] + acc[1]) + (acc[2] + acc[3]);
}

#if VECTOR_BYTES == 64
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own header where no mask is given

// `dot` by gathers of 16 entries.
template <class Index>
__attribute__((noinline)) void dot_gathered(const float* values, const Index* columns, int64_t n, const float* x, float* y) {
    const auto indices = [](const Index* c) __attribute__((always_inline)) {
        if constexpr (sizeof(Index) == 2) return _mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256((const __m256i*)c));
        else return _mm512_loadu_si512(c);
    };
    __m512 total = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + 16 <= n; k += 16) {
        expect_entries(values + k, columns + k);
        const __m512 in = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), kAll, indices(columns + k), x, 4);
        total = _mm512_fmadd_ps(_mm512_loadu_ps(values + k), in, total);
    }
    const __mmask16 rest = __mmask16((1 << (n - k)) - 1);  // columns end with zeros enough to be read here
    const __m512 in = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), rest, indices(columns + k), x, 4);
    total = _mm512_mask3_fmadd_ps(_mm512_maskz_loadu_ps(rest, values + k), in, total, rest);
    float lanes[16];
    _mm512_storeu_ps(lanes, total);
    const Four* quarter = reinterpret_cast<const Four*>(lanes);
    *y = across((quarter[0] + quarter[2]) + (quarter[1] + quarter[3]));
}

// Is `dot_gathered` the faster one? By rule, so that a machine's bits are always the same: from the cores that brought
// AVX512-FP16 on, Intel's gather fast and need no mitigation of Downfall.
inline bool gathers() {
    static const bool fast = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 23 & 1);
    }();
    return fast;
}
#endif

template <class T, class S, class Index>
using Dot = void (*)(const S*, const Index*, int64_t, const T*, T*);

// The kernel for activations of so many lanes, 1 or kFew; of one only where values are stored in T.
template <class T, class S, class Index>
inline Dot<T, S, Index> dot_of(int64_t lanes) {
    if constexpr (std::is_same_v<T, S>) {
#if VECTOR_BYTES == 64
        if constexpr (sizeof(T) == 4)
            if (lanes == 1 && gathers()) return dot_gathered<Index>;
#endif
        if (lanes == 1) return dot<T, Index>;
    }
    return dot_few<T, S, Index>;
}

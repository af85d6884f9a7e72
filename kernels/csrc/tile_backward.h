// The inner loops of the backward pass, over one tile: gradients of the input and of the values, from the same loads.
//
// Two multiply-adds share a load of gy. A segment reads and writes R vectors of gx and reads as many of x: from L2, or from
// another core, and so they are asked for two segments before. docs/built/linear.md counts the cycles.
#pragma once
#include <type_traits>

#include "tile.h"

// Vectors of gx and x that there are registers for beside four dot products, of 32 or of 16. With more of them, dot products
// of so many entries go to memory first: one after the other, their additions across lanes would wait for each other.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kFused = 8;
#else
constexpr int kFused = 4;
#endif
constexpr int kParked = 32;

// Dot products of `count` entries, at most a unit, a vector of parts for each -> to, or those places of it that `at` says;
// added if `add`.
template <class T, bool SCATTERED>
INLINE void write_dots(const Vec<T>* dots, int32_t count, T* to, const int32_t* at, bool add) {
    typedef typename Simd<T>::Lane Lane;
    const Lane total = add_units<T>(fold<T>(dots));
    if (!SCATTERED && count == kUnit<T>) {
        Lane& all = *reinterpret_cast<Lane*>(to);
        all = add ? all + total : total;
        return;
    }
    each_place<T>([&](auto J) __attribute__((always_inline)) {
        if (J >= count) return;
        T& one = to[SCATTERED ? at[J] : J];
        one = add ? one + total[int(J)] : total[int(J)];
    });
}

// A vector of parts of <mine, in>: one chain of multiply-adds, or two where it would be long. f(r, in) sees what is loaded.
template <class T, int R, class F>
INLINE Vec<T> product(const Vec<T> (&mine)[R], const T* in, F f) {
    constexpr int C = R > 4 ? 2 : 1;
    Vec<T> chain[C] = {};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        Vec<T> v = load<T>(in + r * kWidth<T>);
        f(r, v);
        chain[r % C] += mine[r] * v;
    }
    return C > 1 ? chain[0] + chain[C - 1] : chain[0];
}

// Of a row of Wᵀ with `length` entries: gx += Σ values * gy[col], and from the same loads gvalues (+)= <x, gy[col]>.
template <class T, int R, bool IN_CSR, class Rows, class Column>
INLINE void fused_row(const T* values, const Column* col, const int32_t* at, int32_t length, const T* gy, Rows rows,
                      const T* x, T* gx, T* gvalues, bool add) {
    constexpr int W = kWidth<T>, E = kUnit<T>, U = kSums<T, R>;
    Vec<T> acc[U][R] = {}, mine[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[0][r] = load<T>(gx + r * W), mine[r] = load<T>(x + r * W);
    const auto entry = [&](int32_t k, auto value, Vec<T>(&to)[R]) __attribute__((always_inline)) {
        return product<T, R>(mine, gy + rows(col[k]), [&](int r, Vec<T>& in) __attribute__((always_inline)) {
            hold<T>(in);
            to[r] += value * in;
        });
    };
    const auto value_of = [&](int32_t k) __attribute__((always_inline)) {
        if (!IN_CSR) return values[k];
        __builtin_prefetch(values + at[k + kAhead]);
        __builtin_prefetch(gvalues + at[k + kAhead], 1);
        return values[at[k]];
    };
    // `count` dot products of a unit: all, said by a constant, or fewer.
    const auto unit = [&](int32_t k, auto count, Vec<T>* dots) __attribute__((always_inline)) {
        if constexpr (!IN_CSR && !std::is_same_v<decltype(count), int32_t>) {
            const Unit<T> all(values + k);
            each_place<T>([&](auto J) __attribute__((always_inline)) {
                dots[J] = entry(k + J, all.template all<J>(), acc[J % U]);
            });
        } else {
            each_place<T>([&](auto J) __attribute__((always_inline)) {
                dots[J] = J < count ? entry(k + J, value_of(k + J), acc[J % U]) : Vec<T>{};
            });
        }
    };
    const auto write = [&](int32_t k, int32_t count, const Vec<T>* dots) __attribute__((always_inline)) {
        write_dots<T, IN_CSR>(dots, count, IN_CSR ? gvalues : gvalues + k, at + k, add);
    };
    int32_t k = 0;
    if constexpr (R <= kFused) {
        Vec<T> dots[E];
        for (; k + E <= length; k += E) unit(k, Place<E>(), dots), write(k, E, dots);
        if (k < length) unit(k, length - k, dots), write(k, length - k, dots);
    } else {
        Vec<T> dots[kParked];
        while (k < length) {
            const int32_t begin = k, end = length - k < kParked ? length : k + kParked;
            for (; k + E <= end; k += E) unit(k, Place<E>(), dots + (k - begin));
            if (k < end) unit(k, end - k, dots + (k - begin));
            for (k = begin; k < end; k += E) write(k, end - k < E ? end - k : E, dots + (k - begin));
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int u = 1; u < U; ++u) acc[0][r] += acc[u][r];
        store<T>(gx + r * W, acc[0][r]);
    }
}

// f(its row, the rows of the next two behind it; its length) for the segments of a tile.
template <class F>
INLINE void each_segment(const Schedule& s, const Tile* tile, F f) {
    const Bucket* last = s.buckets + tile[1].bucket;
    const uint16_t* row = s.segment_row + tile->segment;
    for (const Bucket* b = s.buckets + tile->bucket; b < last; ++b) {
        const int32_t length = b->length;
        for (const uint16_t* const stop = row + b->count; row < stop; ++row) f(row, length);
    }
}

// Over Wᵀ: gx[row] += Σ values * gy[col], and from the same loads gvalues (+)= <x[row], gy[col]>. Values and their gradient
// are of this tile, in its order; or, if IN_CSR, all of W: their misses are asked for kAhead entries before.
template <class T, int R, bool IN_CSR, class Rows>
void fused_tile(const Schedule& s, const Tile* tile, const T* values, const T* gy, Rows rows, const T* x, int64_t ldx,
                T* gx, int64_t ldgx, T* gvalues, bool add) {
    const int32_t* at = s.entry_value + tile->entry;
    const auto* col = rows.entries(s, tile);
    each_segment(s, tile, [&](const uint16_t* row, int32_t length) __attribute__((always_inline)) {
        expect<T, R>(gx + row[2] * ldgx);
        expect<T, R>(x + row[2] * ldx);
        fused_row<T, R, IN_CSR>(values, col, at, length, gy, rows, x + *row * ldx, gx + *row * ldgx, gvalues, add);
        col += length, at += length;
        if (!IN_CSR) values += length, gvalues += length;
    });
}

// Over W: gvalues (+)= <gy[row], x[col]>, where gx is not wanted.
template <class T, int R, class Rows>
void sddmm_tile(const Schedule& s, const Tile* tile, const T* gy, int64_t ld, const T* x, Rows rows, T* gvalues,
                bool add) {
    constexpr int W = kWidth<T>, E = kUnit<T>;
    const auto* col = rows.entries(s, tile);
    each_segment(s, tile, [&](const uint16_t* row, int32_t length) __attribute__((always_inline)) {
        const T* own = gy + *row * ld;
        expect<T, R>(gy + row[2] * ld);
        Vec<T> mine[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) mine[r] = load<T>(own + r * W);
        for (int32_t k = 0; k < length; k += E) {
            Vec<T> dots[E] = {};
            each_place<T>([&](auto J) __attribute__((always_inline)) {
                const auto nothing = [](int, Vec<T>&) {};
                if (k + J < length) dots[J] = product<T, R>(mine, x + rows(col[k + J]), nothing);
            });
            write_dots<T, false>(dots, length - k < E ? length - k : E, gvalues + k, nullptr, add);
        }
        col += length, gvalues += length;
    });
}

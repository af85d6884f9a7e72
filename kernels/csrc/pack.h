// Row-major (N, features) <-> packed: batch-minor, columns N.. zero. What is packed is of T, and the other of T or of 16
// bits: it is converted on its way.
#pragma once
#include <algorithm>

#include "half.h"
#include "team.h"

// The rows of a matrix.
template <class T>
INLINE auto rows_of(T* matrix, int64_t stride) {
    return [=](int row) __attribute__((always_inline)) { return matrix + row * stride; };
}

inline int64_t padded(int64_t batch) { return ceil_div(batch, kLanes) * kLanes; }

template <class T>
constexpr int64_t kWidest = kMaxGroups<T> * kLanes;

// Is a chain's work more in its activations than in its weights? features: of the inputs and outputs of all its layers.
// What another core wrote comes late. So a thread then takes a tile of the batch through all layers. Backward it finds
// gradients of all values, which are added up afterwards: of a tile, at most half as many as its activations. With AVX-512
// that is 64 values a feature. On Zen 4 it pays up to 60 to 100 on one die, and beyond on two.
template <class T>
bool is_light(int64_t values, int64_t features) { return values <= features * kWidest<T> / 2; }

// The batch in equal tiles of at most 8 vectors, as few as there can be. If `light`, an even number of them, so that two
// threads have as many, where a tile of all had 6 vectors or more.
//
// In `inference` such tiles of long vectors are half as wide, from 16 groups on. Where values are few, the entries of a segment
// span many columns, whose x of 8 vectors is more than L1 holds. Training gains nothing by it: backward, each tile has sums of
// its own. A sample's sums are the same in tiles of 4 to 8 vectors.
//
// No tile depends on the threads. Packed activations are tile after tile, each (features, width) and contiguous: a page then
// holds many features.
template <class T>
struct BatchTiles {
    explicit BatchTiles(int64_t batch, bool light = false, bool inference = false)
        : light(light), batch(batch), groups(padded(batch) / kLanes), count(ceil_div(groups, kMaxGroups<T>)) {
        if (light && count < groups && groups >= std::max(4, 6 * kWidth<T> / kLanes)) count += count % 2;
        if (light && inference && VECTOR_BYTES == 64) count = std::max(count, groups / kMaxGroups<T> * 2);
    }
    int64_t begin(int64_t i) const { return groups * i / count * kLanes; }  // first column
    int64_t width(int64_t i) const { return begin(i + 1) - begin(i); }
    template <class U>
    U* of(U* packed, int64_t features, int64_t i) const { return packed + features * begin(i); }
    int64_t samples(int64_t i) const { return std::min(width(i), batch - begin(i)); }
    bool light;
    int64_t batch, groups, count;
};

// Features [from, to) of x, whose rows (samples) are `stride` apart, to `width` columns.
template <class T, class S>
void pack(const S* x, int64_t stride, int64_t batch, int64_t from, int64_t to, T* packed, int64_t ld, int64_t width) {
    constexpr int W = kWidth<T>;
    for (int64_t n = 0; n < width; n += W) {
        const int64_t valid = batch - n < W ? (batch > n ? batch - n : 0) : W;
        int64_t f = from;
        for (; f + W <= to; f += W) {
            if (valid == W) {
                transpose<T>(rows_of(x + n * stride + f, stride), rows_of(packed + f * ld + n, ld));
                continue;
            }
            alignas(64) T rows[W * W] = {};
            for (int i = 0; i < valid; ++i) store<T>(rows + i * W, load<T>(x + (n + i) * stride + f));
            transpose<T>(rows_of(rows, W), rows_of(packed + f * ld + n, ld));
        }
        for (; f < to; ++f)
            for (int i = 0; i < W; ++i) packed[f * ld + n + i] = i < valid ? T(x[(n + i) * stride + f]) : T(0);
    }
}

// Packed x with other strides or unpadded: copies features [from, to), filling up with zeros.
template <class T, class S>
void repack(const S* x, int64_t stride, int64_t batch, int64_t from, int64_t to, T* packed, int64_t ld, int64_t width) {
    for (int64_t f = from; f < to; ++f) {
        for (int64_t n = 0; n < batch; ++n) packed[f * ld + n] = x[f * stride + n];
        for (int64_t n = batch; n < width; ++n) packed[f * ld + n] = T(0);
    }
}

// The inverse: `features` packed rows, `width` valid columns of each, to y (width, features) with row stride `stride`.
template <class T, class S>
void unpack(const T* packed, int64_t ld, int64_t features, int64_t width, S* y, int64_t stride) {
    constexpr int W = kWidth<T>;
    for (int64_t n = 0; n < width; n += W) {
        const int64_t valid = width - n < W ? width - n : W;
        int64_t f = 0;
        for (; f + W <= features; f += W) {
            if (valid == W) {
                transpose<T>(rows_of(packed + f * ld + n, ld), rows_of(y + n * stride + f, stride));
                continue;
            }
            alignas(64) T rows[W * W];
            transpose<T>(rows_of(packed + f * ld + n, ld), rows_of(rows, W));
            for (int i = 0; i < valid; ++i) store<T>(y + (n + i) * stride + f, load<T>(rows + i * W));
        }
        for (; f < features; ++f)
            for (int i = 0; i < valid; ++i) y[(n + i) * stride + f] = packed[f * ld + n + i];
    }
}

// A chain's activations, tile by tile of the batch: from the caller's tensors to packed ones, back, and to what is kept.
//
// T is what sums are taken in, S what tensors are stored in: the same, or 16 bits.
#pragma once
#include <algorithm>

#include "chain.h"
#include "order.h"
#include "pack.h"

template <class T, class S>
constexpr bool kNarrow = sizeof(S) < sizeof(T);

// Tile i of x, some of its features -> that tile, packed.
template <class T, class S>
void pack_tile(const ChainMatrix& x, int64_t batch, int64_t features, int64_t i, Range some, T* tile) {
    const BatchTiles<T> tiles(batch);
    const int64_t begin = tiles.begin(i), width = tiles.width(i);
    const S* first = static_cast<const S*>(x.data) + begin * (x.batch_minor ? 1 : x.stride);
    (x.batch_minor ? repack<T, S> : pack<T, S>)(first, x.stride, std::min(batch - begin, width), some.begin, some.end,
                                                tile, width, width);
}

// Rows [row, row + rows) of tile i, packed -> y; a batch-minor one to its last column.
template <class T, class S>
void unpack_rows(const T* packed, int64_t batch, int64_t i, int64_t row, int64_t rows, const ChainMatrix& y) {
    const BatchTiles<T> tiles(batch);
    const int64_t begin = tiles.begin(i), width = tiles.width(i);
    S* to = static_cast<S*>(y.data);
    if (!y.batch_minor)
        return unpack<T, S>(packed, width, rows, std::min(width, batch - begin), to + begin * y.stride + row, y.stride);
    const int64_t end = i + 1 == tiles.count ? y.stride : begin + width;
    for (int64_t r = 0; r < rows; ++r) {
        S* out = to + (row + r) * y.stride;
        std::copy_n(packed + r * width, width, out + begin);
        std::fill(out + begin + width, out + end, S(0));
    }
}

// Features `some` of a layer's input, tile i: to what is kept of it in 16 bits, or from there if `back`.
template <class T, class S>
void keep(const ChainLayer& layer, int64_t batch, int64_t features, int64_t i, Range some, bool back) {
    if constexpr (kNarrow<T, S>) {
        if (!layer.kept) return;
        const BatchTiles<T> tiles(batch);
        const int64_t width = tiles.width(i), count = (some.end - some.begin) * width;
        T* input = tiles.of(static_cast<T*>(layer.input), features, i) + some.begin * width;
        S* kept = tiles.of(static_cast<S*>(layer.kept), features, i) + some.begin * width;
        for (int64_t k = 0; k < count; k += kWidth<T>)
            back ? store<T>(input + k, load<T>(kept + k)) : store<T>(kept + k, load<T>(input + k));
    }
}

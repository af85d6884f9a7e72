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
void pack_tile(const ChainMatrix& x, const BatchTiles<T>& tiles, int64_t i, Range some, T* tile) {
    const int64_t begin = tiles.begin(i), width = tiles.width(i);
    const S* first = static_cast<const S*>(x.data) + begin * (x.batch_minor ? 1 : x.stride);
    (x.batch_minor ? repack<T, S> : pack<T, S>)(first, x.stride, tiles.samples(i), some.begin, some.end, tile, width,
                                                width);
}

// Rows [row, row + rows) of tile i, packed -> y; a batch-minor one to its last column.
template <class T, class S>
void unpack_rows(const T* packed, const BatchTiles<T>& tiles, int64_t i, int64_t row, int64_t rows, const ChainMatrix& y) {
    const int64_t begin = tiles.begin(i), width = tiles.width(i);
    S* to = static_cast<S*>(y.data);
    if (!y.batch_minor)
        return unpack<T, S>(packed, width, rows, tiles.samples(i), to + begin * y.stride + row, y.stride);
    const int64_t end = i + 1 == tiles.count ? y.stride : begin + width;
    for (int64_t r = 0; r < rows; ++r) {
        S* out = to + (row + r) * y.stride;
        std::copy_n(packed + r * width, width, out + begin);
        std::fill(out + begin + width, out + end, S(0));
    }
}

// A large result is mostly fresh memory.
template <class S>
void expect_matrix(const ChainMatrix& y, int64_t batch, int64_t features) {
    if (y.data) expect_writes(y.data, y.stride * (y.batch_minor ? features : batch) * sizeof(S));
}

// Features `some` of a layer's input, tile i: to what is kept of it in 16 bits, or from there if `back`.
template <class T, class S>
void keep(const ChainLayer& layer, const BatchTiles<T>& tiles, int64_t features, int64_t i, Range some, bool back) {
    if constexpr (kNarrow<T, S>) {
        if (!layer.kept) return;
        const int64_t width = tiles.width(i), count = (some.end - some.begin) * width;
        T* input = tiles.of(static_cast<T*>(layer.input), features, i) + some.begin * width;
        S* kept = tiles.of(static_cast<S*>(layer.kept), features, i) + some.begin * width;
        for (int64_t k = 0; k < count; k += kWidth<T>)
            back ? store<T>(input + k, load<T>(kept + k)) : store<T>(kept + k, load<T>(input + k));
    }
}

// Are the plans of all layers theirs, and are there values?
inline bool are_plans(const ChainArgs& a, const ChainLayer* layers, bool backward) {
    for (int64_t l = 0; l < a.layers; ++l)
        if (!is_plan(layers[l].plan, layers[l].plan_size, layers[l].rows, l ? layers[l - 1].rows : a.features, layers[l].nnz,
                     backward) ||
            (layers[l].nnz && !layers[l].values))
            return false;
    return true;
}

// f(T, S) for tensors of this element type.
template <class F>
void of_element(int64_t element, F f) {
    if (element == FLOAT64) f(double(), double());
    else if (element == FLOAT32) f(float(), float());
    else if (element == BFLOAT16) f(float(), Bfloat16());
    else f(float(), Float16());
}

// A second thread comes too late for so few products of a value and a group of lanes: with it layers of 300 x 100 took 10 to
// 20 % longer on Zen 4 on one die, and up to three times as long on two, where what it reads comes from the other one.
constexpr int64_t kTiny = 256 * VECTOR_BYTES;

// How many threads work on a chain; where there is a backward, the same both ways, as it reads what forward wrote.
template <class T>
int64_t team_of(const ChainArgs& a, const ChainLayer* layers, const BatchTiles<T>& tiles) {
    int64_t products = 0;
    for (int64_t l = 0; l < a.layers; ++l) products += layers[l].nnz * tiles.groups * (a.inference ? 1 : 2);
    return tiles.light && tiles.count == 1 && products <= kTiny ? 1 : a.threads;
}

// Of a whole chain: in training the same forward and backward.
template <class T>
BatchTiles<T> tiles_of(const ChainArgs& a, const ChainLayer* layers) {
    int64_t values = 0, features = 0;
    for (int64_t l = 0; l < a.layers; ++l)
        values += layers[l].nnz, features += (l ? layers[l - 1].rows : a.features) + layers[l].rows;
    return BatchTiles<T>(a.batch, is_light<T>(values, features), a.inference);
}

// One linear layer, strip by strip, over one tile of the batch: what inference, autograd and native training share.
//
// For each tile of the batch (at most 8 vectors wide) and each strip of rows (at most 256: y of it stays in L2), tiles of
// `block` columns are multiplied one after the other, each with the rows of x that it needs in L1.
#pragma once
#include <algorithm>

#include "order.h"
#include "pack.h"
#include "team.h"
#include "tile_backward.h"

inline int64_t first_row(const Schedule& s, int64_t strip) { return strip * s.strip; }
inline int64_t height(const Schedule& s, int64_t strip) { return std::min<int64_t>(s.strip, s.rows - first_row(s, strip)); }

// f(tile of the matrix, entries of the strip before it, first of its columns, R) for the tiles of a strip.
template <class T, class F>
INLINE void each_tile(const Schedule& s, int64_t strip, int64_t width, F f) {
    const Tile* tile = s.tiles + strip * s.blocks;
    const int64_t first = tile->entry;
    with_registers<T>(width / kLanes, [&](auto R) {
        for (int64_t b = 0; b < s.blocks; ++b, ++tile) f(tile, tile->entry - first, b * s.block, R);
    });
}

// y = W x + b of a strip's rows, then a ReLU if `relu`. values: of the strip, in its order; or all of W in CSR's if `in_csr`.
template <class T>
void forward_strip(const Schedule& s, int64_t strip, const T* values, bool in_csr, const T* bias, const T* x, T* y,
                   int64_t width, bool relu) {
    const int64_t row = first_row(s, strip), rows = height(s, strip);
    for (int64_t r = 0; r < rows; ++r) std::fill_n(y + r * width, width, bias ? bias[row + r] : T(0));
    each_tile<T>(s, strip, width, [&](const Tile* tile, int64_t before, int64_t column, auto R) {
        constexpr Packed<R * kWidth<T>> rows_of_x;
        const T* in = x + column * width;
        if (in_csr) spmm_tile<T, R, true>(s, tile, values, in, rows_of_x, y, width);
        else spmm_tile<T, R, false>(s, tile, values + before, in, rows_of_x, y, width);
    });
    for (int64_t i = 0; relu && i < rows * width; ++i) y[i] = relu_of(y[i]);
}

// gx = Wᵀ gy of a strip's rows of Wᵀ, if `relu` zero where x is not positive, and where gvalues is not null the gradient of
// the strip's values (added if `add`). x: those rows of the input. in_csr: values and gvalues are all of W, not null.
template <class T>
void input_gradient_strip(const Schedule& s, int64_t strip, const T* values, bool in_csr, const T* gy, const T* x, T* gx,
                          T* gvalues, bool add, int64_t width, bool relu) {
    const int64_t size = height(s, strip) * width;
    std::fill_n(gx, size, T(0));
    each_tile<T>(s, strip, width, [&](const Tile* tile, int64_t before, int64_t column, auto R) {
        constexpr Packed<R * kWidth<T>> rows_of_gy;
        const T* in = gy + column * width;
        if (in_csr)
            fused_tile<T, R, true>(s, tile, values, in, rows_of_gy, x, width, gx, width, gvalues, add);
        else if (gvalues)
            fused_tile<T, R, false>(s, tile, values + before, in, rows_of_gy, x, width, gx, width, gvalues + before, add);
        else
            spmm_tile<T, R, false>(s, tile, values + before, in, rows_of_gy, gx, width);
    });
    for (int64_t i = 0; relu && i < size; ++i) gx[i] = x[i] <= 0 ? T(0) : gx[i];
}

// The gradient of a strip's values alone. gy: the strip's rows.
template <class T>
void values_gradient_strip(const Schedule& s, int64_t strip, const T* gy, const T* x, T* gvalues, bool add, int64_t width) {
    each_tile<T>(s, strip, width, [&](const Tile* tile, int64_t before, int64_t column, auto R) {
        sddmm_tile<T, R>(s, tile, gy, width, x + column * width, Packed<R * kWidth<T>>(), gvalues + before, add);
    });
}

// gbias (+)= Σ gy over a tile of the batch, of some rows.
template <class T>
void bias_gradient(const T* gy, int64_t width, Range rows, T* gbias, bool add) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        Vec<T> total = {};
        for (int64_t n = 0; n < width; n += kWidth<T>) total += load<T>(gy + r * width + n);
        gbias[r] = (add ? gbias[r] : T(0)) + sum<T>(total);
    }
}

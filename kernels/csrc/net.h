// A frozen net: stages that hand one image (or sample) on, each writing what the next one reads.
//
// A field is how a stage reads its input, float32. A convolution's holds a copy of the image for each column of its
// kernel, shifted by it and cut to the columns of the output, with its rows of padding: a tap is then a constant
// offset, whichever the pixel, and pixel i of the output is element i from there. For a stride, rows with the same
// number modulo the stride (a phase) lie together. Everything else reads the plain image: one copy, no padding.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "dot.h"

struct Field {  // mirrored in cpu_stages.py
    int64_t channels, height, width;                   // the image
    int64_t columns, copies, stride, dilation, left;   // columns of a copy; copies: the kernel's width; left: padding
    int64_t phases, rows, top;                         // rows of a phase, those of padding included; top: padding
    int64_t plane() const { return rows * columns; }
    int64_t channel() const { return copies * phases * plane(); }
    bool plain() const { return copies == 1 && phases == 1 && !top && rows == height && columns == width && !left; }
};

enum Kind : int64_t { CONVOLUTION = 0, LINEAR = 1, MEAN = 2 };

struct Stage {  // mirrored in cpu_net.py
    int64_t kind, rows;      // of the matrix: channels or features of the output
    const int32_t* begin;    // of each row's entries and after the last; LINEAR: of kRows rows, entries of each of them
    const void* at;          // of an entry: CONVOLUTION: int32 offset in the field; LINEAR: uint16 or int32 column
    const float* values;
    const int32_t* order;    // LINEAR: the row of each sum; rows of a strip are sorted by length, the last ones may be -1
    const float *scale, *shift;  // of a row's sum; CONVOLUTION: null: 1, 0; LINEAR: shift alone, in order
    int64_t relu, pool, wide;    // pool: windows pool x pool; wide: columns are int32
    int64_t height, width;       // CONVOLUTION: of the output, before the pooling
    int64_t by_pixels;           // CONVOLUTION: threads share out the output's rows of pixels, not its channels
    Field input;
};

// Rows [from, to) of a channel's image, of which row `from` is at `y`, into a field; the padding with the rows next to it.
inline void put(const Field& f, float* field, int64_t channel, const float* y, int64_t from, int64_t to) {
    float* base = field + channel * f.channel();
    if (f.plain()) {
        std::copy_n(y, (to - from) * f.width, base + from * f.width);
        return;
    }
    for (int64_t copy = 0; copy < f.copies; ++copy, base += f.phases * f.plane()) {
        const auto row = [&](int64_t r) { return base + r % f.phases * f.plane() + r / f.phases * f.columns; };
        if (from == 0)
            for (int64_t r = 0; r < f.top; ++r) std::fill_n(row(r), f.columns, 0.0f);
        if (to == f.height)
            for (int64_t r = f.top + to; r < f.rows * f.phases; ++r) std::fill_n(row(r), f.columns, 0.0f);
        const int64_t shift = copy * f.dilation - f.left;  // column w reads w * stride + shift
        if (f.stride == 1 && f.phases == 1 && f.columns == f.width && std::abs(shift) < f.width) {
            float* target = row(from + f.top);  // all rows at once, then the columns that came from other rows
            const int64_t count = (to - from) * f.width - std::abs(shift);
            std::memcpy(target + std::max<int64_t>(-shift, 0), y + std::max<int64_t>(shift, 0), count * sizeof(float));
            for (int64_t r = from; r < to; ++r, target += f.columns) {
                for (int64_t w = 0; w < -shift; ++w) target[w] = 0;
                for (int64_t w = f.columns - shift; w < f.columns; ++w) target[w] = 0;
            }
        } else {
            for (int64_t r = from; r < to; ++r)
                for (int64_t w = 0; w < f.columns; ++w) {
                    const int64_t column = w * f.stride + shift;
                    const bool inside = column >= 0 && column < f.width;
                    row(r + f.top)[w] = inside ? y[(r - from) * f.width + column] : 0.0f;
                }
        }
    }
}

// Sums of one row for R vectors of B bytes: of neighbouring pixels, `offset` being that of a tap, or where STRIDED of
// samples, it being a column of W whose samples begin at offset * stride. At least 8 sums are under way.
template <int B, int R, bool STRIDED>
__attribute__((noinline)) void taps(const int32_t* offset, const float* value, int64_t n, const float* x, int64_t stride,
                                    float* y) {
    typedef float V __attribute__((vector_size(B), aligned(4), may_alias));
    constexpr int W = B / 4, U = R >= 6 ? 1 : R >= 3 ? 2 : R == 2 ? 4 : 8;
    V acc[U][R] = {};
    const auto entry = [&](int64_t k, V(&to)[R]) __attribute__((always_inline)) {
        const float* in = x + (STRIDED ? offset[k] * stride : offset[k]);
        const float v = value[k];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) to[r] += v * *reinterpret_cast<const V*>(in + r * W);
    };
    int64_t k = 0;
    for (; k + U <= n; k += U)
#pragma GCC unroll 8
        for (int u = 0; u < U; ++u) entry(k + u, acc[u]);
    for (; k < n; ++k) entry(k, acc[0]);
#pragma GCC unroll 8
    for (int u = 1; u < U; ++u)
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) acc[0][r] += acc[u][r];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) *reinterpret_cast<V*>(y + r * W) = acc[0][r];
}

typedef void (*Sums)(const int32_t*, const float*, int64_t, const float*, int64_t, float*);

// `taps` for 1 to 8 vectors.
template <int B, bool STRIDED = false>
inline Sums taps_of(int64_t vectors) {
    static const Sums table[] = {taps<B, 1, STRIDED>, taps<B, 2, STRIDED>, taps<B, 3, STRIDED>, taps<B, 4, STRIDED>,
                                 taps<B, 5, STRIDED>, taps<B, 6, STRIDED>, taps<B, 7, STRIDED>, taps<B, 8, STRIDED>};
    return table[vectors - 1];
}

constexpr int kRows = 8;  // of a linear layer that are summed at once, as lanes

// Σ values * x[columns] for kRows rows of `length` entries: entry k of all rows, then entry k + 1. Not inlined: it needs
// all registers. Values that never change may lie so, and kRows rows have one end of a loop, where those of dot.h have one each.
template <class Index>
__attribute__((noinline)) void dots(const float* values, const Index* columns, int64_t length, const float* x, Four* sums) {
    Four low = {}, high = {};
    for (const float* const end = values + kRows * length; values < end; values += kRows, columns += kRows) {
        low += four(x, columns) * *reinterpret_cast<const Four*>(values);
        high += four(x, columns + 4) * *reinterpret_cast<const Four*>(values + 4);
    }
    sums[0] = low, sums[1] = high;
}

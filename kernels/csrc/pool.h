// Max pooling of packed blocks, windows of pool x pool that do not overlap.
//
// Which pixel of its window won is kept for the backward pass, a byte each: (image / kLanes, channel, row, column, image
// % kLanes), or images one by one where pixels serve as lanes. kNobody: what follows is a ReLU, and nothing was positive.
#pragma once
#include "simd.h"

constexpr int kNobody = 255;

struct Windows {  // of `rows` x `columns` windows a channel and image
    int64_t pool, channels, rows, columns, images;
    // Of an image (the first of its group), a channel and a row.
    uint8_t* at(uint8_t* winners, int64_t image, int64_t channel, int64_t row, int64_t lanes) const {
        return winners + ((image / lanes * channels + channel) * rows + row) * columns * lanes;
    }
};

template <class T>
struct Bytes {
    typedef uint8_t V __attribute__((vector_size(kWidth<T>), aligned(1), may_alias));
};

// One channel of a block: windows of rows [from, to) -> the block's first rows, pitch `windows.columns`.
template <class T>
void pool_plane(T* plane, int64_t pitch, int64_t lanes, const Windows& w, bool relu, int64_t image, int64_t channel,
                int64_t from, int64_t to, uint8_t* winners) {
    typedef typename Simd<T>::I I;
    typedef typename Bytes<T>::V B;
    T* out = plane;
    if (lanes == 1) {
        uint8_t* winner = w.at(winners, image, channel, from, 1);
        for (int64_t row = 0; row < to - from; ++row)
            for (int64_t column = 0; column < w.columns; ++column) {
                const T* window = plane + row * w.pool * pitch + column * w.pool;
                T best = *window;
                int which = 0;
                for (int k = 1; k < w.pool * w.pool; ++k) {
                    const T v = window[k / w.pool * pitch + k % w.pool];
                    if (v > best || v != v) best = v, which = k;
                }
                *winner++ = uint8_t(relu && best <= 0 ? kNobody : which);
                *out++ = relu ? relu_of(best) : best;
            }
        return;
    }
    for (int64_t row = 0; row < to - from; ++row)
        for (int64_t column = 0; column < w.columns; ++column, out += lanes)
            for (int64_t lane = 0; lane < lanes; lane += kWidth<T>) {
                const T* window = plane + (row * w.pool * pitch + column * w.pool) * lanes + lane;
                Vec<T> best = load<T>(window);
                I which = {};
                for (int k = 1; k < w.pool * w.pool; ++k) {
                    const Vec<T> v = load<T>(window + (k / w.pool * pitch + k % w.pool) * lanes);
                    const I better = (v > best) | (v != v);
                    best = better ? v : best;
                    which = better ? I{} + k : which;
                }
                if (relu) {
                    which = best <= 0 ? I{} + kNobody : which;
                    best = relu_of(best);
                }
                store<T>(out + lane, best);
                const int64_t group = image + lane / kLanes * kLanes;
                if (group < w.images)
                    *reinterpret_cast<B*>(w.at(winners, group, channel, from + row, kLanes) + column * kLanes + lane % kLanes) =
                        __builtin_convertvector(which, B);
            }
}

// The gradient: window `row` of `pooled` -> those of its rows that are in [from, to), with zeros where another pixel won.
// plane is where row `from` begins.
template <class T>
void unpool_row(const T* pooled, T* plane, int64_t pitch, int64_t lanes, const Windows& w, int64_t image, int64_t channel,
                int64_t row, int64_t from, int64_t to, const uint8_t* winners) {
    typedef typename Simd<T>::I I;
    typedef typename Bytes<T>::V B;
    uint8_t* all = const_cast<uint8_t*>(winners);
    for (int64_t r = 0; r < w.pool; ++r) {
        const int64_t y = row * w.pool + r - from;
        if (y < 0 || y >= to - from) continue;
        for (int64_t column = 0; column < w.columns; ++column)
            for (int64_t s = 0; s < w.pool; ++s) {
                const int which = int(r * w.pool + s);
                T* out = plane + (y * pitch + column * w.pool + s) * lanes;
                if (lanes == 1) {
                    *out = w.at(all, image, channel, row, 1)[column] == which ? pooled[column] : T(0);
                    continue;
                }
                for (int64_t lane = 0; lane < lanes; lane += kWidth<T>) {
                    const int64_t group = image + lane / kLanes * kLanes;
                    Vec<T> g = {};
                    if (group < w.images) {
                        const uint8_t* winner = w.at(all, group, channel, row, kLanes) + column * kLanes + lane % kLanes;
                        const I won = __builtin_convertvector(*reinterpret_cast<const B*>(winner), I);
                        g = won == which ? load<T>(pooled + column * lanes + lane) : g;
                    }
                    store<T>(out + lane, g);
                }
            }
    }
}

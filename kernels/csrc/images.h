// Tensors of images <-> packed blocks: (channel, pixel, lane), where a lane is an image of the batch.
//
// A table says where each pixel goes, so that halos, strides and flips cost nothing in the loops. A block with one lane
// is a padded copy of a single image, in which neighbouring pixels serve as lanes.
#pragma once
#include "simd.h"

template <class T>
struct Images {  // pixels, or else channels, are contiguous
    T* data;
    int64_t batch, channels, height, width, image, channel, pixel;  // the last three: strides
};

// columns x rows elements of from(row)[column] -> to(column)[row], kWidth x kWidth at most; `fill` writes zeros in rows up
// to kWidth. Where gate(row)[column] <= 0 a zero is taken instead.
template <class T, bool GATED, class From, class To, class Gate>
INLINE void move_block(int rows, int columns, bool fill, From from, To to, Gate gate) {
    constexpr int W = kWidth<T>;
    if (!GATED && rows == W && columns == W) return transpose<T>(from, to);
    alignas(64) T in[W * W], out[W * W];
    for (int r = 0; r < W; ++r) {
        Vec<T> v = {};
        if (r < rows && columns == W) {
            v = load<T>(from(r));
            if (GATED) v = load<T>(gate(r)) <= 0 ? Vec<T>{} : v;
        } else if (r < rows) {
            for (int c = 0; c < columns; ++c) v[c] = GATED && gate(r)[c] <= 0 ? T(0) : from(r)[c];
        }
        store<T>(in + r * W, v);
    }
    transpose<T>([&](int r) { return in + r * W; }, [&](int c) { return out + c * W; });
    for (int c = 0; c < columns; ++c) {
        T* target = to(c);
        if (fill)
            store<T>(target, load<T>(out + c * W));
        else
            for (int r = 0; r < rows; ++r) target[r] = out[c * W + r];
    }
}

// Rows [from, to) of `lanes` images beginning with `first`: pixel i of them, channel c -> packed[c * plane + place[i]].
// Images after the last are zeros. GATED: by `gate`, images of the same shape and strides.
template <class T, bool GATED>
void pack_images(const Images<const T>& x, const T* gate, int64_t first, int64_t lanes, int64_t from, int64_t to,
                 const int32_t* place, T* packed, int64_t plane) {
    constexpr int W = kWidth<T>;
    const int64_t pixels = (to - from) * x.width, start = first * x.image + from * x.width * x.pixel;
    if (pixels <= 0) return;
    const T* data = x.data + start;
    if (GATED) gate += start;
    const T* const other = GATED ? gate : data;
    if (lanes == 1) {
        const int64_t step = x.width > 1 ? place[1] - place[0] : 1;
        for (int64_t c = 0; c < x.channels; ++c)
            for (int64_t row = 0; row < pixels; row += x.width) {
                const T *source = data + c * x.channel + row * x.pixel, *g = other + c * x.channel + row * x.pixel;
                T* target = packed + c * plane + place[row];
                if (step == 1 && x.pixel == 1)
                    for (int64_t i = 0; i < x.width; ++i) target[i] = GATED && g[i] <= 0 ? T(0) : source[i];
                else
                    for (int64_t i = 0; i < x.width; ++i)
                        packed[c * plane + place[row + i]] = GATED && g[i * x.pixel] <= 0 ? T(0) : source[i * x.pixel];
            }
        return;
    }
    for (int64_t lane = 0; lane < lanes; lane += W) {
        const int64_t left = x.batch - first - lane;
        const int rows = left < 0 ? 0 : left < W ? int(left) : W;
        const int64_t at = lane * x.image;
        if (x.pixel == 1) {
            for (int64_t c = 0; c < x.channels; ++c)
                for (int64_t i = 0; i < pixels; i += W) {
                    const int64_t source = at + c * x.channel + i;
                    T* target = packed + c * plane + lane;
                    move_block<T, GATED>(
                        rows, int(pixels - i < W ? pixels - i : W), true,
                        [&](int r) { return data + source + r * x.image; }, [&](int p) { return target + place[i + p]; },
                        [&](int r) { return other + source + r * x.image; });
                }
        } else {
            for (int64_t i = 0; i < pixels; ++i)
                for (int64_t c = 0; c < x.channels; c += W) {
                    const int64_t source = at + i * x.pixel + c;
                    T* target = packed + c * plane + place[i] + lane;
                    move_block<T, GATED>(
                        rows, int(x.channels - c < W ? x.channels - c : W), true,
                        [&](int r) { return data + source + r * x.image; }, [&](int p) { return target + p * plane; },
                        [&](int r) { return other + source + r * x.image; });
                }
        }
    }
}

// The inverse: packed[c * plane + place[i]] -> pixel i of rows [from, to), channel c, of those images that exist.
template <class T>
void unpack_images(const T* packed, int64_t plane, const int32_t* place, const Images<T>& y, int64_t first, int64_t lanes,
                   int64_t from, int64_t to) {
    constexpr int W = kWidth<T>;
    const int64_t pixels = (to - from) * y.width;
    T* data = y.data + first * y.image + from * y.width * y.pixel;
    if (lanes == 1) {
        const int64_t step = y.width > 1 ? place[1] - place[0] : 1;
        for (int64_t c = 0; c < y.channels; ++c)
            for (int64_t row = 0; row < pixels; row += y.width) {
                const T* source = packed + c * plane + place[row];
                T* target = data + c * y.channel + row * y.pixel;
                if (step == 1 && y.pixel == 1)
                    for (int64_t i = 0; i < y.width; ++i) target[i] = source[i];
                else
                    for (int64_t i = 0; i < y.width; ++i) target[i * y.pixel] = packed[c * plane + place[row + i]];
            }
        return;
    }
    const auto none = [](int) { return static_cast<const T*>(nullptr); };
    for (int64_t lane = 0; lane < lanes; lane += W) {
        const int64_t left = y.batch - first - lane, at = lane * y.image;
        const int columns = left < 0 ? 0 : left < W ? int(left) : W;
        if (!columns) return;
        if (y.pixel == 1) {
            for (int64_t c = 0; c < y.channels; ++c)
                for (int64_t i = 0; i < pixels; i += W) {
                    const T* source = packed + c * plane + lane;
                    T* target = data + at + c * y.channel + i;
                    move_block<T, false>(
                        int(pixels - i < W ? pixels - i : W), columns, false,
                        [&](int p) { return source + place[i + p]; }, [&](int r) { return target + r * y.image; }, none);
                }
        } else {
            for (int64_t i = 0; i < pixels; ++i)
                for (int64_t c = 0; c < y.channels; c += W) {
                    const T* source = packed + c * plane + place[i] + lane;
                    T* target = data + at + i * y.pixel + c;
                    move_block<T, false>(
                        int(y.channels - c < W ? y.channels - c : W), columns, false,
                        [&](int p) { return source + p * plane; }, [&](int r) { return target + r * y.image; }, none);
                }
        }
    }
}

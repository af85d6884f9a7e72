// Tensors of images <-> packed blocks: (channel, pixel, lane), where a lane is an image of the batch.
//
// A table says where each pixel goes, so that halos and strides cost nothing in the loops. A block with one lane is a
// padded copy of a single image, in which neighbouring pixels serve as lanes.
#pragma once
#include "simd.h"

template <class T>
struct Images {  // pixels, or else channels, are contiguous
    T* data;
    int64_t batch, channels, height, width, image, channel, row, pixel;  // the last four: strides
    // Rows [from, to) of one image, as few and long as can be where pixel i of them goes to place[i].
    Images rows(int64_t first, int64_t from, int64_t to, const int32_t* place) const {
        Images some = *this;
        some.data += first * image + from * row;
        some.height = to - from;
        const bool follow = some.height > 1 && place[width] - place[0] == width;  // no halo, and no phases between
        if (follow && row == width * pixel) some.width *= some.height, some.height = 1;
        return some;
    }
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

// Rows of one image, pixel by pixel as `pack_images` says. gate: of the same shape and strides.
template <class T, bool GATED>
void pack_pixels(const Images<const T>& x, const T* gate, const int32_t* place, T* packed, int64_t plane) {
    constexpr int W = kWidth<T>;
    const bool neighbours = x.width < 2 || place[1] - place[0] == 1;
    for (int64_t row = 0; neighbours && x.pixel != 1 && row < x.height; ++row)
        for (int64_t i = 0; i < x.width; i += W)
            for (int64_t c = 0; c < x.channels; c += W) {
                const int64_t source = row * x.row + i * x.pixel + c;
                T* target = packed + c * plane + place[row * x.width + i];
                move_block<T, GATED>(
                    int(x.width - i < W ? x.width - i : W), int(x.channels - c < W ? x.channels - c : W), false,
                    [&](int r) { return x.data + source + r * x.pixel; }, [&](int p) { return target + p * plane; },
                    [&](int r) { return gate + source + r * x.pixel; });
            }
    if (neighbours && x.pixel != 1) return;
    for (int64_t c = 0; c < x.channels; ++c)
        for (int64_t row = 0; row < x.height; ++row) {
            const T *source = x.data + c * x.channel + row * x.row, *g = GATED ? gate + c * x.channel + row * x.row : source;
            const int32_t* to = place + row * x.width;
            T* target = packed + c * plane;
            if (neighbours)
                for (int64_t i = 0; i < x.width; ++i) target[*to + i] = GATED && g[i] <= 0 ? T(0) : source[i];
            else
                for (int64_t i = 0; i < x.width; ++i) target[to[i]] = GATED && g[i * x.pixel] <= 0 ? T(0) : source[i * x.pixel];
        }
}

// The inverse.
template <class T>
void unpack_pixels(const T* packed, int64_t plane, const int32_t* place, const Images<T>& y) {
    constexpr int W = kWidth<T>;
    const auto none = [](int) { return static_cast<const T*>(nullptr); };
    const bool neighbours = y.width < 2 || place[1] - place[0] == 1;
    for (int64_t row = 0; neighbours && y.pixel != 1 && row < y.height; ++row)
        for (int64_t i = 0; i < y.width; i += W)
            for (int64_t c = 0; c < y.channels; c += W) {
                const T* source = packed + c * plane + place[row * y.width + i];
                T* target = y.data + row * y.row + i * y.pixel + c;
                move_block<T, false>(
                    int(y.channels - c < W ? y.channels - c : W), int(y.width - i < W ? y.width - i : W), false,
                    [&](int p) { return source + p * plane; }, [&](int r) { return target + r * y.pixel; }, none);
            }
    if (neighbours && y.pixel != 1) return;
    for (int64_t c = 0; c < y.channels; ++c)
        for (int64_t row = 0; row < y.height; ++row) {
            const T* source = packed + c * plane;
            const int32_t* from = place + row * y.width;
            T* target = y.data + c * y.channel + row * y.row;
            if (neighbours && y.pixel == 1)
                for (int64_t i = 0; i < y.width; ++i) target[i] = source[*from + i];
            else
                for (int64_t i = 0; i < y.width; ++i) target[i * y.pixel] = source[from[i]];
        }
}

// Rows [from, to) of `lanes` images beginning with `first`: pixel i of them, channel c -> packed[c * plane + place[i]].
// Images after the last are zeros. GATED: by `gate`, images of the same shape and strides. All lanes of a pixel are
// written together, so that their line of the cache is fetched once.
template <class T, bool GATED>
void pack_images(const Images<const T>& x, const T* gate, int64_t first, int64_t lanes, int64_t from, int64_t to,
                 const int32_t* place, T* packed, int64_t plane) {
    constexpr int W = kWidth<T>;
    const int64_t pixels = (to - from) * x.width, start = first * x.image + from * x.row;
    if (pixels <= 0) return;
    if (GATED) gate += start;
    if (lanes == 1) return pack_pixels<T, GATED>(x.rows(first, from, to, place), gate, place, packed, plane);
    const T* const data = x.data + start;
    const auto move = [&](int64_t lane, int64_t source, int columns, auto target) __attribute__((always_inline)) {
        const int64_t left = x.batch - first - lane, at = source + lane * x.image;
        move_block<T, GATED>(
            left < 0 ? 0 : left < W ? int(left) : W, columns, true, [&](int r) { return data + at + r * x.image; },
            [&](int p) { return target(p) + lane; }, [&](int r) { return gate + at + r * x.image; });
    };
    if (x.pixel == 1) {
        for (int64_t c = 0; c < x.channels; ++c)
            for (int64_t i = 0; i < pixels; i += W)
                for (int64_t lane = 0; lane < lanes; lane += W)
                    move(lane, c * x.channel + i, int(pixels - i < W ? pixels - i : W),
                         [&](int p) { return packed + c * plane + place[i + p]; });
    } else {
        for (int64_t i = 0; i < pixels; ++i)
            for (int64_t c = 0; c < x.channels; c += W)
                for (int64_t lane = 0; lane < lanes; lane += W)
                    move(lane, i * x.pixel + c, int(x.channels - c < W ? x.channels - c : W),
                         [&](int p) { return packed + (c + p) * plane + place[i]; });
    }
}

// The inverse: packed[c * plane + place[i]] -> pixel i of rows [from, to), channel c, of those images that exist.
template <class T>
void unpack_images(const T* packed, int64_t plane, const int32_t* place, const Images<T>& y, int64_t first, int64_t lanes,
                   int64_t from, int64_t to) {
    constexpr int W = kWidth<T>;
    const int64_t pixels = (to - from) * y.width;
    if (pixels <= 0) return;
    if (lanes == 1) return unpack_pixels<T>(packed, plane, place, y.rows(first, from, to, place));
    T* const data = y.data + first * y.image + from * y.row;
    const auto none = [](int) { return static_cast<const T*>(nullptr); };
    const auto move = [&](int64_t lane, int rows, auto source, int64_t target) __attribute__((always_inline)) {
        const int64_t left = y.batch - first - lane;
        if (left <= 0) return;
        move_block<T, false>(
            rows, left < W ? int(left) : W, false, [&](int p) { return source(p) + lane; },
            [&](int r) { return data + (lane + r) * y.image + target; }, none);
    };
    if (y.pixel == 1) {
        for (int64_t c = 0; c < y.channels; ++c)
            for (int64_t i = 0; i < pixels; i += W)
                for (int64_t lane = 0; lane < lanes; lane += W)
                    move(lane, int(pixels - i < W ? pixels - i : W),
                         [&](int p) { return packed + c * plane + place[i + p]; }, c * y.channel + i);
    } else {
        for (int64_t i = 0; i < pixels; ++i)
            for (int64_t c = 0; c < y.channels; c += W)
                for (int64_t lane = 0; lane < lanes; lane += W)
                    move(lane, int(y.channels - c < W ? y.channels - c : W),
                         [&](int p) { return packed + (c + p) * plane + place[i]; }, i * y.pixel + c);
    }
}

// How a convolution is cut up: items of work, the packed blocks they need, and the steps through these.
#pragma once
#include <algorithm>
#include <vector>

#include "images.h"
#include "order.h"
#include "pool.h"
#include "team.h"

enum Flat : int64_t { IMAGES = 0, PIXELS = 1, ROWS = 2 };  // what lanes are; ROWS: pixels, and images are rows of one

struct ConvArgs {  // filled by python_conv.cpp
    int64_t is_double, threads, flat, relu, pool, batch, channels, height, width, out_channels, out_height, out_width;
    const Taps* taps;
    const int32_t* plan;
    int64_t plan_size, nnz;
    const void *values, *bias;  // bias: null if none
    void *x, *y, *gy, *gx;  // forward: x -> y; backward: gy -> gx (null where not needed), y for the ReLU; y, gy pooled
    int64_t x_strides[3], y_strides[3], gy_strides[3], gx_strides[3];  // image, channel, pixel
    void *gvalues, *gbias;                                             // null where not needed
    uint8_t* winners;  // of the pooling: written by forward, read by backward
    const void *mean, *variance, *gain, *offset;  // of a batchnorm by running statistics; all null: none; no backward
    double epsilon;
    const ConvArgs* first;  // the convolution whose output this one's input is, in place of x; null: none; no backward
    int64_t pooled_height() const { return out_height / pool; }
    int64_t pooled_width() const { return out_width / pool; }
    int64_t used_height() const { return pool == 1 ? out_height : pooled_height() * pool; }
    Windows windows() const { return {pool, out_channels, pooled_height(), pooled_width(), batch}; }
};

constexpr int64_t kWorkingSet = 1 << 20;     // bytes of an item's packed blocks: about an L2
constexpr int64_t kRun = 128;                // pixels of a channel that an item reads or writes, at least
constexpr int64_t kShares = 4;               // items that a small call is cut into, whatever threads there are
constexpr int64_t kSharePixels = 512;        // pixels of y, at least, for which a copy of gvalues costs little beside
constexpr int64_t kMaxShares = 64;           // of these copies
constexpr int64_t kMaxElements = INT32_MAX;  // of a packed block: offsets into it have 32 bits

template <class T>
Images<T> images(const ConvArgs& a, void* data, const int64_t* strides, bool output) {
    const int64_t width = output ? a.pooled_width() : a.width;
    return {static_cast<T*>(data), a.batch, output ? a.out_channels : a.channels, output ? a.pooled_height() : a.height,
            width, strides[0], strides[1], a.flat == ROWS ? strides[0] : width * strides[2], strides[2]};
}

// A 1x1 convolution is a product of matrices: pixels are lanes, which contiguous images hold as the product wants them. As
// small images would fill few vectors, they are taken for the rows of a single one.
inline ConvArgs by_pixels(const ConvArgs& a, int64_t size) {
    const Taps& t = *a.taps;
    ConvArgs b = a;
    const int64_t pixels = a.height * a.width;
    if (a.first || t.size() > 1 || t.phases() > 1 || a.pool > 1 || pixels < kLanes || a.out_height * a.out_width != pixels) return b;
    b.flat = PIXELS;
    if (pixels * (a.channels + a.out_channels) * size > kWorkingSet) return b;
    b.flat = ROWS, b.batch = 1, b.height = b.out_height = a.batch, b.width = b.out_width = pixels;
    return b;
}

// Pixels of `rows` x `pitch` per phase; phase (a, b) holds image pixels (a + stride i, b + stride j).
struct Block {
    int64_t rows, pitch, stride[2], lanes;
    // Elements of a phase, with room for a last vector that runs over.
    int64_t phase_size() const { return rows * pitch * lanes + (lanes == 1 ? kLanes : 0); }
    int64_t plane() const { return stride[0] * stride[1] * phase_size(); }  // elements of a channel
    int64_t at(int64_t row, int64_t column) const {
        const int64_t phase = row % stride[0] * stride[1] + column % stride[1];
        return phase * phase_size() + (row / stride[0] * pitch + column / stride[1]) * lanes;
    }
    // Where the pixels of `height` rows of `width` go, the first of them being pixel (top, left) of the block.
    std::vector<int32_t> places(int64_t height, int64_t width, int64_t top, int64_t left) const {
        std::vector<int32_t> place(height * width);
        for (int64_t h = 0; h < height; ++h)
            for (int64_t w = 0; w < width; ++w) place[h * width + w] = int32_t(at(h + top, w + left));
        return place;
    }
};

struct Step {
    int64_t at, groups;  // first element, groups of kLanes
};

// Covers `rows` x `width` pixels of a phase in steps of at most `most` groups, all about as large.
inline std::vector<Step> steps(int64_t rows, int64_t width, int64_t pitch, int64_t lanes, int64_t most) {
    std::vector<Step> out;
    if (rows <= 0 || width <= 0) return out;
    const bool flat = lanes == 1;  // pixels are lanes: run on through the halo, whose results nobody reads
    const int64_t per_pixel = flat ? 1 : lanes / kLanes;
    const int64_t length = flat ? ceil_div((rows - 1) * pitch + width, kLanes) : width;
    const int64_t pieces = ceil_div(length * per_pixel, most / per_pixel * per_pixel);
    for (int64_t row = 0; row < (flat ? 1 : rows); ++row)
        for (int64_t p = 0; p < pieces; ++p) {
            const int64_t from = length * p / pieces, to = length * (p + 1) / pieces;
            out.push_back({flat ? from * kLanes : (row * pitch + from) * lanes, (to - from) * per_pixel});
        }
    return out;
}

// How a call is cut into items, and what an item's blocks look like. Rows are those of the block that is written.
//
// No sum may depend on how many threads there are. Those of y depend on the cut where steps have fewer than 4 vectors
// (kSums), those of the values' gradient always: threads then share out a cut that sizes alone decide.
template <class T>
struct Cut {
    Cut(const ConvArgs& a, int64_t rows, int64_t width) : rows(rows) {
        lanes = 1;
        if (!a.flat) {
            const int64_t groups = ceil_div(a.batch, kLanes);
            lanes = kLanes * std::max<int64_t>(1, std::min(kMaxGroups<T> / width, groups / kShares));
        }
        parts = ceil_div(a.batch, lanes);
    }
    // A working set of `fixed` + height * `per_row` bytes an item, but rows enough to read and write memory in long runs,
    // and as many items as are `wanted`, of at least `least` rows and, where pixels are lanes, of 4 groups of them; a
    // multiple of `unit` rows.
    void choose_height(int64_t wanted, int64_t least, int64_t width, int64_t fixed, int64_t per_row, int64_t unit = 1) {
        const int64_t most = std::max(ceil_div(kRun, width), (kWorkingSet - fixed) / std::max<int64_t>(per_row, 1));
        least = std::max<int64_t>(least, lanes == 1 ? ceil_div(3 * kLanes + 1, width) : 1);
        this->unit = unit, units = ceil_div(rows, unit);
        const int64_t shared = std::min(ceil_div(wanted, parts), units / ceil_div(least, unit));
        per_part = std::clamp<int64_t>(std::max(ceil_div(rows, most), shared), 1, units);
        height = ceil_div(units, per_part) * unit;
    }
    int64_t items() const { return parts * per_part; }
    int64_t image(int64_t item) const { return item / per_part * lanes; }
    int64_t begin(int64_t item) const { return units * (item % per_part) / per_part * unit; }
    int64_t end(int64_t item) const { return std::min(rows, units * (item % per_part + 1) / per_part * unit); }
    int64_t rows, lanes, parts, height = 1, per_part = 1, units = 1, unit = 1;
};

// Zeroes the rows of a block that lie outside of the image, where earlier items may have left theirs.
template <class T>
void clear_rows(T* packed, const Block& b, int64_t channels, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row)
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t phase = 0; phase < b.stride[1]; ++phase)
                std::fill_n(packed + c * b.plane() + b.at(row, phase), b.pitch * b.lanes, T(0));
}

// The input of output rows [begin, end): rows of x around them, padded.
template <class T>
struct Input {
    Input(const ConvArgs& a, int64_t lanes, int64_t height) : a(a) {
        for (int d = 0; d < 2; ++d) {
            const int64_t stride = a.taps->stride[d], reach = int64_t(a.taps->kernel[d] - 1) * a.taps->dilation[d] + 1;
            const int64_t need = ((d ? a.out_width : height) - 1) * stride + reach;
            size[d] = ceil_div(d ? std::max(need, a.width + a.taps->before[1]) : need, stride);
            block.stride[d] = stride;
        }
        block.rows = size[0], block.pitch = size[1], block.lanes = lanes;
        place = block.places(size[0] * block.stride[0], a.width, 0, a.taps->before[1]);
    }
    void pack(T* packed, int64_t image, int64_t begin) const {
        const int64_t top = begin * a.taps->stride[0] - a.taps->before[0], rows = size[0] * block.stride[0];
        const int64_t from = std::clamp<int64_t>(-top, 0, rows), to = std::clamp<int64_t>(a.height - top, from, rows);
        clear_rows(packed, block, a.channels, 0, from);
        clear_rows(packed, block, a.channels, to, rows);
        pack_images<T, false>(images<const T>(a, a.x, a.x_strides, false), nullptr, image, block.lanes, top + from, top + to,
                              place.data() + from * a.width, packed, block.plane());
    }
    int64_t offset(int64_t r, int64_t s) const { return block.at(r * a.taps->dilation[0], s * a.taps->dilation[1]); }
    int64_t elements() const { return a.channels * block.plane() + kMaxGroups<T> * kLanes; }

    const ConvArgs& a;
    Block block;
    int64_t size[2];
    std::vector<int32_t> place;
};

// Items by rows of the output, as many as are `wanted`.
template <class T>
Cut<T> cut_output(const ConvArgs& a, int64_t wanted) {
    Cut<T> cut(a, a.used_height(), a.out_width);
    const Input<T> one(a, cut.lanes, 1), two(a, cut.lanes, 2);
    const int64_t row = two.elements() - one.elements() + a.out_channels * one.block.pitch * cut.lanes;
    cut.choose_height(wanted, 1, a.out_width, one.elements() * sizeof(T), row * sizeof(T), a.pool);
    return cut;
}

// Where the entries of `strips` find their input: channel * plane + offset(r, t) of the tap that their column is.
template <class F>
void entry_offsets(const Schedule& s, Range strips, int64_t channels, int64_t plane, const Taps& taps, F offset,
                   int32_t* to) {
    std::vector<int32_t> columns(channels * taps.size());
    for (int64_t tap = 0; tap < taps.size(); ++tap) {
        const int64_t first = offset(tap / taps.kernel[1], tap % taps.kernel[1]);
        for (int64_t c = 0; c < channels; ++c) columns[c * taps.size() + tap] = int32_t(c * plane + first);
    }
    for (int64_t tile = strips.begin * s.blocks; tile < strips.end * s.blocks; ++tile) {
        const int32_t* first = columns.data() + tile % s.blocks * s.block;
        for (int32_t k = s.tiles[tile].entry; k < s.tiles[tile + 1].entry; ++k) to[k] = first[s.entry_col[k]];
    }
}

// Is the call's plan one for it, and are there values?
inline bool has_plan(const ConvArgs& a, bool backward) {
    return is_plan(a.plan, a.plan_size, a.out_channels, a.channels * a.taps->size(), a.nnz, backward, a.taps) &&
           (!a.nnz || a.values);
}

// Direct sparse convolution: no im2col, the tiles of a matrix product over packed images.
//
// An item of work is a range of rows of some images. Its input is packed with a halo, so that a tap is a constant offset,
// which is written down for each entry, once a call: a table of taps would be one more load for each use. Then each step
// multiplies all weights with a few vectors of neighbouring output pixels. A vector holds one pixel of kLanes images or,
// where the batch is too small for that or the kernel is 1x1, kLanes pixels of one image. For a stride, pixels with the
// same coordinates modulo the stride (a phase) lie together, so that neighbours stay neighbours.
#include <cmath>
#include <optional>

#include "cut.h"
#include "tile.h"

namespace {

thread_local Scratch blocks;         // of a thread
thread_local Scratch offset_memory;  // of the calling thread: where entries find their input
thread_local Scratch ordered;        // of the calling thread: values in the order of tiles

// Channel o by its running statistics: (y - mean) / sqrt(variance + epsilon) * gain + offset.
template <class T>
void normalise(const ConvArgs& a, int64_t o, T* y, int64_t count) {
    const auto of = [&](const void* p, T otherwise) { return p ? static_cast<const T*>(p)[o] : otherwise; };
    const T scale = of(a.gain, 1) / std::sqrt(of(a.variance, 1) + T(a.epsilon));
    const T shift = of(a.offset, 0) - of(a.mean, 0) * scale;
    for (int64_t i = 0; i < count; ++i) y[i] = y[i] * scale + shift;
}

// The input of a convolution `to`, made by another one where `to` needs it: it never leaves the cache. Rows that two items
// need are made twice.
template <class T>
struct Made {
    Made(const ConvArgs& a, const Input<T>& to)
        : a(a), to(to), s(read_plan(a.plan).forward), input(a, to.block.lanes, to.size[0]) {}
    // Do both step through rows of the same pitch, with images as lanes?
    bool fits() const {
        const Block &from = input.block, &here = to.block;
        return here.lanes > 1 && from.pitch == here.pitch && a.taps->phases() == 1 && to.a.taps->phases() == 1 &&
               input.elements() <= kMaxElements;
    }
    int64_t elements() const { return input.elements(); }
    // Of the strips of this thread.
    void prepare(T* values, int32_t* offsets) const {
        const Range mine = share(s.strips, thread_index(), team_size());
        to_order<false>(s, mine, static_cast<const T*>(a.values), values + first_entry(s, mine.begin));
        entry_offsets(s, mine, a.channels, input.block.plane(), *a.taps,
                      [&](int64_t r, int64_t t) { return input.offset(r, t); }, offsets);
    }
    void pack(const T* values, const int32_t* offsets, T* scratch, T* packed, int64_t image, int64_t begin) const {
        const Block& b = to.block;
        const int64_t top = begin - to.a.taps->before[0], plane = b.plane();
        const int64_t from = std::clamp<int64_t>(-top, 0, b.rows), end = std::clamp<int64_t>(a.out_height - top, from, b.rows);
        clear_rows(packed, b, a.out_channels, 0, from);
        clear_rows(packed, b, a.out_channels, end, b.rows);
        if (from == end) return;
        input.pack(scratch, image, top + from);
        T* const out = packed + b.at(from, to.a.taps->before[1]);
        const T* bias = static_cast<const T*>(a.bias);
        const auto each_row = [&](auto f) {
            for (int64_t o = 0; o < a.out_channels; ++o)
                for (int64_t row = 0; row < end - from; ++row) f(o, out + o * plane + b.at(row, 0));
        };
        const int64_t width = a.out_width * b.lanes;
        each_row([&](int64_t o, T* y) { std::fill_n(y, width, bias ? bias[o] : T(0)); });
        for (const Step& step : steps(end - from, a.out_width, b.pitch, b.lanes, kMaxGroups<T>))
            with_registers<T>(step.groups, [&](auto R) {
                for (const Tile* tile = s.tiles; tile < s.tiles + s.strips * s.blocks; ++tile)
                    spmm_tile<T, R, false>(s, tile, values + tile->entry, scratch + step.at, Mapped{offsets},
                                           out + (tile - s.tiles) / s.blocks * s.strip * plane + step.at, plane);
            });
        if (!a.relu) return;
        each_row([&](int64_t, T* y) {
            for (int64_t i = 0; i < width; ++i) y[i] = relu_of(y[i]);
        });
    }
    const ConvArgs& a;
    const Input<T>& to;
    const Schedule s;
    const Input<T> input;
};

template <class T>
bool forward(const ConvArgs& a) {
    expect_writes(a.y, a.batch * a.out_channels * a.pooled_height() * a.pooled_width() * sizeof(T));
    const Schedule s = read_plan(a.plan).forward;
    const T* bias = static_cast<const T*>(a.bias);
    const int64_t entries = a.nnz + kLanes, all_entries = entries + (a.first ? a.first->nnz + kLanes : 0);
    T* values = ordered.get<T>(all_entries);
    const Cut<T> cut = cut_output<T>(a, a.threads);
    const Input<T> input(a, cut.lanes, cut.height);
    const Block output{cut.height, input.block.pitch, {1, 1}, cut.lanes};
    const Block result{cut.height / a.pool, a.pool == 1 ? output.pitch : a.pooled_width(), {1, 1}, cut.lanes};
    const std::vector<int32_t> place = result.places(result.rows, a.pooled_width(), 0, 0);
    std::optional<Made<T>> made;
    if (a.first) made.emplace(*a.first, input);
    if (input.elements() > kMaxElements || (made && !made->fits())) return false;
    int32_t* offsets = offset_memory.get<int32_t>(all_entries);
    const int64_t plane = output.plane();
    Queue queue;
    together(a.threads, [&] {
        const int64_t packed_elements = input.elements() + (made ? made->elements() : 0);
        T* packed = blocks.get<T>(packed_elements + a.out_channels * plane);
        T* out = packed + packed_elements;
        std::fill_n(packed, packed_elements, T(0));
        const Range mine = share(s.strips, thread_index(), team_size());
        to_order<false>(s, mine, static_cast<const T*>(a.values), values + first_entry(s, mine.begin));
        entry_offsets(s, mine, a.channels, input.block.plane(), *a.taps,
                      [&](int64_t r, int64_t t) { return input.offset(r, t); }, offsets);
        if (made) made->prepare(values + entries, offsets + entries);
        barrier();
        auto item = [&](int64_t i, int64_t strip_from, int64_t strip_to) {
            const int64_t begin = cut.begin(i), end = cut.end(i), image = cut.image(i);
            const int64_t channel = strip_from * s.strip, channels = std::min<int64_t>(s.rows, strip_to * s.strip) - channel;
            if (made) made->pack(values + entries, offsets + entries, packed + input.elements(), packed, image, begin);
            else input.pack(packed, image, begin);
            for (int64_t o = channel; o < channel + channels; ++o) std::fill_n(out + o * plane, plane, bias ? bias[o] : T(0));
            for (const Step& step : steps(end - begin, a.out_width, output.pitch, cut.lanes, kMaxGroups<T>))
                with_registers<T>(step.groups, [&](auto R) {
                    for (int64_t strip = strip_from; strip < strip_to; ++strip)
                        for (int64_t b = 0; b < s.blocks; ++b) {
                            const Tile* tile = s.tiles + strip * s.blocks + b;
                            spmm_tile<T, R, false>(s, tile, values + tile->entry, packed + step.at, Mapped{offsets},
                                                   out + strip * s.strip * plane + step.at, plane);
                        }
                });
            for (int64_t o = channel; o < channel + channels; ++o) {
                T* y = out + o * plane;
                if (a.mean) normalise<T>(a, o, y, plane);
                if (a.pool > 1)
                    pool_plane<T>(y, output.pitch, cut.lanes, a.windows(), a.relu, image, o, begin / a.pool, end / a.pool,
                                  a.winners);
                else if (a.relu)
                    for (int64_t i = 0; i < plane; ++i) y[i] = relu_of(y[i]);
            }
            Images<T> y = images<T>(a, a.y, a.y_strides, true);
            y.data += channel * y.channel;
            y.channels = channels;
            unpack_images<T>(out + channel * plane, plane, place.data(), y, image, cut.lanes, begin / a.pool, end / a.pool);
        };
        const int64_t sharers = team_size() / cut.items();  // few items: threads share one, by its output channels
        if (sharers > 1) {
            const int64_t share = thread_index() % sharers, i = thread_index() / sharers;
            if (i < cut.items()) item(i, s.strips * share / sharers, s.strips * (share + 1) / sharers);
        } else {
            queue.each(0, cut.items(), [&](int64_t i) { item(i, 0, s.strips); });
        }
    });
    return true;
}

}  // namespace

// TOO_LARGE, with nothing done, where a single row of the images is too large for 32-bit offsets.
EXPORT int64_t sparselottery_conv_forward(const ConvArgs* args) {
    if (!has_plan(*args, false) || (args->first && !has_plan(*args->first, false))) return NO_PLAN;
    const bool done = args->is_double ? forward<double>(by_pixels(*args, 8)) : forward<float>(by_pixels(*args, 4));
    return done ? DONE : TOO_LARGE;
}

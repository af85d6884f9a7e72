// Direct sparse convolution: no im2col, the tiles of a matrix product over packed images.
//
// An item of work is a range of rows of some images. Its input is packed with a halo, so that a tap is a constant offset,
// kept in a table; then each step multiplies all weights with a few vectors of neighbouring output pixels. A vector
// holds one pixel of kLanes images or, where the batch is too small for that, kLanes pixels of one image. For a stride,
// pixels with the same coordinates modulo the stride (a phase) lie together, so that neighbours stay neighbours.
#include <cmath>

#include "cut.h"
#include "order.h"
#include "tile.h"

namespace {

thread_local Scratch blocks;         // of a thread
thread_local Scratch gradients;      // of the calling thread: every thread's share of gvalues and gbias
thread_local Scratch offset_tables;  // of the calling thread
thread_local Scratch ordered;        // of the calling thread: values in the order of tiles

// This thread's share of the values -> the order of tiles.
template <bool TRANSPOSED, class T>
void order_share(const Schedule& s, const T* values, T* ordered) {
    const Range strips = share(s.strips, thread_index(), team_size());
    to_order<TRANSPOSED>(s, strips, values, ordered + first_entry(s, strips.begin));
}

// Channel o by its running statistics: (y - mean) / sqrt(variance + epsilon) * gain + offset.
template <class T>
void normalise(const ConvArgs& a, int64_t o, T* y, int64_t count) {
    const auto of = [&](const void* p, T otherwise) { return p ? static_cast<const T*>(p)[o] : otherwise; };
    const T scale = of(a.gain, 1) / std::sqrt(of(a.variance, 1) + T(a.epsilon));
    const T shift = of(a.offset, 0) - of(a.mean, 0) * scale;
    for (int64_t i = 0; i < count; ++i) y[i] = y[i] * scale + shift;
}

template <class T>
bool forward(const ConvArgs& a) {
    expect_writes(a.y, a.batch * a.out_channels * a.pooled_height() * a.pooled_width() * sizeof(T));
    const Schedule s = read_plan(a.plan).forward;
    const T* bias = static_cast<const T*>(a.bias);
    T* values = ordered.get<T>(a.nnz + kLanes);
    const Cut<T> cut = cut_output<T>(a);
    const Input<T> input(a, cut.lanes, cut.height);
    const Block output{cut.height, input.block.pitch, {1, 1}, cut.lanes};
    const Block result{cut.height / a.pool, a.pool == 1 ? output.pitch : a.pooled_width(), {1, 1}, cut.lanes};
    const std::vector<int32_t> place = result.places(result.rows, a.pooled_width(), 0, 0);
    if (input.elements() > kMaxElements) return false;
    int32_t* table = offset_tables.get<int32_t>(a.channels * a.taps->size());
    offsets(table, a.channels, input.block.plane(), *a.taps, [&](int64_t r, int64_t t) { return input.offset(r, t); });
    const int64_t plane = output.plane();
    together(a.threads, [&] {
        T* packed = blocks.get<T>(input.elements() + a.out_channels * plane);
        T* out = packed + input.elements();
        std::fill_n(packed, input.elements(), T(0));
        order_share<false>(s, static_cast<const T*>(a.values), values);
        barrier();
        auto item = [&](int64_t i, int64_t strip_from, int64_t strip_to) {
            const int64_t begin = cut.begin(i), end = cut.end(i), image = cut.image(i);
            const int64_t channel = strip_from * s.strip, channels = std::min<int64_t>(s.rows, strip_to * s.strip) - channel;
            input.pack(packed, image, begin);
            for (int64_t o = channel; o < channel + channels; ++o) std::fill_n(out + o * plane, plane, bias ? bias[o] : T(0));
            for (const Step& step : steps(end - begin, a.out_width, output.pitch, cut.lanes, kMaxGroups<T>))
                with_registers<T>(step.groups, [&](auto R) {
                    for (int64_t strip = strip_from; strip < strip_to; ++strip)
                        for (int64_t b = 0; b < s.blocks; ++b) {
                            const Tile* tile = s.tiles + strip * s.blocks + b;
                            spmm_tile<T, R, false>(s, tile, values + tile->entry, packed + step.at,
                                                   Mapped{table + b * s.block}, out + strip * s.strip * plane + step.at,
                                                   plane);
                        }
                });
            for (int64_t o = channel; o < channel + channels; ++o) {
                T* y = out + o * plane;
                if (a.mean) normalise<T>(a, o, y, plane);
                if (a.pool > 1)
                    pool_plane<T>(y, output.pitch, cut.lanes, a.windows(), a.relu, image, o, begin / a.pool, end / a.pool,
                                  a.winners);
                else if (a.relu)
                    for (int64_t i = 0; i < plane; ++i) y[i] = y[i] < 0 ? T(0) : y[i];
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
            each_item(cut, [&](int64_t i) { item(i, 0, s.strips); });
        }
    });
    return true;
}

// gbias += Σ gy over the rows [from, to) of a packed block.
template <class T>
void add_bias_gradient(const T* gy, const Block& block, int64_t channels, int64_t from, int64_t to, int64_t width, T* gbias) {
    for (int64_t o = 0; o < channels; ++o)
        for (int64_t row = from; row < to; ++row) {
            const T* g = gy + o * block.plane() + block.at(row, 0);
            Vec<T> sums = {};
            int64_t i = 0;
            for (; i + kWidth<T> <= width * block.lanes; i += kWidth<T>) sums += load<T>(g + i);
            T total = sum<T>(sums);
            for (; i < width * block.lanes; ++i) total += g[i];
            gbias[o] += total;
        }
}

// Every thread adds to its own copy of (gvalues in the order of tiles, gbias); these are summed at the end, in order of the
// threads.
template <class T>
struct Gradients {
    Gradients(const ConvArgs& a, int64_t nnz)
        : values(static_cast<T*>(a.gvalues)), bias(static_cast<T*>(a.gbias)), nnz(values ? nnz : 0),
          outputs(bias ? a.out_channels : 0), copies(gradients.get<T>(a.threads * size() + 64)) {}
    int64_t size() const { return (nnz + outputs + kLanes - 1) / kLanes * kLanes + kLanes; }
    T* mine() const {
        T* copy = copies + thread_index() * size();
        std::fill_n(copy, size(), T(0));
        return copy;
    }
    // TRANSPOSED: tiles are those of Wᵀ, phase after phase.
    template <bool TRANSPOSED>
    void reduce(const Plan& plan) const {
        int64_t begin = 0;
        for (int phase = 0; nnz && phase < (TRANSPOSED ? plan.phases : 1); ++phase) {
            const Schedule s = TRANSPOSED ? plan.transpose(phase) : plan.forward;
            const Range strips = share(s.strips, thread_index(), team_size());
            const int64_t from = begin + first_entry(s, strips.begin), to = begin + first_entry(s, strips.end);
            for (int64_t i = from; i < to; ++i) copies[i] = total(i);
            from_order<TRANSPOSED>(s, strips, copies + from, values);
            begin += first_entry(s, s.strips);
        }
        const Range mine = share(outputs, thread_index(), team_size());
        for (int64_t o = mine.begin; o < mine.end; ++o) bias[o] = total(nnz + o);
    }
    T total(int64_t i) const {
        T total = copies[i];
        for (int64_t t = 1; t < team_size(); ++t) total += copies[t * size() + i];
        return total;
    }
    T *values, *bias;
    int64_t nnz, outputs;
    T* copies;
};

// Packs the gradient of the convolution's output: rows [from, to), the first of them to `row` of the block.
template <class T>
struct OutputGradient {
    OutputGradient(const ConvArgs& a, const Block& block, int64_t left)
        : a(a), block(block), left(left), gy(images<const T>(a, a.gy, a.gy_strides, true)) {
        if (a.pool == 1) {
            place = block.places(block.rows, a.out_width, 0, left);
        } else {
            pooled = {block.rows / a.pool + 2, a.pooled_width(), {1, 1}, block.lanes};
            place = pooled.places(pooled.rows, a.pooled_width(), 0, 0);
        }
    }
    // A block and, before it is pooled backwards, what comes in.
    int64_t elements() const { return a.out_channels * (block.plane() + pooled.plane()) + kLanes * kMaxGroups<T>; }
    void pack(T* packed, int64_t image, int64_t row, int64_t from, int64_t to) const {
        if (a.pool > 1) return unpool(packed, image, row, from, std::min(to, a.used_height()));
        const int32_t* first = place.data() + row * a.out_width;
        if (a.relu)
            pack_images<T, true>(gy, static_cast<const T*>(a.y), image, block.lanes, from, to, first, packed, block.plane());
        else
            pack_images<T, false>(gy, nullptr, image, block.lanes, from, to, first, packed, block.plane());
    }
    void unpool(T* packed, int64_t image, int64_t row, int64_t from, int64_t to) const {
        if (from >= to) return;
        const int64_t first = from / a.pool, last = ceil_div(to, a.pool);
        T* temporary = packed + a.out_channels * block.plane() + kLanes * kMaxGroups<T>;
        pack_images<T, false>(gy, nullptr, image, block.lanes, first, last, place.data(), temporary, pooled.plane());
        for (int64_t o = 0; o < a.out_channels; ++o)
            for (int64_t p = first; p < last; ++p)
                unpool_row<T>(temporary + o * pooled.plane() + pooled.at(p - first, 0),
                              packed + o * block.plane() + block.at(row, left), block.pitch, block.lanes, a.windows(), image,
                              o, p, from, to, a.winners);
    }
    const ConvArgs& a;
    Block block, pooled{0, 0, {1, 1}, block.lanes == 1 ? 1 : kLanes};
    int64_t left;
    Images<const T> gy;
    std::vector<int32_t> place;
};

// gvalues and gbias alone, where gx is not wanted.
template <class T>
bool values_gradient(const ConvArgs& a) {
    const Plan plan = read_plan(a.plan);
    const Schedule s = plan.forward;
    const Cut<T> cut = cut_output<T>(a);
    const Input<T> input(a, cut.lanes, cut.height);
    const Block output{cut.height, input.block.pitch, {1, 1}, cut.lanes};
    const OutputGradient<T> gradient(a, output, 0);
    if (input.elements() > kMaxElements) return false;
    int32_t* table = offset_tables.get<int32_t>(a.channels * a.taps->size());
    offsets(table, a.channels, input.block.plane(), *a.taps, [&](int64_t r, int64_t t) { return input.offset(r, t); });
    const Gradients<T> sums(a, plan.nnz);
    const int64_t plane = output.plane(), gy_elements = gradient.elements();
    one_by_one(a.threads, [&] {
        T* packed = blocks.get<T>(input.elements() + gy_elements);
        T *gy = packed + input.elements(), *mine = sums.mine();
        std::fill_n(packed, input.elements() + gy_elements, T(0));
        each_item(cut, [&](int64_t i) {
            const int64_t begin = cut.begin(i), end = cut.end(i), image = cut.image(i);
            if (end - begin < cut.height) std::fill_n(gy, gy_elements, T(0));
            gradient.pack(gy, image, 0, begin, end);
            if (sums.bias)
                add_bias_gradient<T>(gy, output, a.out_channels, 0, end - begin, a.out_width, mine + sums.nnz);
            if (!sums.values) return;
            input.pack(packed, image, begin);
            for (const Step& step : steps(end - begin, a.out_width, output.pitch, cut.lanes, kMaxGroups<T>))
                with_registers<T>(step.groups, [&](auto R) {
                    for (int64_t strip = 0; strip < s.strips; ++strip)
                        for (int64_t b = 0; b < s.blocks; ++b) {
                            const Tile* tile = s.tiles + strip * s.blocks + b;
                            sddmm_tile<T, R>(s, tile, gy + strip * s.strip * plane + step.at, plane, packed + step.at,
                                             Mapped{table + b * s.block}, mine + tile->entry, true);
                        }
                });
        });
    });
    one_by_one(a.threads, [&] { sums.template reduce<false>(plan); });
    return true;
}

// gx, and gvalues with it where wanted: phase by phase, each a convolution of gy with the taps that reach it.
template <class T>
bool input_gradient(const ConvArgs& a) {
    expect_writes(a.gx, a.batch * a.channels * a.height * a.width * sizeof(T));
    const Taps& taps = *a.taps;
    const Plan plan = read_plan(a.plan);
    const int64_t stride[2] = {taps.stride[0], taps.stride[1]}, phases = taps.phases();
    int64_t low[2], high[2];  // how far in gy taps reach from a pixel of a phase
    for (int d = 0; d < 2; ++d) {
        low[d] = high[d] = 0;
        for (int first = 0; first < stride[d]; ++first)
            for (int k = 0, shift; k < taps.kernel[d]; ++k)
                if (taps.reaches(d, first, k, &shift))
                    low[d] = std::min<int64_t>(low[d], shift), high[d] = std::max<int64_t>(high[d], shift);
    }
    const int64_t rows = ceil_div(a.height, stride[0]), columns = ceil_div(a.width, stride[1]);
    high[0] = std::max(high[0], a.out_height - rows);  // for gbias: rows that see nothing but padding
    const int64_t pitch = std::max(columns, a.out_width) + high[1] - low[1];
    Cut<T> cut(a, rows, columns);
    const int64_t row_bytes = pitch * cut.lanes * sizeof(T);
    cut.choose_height(a.threads, columns, (high[0] - low[0]) * a.out_channels * row_bytes,
                      (a.out_channels + 2 * phases * a.channels) * row_bytes);
    const Block around{cut.height + high[0] - low[0], pitch, {1, 1}, cut.lanes};
    const Block inner{cut.height, pitch, {stride[0], stride[1]}, cut.lanes};
    const OutputGradient<T> gradient(a, around, -low[1]);
    const std::vector<int32_t> place_x = inner.places(cut.height * stride[0], a.width, 0, 0);
    const int64_t table_size = a.out_channels * taps.size();
    if (a.out_channels * around.plane() > kMaxElements || a.channels * inner.plane() > kMaxElements) return false;
    int32_t* tables = offset_tables.get<int32_t>(table_size * phases);
    for (int64_t phase = 0; phase < phases; ++phase)
        offsets(tables + phase * table_size, a.out_channels, around.plane(), taps, [&](int64_t r, int64_t t) {
            int row = 0, column = 0;  // taps of other phases have no entries there
            const bool meets = taps.reaches(0, int(phase / stride[1]), int(r), &row) &&
                               taps.reaches(1, int(phase % stride[1]), int(t), &column);
            return meets ? around.at(row - low[0], column - low[1]) : 0;
        });
    const int64_t left = around.at(0, -low[1]);
    const Gradients<T> sums(a, plan.nnz);
    T* values = ordered.get<T>(a.nnz + kLanes);
    const int64_t plane = inner.plane(), slack = kLanes * kMaxGroups<T>;
    const int64_t gy_elements = gradient.elements(), x_elements = a.channels * plane + slack;
    one_by_one(a.threads, [&] {
        for (int64_t phase = 0, begin = 0; phase < phases; ++phase) {
            const Schedule s = plan.transpose(int(phase));
            order_share<true>(s, static_cast<const T*>(a.values), values + begin);
            begin += first_entry(s, s.strips);
        }
    });
    one_by_one(a.threads, [&] {
        T* gy = blocks.get<T>(gy_elements + 2 * x_elements);
        T *x = gy + gy_elements, *gx = x + x_elements, *mine = sums.mine();
        std::fill_n(gy, gy_elements + x_elements, T(0));
        each_item(cut, [&](int64_t i) {
            const int64_t begin = cut.begin(i), end = cut.end(i), image = cut.image(i);
            const int64_t top = begin + low[0];  // the row of gy that is the first of its block
            const int64_t from = std::clamp<int64_t>(-top, 0, around.rows);
            const int64_t to = std::clamp<int64_t>(a.used_height() - top, from, around.rows);
            clear_rows(gy, around, a.out_channels, 0, from);
            clear_rows(gy, around, a.out_channels, to, around.rows);
            gradient.pack(gy, image, from, top + from, top + to);
            const int64_t first = begin * stride[0], last = std::min(a.height, end * stride[0]);
            if (sums.values) {
                if (cut.lanes == 1) std::fill_n(x, x_elements, T(0));  // halos meet gy there
                pack_images<T, false>(images<const T>(a, a.x, a.x_strides, false), nullptr, image, cut.lanes, first, last,
                                      place_x.data(), x, plane);
            }
            if (sums.bias)  // of rows that no earlier item has packed
                add_bias_gradient<T>(gy + left, around, a.out_channels, begin ? around.rows - cut.height : from,
                                     std::min(to, around.rows), a.out_width, mine + sums.nnz);
            std::fill_n(gx, x_elements, T(0));
            for (int64_t phase = 0, before = 0; phase < phases; ++phase) {
                const Schedule s = plan.transpose(int(phase));
                const T* own = values + before;
                T* gown = mine + before;
                before += first_entry(s, s.strips);
                const int32_t* table = tables + phase * table_size;
                const int64_t base = phase * inner.phase_size(), row = phase / stride[1], column = phase % stride[1];
                for (const Step& step : steps(ceil_div(last - first - row, stride[0]),
                                              ceil_div(a.width - column, stride[1]), pitch, cut.lanes, kMaxGroups<T>))
                    with_registers<T>(step.groups, [&](auto R) {
                        for (int64_t strip = 0; strip < s.strips; ++strip)
                            for (int64_t b = 0; b < s.blocks; ++b) {
                                const Tile* tile = s.tiles + strip * s.blocks + b;
                                const int64_t at = strip * s.strip * plane + base + step.at;
                                const Mapped map{table + b * s.block};
                                if (sums.values)
                                    fused_tile<T, R, false>(s, tile, own + tile->entry, gy + step.at, map, x + at, plane, gx + at,
                                                     plane, gown + tile->entry, true);
                                else
                                    spmm_tile<T, R, false>(s, tile, own + tile->entry, gy + step.at, map, gx + at, plane);
                            }
                    });
            }
            unpack_images<T>(gx, plane, place_x.data(), images<T>(a, a.gx, a.gx_strides, false), image, cut.lanes, first,
                             last);
        });
    });
    one_by_one(a.threads, [&] { sums.template reduce<true>(plan); });
    return true;
}

template <class T>
bool backward(const ConvArgs& a) {
    return a.gx ? input_gradient<T>(a) : values_gradient<T>(a);
}

template <class F>
int64_t checked(const ConvArgs& a, bool backward, F run) {
    const bool fits = is_plan(a.plan, a.plan_size, a.out_channels, a.channels * a.taps->size(), a.nnz, backward, a.taps);
    if (!fits || (a.nnz && !a.values)) return NO_PLAN;
    return run() ? DONE : TOO_LARGE;
}

}  // namespace

ABI(conv, words_of<ConvArgs>);

// TOO_LARGE, with nothing done, where a single row of the images is too large for 32-bit offsets.
EXPORT int64_t sparselottery_conv_forward(const ConvArgs* args) {
    return checked(*args, false, [&] { return args->is_double ? forward<double>(*args) : forward<float>(*args); });
}

EXPORT int64_t sparselottery_conv_backward(const ConvArgs* args) {
    return checked(*args, args->gx, [&] { return args->is_double ? backward<double>(*args) : backward<float>(*args); });
}

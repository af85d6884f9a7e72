// The gradients of a convolution: as conv.cpp multiplies, for x by Wᵀ and, from the same loads, for the values.
#include "conv_gradients.h"
#include "tile_backward.h"

namespace {

thread_local Scratch blocks;         // of a thread
thread_local Scratch gradients;      // of the calling thread: all shares of gvalues and gbias
thread_local Scratch offset_memory;  // of the calling thread: where entries find their input
thread_local Scratch ordered;        // of the calling thread: values in the order of tiles

// gvalues and gbias alone, where gx is not wanted.
template <class T>
bool values_gradient(const ConvArgs& a) {
    const Plan plan = read_plan(a.plan);
    const Schedule s = plan.forward;
    const Cut<T> cut = cut_output<T>(a, kShares);
    const Input<T> input(a, cut.lanes, cut.height);
    const Block output{cut.height, input.block.pitch, {1, 1}, cut.lanes};
    const OutputGradient<T> gradient(a, output, 0);
    if (input.elements() > kMaxElements) return false;
    int32_t* offsets = offset_memory.get<int32_t>(a.nnz + kLanes);
    const Gradients<T> sums(a, plan.nnz, cut.items(), gradients);
    const int64_t plane = output.plane(), gy_elements = gradient.elements();
    Queue queue;
    together(a.threads, [&] {
        entry_offsets(s, share(s.strips, thread_index(), team_size()), a.channels, input.block.plane(), *a.taps,
                      [&](int64_t r, int64_t t) { return input.offset(r, t); }, offsets);
        T* packed = blocks.get<T>(input.elements() + gy_elements);
        T* gy = packed + input.elements();
        std::fill_n(packed, input.elements() + gy_elements, T(0));
        barrier();
        sums.each(queue, [&](int64_t i, T* mine) {
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
                                             Mapped{offsets}, mine + tile->entry, true);
                        }
                });
        });
        barrier();
        sums.template reduce<false>(plan);
    });
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
    cut.choose_height(kShares, 2 * (high[0] - low[0]), columns, (high[0] - low[0]) * a.out_channels * row_bytes,
                      (a.out_channels + 2 * phases * a.channels) * row_bytes);
    const Block around{cut.height + high[0] - low[0], pitch, {1, 1}, cut.lanes};
    const Block inner{cut.height, pitch, {stride[0], stride[1]}, cut.lanes};
    const OutputGradient<T> gradient(a, around, -low[1]);
    const std::vector<int32_t> place_x = inner.places(cut.height * stride[0], a.width, 0, 0);
    if (a.out_channels * around.plane() > kMaxElements || a.channels * inner.plane() > kMaxElements) return false;
    // Of a tap in a phase; those that do not reach it have no entries there.
    const auto offset = [&](int64_t phase, int64_t r, int64_t t) {
        int row = 0, column = 0;
        const bool meets = taps.reaches(0, int(phase / stride[1]), int(r), &row) &&
                           taps.reaches(1, int(phase % stride[1]), int(t), &column);
        return meets ? around.at(row - low[0], column - low[1]) : 0;
    };
    int32_t* offsets = offset_memory.get<int32_t>(a.nnz + kLanes);
    const int64_t left = around.at(0, -low[1]);
    const Gradients<T> sums(a, plan.nnz, cut.items(), gradients);
    T* values = ordered.get<T>(a.nnz + kLanes);
    const int64_t plane = inner.plane(), slack = kLanes * kMaxGroups<T>;
    const int64_t gy_elements = gradient.elements(), x_elements = a.channels * plane + slack;
    Queue queue;
    together(a.threads, [&] {
        for (int64_t phase = 0, before = 0; phase < phases; ++phase) {
            const Schedule s = plan.transpose(int(phase));
            const Range mine = share(s.strips, thread_index(), team_size());
            to_order<true>(s, mine, static_cast<const T*>(a.values), values + before + first_entry(s, mine.begin));
            entry_offsets(s, mine, a.out_channels, around.plane(), taps,
                          [&](int64_t r, int64_t t) { return offset(phase, r, t); }, offsets + before);
            before += first_entry(s, s.strips);
        }
        T* gy = blocks.get<T>(gy_elements + 2 * x_elements);
        T *x = gy + gy_elements, *gx = x + x_elements;
        std::fill_n(gy, gy_elements + x_elements, T(0));
        barrier();
        sums.each(queue, [&](int64_t i, T* mine) {
            const int64_t begin = cut.begin(i), end = cut.end(i), image = cut.image(i);
            const int64_t top = begin + low[0];  // the row of gy that is the first of its block
            const int64_t seen = end - begin + high[0] - low[0];
            const int64_t from = std::clamp<int64_t>(-top, 0, seen);
            const int64_t to = std::clamp<int64_t>(a.used_height() - top, from, seen);
            clear_rows(gy, around, a.out_channels, 0, from);
            clear_rows(gy, around, a.out_channels, to, around.rows);
            gradient.pack(gy, image, from, top + from, top + to);
            const int64_t first = begin * stride[0], last = std::min(a.height, end * stride[0]);
            if (sums.values) {
                if (cut.lanes == 1 && (pitch > columns || last - first < inner.rows * stride[0]))
                    std::fill_n(x, x_elements, T(0));  // what lies between rows and after them meets gy
                pack_images<T, false>(images<const T>(a, a.x, a.x_strides, false), nullptr, image, cut.lanes, first, last,
                                      place_x.data(), x, plane);
            }
            if (sums.bias)  // of rows that no earlier item has packed
                add_bias_gradient<T>(gy + left, around, a.out_channels, begin ? high[0] - low[0] : from, to, a.out_width,
                                     mine + sums.nnz);
            std::fill_n(gx, x_elements, T(0));
            for (int64_t phase = 0, before = 0; phase < phases; ++phase) {
                const Schedule s = plan.transpose(int(phase));
                const T* own = values + before;
                T* gown = mine + before;
                const Mapped map{offsets + before};
                before += first_entry(s, s.strips);
                const int64_t base = phase * inner.phase_size(), row = phase / stride[1], column = phase % stride[1];
                for (const Step& step : steps(ceil_div(last - first - row, stride[0]),
                                              ceil_div(a.width - column, stride[1]), pitch, cut.lanes, kMaxGroups<T>))
                    with_registers<T>(step.groups, [&](auto R) {
                        for (int64_t strip = 0; strip < s.strips; ++strip)
                            for (int64_t b = 0; b < s.blocks; ++b) {
                                const Tile* tile = s.tiles + strip * s.blocks + b;
                                const int64_t at = strip * s.strip * plane + base + step.at;
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
        barrier();
        sums.template reduce<true>(plan);
    });
    return true;
}

template <class T>
bool backward(const ConvArgs& a) {
    return a.gx ? input_gradient<T>(a) : values_gradient<T>(a);
}

}  // namespace

// As sparselottery_conv_forward.
EXPORT int64_t sparselottery_conv_backward(const ConvArgs* args) {
    if (!has_plan(*args, args->gx)) return NO_PLAN;
    const bool done = args->is_double ? backward<double>(by_pixels(*args, 8)) : backward<float>(by_pixels(*args, 4));
    return done ? DONE : TOO_LARGE;
}

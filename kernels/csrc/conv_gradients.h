// What the backward pass of a convolution takes in, the gradient of its output, and the sums that it gives.
#pragma once
#include "cut.h"

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

// The sums over items, of values (in the order of tiles) and of the bias. Items are in shares, of which each has a copy of
// the sums, whoever works on it; copies are summed in the end, in order. How many there are depends on sizes alone.
template <class T>
struct Gradients {
    Gradients(const ConvArgs& a, int64_t nnz, int64_t items, Scratch& memory)
        : values(static_cast<T*>(a.gvalues)), bias(static_cast<T*>(a.gbias)), nnz(values ? nnz : 0),
          outputs(bias ? a.out_channels : 0), items(items),
          shares(std::clamp<int64_t>(a.batch * a.out_height * a.out_width / kSharePixels, 1, std::min(items, kMaxShares))),
          copies(memory.get<T>(shares * size() + 64)) {}
    int64_t size() const { return (nnz + outputs + kLanes - 1) / kLanes * kLanes + kLanes; }
    // f(item, the copy of its share) for all items of the shares that this thread comes to.
    template <class F>
    void each(Queue& queue, F f) const {
        queue.each(0, shares, [&](int64_t i) {
            T* copy = copies + i * size();
            std::fill_n(copy, size(), T(0));
            const Range mine = share(items, i, shares);
            for (int64_t item = mine.begin; item < mine.end; ++item) f(item, copy);
        });
    }
    // TRANSPOSED: tiles are those of Wᵀ, phase after phase.
    template <bool TRANSPOSED>
    void reduce(const Plan& plan) const {
        int64_t begin = 0;
        for (int phase = 0; nnz && phase < (TRANSPOSED ? plan.phases : 1); ++phase) {
            const Schedule s = TRANSPOSED ? plan.transpose(phase) : plan.forward;
            const Range strips = share(s.strips, thread_index(), team_size());
            const int64_t from = begin + first_entry(s, strips.begin), to = begin + first_entry(s, strips.end);
            for (int64_t i = 1; i < shares; ++i)
                for (int64_t k = from; k < to; ++k) copies[k] += copies[i * size() + k];
            from_order<TRANSPOSED>(s, strips, copies + from, values);
            begin += first_entry(s, s.strips);
        }
        const Range mine = share(outputs, thread_index(), team_size());
        for (int64_t o = mine.begin; o < mine.end; ++o) {
            bias[o] = copies[nnz + o];
            for (int64_t i = 1; i < shares; ++i) bias[o] += copies[i * size() + nnz + o];
        }
    }
    T *values, *bias;
    int64_t nnz, outputs, items, shares;
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

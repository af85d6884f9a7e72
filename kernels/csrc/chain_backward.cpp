// The chain of chain.cpp, backward, in one parallel region. T is what sums are taken in, S what tensors are stored in.
//
// As forward, a thread takes a tile of the batch through all layers alone: lines that another core wrote come late, and
// gradients of the activations then stay where they are made. What it finds of the values' gradient goes to memory of the
// tile, and these sums are added up afterwards, tile after tile. Where values are many, and with tiles that are left over,
// threads share out the strips of a tile instead: the same sums in the same order.
#include <vector>

#include "chain_tiles.h"
#include "layer.h"

namespace {

constexpr int64_t kMost = 1 << 21;  // elements of all tiles' sums: those of huge batches would be kept for nothing

thread_local Scratch scratch;  // of a thread: a strip of gx
thread_local Scratch ordered;  // the caller's: values in the order of tiles, and sums

// What is known of a layer: of Wᵀ where the gradient of the input is needed, else of W. Values and their gradient are in the
// order of tiles, or in CSR's where they are read but once. Sums are those of all layers: values' gradients, then bias's.
template <class T, class S>
struct Layer {
    Layer(const ChainLayer& l, int64_t in_features, bool input, bool once)
        : params(l), in_features(in_features), input(input), in_csr(!kNarrow<T, S> && once && input && l.gvalues),
          s(input ? read_plan(l.plan).transpose() : read_plan(l.plan).forward), strips(input || l.gvalues ? s.strips : 0),
          entries(in_csr ? 0 : l.nnz), values(static_cast<const S*>(l.values)), gvalues(static_cast<S*>(l.gvalues)),
          gbias(static_cast<S*>(l.gbias)) {}
    int64_t sums() const { return (gvalues ? entries : 0) + (gbias ? params.rows : 0); }
    // The values of some strips, in their order.
    void order(Range some, T* own) const {
        if (input && !in_csr) to_order<true>(s, some, values, own + at_values + first_entry(s, some.begin));
    }
    // Of one tile of the batch gx of a strip's rows, and the gradient of its values, added if `add`. own: all values.
    void strip(int64_t strip, const T* gy, const T* x, T* gx, const T* own, T* all, bool add, int64_t width, bool relu) const {
        const int64_t row = first_row(s, strip), entry = first_entry(s, strip);
        T* const gown = gvalues ? all + at_sums + entry : nullptr;
        if constexpr (!kNarrow<T, S>) if (in_csr)
            return input_gradient_strip<T>(s, strip, values, true, gy, x + row * width, gx, gvalues, false, width, relu);
        if (!input) return values_gradient_strip<T>(s, strip, gy + row * width, x, gown, add, width);
        input_gradient_strip<T>(s, strip, own + at_values + entry, false, gy, x + row * width, gx, gown, add, width, relu);
    }
    void bias(const T* gy, T* all, bool add, int64_t width, Range rows) const {
        if (gbias) bias_gradient<T>(gy, width, rows, all + at_bias(), add);
    }
    // A strip's sums, or the bias's of some rows, += those of another tile.
    void add(int64_t strip, T* total, const T* others) const {
        const int64_t end = at_sums + first_entry(s, strip + 1);
        for (int64_t k = at_sums + first_entry(s, strip); gvalues && k < end; ++k) total[k] += others[k];
    }
    void add_bias(Range rows, T* total, const T* others) const {
        for (int64_t r = at_bias() + rows.begin; gbias && r < at_bias() + rows.end; ++r) total[r] += others[r];
    }
    // They are complete.
    void give(int64_t strip, const T* total) const {
        if (!gvalues || in_csr) return;
        const Range only{strip, strip + 1};
        const T* const gown = total + at_sums + first_entry(s, strip);
        input ? from_order<true>(s, only, gown, gvalues) : from_order<false>(s, only, gown, gvalues);
    }
    void give_bias(Range rows, const T* total) const {
        if (gbias) std::copy_n(total + at_bias() + rows.begin, rows.end - rows.begin, gbias + rows.begin);
    }
    const ChainLayer& params;
    const int64_t in_features;
    const bool input, in_csr;
    const Schedule s;
    const int64_t strips, entries;
    const S* values;
    S *gvalues, *gbias;
    int64_t at_values = 0, at_sums = 0;  // among those of all layers

  private:
    int64_t at_bias() const { return at_sums + (gvalues ? entries : 0); }
};

template <class T, class S>
struct Pass {
    Pass(const ChainArgs& a, const ChainLayer* params) : a(a), tiles(tiles_of<T>(a, params)) {
        for (int64_t l = 0; l < a.layers; ++l) {
            layers.emplace_back(params[l], l ? params[l - 1].rows : a.features, l || a.y.data, tiles.count == 1);
            Layer<T, S>& layer = layers.back();
            layer.at_values = values, layer.at_sums = sums;
            values += layer.input ? layer.entries : 0, sums += layer.sums();
            rows = std::max<int64_t>(rows, layer.s.strip);
        }
    }
    // Tile i, alone or by all threads: each_strip(layer, f) calls f(strip) for those of its strips that are this thread's.
    template <class F>
    void tile(int64_t i, bool alone, const T* own, T* all, bool add, F each_strip) const {
        const auto mine = [&](int64_t count) { return alone ? Range{0, count} : share(count, thread_index(), team_size()); };
        const auto of = [&](void* packed, int64_t count) { return tiles.of(static_cast<T*>(packed), count, i); };
        const int64_t width = tiles.width(i), out_features = layers.back().params.rows;
        pack_tile<T, S>(a.x, tiles, i, mine(out_features), of(a.packed_gy, out_features));
        if (a.input.data) pack_tile<T, S>(a.input, tiles, i, mine(a.features), of(layers[0].params.input, a.features));
        for (const Layer<T, S>& layer : layers)
            keep<T, S>(layer.params, tiles, layer.in_features, i, mine(layer.in_features), true);
        if (!alone) barrier();
        T* const out = scratch.get<T>(rows * kWidest<T>);
        const T* gy = of(a.packed_gy, out_features);
        for (int64_t l = a.layers - 1; l >= 0; --l) {
            const Layer<T, S>& layer = layers[l];
            const T* x = of(layer.params.input, layer.in_features);
            layer.bias(gy, all, add, width, mine(layer.params.rows));
            each_strip(l, [&](int64_t strip) {
                const int64_t row = first_row(layer.s, strip);
                T* gx = l ? of(layer.params.ginput, layer.in_features) + row * width : out;
                layer.strip(strip, gy, x, gx, own, all, add, width, l);
                if (!l && a.y.data) unpack_rows<T, S>(gx, tiles, i, row, height(layer.s, strip), a.y);
            });
            if (l && !alone) barrier();
            gy = of(layer.params.ginput, layer.in_features);
        }
    }
    const ChainArgs& a;
    const BatchTiles<T> tiles;
    std::vector<Layer<T, S>> layers;
    int64_t values = 0, sums = 0, rows = 0;  // of all layers; rows: of their highest strip
};

template <class T, class S>
void backward(const ChainArgs& a, const ChainLayer* params) {
    const Pass<T, S> pass(a, params);
    expect_matrix<S>(a.y, a.batch, a.features);
    for (const auto& layer : pass.layers)
        if (layer.gvalues) expect_writes(layer.gvalues, layer.params.nnz * sizeof(S));
    const int64_t count = pass.tiles.count;
    const bool light = pass.tiles.light && a.threads > 1 && count * pass.sums <= kMost;
    T* const own = ordered.get<T>(pass.values + (light ? count : 1) * pass.sums + kLanes);
    T* const total = own + pass.values;
    Queue whole;
    std::vector<Queue> queues(a.layers);
    together(team_of<T>(a, params, pass.tiles), [&] {
        const int64_t part = thread_index(), parts = team_size(), alone = light && parts > 1 ? count - count % parts : 0;
        if (alone) {
            for (const auto& layer : pass.layers) layer.order(share(layer.s.strips, part, parts), own);
            barrier();
            whole.each(0, alone, [&](int64_t i) {  // the sums of the first tile are where the total will be
                pass.tile(i, true, own, total + i * pass.sums, false, [&](int64_t l, auto run) {
                    for (int64_t strip = 0; strip < pass.layers[l].strips; ++strip) run(strip);
                });
            });
            barrier();
            for (const auto& layer : pass.layers) {
                const Range strips = share(layer.strips, part, parts), rows = share(layer.params.rows, part, parts);
                for (int64_t strip = strips.begin; strip < strips.end; ++strip) {
                    for (int64_t i = 1; i < alone; ++i) layer.add(strip, total, total + i * pass.sums);
                    if (alone == count) layer.give(strip, total);
                }
                for (int64_t i = 1; i < alone; ++i) layer.add_bias(rows, total, total + i * pass.sums);
                if (alone == count) layer.give_bias(rows, total);
            }
        }
        // A thread takes strips of the first of these tiles as it comes to them, and keeps them for the others.
        std::vector<std::vector<int64_t>> mine(a.layers);
        for (int64_t i = alone; i < count; ++i) {
            const bool last = i + 1 == count;
            pass.tile(i, false, own, total, i > 0, [&](int64_t l, auto run) {
                const auto& layer = pass.layers[l];
                const auto take = [&](int64_t strip) {
                    if (i == 0) layer.order({strip, strip + 1}, own);
                    run(strip);
                    if (last) layer.give(strip, total);
                };
                if (i > alone) return void(std::for_each(mine[l].begin(), mine[l].end(), take));
                queues[l].each(0, layer.strips, [&](int64_t strip) {
                    mine[l].push_back(strip);
                    take(strip);
                });
            });
            for (const auto& layer : pass.layers)
                if (last) layer.give_bias(share(layer.params.rows, part, parts), total);
        }
    });
}

}  // namespace

EXPORT int64_t sparselottery_chain_backward(const ChainArgs* args, const ChainLayer* layers) {
    if (!are_plans(*args, layers, true)) return NO_PLAN;
    of_element(args->element, [&](auto sum, auto stored) { backward<decltype(sum), decltype(stored)>(*args, layers); });
    return DONE;
}

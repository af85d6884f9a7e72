// The chain h_l = h_{l-1} W_lᵀ + b_l with a ReLU between layers, forward and backward, each in one parallel region.
//
// Forward, threads share out the batch and then strips of output rows (`Team`); backward, strips. Nothing is written by
// two threads.
#include <algorithm>
#include <atomic>
#include <vector>

#include "pack.h"
#include "plan.h"
#include "team.h"
#include "tile.h"

namespace {

enum Layout : int64_t { ROW_MAJOR = 0, BATCH_MINOR = 1, PACKED = 2 };

struct Layer {  // mirrored in cpu.py
    const int32_t* plan;
    int64_t plan_size, rows, nnz;
    const void *values, *bias;  // bias: null if none
    void* input;                // packed input of the layer; written by forward, read by backward
    int64_t ld_input;
    void *gvalues, *gbias;  // null where not needed
    void* ginput;           // backward of hidden layers: packed gradient of the input
};

struct Args {  // mirrored in cpu.py
    int64_t is_double, threads, layers, batch, features, ld;  // ld: of all packed buffers but a PACKED x or gy
    const void* x;
    int64_t x_stride, x_layout;  // forward: x -> layer[0].input unless PACKED
    void* y;                     // forward: the output; backward: gx, or null
    int64_t y_stride, y_layout;
    void* packed_gy;  // backward: gy (in x) is packed to here unless PACKED
};

struct FrozenLayer {  // mirrored in cpu_net.py
    const int32_t* plan;
    const float *values, *bias;
};

struct Frozen {  // mirrored in cpu_net.py; its layers follow
    int64_t threads, layers;
};

thread_local Scratch scratch;    // a strip's output on its way to row-major
thread_local Scratch workspace;  // the caller's: packed activations that nobody keeps

struct BatchTile {
    int64_t begin, groups;  // columns [begin, begin + groups * kLanes)
};

// Lane groups [from, to) of the batch in `count` equal tiles of at most 8 vectors.
template <class T>
struct Batches {
    Batches(int64_t from, int64_t to, int64_t count) : from(from), groups(to - from), count(count) {}
    explicit Batches(int64_t batch) : Batches(0, padded(batch) / kLanes, tiles(padded(batch) / kLanes)) {}
    static int64_t tiles(int64_t groups) { return (groups + kMaxGroups<T> - 1) / kMaxGroups<T>; }
    BatchTile operator[](int64_t i) const {
        const int64_t begin = groups * i / count;
        return {(from + begin) * kLanes, groups * (i + 1) / count - begin};
    }
    int64_t from, groups, count;
};

// How a parallel region shares out the work: the batch in parts, and each part's strips among `sharers` threads.
//
// A part has at least `least` lane groups: with fewer, each thread would stream the weights for too few columns. A thread
// keeps its samples from the first layer to the last. What it packs it also multiplies, so activations stay in
// its own caches (moving a line to another core costs 30 to 300 ns) and, unless threads share a part, no layer waits.
struct Team {
    Team(int64_t groups, int64_t least, int64_t threads) {
        parts = std::max<int64_t>(1, std::min(threads, groups / least));
        while (threads % parts) --parts;
        sharers = threads / parts;
        part = thread_index() / sharers;
        share = thread_index() % sharers;
    }
    template <class T>
    Batches<T> batches(int64_t groups) const {
        const int64_t most = (groups + parts - 1) / parts;  // all parts have as many tiles, so that barriers match
        return {groups * part / parts, groups * (part + 1) / parts, Batches<T>::tiles(most)};
    }
    void wait() const {
        if (sharers > 1) barrier();
    }
    int64_t parts, sharers, part, share;
};

// Packs features [from, to) of a tile, and of the columns up to ld after the last one.
template <class T>
void pack_tile(const Args& a, void* packed, BatchTile tile, int64_t from, int64_t to) {
    const int64_t end = tile.begin + tile.groups * kLanes, width = (end < padded(a.batch) ? end : a.ld) - tile.begin;
    const int64_t valid = std::min(a.batch - tile.begin, width), row = a.x_layout == ROW_MAJOR ? a.x_stride : 1;
    (a.x_layout == ROW_MAJOR ? pack<T> : repack<T>)(static_cast<const T*>(a.x) + tile.begin * row, a.x_stride, valid,
                                                    from, to, static_cast<T*>(packed) + tile.begin, a.ld, width);
}

template <class T>
void pack_input(const Args& a, void* packed, int64_t features) {
    constexpr int64_t chunk = 64;
    const BatchTile all{0, padded(a.batch) / kLanes};
    const int64_t chunks = (features + chunk - 1) / chunk, size = team_size(), me = thread_index();
    for (int64_t c = chunks * me / size; c < chunks * (me + 1) / size; ++c)
        pack_tile<T>(a, packed, all, c * chunk, std::min(features, (c + 1) * chunk));
    barrier();
}

// One strip of a layer's output, for one tile of the batch.
template <class T>
void forward_strip(const Args& a, const Layer& layer, const Layer* next, const Schedule& s, int64_t strip,
                   BatchTile tile) {
    const T *values = static_cast<const T*>(layer.values), *bias = static_cast<const T*>(layer.bias);
    const bool row_major = !next && a.y_layout == ROW_MAJOR;
    const int64_t ld = layer.ld_input, ld_out = next ? next->ld_input : a.y_stride;
    const int64_t row0 = strip * s.strip, height = std::min<int64_t>(s.strip, s.rows - row0);
    const int64_t width = tile.groups * kLanes, ldy = row_major ? width : ld_out;
    const T* x = static_cast<const T*>(layer.input) + tile.begin;
    T* packed = static_cast<T*>(next ? next->input : a.y);
    T* y = row_major ? scratch.get<T>(s.strip * width) : packed + row0 * ld_out + tile.begin;
    for (int64_t r = 0; r < height; ++r) std::fill_n(y + r * ldy, width, bias ? bias[row0 + r] : T(0));
    with_registers<T>(tile.groups, [&](auto R) {
        for (int64_t b = 0; b < s.blocks; ++b)
            spmm_tile<T, R, false>(s, s.tiles + strip * s.blocks + b, values, x + b * s.block * ld, Strided{ld}, y, ldy);
    });
    if (next)
        for (int64_t r = 0; r < height; ++r)
            for (int64_t n = 0; n < width; ++n) y[r * ldy + n] = y[r * ldy + n] < 0 ? T(0) : y[r * ldy + n];
    if (next && tile.begin + width == padded(a.batch))
        for (int64_t r = 0; r < height; ++r) std::fill(y + r * ldy + width, y + r * ldy + ld_out - tile.begin, T(0));
    if (row_major)
        unpack<T>(y, ldy, height, std::min(width, a.batch - tile.begin),
                  static_cast<T*>(a.y) + tile.begin * a.y_stride + row0, a.y_stride);
}

// Σ values * x[columns], in scalar chains: they keep up with memory, and gathers are no faster.
template <class T, class Index>
__attribute__((noinline)) T dot(const T* values, const Index* columns, int64_t n, const T* x) {
    T chains[4] = {};
    const T* const end = values + n;
    for (; values + 4 <= end; values += 4, columns += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            chains[i] += values[i] * x[columns[i]];
            keep_scalar(chains[i]);
        }
    for (; values < end; ++values, ++columns) chains[0] += *values * x[*columns];
    return (chains[0] + chains[1]) + (chains[2] + chains[3]);
}

// One sample, nothing saved: a sparse dot product per output.
template <class T>
void forward_single(const Args& a, const Layer* layers) {
    for (int64_t l = 0; l < a.layers; ++l) {
        const Layer& layer = layers[l];
        const Plan plan = read_plan(layer.plan);
        const bool hidden = l + 1 < a.layers;
        const T *values = static_cast<const T*>(layer.values), *bias = static_cast<const T*>(layer.bias);
        const T* x = static_cast<const T*>(l ? layer.input : a.x);
        T* y = static_cast<T*>(hidden ? layers[l + 1].input : a.y);
        const int64_t rows = plan.out_features, size = team_size(), me = thread_index();
        for (int64_t r = rows * me / size; r < rows * (me + 1) / size; ++r) {
            const int32_t begin = plan.crow_indices[r], n = plan.crow_indices[r + 1] - begin;
            const T total = (bias ? bias[r] : T(0)) + (plan.columns ? dot(values + begin, plan.columns + begin, n, x)
                                                                    : dot(values + begin, plan.wide_columns + begin, n, x));
            y[r] = hidden && total < 0 ? T(0) : total;
        }
        if (hidden) barrier();
    }
}

template <class T>
void forward(const Args& a, const Layer* layers) {
    if (a.batch == 1 && !layers[0].input) {
        together(a.threads, [&] { forward_single<T>(a, layers); });
        return;
    }
    together(a.threads, [&] {
        const int64_t groups = padded(a.batch) / kLanes;
        const Team team(groups, kMaxGroups<T>, team_size());
        const Batches<T> batches = team.batches<T>(groups);
        for (int64_t i = 0; i < batches.count; ++i) {
            const BatchTile tile = batches[i];
            if (a.x_layout != PACKED) {
                const int64_t features = read_plan(layers[0].plan).in_features;
                pack_tile<T>(a, layers[0].input, tile, features * team.share / team.sharers,
                             features * (team.share + 1) / team.sharers);
                team.wait();
            }
            for (int64_t l = 0; l < a.layers; ++l) {
                const Schedule s = read_plan(layers[l].plan).forward;
                const Layer* next = l + 1 < a.layers ? layers + l + 1 : nullptr;
                for (int64_t strip = team.share; strip < s.strips; strip += team.sharers)
                    forward_strip<T>(a, layers[l], next, s, strip, tile);
                if (next) team.wait();
            }
        }
    });
}

template <class T>
void bias_gradient(const Schedule& s, const Layer& layer, const T* gy, int64_t ld, int64_t width) {
    T* gbias = static_cast<T*>(layer.gbias);
    const int64_t size = team_size(), me = thread_index();
    for (int64_t r = s.rows * me / size; r < s.rows * (me + 1) / size; ++r) {
        Vec<T> total = {};
        for (int64_t n = 0; n < width; n += kWidth<T>) total += load<T>(gy + r * ld + n);
        gbias[r] = sum<T>(total);
    }
}

// gvalues alone, strips of W: each thread owns the values of its rows.
template <class T>
void values_gradient(const Schedule& s, const Layer& layer, const T* gy, int64_t ld, const Batches<T>& batches,
                     std::atomic<int64_t>& taken) {
    const T* x = static_cast<const T*>(layer.input);
    T* gvalues = static_cast<T*>(layer.gvalues);
    const int64_t ldx = layer.ld_input;
    for (int64_t strip; (strip = taken++) < s.strips;)
        for (int64_t i = 0; i < batches.count; ++i) {
            const BatchTile tile = batches[i];
            with_registers<T>(tile.groups, [&](auto R) {
                for (int64_t b = 0; b < s.blocks; ++b)
                    sddmm_tile<T, R>(s, s.tiles + strip * s.blocks + b, gy + strip * s.strip * ld + tile.begin, ld,
                                     x + b * s.block * ldx + tile.begin, Strided{ldx}, gvalues, i > 0);
            });
        }
}

// gx, and gvalues with it where wanted, by strips of Wᵀ.
template <class T>
void input_gradient(const Args& a, const Schedule& s, const Layer& layer, bool hidden, const T* gy, int64_t ld,
                    const Batches<T>& batches, std::atomic<int64_t>& taken) {
    const T* values = static_cast<const T*>(layer.values);
    T* gvalues = static_cast<T*>(layer.gvalues);
    const bool row_major = !hidden && a.y_layout == ROW_MAJOR;
    T* packed = static_cast<T*>(hidden ? layer.ginput : a.y);
    const int64_t ld_out = hidden ? a.ld : a.y_stride;
    for (int64_t strip; (strip = taken++) < s.strips;)
        for (int64_t i = 0; i < batches.count; ++i) {
            const BatchTile tile = batches[i];
            const int64_t row0 = strip * s.strip, height = std::min<int64_t>(s.strip, s.rows - row0);
            const int64_t width = tile.groups * kLanes, ldgx = row_major ? width : ld_out;
            T* gx = row_major ? scratch.get<T>(s.strip * width) : packed + row0 * ld_out + tile.begin;
            const T* x = static_cast<const T*>(layer.input) + row0 * layer.ld_input + tile.begin;
            for (int64_t r = 0; r < height; ++r) std::fill_n(gx + r * ldgx, width, T(0));
            with_registers<T>(tile.groups, [&](auto R) {
                for (int64_t b = 0; b < s.blocks; ++b) {
                    const Tile* t = s.tiles + strip * s.blocks + b;
                    const T* in = gy + b * s.block * ld + tile.begin;
                    if (gvalues)
                        fused_tile<T, R>(s, t, values, in, Strided{ld}, x, layer.ld_input, gx, ldgx, gvalues, i > 0);
                    else
                        spmm_tile<T, R, true>(s, t, values, in, Strided{ld}, gx, ldgx);
                }
            });
            if (hidden)
                for (int64_t r = 0; r < height; ++r)
                    for (int64_t n = 0; n < width; ++n)
                        gx[r * ldgx + n] = x[r * layer.ld_input + n] <= 0 ? T(0) : gx[r * ldgx + n];
            if (row_major)
                unpack<T>(gx, ldgx, height, std::min(width, a.batch - tile.begin),
                          static_cast<T*>(a.y) + tile.begin * a.y_stride + row0, a.y_stride);
        }
}

template <class T>
void backward(const Args& a, const Layer* layers) {
    const Batches<T> batches(a.batch);
    std::vector<std::atomic<int64_t>> taken(a.layers);  // strips of each layer
    together(a.threads, [&] {
        const T* gy = static_cast<const T*>(a.x_layout == PACKED ? a.x : a.packed_gy);
        int64_t ld = a.x_layout == PACKED ? a.x_stride : a.ld;
        if (a.x_layout != PACKED) pack_input<T>(a, a.packed_gy, read_plan(layers[a.layers - 1].plan).out_features);
        for (int64_t l = a.layers - 1; l >= 0; --l) {
            const Layer& layer = layers[l];
            const Plan plan = read_plan(layer.plan);
            if (layer.gbias) bias_gradient<T>(plan.forward, layer, gy, ld, padded(a.batch));
            if (l || a.y)
                input_gradient<T>(a, plan.transpose(), layer, l > 0, gy, ld, batches, taken[l]);
            else if (layer.gvalues)
                values_gradient<T>(plan.forward, layer, gy, ld, batches, taken[l]);
            barrier();
            gy = static_cast<const T*>(layer.ginput);
            ld = a.ld;
        }
    });
}

bool are_plans(const Args& a, const Layer* layers, bool backward) {
    for (int64_t l = 0; l < a.layers; ++l)
        if (!is_plan(layers[l].plan, layers[l].plan_size, layers[l].rows, l ? layers[l - 1].rows : a.features, layers[l].nnz,
                     backward) ||
            (layers[l].nnz && !layers[l].values))
            return false;
    return true;
}

}  // namespace

ABI(chain, kLanes, words_of<Args>, words_of<Layer>, words_of<Frozen>, words_of<FrozenLayer>);

// Memory of the calling thread, valid until it asks again.
EXPORT void* sparselottery_workspace(int64_t bytes) { return workspace.get<char>(bytes + 64); }

// The layers follow their args.
EXPORT int64_t sparselottery_chain_forward(const Args* args) {
    const Layer* layers = reinterpret_cast<const Layer*>(args + 1);
    if (!are_plans(*args, layers, false)) return NO_PLAN;
    args->is_double ? forward<double>(*args, layers) : forward<float>(*args, layers);
    return DONE;
}

// The same for a frozen chain, fp32: x (batch, in_features) -> y (batch, out_features), both row-major.
EXPORT void sparselottery_chain_infer(const Frozen* chain, const void* x, void* y, int64_t batch) {
    const FrozenLayer* frozen = reinterpret_cast<const FrozenLayer*>(chain + 1);
    int64_t ld = padded(batch), features = 0;
    ld += ld / kLanes / 16 * kLanes;  // as reference.leading_dim
    std::vector<Layer> layers(chain->layers);
    for (int64_t l = 0; l < chain->layers; ++l) features += read_plan(frozen[l].plan).in_features;
    float* at = workspace.get<float>(features * ld + kLanes);
    for (int64_t l = 0; l < chain->layers; ++l) {
        const FrozenLayer& f = frozen[l];
        layers[l] = {f.plan, 0, 0, 0, f.values, f.bias, at, ld, nullptr, nullptr, nullptr};
        at += read_plan(f.plan).in_features * ld;
    }
    const Plan first = read_plan(frozen[0].plan), last = read_plan(frozen[chain->layers - 1].plan);
    const Args args{0, chain->threads, chain->layers, batch, first.in_features, ld, x, first.in_features, ROW_MAJOR,
                    y, last.out_features, ROW_MAJOR, nullptr};
    forward<float>(args, layers.data());
}

EXPORT int64_t sparselottery_chain_backward(const Args* args) {
    const Layer* layers = reinterpret_cast<const Layer*>(args + 1);
    if (!are_plans(*args, layers, true)) return NO_PLAN;
    args->is_double ? backward<double>(*args, layers) : backward<float>(*args, layers);
    return DONE;
}

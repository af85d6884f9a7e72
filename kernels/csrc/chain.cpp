// The chain h_l = h_{l-1} W_lᵀ + b_l with a ReLU between layers, forward, in one parallel region.
//
// Nothing is written by two threads, and no sum depends on how many there are. T is what sums are taken in, S what
// tensors are stored in: the same, or 16 bits, widened when packed or put into order, and rounded on their way back.
#include <vector>

#include "chain_tiles.h"
#include "dot.h"
#include "layer.h"

namespace {

using Args = ChainArgs;
using Layer = ChainLayer;

struct FrozenLayer {  // mirrored in cpu_net.py
    const int32_t* plan;
    const float *values, *bias;
};

struct Frozen {  // mirrored in cpu_net.py; its layers follow
    int64_t threads, layers;
};

thread_local Scratch scratch;    // of a thread: a strip's output
thread_local Scratch ordered;    // the caller's: values and their gradients in the order of tiles
thread_local Scratch workspace;  // the caller's: packed activations that nobody keeps

// Is this a call for `forward_few`?
bool is_few(const Args& a) { return a.inference && a.batch <= kFew && !a.x.batch_minor && !a.y.batch_minor; }

// Few samples, nothing saved: whole rows of W, read once. Activations are (features, kFew), or those of one sample that is
// not stored in 16 bits.
template <class T, class S>
void forward_few(const Args& a, const Layer* layers) {
    const int64_t lanes = kNarrow<T, S> || a.batch > 1 ? kFew : 1;
    int64_t features = lanes > 1 ? a.features : 0;
    for (int64_t l = 0; l + 1 < a.layers; ++l) features += layers[l].rows;
    T* const memory = ordered.get<T>(features * lanes + kLanes);
    together(a.threads, [&] {
        const S* given = static_cast<const S*>(a.x.data);
        const T* x = static_cast<const T*>(a.x.data);
        T* free = memory;
        if (lanes > 1) {
            const Range mine = share(a.features, thread_index(), team_size());
            for (int64_t n = 0; n < lanes; ++n)
                for (int64_t f = mine.begin; f < mine.end; ++f)
                    free[f * lanes + n] = n < a.batch ? T(given[n * a.x.stride + f]) : T(0);
            x = free, free += a.features * lanes;
            barrier();
        }
        for (int64_t l = 0; l < a.layers; ++l) {
            const Plan plan = read_plan(layers[l].plan);
            const bool hidden = l + 1 < a.layers;
            const S *values = static_cast<const S*>(layers[l].values), *bias = static_cast<const S*>(layers[l].bias);
            const Range rows = share(plan.out_features, thread_index(), team_size());
            const auto each_row = [&](auto* columns) {
                const auto row_of = dot_of<T, S, std::remove_const_t<std::remove_pointer_t<decltype(columns)>>>(lanes);
                for (int64_t r = rows.begin; r < rows.end; ++r) {
                    const int32_t begin = plan.crow_indices[r];
                    T total[kFew];
                    row_of(values + begin, columns + begin, plan.crow_indices[r + 1] - begin, x, total);
                    for (int64_t n = 0; n < (hidden ? lanes : a.batch); ++n) {
                        const T y = total[n] + (bias ? T(bias[r]) : T(0));
                        if (hidden) free[r * lanes + n] = relu_of(y);
                        else static_cast<S*>(a.y.data)[n * a.y.stride + r] = S(y);
                    }
                }
            };
            plan.columns ? each_row(plan.columns) : each_row(plan.wide_columns);
            if (hidden) barrier();
            x = free, free += plan.out_features * lanes;
        }
    });
}

template <class T, class S>
void forward(const Args& a, const Layer* layers) {
    if (is_few(a)) return forward_few<T, S>(a, layers);
    expect_matrix<S>(a.y, a.batch, layers[a.layers - 1].rows);
    const BatchTiles<T> tiles = tiles_of<T>(a, layers);
    constexpr bool narrow = kNarrow<T, S>;
    const bool in_csr = !narrow && (tiles.count == 1 || (tiles.light && tiles.count == 2));  // read once, or there are few
    const auto operands = [&](const Layer& layer) { return in_csr ? 0 : layer.nnz + (narrow ? layer.rows : 0); };
    int64_t entries = 0;
    for (int64_t l = 0; l < a.layers; ++l) entries += operands(layers[l]);
    T* const all = ordered.get<T>(entries + kLanes);
    Queue whole;
    std::vector<Queue> shared(tiles.count * a.layers);
    together(team_of<T>(a, layers, tiles), [&] {
        if (!in_csr) {
            T* values = all;
            for (int64_t l = 0; l < a.layers; values += operands(layers[l]), ++l) {
                const Schedule s = read_plan(layers[l].plan).forward;
                const Range strips = share(s.strips, thread_index(), team_size());
                to_order<false>(s, strips, static_cast<const S*>(layers[l].values), values + first_entry(s, strips.begin));
                const S* bias = static_cast<const S*>(layers[l].bias);
                const Range rows = share(narrow && bias ? s.rows : 0, thread_index(), team_size());
                std::copy(bias + rows.begin, bias + rows.end, values + layers[l].nnz + rows.begin);
            }
            barrier();
        }
        // A tile goes through all layers before the next: its activations stay in the caches, those of one core where a
        // thread has it alone (moving a line to another core costs 30 to 300 ns); then nobody waits.
        const bool reuse = a.inference && tiles.count > 2 * team_size();  // then a thread's tiles fit before those left over
        const auto forward_tile = [&](int64_t i, bool alone) {
            const int64_t width = tiles.width(i);
            const auto at = [&](void* input, int64_t features) {  // tile i of an input; of what nobody keeps, a thread has one
                T* packed = static_cast<T*>(input);
                return alone && reuse ? packed + features * kWidest<T> * thread_index() : tiles.of(packed, features, i);
            };
            const Range features = alone ? Range{0, a.features} : share(a.features, thread_index(), team_size());
            pack_tile<T, S>(a.x, tiles, i, features, at(layers[0].input, a.features));
            keep<T, S>(layers[0], tiles, a.features, i, features, false);
            if (!alone) barrier();
            const T* values = all;
            for (int64_t l = 0; l < a.layers; values += operands(layers[l]), ++l) {
                const Layer &layer = layers[l], *next = l + 1 < a.layers ? layers + l + 1 : nullptr;
                const Schedule s = read_plan(layer.plan).forward;
                const T* x = at(layer.input, s.cols);
                const T* bias = narrow && layer.bias ? values + layer.nnz : static_cast<const T*>(layer.bias);
                const auto strip_forward = [&](int64_t strip) {
                    const int64_t row = first_row(s, strip);
                    T* y = next ? at(next->input, s.rows) + row * width
                                : scratch.get<T>(s.strip * kWidest<T>);
                    forward_strip<T>(s, strip, in_csr ? static_cast<const T*>(layer.values) : values + first_entry(s, strip),
                                     in_csr, bias, x, y, width, next);
                    if (!next) unpack_rows<T, S>(y, tiles, i, row, height(s, strip), a.y);
                    else keep<T, S>(*next, tiles, s.rows, i, {row, row + height(s, strip)}, false);
                };
                if (!alone) shared[i * a.layers + l].each(0, s.strips, strip_forward);
                else
                    for (int64_t strip = 0; strip < s.strips; ++strip) strip_forward(strip);
                if (next && !alone) barrier();
            }
        };
        const int64_t left_over = tiles.count - tiles.count % team_size();
        whole.each(0, left_over, [&](int64_t i) { forward_tile(i, true); });
        for (int64_t i = left_over; i < tiles.count; ++i) forward_tile(i, false);
    });
}

}  // namespace

ABI(chain, kLanes, words_of<Frozen>, words_of<FrozenLayer>);

// Memory of the calling thread, valid until it asks again.
EXPORT void* sparselottery_workspace(int64_t bytes) { return workspace.get<char>(bytes + 64); }

// Packed x -> y (batch, features), row-major, of a chain with so many values, and features of all inputs and outputs.
EXPORT int64_t sparselottery_unpack(bool is_double, const void* packed, int64_t batch, int64_t features, void* y,
                                    int64_t values, int64_t all_features) {
    const ChainMatrix to{y, features, 0};
    const auto all = [&](auto* x) {
        using T = std::remove_cv_t<std::remove_pointer_t<decltype(x)>>;
        const BatchTiles<T> tiles(batch, is_light<T>(values, all_features));
        for (int64_t i = 0; i < tiles.count; ++i) unpack_rows<T, T>(tiles.of(x, features, i), tiles, i, 0, features, to);
    };
    is_double ? all(static_cast<const double*>(packed)) : all(static_cast<const float*>(packed));
    return DONE;
}

EXPORT int64_t sparselottery_chain_forward(const Args* args, const Layer* layers) {
    if (!are_plans(*args, layers, false)) return NO_PLAN;
    of_element(args->element, [&](auto sum, auto stored) { forward<decltype(sum), decltype(stored)>(*args, layers); });
    return DONE;
}

// The same for a frozen chain, fp32: x (batch, in_features) -> y (batch, out_features), both row-major.
EXPORT void sparselottery_chain_infer(const Frozen* chain, const void* x, void* y, int64_t batch) {
    const FrozenLayer* frozen = reinterpret_cast<const FrozenLayer*>(chain + 1);
    const int64_t columns = padded(batch);
    int64_t features = 0;
    std::vector<Layer> layers(chain->layers);
    for (int64_t l = 0; l < chain->layers; ++l) features += read_plan(frozen[l].plan).in_features;
    float* at = workspace.get<float>(features * columns);
    for (int64_t l = 0; l < chain->layers; ++l) {
        const FrozenLayer& f = frozen[l];
        const Plan plan = read_plan(f.plan);
        layers[l] = {f.plan, 0, plan.out_features, plan.nnz, f.values, f.bias, at, nullptr, nullptr, nullptr, nullptr};
        at += plan.in_features * columns;
    }
    const int64_t in = read_plan(frozen[0].plan).in_features, out = layers.back().rows;
    const Args args{FLOAT32, chain->threads, chain->layers, batch, in, {const_cast<void*>(x), in, 0}, {y, out, 0}, {}, nullptr, 1};
    forward<float, float>(args, layers.data());
}

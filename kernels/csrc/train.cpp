// Training of a chain of sparse linear layers with a ReLU between them: whole steps, many in one call. A step is a batch of
// images, forward, cross-entropy of the softmax, backward, and Adam or SGD.
//
// The first layer's input needs no gradient, so that its values and moments can stay in the order of tiles from the first
// step to the last: each tile's gradient is followed by its update, and nothing but these three arrays leaves L1.
//
// Threads own strips of rows of each W: they compute these outputs, and alone write these values, biases and moments. So
// the first layer, most of the work, needs nobody from its gradient to its next product. Gradients of hidden activations
// are owned by strips of Wᵀ. Every sum is taken by one thread, in an order that does not depend on how many there are.
#include <algorithm>
#include <vector>

#include "layer.h"
#include "update.h"

namespace {

constexpr int64_t kSteps = 4;  // that a team does before it may be told to leave processors to others

// Is a team faster than one thread? For small nets that depends on where the cores are, which may change: lines that wander
// between two dies take five times as long. So both are timed, again and again, and the faster one does most of the steps.
class Pace {
  public:
    explicit Pace(double* kept) : turn_(kept[0]), seconds_(kept + 1) {}
    bool team() const { return turn_ < kTries || (turn_ >= 2 * kTries && seconds_[0] <= seconds_[1]); }
    // What a step took, of those since it was asked.
    void took(double seconds) {
        double& best = seconds_[turn_ >= kTries];
        const int attempt = int(turn_) % kTries;
        if (turn_ < 2 * kTries && attempt) best = attempt == 1 ? seconds : std::min(best, seconds);
        turn_ = turn_ + 1 < kTurns ? turn_ + 1 : 0;
    }

  private:
    static constexpr int kTries = 3, kTurns = 256;  // of kSteps steps; the first try of each way warms caches
    double &turn_, *const seconds_;
};

thread_local Scratch workspace;  // the caller's: what threads share
thread_local Scratch scratch;    // of a thread: its values and their gradients in the order of tiles

Range rows_of_strips(const Schedule& s, Range strips) {
    return {std::min<int64_t>(strips.begin * s.strip, s.rows), std::min<int64_t>(strips.end * s.strip, s.rows)};
}

// Features `range` of the images `order` as packed columns, zeros after the last image.
template <class T>
void pack_images(const T* images, int64_t features, const int64_t* order, int64_t batch, const T* zeros, Range range, T* x) {
    constexpr int W = kWidth<T>;
    const BatchTiles<T> tiles(batch);
    for (int64_t i = 0; i < tiles.count; ++i)
        for (int64_t n = 0, width = tiles.width(i); n < width; n += W) {
            T* packed = tiles.of(x, features, i) + n;
            const int64_t first = tiles.begin(i) + n;
            const T* row[W];
            for (int j = 0; j < W; ++j) row[j] = first + j < batch ? images + order[first + j] * features : zeros;
            int64_t f = range.begin;
            for (; f + W <= range.end; f += W)
                transpose<T>([&](int j) { return row[j] + f; }, rows_of(packed + f * width, width));
            for (; f < range.end; ++f)
                for (int j = 0; j < W; ++j) packed[f * width + j] = row[j][f];
        }
}

// Logits, packed, of columns `range` -> the gradient of their mean cross-entropy, in place.
template <class T>
void cross_entropy_gradient(T* logits, int64_t classes, const int64_t* labels, const int64_t* order, int64_t batch,
                            Range range) {
    constexpr int W = kWidth<T>;
    const BatchTiles<T> tiles(batch);
    for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t width = tiles.width(t), begin = tiles.begin(t);
        for (int64_t n = std::max(range.begin, begin); n < std::min(range.end, begin + width); n += W) {
            T* column = tiles.of(logits, classes, t) + n - begin;
            Vec<T> top = load<T>(column), total = {};
            for (int64_t c = 1; c < classes; ++c) {
                const Vec<T> v = load<T>(column + c * width);
                top = v > top ? v : top;
            }
            for (int64_t c = 0; c < classes; ++c) {
                const Vec<T> e = exponentials<T>(load<T>(column + c * width) - top);
                store<T>(column + c * width, e);
                total += e;
            }
            Vec<T> scale = T(1) / (total * T(batch));
            for (int i = 0; i < W; ++i) scale[i] = n + i < batch ? scale[i] : T(0);
            for (int64_t c = 0; c < classes; ++c) store<T>(column + c * width, load<T>(column + c * width) * scale);
            for (int i = 0; i < W && n + i < batch; ++i) column[labels[order[n + i]] * width + i] -= T(1) / T(batch);
        }
    }
}

template <class T>
struct Layer {
    const TrainedLayer* params;
    Schedule rows, columns;  // of W and Wᵀ
    T *output, *goutput;     // packed; of the last layer the same
    T *gvalues, *gbias;
    T* ordered[3];           // of the first layer: values and moments in the order of tiles; else null
    Range strips, strips_back, owned_rows, owned_values;  // this thread's
    void divide(int64_t part, int64_t parts) {
        strips = fair_share(rows, part, parts), strips_back = fair_share(columns, part, parts);
        owned_rows = rows_of_strips(rows, strips);
        const int32_t* crow_indices = read_plan(params->plan).crow_indices;
        owned_values = {crow_indices[owned_rows.begin], crow_indices[owned_rows.end]};
    }
    const T* values() const { return static_cast<const T*>(params->values); }
    const T* bias() const { return static_cast<const T*>(params->bias); }
    // output = W input + b of my rows, with a ReLU if `relu`.
    void forward(const BatchTiles<T>& tiles, const T* input, bool relu) const {
        const bool in_csr = !ordered[0] && tiles.count == 1;  // values are read but once
        const T* own = ordered[0] ? ordered[0] + first_entry(rows, strips.begin) : values();
        if (!ordered[0] && !in_csr) {
            T* copy = scratch.get<T>(entries(rows, strips));
            to_order<false>(rows, strips, values(), copy);
            own = copy;
        }
        for (int64_t i = 0; i < tiles.count; ++i)
            for (int64_t strip = strips.begin; strip < strips.end; ++strip)
                forward_strip<T>(rows, strip, in_csr ? own : own + before(rows, strips, strip), in_csr, bias(),
                                 tiles.of(input, rows.cols, i),
                                 tiles.of(output, rows.rows, i) + first_row(rows, strip) * tiles.width(i), tiles.width(i), relu);
    }
    // ginput = Wᵀ goutput of my columns, 0 where input <= 0, and the gradient of their values.
    void backward(const BatchTiles<T>& tiles, const T* input, T* ginput) const {
        const bool in_csr = tiles.count == 1;
        const int64_t size = entries(columns, strips_back);
        T *own = scratch.get<T>(in_csr ? 0 : 2 * size), *gown = own + size;
        if (!in_csr) to_order<true>(columns, strips_back, values(), own);
        for (int64_t i = 0; i < tiles.count; ++i)
            for (int64_t strip = strips_back.begin; strip < strips_back.end; ++strip) {
                const int64_t at = first_row(columns, strip) * tiles.width(i), k = before(columns, strips_back, strip);
                input_gradient_strip<T>(columns, strip, in_csr ? values() : own + k, in_csr,
                                        tiles.of(goutput, columns.cols, i), tiles.of(input, columns.rows, i) + at,
                                        tiles.of(ginput, columns.rows, i) + at, in_csr ? gvalues : gown + k, i > 0,
                                        tiles.width(i), true);
            }
        if (!in_csr) from_order<true>(columns, strips_back, gown, gvalues);
    }
    // Brings values and moments of my rows into the order of tiles, or back.
    void bring(bool in) const {
        void* const csr[] = {params->values, params->values_moments[0], params->values_moments[1]};
        for (int i = 0; i < 3; ++i) {
            if (!csr[i]) continue;
            T *there = static_cast<T*>(csr[i]), *here = ordered[i] + first_entry(rows, strips.begin);
            in ? to_order<false>(rows, strips, there, here) : from_order<false>(rows, strips, here, there);
        }
    }
    // Tile by tile the gradient of my rows' values and their update.
    void update_ordered(const Update<T>& rule, const BatchTiles<T>& tiles, const T* input) const {
        T* gradient = scratch.get<T>(rows.strip * rows.block + kLanes);
        for (int64_t strip = strips.begin; strip < strips.end; ++strip)
            for (int64_t b = 0; b < rows.blocks; ++b) {
                const Tile* tile = rows.tiles + strip * rows.blocks + b;
                for (int64_t i = 0; i < tiles.count; ++i)
                    with_registers<T>(tiles.width(i) / kLanes, [&](auto R) {
                        constexpr int width = R * kWidth<T>;
                        sddmm_tile<T, R>(rows, tile, tiles.of(goutput, rows.rows, i) + first_row(rows, strip) * width, width,
                                         tiles.of(input, rows.cols, i) + b * rows.block * width, Packed<width>(), gradient,
                                         i > 0);
                    });
                const int64_t at = tile->entry;
                rule(ordered[0] + at, ordered[1] + at, ordered[2] + at, gradient, tile[1].entry - at);
            }
    }
    // Of the rows that this thread owns: the values' gradient is there.
    void update_values(const Update<T>& rule) const {
        const auto at = [&](void* p) { return static_cast<T*>(p) + owned_values.begin; };
        void* const* moments = params->values_moments;
        rule(at(params->values), at(moments[0]), at(moments[rule.rule == ADAM]), gvalues + owned_values.begin,
             owned_values.end - owned_values.begin);
    }
    void update_bias(const Update<T>& rule, const BatchTiles<T>& tiles) const {
        if (!params->bias) return;
        for (int64_t i = 0; i < tiles.count; ++i)
            bias_gradient<T>(tiles.of(goutput, rows.rows, i), tiles.width(i), owned_rows, gbias, i > 0);
        const auto at = [&](void* p) { return static_cast<T*>(p) + owned_rows.begin; };
        void* const* moments = params->bias_moments;
        rule(at(params->bias), at(moments[0]), at(moments[rule.rule == ADAM]), gbias + owned_rows.begin,
             owned_rows.end - owned_rows.begin);
    }
    static int64_t before(const Schedule& s, Range strips, int64_t strip) {
        return first_entry(s, strip) - first_entry(s, strips.begin);
    }
    static int64_t entries(const Schedule& s, Range strips) { return before(s, strips, strips.end) + kLanes; }
};

template <class T>
void train(const Training& a, const TrainedLayer* params) {
    const BatchTiles<T> tiles(a.batch);
    const int64_t columns = padded(a.batch), features = read_plan(params[0].plan).in_features;
    int64_t size = 0;
    const auto reserve = [&](int64_t elements) {  // each array a multiple of a cache line
        const int64_t at = size;
        size += (elements + 15) / 16 * 16;
        return at;
    };
    struct Offsets {
        int64_t output, goutput, gvalues, gbias;
    };
    const int64_t entries = read_plan(params[0].plan).nnz + kLanes;
    std::vector<Offsets> offsets(a.layers);
    const int64_t at_zeros = reserve(features), at_x[2] = {reserve(features * columns), reserve(features * columns)};
    for (int64_t l = 0; l < a.layers; ++l) {
        const Plan plan = read_plan(params[l].plan);
        offsets[l].output = reserve(plan.out_features * columns);
        offsets[l].goutput = l + 1 < a.layers ? reserve(plan.out_features * columns) : offsets[l].output;
        offsets[l].gvalues = reserve(l ? plan.nnz : 0), offsets[l].gbias = reserve(plan.out_features);
    }
    const int64_t at_ordered[] = {reserve(entries), reserve(entries), reserve(entries)};
    T* base = workspace.get<T>(size);
    std::fill_n(base + at_zeros, features, T(0));
    const auto some_steps = [&](int64_t from, int64_t to) {
        const int64_t part = thread_index(), parts = team_size();
        std::vector<Layer<T>> layers(a.layers);
        for (int64_t l = 0; l < a.layers; ++l) {
            const Plan plan = read_plan(params[l].plan);
            const Offsets& o = offsets[l];
            layers[l] = {params + l, plan.forward, plan.transpose(), base + o.output, base + o.goutput, base + o.gvalues,
                         base + o.gbias};
            layers[l].divide(part, parts);
        }
        for (int i = 0; i < 3; ++i) layers[0].ordered[i] = base + at_ordered[i];
        if (from == 0) layers[0].bring(true);
        const Layer<T>& last = layers.back();
        const auto feature = [&](int64_t p) { return p == parts ? features : features * p / parts / 16 * 16; };
        const Range my_features{feature(part), feature(part + 1)};
        const Range my_columns{tiles.groups * part / parts * kLanes, tiles.groups * (part + 1) / parts * kLanes};
        for (int64_t step = from; step < to; ++step) {
            const int64_t* order = a.order + step * a.batch;
            T* const x = base + at_x[step % 2];  // a slower thread may still read the last one
            pack_images(static_cast<const T*>(a.images), features, order, a.batch, base + at_zeros, my_features, x);
            barrier();
            const T* input = x;
            for (const Layer<T>& l : layers) {
                l.forward(tiles, input, &l != &last);
                barrier();
                input = l.output;
            }
            cross_entropy_gradient(last.output, last.rows.rows, a.labels, order, a.batch, my_columns);
            barrier();
            const Update<T> rule(a, step);
            for (int64_t i = a.layers - 1; i > 0; --i) {
                layers[i].backward(tiles, layers[i - 1].output, layers[i - 1].goutput);
                barrier();
                layers[i].update_values(rule);
                layers[i].update_bias(rule, tiles);
            }
            layers[0].update_ordered(rule, tiles, x);
            layers[0].update_bias(rule, tiles);
        }
        if (to == a.steps) layers[0].bring(false);
    };
    Pace pace(a.pace);
    for (int64_t from = 0, to; from < a.steps; from = to) {
        to = std::min(a.steps, from + kSteps);
        const double began = Meeting::seconds();
        together(pace.team() ? a.threads : 1, [&] { some_steps(from, to); });
        pace.took((Meeting::seconds() - began) / double(to - from));
    }
}

}  // namespace

ABI(train, kLanes, words_of<Training>, words_of<TrainedLayer>);

// Trains in place. Indices, labels and order are the caller's to validate.
EXPORT void sparselottery_train(const Training* training) {
    const TrainedLayer* layers = reinterpret_cast<const TrainedLayer*>(training + 1);
    training->is_double ? train<double>(*training, layers) : train<float>(*training, layers);
}

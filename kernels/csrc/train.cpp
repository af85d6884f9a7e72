// Training of a chain of sparse linear layers with a ReLU between them: whole steps, many in one call. A step is a batch of
// images, forward, cross-entropy of the softmax, backward, and Adam or SGD.
//
// Threads own strips of rows of each W: they compute these outputs, and alone write these values, biases and moments. So
// the first layer, most of the work, needs nobody from its gradient to its next product. Gradients of hidden activations
// are owned by strips of Wᵀ. Every sum is taken by one thread, in an order that does not depend on how many there are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "layer.h"

namespace {

enum Rule : int64_t { ADAM = 0, SGD = 1 };

struct TrainedLayer {  // mirrored in cpu_train.py
    const int32_t* plan;
    void *values, *values_moments[2];  // SGD has but the first moment
    void *bias, *bias_moments[2];      // null if none
};

struct Training {  // mirrored in cpu_train.py; its layers follow
    int64_t is_double, threads, layers, batch;
    const void* images;  // (any, in_features), row-major
    const int64_t *labels, *order;  // order: (steps, batch), rows of images
    const double* rates;            // of learning, one for each step
    int64_t steps, first;           // first: steps that were done before these
    int64_t rule;
    const double* constants;  // ADAM: beta1, beta2, eps, weight decay. SGD: momentum, weight decay
};

constexpr int64_t kSteps = 4;  // that a team does before it may be told to leave processors to others

thread_local Scratch workspace;  // the caller's: what threads share
thread_local Scratch scratch;    // of a thread: its values and their gradients in the order of tiles

// The strips of one thread: about its share of the entries.
Range owned_strips(const Schedule& s, int64_t part, int64_t parts) {
    const auto weight = [&](int64_t strip) { return first_entry(s, strip) + strip * s.strip; };
    const auto first = [&](int64_t p) {
        int64_t strip = 0;
        if (p == parts) return int64_t(s.strips);
        while (strip < s.strips && weight(strip) * parts < weight(s.strips) * p) ++strip;
        return strip;
    };
    return {first(part), first(part + 1)};
}

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

// Asks for what `pack_images` will read: images are anywhere in memory.
template <class T>
void prefetch(const T* images, int64_t features, const int64_t* order, int64_t batch, Range range) {
    for (int64_t n = 0; n < batch; ++n)
        for (int64_t f = range.begin; f < range.end; f += 64 / sizeof(T))
            __builtin_prefetch(images + order[n] * features + f, 0, 2);
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

// One step's rule for parameters with gradients: both as in torch.
template <class T>
struct Update {
    Update(const Training& a, int64_t step) : rule(a.rule) {
        const double rate = a.rates[step], *c = a.constants;
        if (rule == ADAM) {
            const double t = double(a.first + step + 1);
            beta1 = T(1 - c[0]), beta2 = T(c[1]), rest2 = T(1 - c[1]), eps = T(c[2]), decay = T(c[3]);
            size = T(rate / (1 - std::pow(c[0], t))), root = T(std::sqrt(1 - std::pow(c[1], t)));
        } else {
            momentum = T(c[0]), decay = T(c[1]), size = T(rate);
        }
    }
    INLINE void vector(Vec<T>& p, Vec<T>& m, Vec<T>& v, Vec<T> g) const {
        g += decay * p;
        if (rule == ADAM) {
            m += beta1 * (g - m);
            v = v * beta2 + rest2 * g * g;
            p -= size * m / (square_roots<T>(v) / root + eps);
        } else {
            m = momentum * m + g;
            p -= size * m;
        }
    }
    void operator()(void* params, void* const* moments, const T* gradient, Range range) const {
        constexpr int W = kWidth<T>;
        T *p = static_cast<T*>(params), *m = static_cast<T*>(moments[0]);
        T* v = static_cast<T*>(moments[rule == ADAM]);  // SGD: not used
        int64_t i = range.begin;
        for (; i + W <= range.end; i += W) {
            Vec<T> each = load<T>(p + i), first = load<T>(m + i), second = load<T>(v + i);
            vector(each, first, second, load<T>(gradient + i));
            store<T>(p + i, each), store<T>(m + i, first);
            if (rule == ADAM) store<T>(v + i, second);
        }
        for (; i < range.end; ++i) {
            Vec<T> each = Vec<T>{} + p[i], first = Vec<T>{} + m[i], second = Vec<T>{} + v[i];
            vector(each, first, second, Vec<T>{} + gradient[i]);
            p[i] = each[0], m[i] = first[0];
            if (rule == ADAM) v[i] = second[0];
        }
    }
    int64_t rule;
    T beta1 = 0, beta2 = 0, rest2 = 0, eps = 0, decay = 0, size = 0, root = 0, momentum = 0;
};

template <class T>
struct Layer {
    const TrainedLayer* params;
    Schedule rows, columns;  // of W and Wᵀ
    T *output, *goutput;     // packed; of the last layer the same
    T *gvalues, *gbias;
    Range strips, strips_back, owned_rows, owned_values;  // this thread's
    void divide(int64_t part, int64_t parts) {
        strips = owned_strips(rows, part, parts), strips_back = owned_strips(columns, part, parts);
        owned_rows = rows_of_strips(rows, strips);
        const int32_t* crow_indices = read_plan(params->plan).crow_indices;
        owned_values = {crow_indices[owned_rows.begin], crow_indices[owned_rows.end]};
    }
    const T* values() const { return static_cast<const T*>(params->values); }
    const T* bias() const { return static_cast<const T*>(params->bias); }
    // output = W input + b of my rows, with a ReLU if `relu`.
    void forward(const BatchTiles<T>& tiles, const T* input, bool relu) const {
        const bool in_csr = tiles.count == 1;  // values are read but once
        const T* ordered = values();
        if (!in_csr) {
            T* own = scratch.get<T>(entries(rows, strips));
            to_order<false>(rows, strips, values(), own);
            ordered = own;
        }
        for (int64_t i = 0; i < tiles.count; ++i)
            for (int64_t strip = strips.begin; strip < strips.end; ++strip)
                forward_strip<T>(rows, strip, in_csr ? ordered : ordered + before(rows, strips, strip), in_csr, bias(),
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
    // The gradient of my rows' values, of a layer whose input needs none.
    void values_gradient(const BatchTiles<T>& tiles, const T* input) const {
        T* gown = scratch.get<T>(entries(rows, strips));
        for (int64_t i = 0; i < tiles.count; ++i)
            for (int64_t strip = strips.begin; strip < strips.end; ++strip)
                values_gradient_strip<T>(rows, strip,
                                         tiles.of(goutput, rows.rows, i) + first_row(rows, strip) * tiles.width(i),
                                         tiles.of(input, rows.cols, i), gown + before(rows, strips, strip), i > 0,
                                         tiles.width(i));
        from_order<false>(rows, strips, gown, gvalues);
    }
    // Of the rows that this thread owns: the values' gradient is there.
    void update(const Update<T>& rule, const BatchTiles<T>& tiles) const {
        rule(params->values, params->values_moments, gvalues, owned_values);
        if (!params->bias) return;
        for (int64_t i = 0; i < tiles.count; ++i)
            bias_gradient<T>(tiles.of(goutput, rows.rows, i), tiles.width(i), owned_rows, gbias, i > 0);
        rule(params->bias, params->bias_moments, gbias, owned_rows);
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
    std::vector<Offsets> offsets(a.layers);
    const int64_t at_zeros = reserve(features), at_x[2] = {reserve(features * columns), reserve(features * columns)};
    for (int64_t l = 0; l < a.layers; ++l) {
        const Plan plan = read_plan(params[l].plan);
        offsets[l].output = reserve(plan.out_features * columns);
        offsets[l].goutput = l + 1 < a.layers ? reserve(plan.out_features * columns) : offsets[l].output;
        offsets[l].gvalues = reserve(plan.nnz), offsets[l].gbias = reserve(plan.out_features);
    }
    T* base = workspace.get<T>(size);
    std::fill_n(base + at_zeros, features, T(0));
    for (int64_t from = 0; from < a.steps; from += kSteps) together(a.threads, [&] {
        const int64_t part = thread_index(), parts = team_size();
        std::vector<Layer<T>> layers(a.layers);
        for (int64_t l = 0; l < a.layers; ++l) {
            const Plan plan = read_plan(params[l].plan);
            const Offsets& o = offsets[l];
            layers[l] = {params + l, plan.forward, plan.transpose(), base + o.output, base + o.goutput, base + o.gvalues,
                         base + o.gbias};
            layers[l].divide(part, parts);
        }
        const Layer<T>& last = layers.back();
        const auto feature = [&](int64_t p) { return p == parts ? features : features * p / parts / 16 * 16; };
        const Range my_features{feature(part), feature(part + 1)};
        const Range my_columns{tiles.groups * part / parts * kLanes, tiles.groups * (part + 1) / parts * kLanes};
        for (int64_t step = from; step < std::min(a.steps, from + kSteps); ++step) {
            const int64_t* order = a.order + step * a.batch;
            T* const x = base + at_x[step % 2];  // a slower thread may still read the last one
            pack_images(static_cast<const T*>(a.images), features, order, a.batch, base + at_zeros, my_features, x);
            barrier();
            if (step + 1 < a.steps) prefetch(static_cast<const T*>(a.images), features, order + a.batch, a.batch, my_features);
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
                layers[i].update(rule, tiles);
            }
            layers[0].values_gradient(tiles, x);
            layers[0].update(rule, tiles);
        }
    });
}

}  // namespace

ABI(train, kLanes, words_of<Training>, words_of<TrainedLayer>);

// Trains in place. Indices, labels and order are the caller's to validate.
EXPORT void sparselottery_train(const Training* training) {
    const TrainedLayer* layers = reinterpret_cast<const TrainedLayer*>(training + 1);
    training->is_double ? train<double>(*training, layers) : train<float>(*training, layers);
}

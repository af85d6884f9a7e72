// Training of a chain of sparse linear layers with a ReLU between them: whole steps, many in one call. A step is a batch of
// images, forward, cross-entropy of the softmax, backward, and Adam or SGD.
//
// Threads own strips of rows of each W: they compute these outputs, and alone write these values, biases and moments. So
// the first layer, most of the work, needs nobody from its gradient to its next product. Gradients of hidden activations
// are owned by strips of Wᵀ. Every sum is taken by one thread, in an order that does not depend on how many there are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pack.h"
#include "plan.h"
#include "team.h"
#include "tile.h"

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

thread_local Scratch workspace;

constexpr int64_t kSteps = 4;  // that a team does before it may be told to leave processors to others

struct Range {
    int64_t begin, end;
};

// The rows of one thread's strips: about its share of the entries.
Range owned_strips(const Schedule& s, int64_t part, int64_t parts) {
    const auto weight = [&](int64_t strip) { return s.tiles[strip * s.blocks].entry + strip * s.strip; };
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

// f(strip, its first row, its rows, a tile of at most 8 vectors' first column, R, is it the first tile?)
template <class T, class F>
INLINE void each_tile(const Schedule& s, Range strips, int64_t width, F f) {
    const int64_t groups = width / kLanes, count = (groups + kMaxGroups<T> - 1) / kMaxGroups<T>;
    for (int64_t strip = strips.begin; strip < strips.end; ++strip)
        for (int64_t i = 0; i < count; ++i) {
            const int64_t begin = groups * i / count, row0 = strip * s.strip;
            with_registers<T>(groups * (i + 1) / count - begin, [&](auto R) {
                f(strip, row0, std::min<int64_t>(s.strip, s.rows - row0), begin * kLanes, R, i == 0);
            });
        }
}

// y = W x + b, then ReLU if `relu`.
template <class T>
void forward(const Schedule& s, Range strips, const T* values, const T* bias, const T* x, T* y, int64_t width, int64_t ld,
             bool relu) {
    each_tile<T>(s, strips, width, [&](int64_t strip, int64_t row0, int64_t height, int64_t column, auto R, bool) {
        constexpr int64_t columns = R * kWidth<T>;
        T* out = y + row0 * ld + column;
        for (int64_t r = 0; r < height; ++r) std::fill_n(out + r * ld, columns, bias ? bias[row0 + r] : T(0));
        for (int64_t b = 0; b < s.blocks; ++b)
            spmm_tile<T, R, false>(s, s.tiles + strip * s.blocks + b, values, x + b * s.block * ld + column, Strided{ld}, out,
                                   ld);
        for (int64_t r = 0; relu && r < height; ++r)
            for (int64_t n = 0; n < columns; ++n) out[r * ld + n] = out[r * ld + n] < 0 ? T(0) : out[r * ld + n];
    });
}

// gx = Wᵀ gy, but 0 where x <= 0, and the gradient of the values.
template <class T>
void input_gradient(const Schedule& s, Range strips, const T* values, const T* gy, const T* x, T* gx, T* gvalues,
                    int64_t width, int64_t ld) {
    each_tile<T>(s, strips, width, [&](int64_t strip, int64_t row0, int64_t height, int64_t column, auto R, bool first) {
        constexpr int64_t columns = R * kWidth<T>;
        const T* in = x + row0 * ld + column;
        T* out = gx + row0 * ld + column;
        for (int64_t r = 0; r < height; ++r) std::fill_n(out + r * ld, columns, T(0));
        for (int64_t b = 0; b < s.blocks; ++b)
            fused_tile<T, R>(s, s.tiles + strip * s.blocks + b, values, gy + b * s.block * ld + column, Strided{ld}, in, ld,
                             out, ld, gvalues, !first);
        for (int64_t r = 0; r < height; ++r)
            for (int64_t n = 0; n < columns; ++n) out[r * ld + n] = in[r * ld + n] <= 0 ? T(0) : out[r * ld + n];
    });
}

template <class T>
void values_gradient(const Schedule& s, Range strips, const T* gy, const T* x, T* gvalues, int64_t width, int64_t ld) {
    each_tile<T>(s, strips, width, [&](int64_t strip, int64_t row0, int64_t, int64_t column, auto R, bool first) {
        for (int64_t b = 0; b < s.blocks; ++b)
            sddmm_tile<T, R>(s, s.tiles + strip * s.blocks + b, gy + row0 * ld + column, ld, x + b * s.block * ld + column,
                             Strided{ld}, gvalues, !first);
    });
}

// Features `range` of the images `order` as packed columns, zeros after the last image.
template <class T>
void pack_images(const T* images, int64_t features, const int64_t* order, int64_t batch, const T* zeros, Range range, T* x,
                 int64_t width, int64_t ld) {
    constexpr int W = kWidth<T>;
    for (int64_t n = 0; n < width; n += W) {
        const T* row[W];
        for (int i = 0; i < W; ++i) row[i] = n + i < batch ? images + order[n + i] * features : zeros;
        int64_t f = range.begin;
        for (; f + W <= range.end; f += W)
            transpose<T>([&](int i) { return row[i] + f; }, rows_of(x + f * ld + n, ld));
        for (; f < range.end; ++f)
            for (int i = 0; i < W; ++i) x[f * ld + n + i] = row[i][f];
    }
}

// Asks for what `pack_images` will read: images are anywhere in memory.
template <class T>
void prefetch(const T* images, int64_t features, const int64_t* order, int64_t batch, Range range) {
    for (int64_t n = 0; n < batch; ++n)
        for (int64_t f = range.begin; f < range.end; f += 64 / sizeof(T))
            __builtin_prefetch(images + order[n] * features + f, 0, 2);
}

// Logits (classes, ld) of columns `range` -> the gradient of their mean cross-entropy, in place.
template <class T>
void cross_entropy_gradient(T* logits, int64_t classes, const int64_t* labels, const int64_t* order, int64_t batch,
                            Range range, int64_t ld) {
    constexpr int W = kWidth<T>;
    for (int64_t n = range.begin; n < range.end; n += W) {
        Vec<T> top = load<T>(logits + n), total = {};
        for (int64_t c = 1; c < classes; ++c) {
            const Vec<T> v = load<T>(logits + c * ld + n);
            top = v > top ? v : top;
        }
        for (int64_t c = 0; c < classes; ++c) {
            const Vec<T> e = exponentials<T>(load<T>(logits + c * ld + n) - top);
            store<T>(logits + c * ld + n, e);
            total += e;
        }
        Vec<T> scale = T(1) / (total * T(batch));
        for (int i = 0; i < W; ++i) scale[i] = n + i < batch ? scale[i] : T(0);
        for (int64_t c = 0; c < classes; ++c) store<T>(logits + c * ld + n, load<T>(logits + c * ld + n) * scale);
        for (int i = 0; i < W && n + i < batch; ++i) logits[labels[order[n + i]] * ld + n + i] -= T(1) / T(batch);
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
    // Of the rows that this thread owns: the values' gradient is there.
    void update(const Update<T>& rule, int64_t width, int64_t ld) const {
        rule(params->values, params->values_moments, gvalues, owned_values);
        if (!params->bias) return;
        for (int64_t r = owned_rows.begin; r < owned_rows.end; ++r) {
            Vec<T> total = {};
            for (int64_t n = 0; n < width; n += kWidth<T>) total += load<T>(goutput + r * ld + n);
            gbias[r] = sum<T>(total);
        }
        rule(params->bias, params->bias_moments, gbias, owned_rows);
    }
};

template <class T>
void train(const Training& a, const TrainedLayer* params) {
    const int64_t width = padded(a.batch), ld = width + width / kLanes / 16 * kLanes;  // as reference.leading_dim
    const int64_t features = read_plan(params[0].plan).in_features;
    int64_t size = 0;
    const auto reserve = [&](int64_t elements) {  // each array a multiple of a cache line, and slack for look-ahead
        const int64_t at = size;
        size += (elements + kSlack + 15) / 16 * 16;
        return at;
    };
    struct Offsets {
        int64_t output, goutput, gvalues, gbias;
    };
    std::vector<Offsets> offsets(a.layers);
    const int64_t at_zeros = reserve(features), at_x[2] = {reserve(features * ld), reserve(features * ld)};
    for (int64_t l = 0; l < a.layers; ++l) {
        const Plan plan = read_plan(params[l].plan);
        offsets[l].output = reserve(plan.out_features * ld);
        offsets[l].goutput = l + 1 < a.layers ? reserve(plan.out_features * ld) : offsets[l].output;
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
        const Range my_columns{width / kLanes * part / parts * kLanes, width / kLanes * (part + 1) / parts * kLanes};
        for (int64_t step = from; step < std::min(a.steps, from + kSteps); ++step) {
            const int64_t* order = a.order + step * a.batch;
            T* const x = base + at_x[step % 2];  // a slower thread may still read the last one
            pack_images(static_cast<const T*>(a.images), features, order, a.batch, base + at_zeros, my_features, x, width, ld);
            barrier();
            if (step + 1 < a.steps) prefetch(static_cast<const T*>(a.images), features, order + a.batch, a.batch, my_features);
            const T* input = x;
            for (const Layer<T>& l : layers) {
                forward(l.rows, l.strips, l.values(), l.bias(), input, l.output, width, ld, &l != &last);
                barrier();
                input = l.output;
            }
            cross_entropy_gradient(last.output, last.rows.rows, a.labels, order, a.batch, my_columns, ld);
            barrier();
            const Update<T> rule(a, step);
            for (int64_t i = a.layers - 1; i > 0; --i) {
                const Layer<T>&l = layers[i], &before = layers[i - 1];
                input_gradient(l.columns, l.strips_back, l.values(), l.goutput, before.output, before.goutput, l.gvalues,
                               width, ld);
                barrier();
                l.update(rule, width, ld);
            }
            values_gradient(layers[0].rows, layers[0].strips, layers[0].goutput, x, layers[0].gvalues, width, ld);
            layers[0].update(rule, width, ld);
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

// The rules that change parameters, of Adam and SGD, and what a training is told.
#pragma once
#include <cmath>
#include <cstdint>

#include "simd.h"

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
    double* pace;             // of this trainer: what Pace keeps, zeros at first
};

// One step's rule for parameters with gradients: both as in torch.
template <class T>
struct Update {
    Update(const Training& a, int64_t step) : rule(a.rule) {
        const double rate = a.rates[step], *c = a.constants;
        if (rule == ADAM) {  // rate / (1 - beta1^t) * m / (sqrt(v) / root + eps), with one division
            const double t = double(a.first + step + 1), root = std::sqrt(1 - std::pow(c[1], t));
            beta1 = T(1 - c[0]), beta2 = T(c[1]), rest2 = T(1 - c[1]), eps = T(c[2] * root), decay = T(c[3]);
            size = T(rate / (1 - std::pow(c[0], t)) * root);
        } else {
            momentum = T(c[0]), decay = T(c[1]), size = T(rate);
        }
    }
    INLINE void vector(T* params, T* first, T* second, const T* gradient) const {
        const Vec<T> p = load<T>(params), g = load<T>(gradient) + decay * p;
        Vec<T> m = load<T>(first);
        if (rule == ADAM) {
            m += beta1 * (g - m);
            const Vec<T> v = load<T>(second) * beta2 + rest2 * g * g;
            store<T>(params, p - size * m / (square_roots<T>(v) + eps));
            store<T>(second, v);
        } else {
            m = momentum * m + g;
            store<T>(params, p - size * m);
        }
        store<T>(first, m);
    }
    // Of `count` parameters, with their moments; of SGD the second is not used.
    void operator()(T* params, T* first, T* second, const T* gradient, int64_t count) const {
        constexpr int W = kWidth<T>;
        int64_t i = 0;
        for (; i + W <= count; i += W) vector(params + i, first + i, second + i, gradient + i);
        if (i == count) return;
        T p[W] = {}, m[W] = {}, v[W] = {}, g[W] = {};
        const bool both = rule == ADAM;
        for (int64_t k = 0; k < count - i; ++k)
            p[k] = params[i + k], m[k] = first[i + k], v[k] = both ? second[i + k] : T(0), g[k] = gradient[i + k];
        vector(p, m, v, g);
        for (int64_t k = 0; k < count - i; ++k) {
            params[i + k] = p[k], first[i + k] = m[k];
            if (both) second[i + k] = v[k];
        }
    }
    int64_t rule;
    T beta1 = 0, beta2 = 0, rest2 = 0, eps = 0, decay = 0, size = 0, momentum = 0;
};

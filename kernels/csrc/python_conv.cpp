// Calls on a convolution, from tensors: those of `ops`, and the short way from a layer as it is.
#include "cut.h"
#include "python_tensor.h"

extern "C" {
int64_t sparselottery_conv_forward(const ConvArgs*);
int64_t sparselottery_conv_backward(const ConvArgs*);
}

namespace {

// Of reference.Geometry, the images (H, W) and the pooling.
struct Frame {
    Frame(PyObject* geometry, PyObject* relu, PyObject* pool) : relu(is_true(relu)), pool(integer(pool)) {
        if (!PyTuple_Check(geometry) || PyTuple_GET_SIZE(geometry) != 12) throw Unfit();
        int32_t g[12];
        for (int i = 0; i < 12; ++i) g[i] = int32_t(integer(PyTuple_GET_ITEM(geometry, i)));
        taps = {g[0], {g[1], g[2]}, {g[3], g[4]}, {g[5], g[7]}, {g[9], g[10]}, g[11]};
        after[0] = g[6], after[1] = g[8];
    }
    void set_images(const int64_t (&shape)[4]) {
        for (int d = 0; d < 2; ++d) {
            const int64_t reach = int64_t(taps.dilation[d]) * (taps.kernel[d] - 1);
            const int64_t room = shape[2 + d] + taps.before[d] + after[d] - reach - 1;
            size[d] = room < 0 ? 0 : room / taps.stride[d] + 1;
        }
        const bool empty = std::min({shape[0], shape[1], shape[2], shape[3], size[0], size[1]}) < 1;
        if (shape[1] != taps.channels || empty) throw Unfit();
        if (pool != 1 && (pool < 2 || pool > std::min<int64_t>({15, size[0], size[1]}))) throw Unfit();
        // As reference.lanes.
        const int64_t images = shape[0], halo = (taps.kernel[1] - 1) * int64_t(taps.dilation[1]) / taps.stride[1];
        const int64_t pixels = ((size[0] - 1) * (size[1] + halo) + size[1] + kLanes - 1) / kLanes;
        groups = (images + kLanes - 1) / kLanes;
        flat = 4 * images * pixels < 3 * size[0] * size[1] * groups;
        if (flat) groups = images;
    }
    Taps taps;
    bool relu, flat;
    int64_t pool, after[2], size[2], groups;  // size: of the output before it is pooled; groups: of images, in winners
};

// Images (N, C, H, W) as they stand, or a copy where neither pixels nor channels are contiguous.
struct Pictures {
    explicit Pictures(PyObject* tensor) : held(Py_NewRef(tensor)), view(tensor) {
        if ((view.kind != FLOAT && view.kind != DOUBLE) || view.dims != 4) throw Unfit();
        if (!find_strides()) {
            held = contiguous(tensor), view = View(held.get());
            if (!find_strides()) throw Unfit();
        }
    }
    // As reference.image_format.
    bool channels_last() const { return view.is_packed({1, 3, 2, 0}) && !view.is_packed({3, 2, 1, 0}); }
    // N, C, H and W.
    const int64_t (&shape() const)[4] { return reinterpret_cast<const int64_t(&)[4]>(view.shape); }
    // Have the pixels, one after the other, the same strides as those of others?
    bool lie_as(const Pictures& other) const { return std::equal(strides, strides + 3, other.strides); }
    Object held;
    View view;
    int64_t strides[3];  // of an image, a channel and a pixel

  private:
    bool find_strides() {
        const int64_t row = view.strides[2], pixel = view.shape[3] > 1 ? view.strides[3] : view.shape[2] > 1 ? row : 1;
        strides[0] = view.strides[0], strides[1] = view.strides[1], strides[2] = pixel;
        return (view.shape[2] < 2 || row == view.shape[3] * pixel) && (pixel == 1 || strides[1] == 1);
    }
};

Object empty_images(PyObject* like, int64_t images, int64_t channels, int64_t height, int64_t width, bool last) {
    const int64_t plane = height * width, c = last ? 1 : plane, pixel = last ? channels : 1;
    return empty<4>(like, {images, channels, height, width}, {channels * plane, c, width * pixel, pixel});
}

// What both directions have of a layer.
struct Filters {
    Filters(const Pictures& x, PyObject* values, PyObject* plan) : values(values, x.view.kind), plan(plan, INT32) {
        if (this->plan.held.get() != plan) throw NoPlan();  // a copy: it was not contiguous
        if (!this->plan.size) throw Unfit();
    }
    // y: after the pooling, forward its output and backward its gradient.
    ConvArgs args(const Frame& f, const Pictures& x, const int64_t (&shape)[4], int64_t out_channels,
                  PyObject* threads) const {
        const int64_t multiply_adds = shape[0] * f.size[0] * f.size[1] * values.size;
        ConvArgs a{x.view.kind == DOUBLE, threads_for(multiply_adds, threads), f.flat, f.relu, f.pool, shape[0], shape[1],
                   shape[2], shape[3], out_channels, f.size[0], f.size[1]};
        a.taps = &f.taps, a.plan = static_cast<const int32_t*>(plan.data), a.plan_size = plan.size;
        a.nnz = values.size, a.values = values.data, a.x = x.view.data;
        std::copy_n(x.strides, 3, a.x_strides);
        return a;
    }
    Vector values, plan;
};

void call(int64_t (*function)(const ConvArgs*), const ConvArgs& args) {
    int64_t code;
    {
        const Unlocked unlocked;
        code = function(&args);
    }
    if (checked(code) == TOO_LARGE) throw Unfit();
}

constexpr int64_t kThin = 8;  // times as many values as a convolution has, one has which makes its own input by it

struct Output {
    Object y, winners;
};

// A convolution of images (N, C, H, W), and what its arguments point to.
struct Convolution {
    // norm: None or reference.Norm. shape: of x, or where that is the input of another, of its output.
    Convolution(const Pictures& x, const int64_t (&shape)[4], Frame& f, PyObject* values, PyObject* bias,
                PyObject* crow_indices, PyObject* plan, PyObject* norm, PyObject* threads)
        : filters(x, values, plan) {
        f.set_images(shape);
        args = filters.args(f, x, shape, View(crow_indices, INT32, 1).shape[0] - 1, threads);
        args.bias = vector(bias, x.view.kind);
        if (norm == Py_None) return;
        if (!PyTuple_Check(norm) || PyTuple_GET_SIZE(norm) != 5) throw Unfit();
        const void** const each[] = {&args.mean, &args.variance, &args.gain, &args.offset};
        for (int i = 0; i < 4; ++i) *each[i] = vector(PyTuple_GET_ITEM(norm, i), x.view.kind);
        args.epsilon = PyFloat_AsDouble(PyTuple_GET_ITEM(norm, 4));
        if (PyErr_Occurred()) throw Failed();
    }
    const void* vector(PyObject* tensor, Kind kind) {
        if (tensor == Py_None) return nullptr;
        const Vector of(tensor, kind);
        if (of.size != args.out_channels) throw Unfit();
        kept.push_back(of.held);
        return of.data;
    }
    const Filters filters;
    ConvArgs args;
    std::vector<Object> kept;
};

// y, and the winners of a pooling or None.
Output run(const Pictures& x, const Frame& f, ConvArgs args) {
    const int64_t images = args.batch, channels = args.out_channels;
    const int64_t height = args.pooled_height(), width = args.pooled_width();
    Output out{empty_images(x.held.get(), images, channels, height, width, x.channels_last()), none()};
    const Pictures y(out.y.get());
    args.y = y.view.data;
    std::copy_n(y.strides, 3, args.y_strides);
    if (f.pool > 1) {
        out.winners = empty_bytes<5>(x.held.get(), {f.groups, channels, height, width, f.flat ? 1 : kLanes});
        args.winners = static_cast<uint8_t*>(address(out.winners));
    }
    call(sparselottery_conv_forward, args);
    return out;
}

struct Gradients {
    Object x, values, bias;
};

// None where not needed; gx in the format of x. y is read if there is a ReLU and no pooling.
Gradients run_back(Object gradient, const Pictures& x, PyObject* out, PyObject* winners, PyObject* values, PyObject* plan,
                   Frame& f, bool need_x, bool need_values, bool need_bias, PyObject* threads) {
    f.set_images(x.shape());
    const Filters filters(x, values, plan);
    const bool gated = f.relu && f.pool == 1;
    Pictures gy(gradient.get());
    const int64_t channels = gy.view.shape[1];
    if (gy.view.kind != x.view.kind || gy.view.shape[0] != x.view.shape[0]) throw Unfit();
    for (int d = 0; d < 2; ++d)
        if (gy.view.shape[2 + d] != f.size[d] / f.pool) throw Unfit();
    ConvArgs args = filters.args(f, x, x.shape(), channels, threads);
    Object held = none();
    if (gated) {
        Pictures y(out);
        if (!std::equal(y.view.shape, y.view.shape + 4, gy.view.shape) || y.view.kind != gy.view.kind) throw Unfit();
        if (!gy.lie_as(y)) {
            const int64_t* s = y.view.shape;
            const Object copy = empty_images(y.held.get(), s[0], s[1], s[2], s[3], y.channels_last());
            gy = Pictures(Object(PyObject_CallMethodOneArg(copy.get(), known.copy, gy.held.get())).get());
            if (!gy.lie_as(y)) throw Unfit();
        }
        args.y = y.view.data, held = Object(y.held);
    }
    PyObject* like = gy.held.get();
    const int64_t* s = x.view.shape;
    Gradients all{need_x ? empty_images(like, s[0], s[1], s[2], s[3], x.channels_last()) : none(),
                  need_values ? empty(like, filters.values.size) : none(), need_bias ? empty(like, channels) : none()};
    args.gy = gy.view.data;
    std::copy_n(gy.strides, 3, args.gy_strides);
    if (need_x) {
        const Pictures gx(all.x.get());
        args.gx = gx.view.data;
        std::copy_n(gx.strides, 3, args.gx_strides);
    }
    if (need_values) args.gvalues = address(all.values);
    if (need_bias) args.gbias = address(all.bias);
    if (f.pool > 1) {
        const View won(winners, UINT8, 5);
        const int64_t expected[] = {f.groups, channels, f.size[0] / f.pool, f.size[1] / f.pool, f.flat ? 1 : kLanes};
        if (!std::equal(expected, expected + 5, won.shape) || !won.is_packed({4, 3, 2, 1, 0})) throw Unfit();
        args.winners = static_cast<uint8_t*>(won.data);
    }
    call(sparselottery_conv_backward, args);
    return all;
}

}  // namespace

// (x, values, bias, crow_indices, plan, geometry, relu, pool, norm, threads) -> (y, winners or None). None if that is nothing
// for these kernels.
PyObject* conv_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 10);
        const Pictures x(args[0]);
        Frame frame(args[5], args[6], args[7]);
        const Convolution conv(x, x.shape(), frame, args[1], args[2], args[3], args[4], args[8], args[9]);
        const Output out = run(x, frame, conv.args);
        return PyTuple_Pack(2, out.y.get(), out.winners.get());
    });
}

// (gy, x, y, winners, values, plan, geometry, relu, pool, need_x, need_values, need_bias, threads) -> gx, gvalues, gbias
PyObject* conv_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 13);
        const Pictures x(args[1]);
        Frame frame(args[6], args[7], args[8]);
        const Gradients out = run_back(Object(Py_NewRef(args[0])), x, args[2], args[3], args[4], args[5], frame,
                                       is_true(args[9]), is_true(args[10]), is_true(args[11]), args[12]);
        return PyTuple_Pack(3, out.x.get(), out.values.get(), out.bias.get());
    });
}

// A layer's call (x, ORDINARY of native.py, layer, relu, pool, norm, threads) -> y or, if gradients are asked for, ((y,
// winners), (crow_indices, col_indices, plan), (x, values, bias)). None if anything is unusual: Python then finds out what.
PyObject* conv(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return usual([=]() -> PyObject* {
        take(count, 7);
        PyObject *input = args[0], *norm = args[5];
        if (!is_ordinary(input, args[1])) throw Unfit();
        const Tables of(args[2]);
        if (Tables::at(of.own.get(), known.pad_first) != Py_None) throw Unfit();
        const bool save = is_grad_enabled() && is_trained({of.values, of.bias, input});
        if (norm != Py_None && is_grad_enabled()) throw Unfit();
        const Pictures x(input);
        Frame frame(Tables::at(of.own.get(), known.geometry), args[3], args[4]);
        const Convolution conv(x, x.shape(), frame, of.values, of.bias, of.crow_indices, of.plan, norm, args[6]);
        const Output out = run(x, frame, conv.args);
        if (!save) return Py_NewRef(out.y.get());
        const Object done(PyTuple_Pack(2, out.y.get(), out.winners.get()));
        const Object indices(PyTuple_Pack(3, of.crow_indices, of.col_indices, of.plan));
        const Object inputs(PyTuple_Pack(3, input, of.values, of.bias));
        return PyTuple_Pack(3, done.get(), indices.get(), inputs.get());
    });
}

// Two layers' call without gradients (x, ORDINARY, first layer, its relu, layer, relu, pool, norm, threads) -> y, the bits of
// one call after the other. None if anything is unusual, or where the first layer's work is not small beside that of the
// second: some of it is done twice.
PyObject* conv_after_conv(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return usual([=]() -> PyObject* {
        take(count, 9);
        if (!is_ordinary(args[0], args[1]) || is_grad_enabled()) throw Unfit();
        const Tables one(args[2]), two(args[4]);
        if (Tables::at(one.own.get(), known.pad_first) != Py_None) throw Unfit();
        if (Tables::at(two.own.get(), known.pad_first) != Py_None) throw Unfit();
        const Pictures x(args[0]);
        const Object pool(PyLong_FromLong(1));
        Frame frame(Tables::at(one.own.get(), known.geometry), args[3], pool.get());
        const Convolution first(x, x.shape(), frame, one.values, one.bias, one.crow_indices, one.plan, Py_None, args[8]);
        Frame next(Tables::at(two.own.get(), known.geometry), args[5], args[6]);
        const int64_t between[4] = {first.args.batch, first.args.out_channels, first.args.out_height, first.args.out_width};
        Convolution second(x, between, next, two.values, two.bias, two.crow_indices, two.plan, args[7], args[8]);
        if (kThin * first.args.nnz > second.args.nnz || frame.flat || next.flat) throw Unfit();
        second.args.first = &first.args;
        return Py_NewRef(run(x, next, second.args).y.get());
    });
}

// The gradients of `conv` (gy, ORDINARY, (x, values, bias, y, winners), indices, (geometry, relu, pool), what of x, values and
// bias needs them, threads) -> gx, gvalues, gbias. None if anything is unusual.
PyObject* conv_gradients(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return usual([=]() -> PyObject* {
        take(count, 7);
        const Sequence kept(args[2]), indices(args[3]), settings(args[4]), needed(args[5]);
        if (!is_ordinary(args[0], args[1]) || !is_plain(kept[0], args[1]) || is_grad_enabled()) throw Unfit();
        const Pictures x(kept[0]);
        Frame frame(settings[0], settings[1], settings[2]);
        const bool need_bias = kept[2] != Py_None && is_true(needed[2]);
        const Gradients out = run_back(Object(Py_NewRef(args[0])), x, kept[3], kept[4], kept[1], indices[2], frame,
                                       is_true(needed[0]), is_true(needed[1]), need_bias, args[6]);
        return PyTuple_Pack(3, out.x.get(), out.values.get(), out.bias.get());
    });
}

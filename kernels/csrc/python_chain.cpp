// Calls on chains of layers, from tensors: those of `ops`, of any number of layers, and the short way of a single one.
#include "python.h"

#include <initializer_list>
#include <vector>

extern "C" {
void* sparselottery_workspace(int64_t bytes);
int64_t sparselottery_chain_forward(const ChainArgs*, const ChainLayer*);
int64_t sparselottery_chain_backward(const ChainArgs*, const ChainLayer*);
}

namespace {

constexpr int64_t kWorth = 1 << 13;  // multiply-adds that take about as long as to wake a thread

// The layers of a chain, from tensors: what forward and backward both read of them.
class Chain {
  public:
    explicit Chain(const Matrix& x) : x_(x) {}
    Chain(const Matrix& x, PyObject* values, PyObject* crow_indices, PyObject* plans) : Chain(x) {
        const Sequence each(values), crows(crow_indices), compiled(plans);
        if (!each.size() || crows.size() != each.size() || compiled.size() != each.size()) throw Unfit();
        for (int64_t l = 0; l < each.size(); ++l) {
            const Vector plan(compiled[l], known.int32);
            if (plan.held.get() != compiled[l]) throw NoPlan();  // a copy: it was not contiguous
            add(each[l], plan.held, plan.data, plan.size, shape<1>(crows[l]).at[0] - 1);
        }
    }
    void add(PyObject* values, const Object& plan, void* words, int64_t size, int64_t rows) {
        const Vector value(values, x_.dtype.get());
        if (!size) throw Unfit();
        hidden += layers.empty() ? 0 : layers.back().rows;
        layers.push_back({static_cast<const int32_t*>(words), size, rows, value.size, value.data});
        kept_.push_back(value.held);
        kept_.push_back(plan);
    }
    void set_bias(int64_t l, const Vector& bias) {
        if (bias.size != layers[l].rows) throw Unfit();
        layers[l].bias = bias.data;
        kept_.push_back(bias.held);
    }
    // Where the packed inputs of layers are: saved, but for an x that is packed, or in `own`; those of 16 bits in both.
    void place(char* own, char* saved) {
        const int64_t ld = leading_dim(x_.rows);
        for (size_t l = 0; l < layers.size(); ++l) {
            const bool is_saved = saved && (l || !x_.packed);
            char*& from = is_saved && !x_.narrow() ? saved : own;
            layers[l].input = from, from += width(l) * ld * x_.size();
            if (is_saved && x_.narrow()) layers[l].kept = saved, saved += width(l) * ld * 2;
        }
    }
    // Features of the inputs that are saved, and of those in `own`.
    int64_t saved() const { return (x_.packed ? 0 : x_.columns) + hidden; }
    int64_t own(bool save) const { return x_.columns + hidden - (save && !x_.narrow() ? saved() : 0); }
    int64_t width(int64_t l) const { return l ? layers[l - 1].rows : x_.columns; }  // of what layer l reads

    std::vector<ChainLayer> layers;
    int64_t hidden = 0;  // features of all hidden activations

  private:
    const Matrix& x_;
    std::vector<Object> kept_;
};

struct Output {
    Object y, saved;
};

// y of x and what is `saved` of it, or None, as reference.chain_forward; y is packed if `batch_minor`.
Output run(const Matrix& x, Chain& chain, bool batch_minor, bool save, int64_t threads) {
    if (!x.rows) throw Unfit();
    const int64_t layers = chain.layers.size(), feature = leading_dim(x.rows) * x.size();
    const int64_t width = chain.width(layers);
    Output out{empty(x.held.get(), x.rows, width, batch_minor),
               save ? empty(x.held.get(), chain.saved() * leading_dim(x.rows)) : none()};
    // What is not saved is in memory of our own.
    const int64_t own = chain.own(save) * feature;
    char* room = own ? static_cast<char*>(sparselottery_workspace(own)) : nullptr;
    chain.place(room, save ? static_cast<char*>(address(out.saved.get())) : nullptr);
    const ChainMatrix y{address(out.y.get()), batch_minor ? leading_dim(x.rows) : width, batch_minor};
    const ChainArgs args{x.element, threads, layers, x.rows, x.columns, x.as, y, {}, nullptr, !save};
    int64_t code;
    {
        const Unlocked unlocked;
        code = sparselottery_chain_forward(&args, chain.layers.data());
    }
    checked(code);
    return out;
}

}  // namespace

// (x, values, biases, crow_indices, plans, batch_minor, save, threads) -> (y, saved). None if that is nothing for these
// kernels.
PyObject* chain_forward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 8);
        const Matrix x(args[0]);
        const Sequence biases(args[2]);
        Chain chain(x, args[1], args[3], args[4]);
        if (biases.size() != int64_t(chain.layers.size())) throw Unfit();
        for (int64_t l = 0; l < biases.size(); ++l)
            if (biases[l] != Py_None) chain.set_bias(l, Vector(biases[l], x.dtype.get()));
        const Output out = run(x, chain, is_true(args[5]), is_true(args[6]), integer(args[7]));
        return PyTuple_Pack(2, out.y.get(), out.saved.get());
    });
}

namespace {

// Are the tensors of a layer those that it remembers, ((name, tensor, version), ...)? As IndexedLayer.check.
bool is_unchanged(PyObject* buffers, PyObject* remembered) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(remembered); ++i) {
        PyObject *each = PyTuple_GET_ITEM(remembered, i), *tensor = PyTuple_GET_ITEM(each, 1);
        if (tensor == Py_None || PyDict_GetItem(buffers, PyTuple_GET_ITEM(each, 0)) != tensor) return false;
        const Object version(PyObject_GetAttr(tensor, known.version));
        if (integer(version.get()) != integer(PyTuple_GET_ITEM(each, 2))) return false;
    }
    return true;
}

// f(), as `guarded`; what has no plan is unfit as well: Python says why.
template <class F>
PyObject* usual(F f) {
    return guarded([f]() -> PyObject* {
        try {
            return f();
        } catch (const NoPlan&) {
            throw Unfit();
        }
    });
}

bool is_grad_enabled() { return is_true(Object(PyObject_CallNoArgs(known.is_grad_enabled)).get()); }

// Does any of these ask for gradients?
bool is_trained(std::initializer_list<PyObject*> tensors) {
    if (!is_grad_enabled()) return false;
    for (PyObject* each : tensors)
        if (each != Py_None && is(each, known.requires_grad, Py_True)) return true;
    return false;
}

}  // namespace

// A layer's call (x, ORDINARY of native.py, parameters, buffers, remembered, in_features, threads) -> y, or (y, saved) if
// gradients are asked for. None if anything is unusual: Python then finds out what.
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return usual([=]() -> PyObject* {
        take(count, 7);
        PyObject *parameters = args[2], *buffers = args[3];
        if (!is_ordinary(args[0], args[1]) || !is_unchanged(buffers, args[4])) throw Unfit();
        PyObject *values = PyDict_GetItem(parameters, known.values), *bias = PyDict_GetItem(parameters, known.bias);
        PyObject *plan = PyDict_GetItem(buffers, known.plan), *crow_indices = PyDict_GetItem(buffers, known.crow_indices);
        if (!values || !bias || !plan || !crow_indices) throw Unfit();
        const Matrix x(args[0]);
        if (x.as.batch_minor || x.columns != integer(args[5])) throw Unfit();
        Chain chain(x);
        const Object words(Py_NewRef(plan));
        if (!is(plan, known.is_cpu, Py_True)) throw Unfit();
        if (bias == Py_None) {
            chain.add(values, words, address(plan), number(plan, known.numel), shape<1>(crow_indices).at[0] - 1);
        } else {
            const Vector shift(bias, x.dtype.get());
            chain.add(values, words, address(plan), number(plan, known.numel), shift.size);
            chain.set_bias(0, shift);
        }
        const bool save = is_trained({values, bias, args[0]});
        const int64_t threads = x.rows * chain.layers[0].nnz < kWorth ? 1 : integer(args[6]);
        Output out = run(x, chain, false, save, threads);
        return save ? PyTuple_Pack(2, out.y.get(), out.saved.get()) : out.y.give();
    });
}

namespace {

struct Needs {
    bool x;
    std::vector<bool> values, bias;
};

struct Gradients {
    Object x;
    std::vector<Object> values, bias;
};

// The gradients of `run` as reference.chain_backward gives them, but for None where not needed, and gx packed if x is.
Gradients run_back(const Matrix& gy, const Matrix& x, const Vector& saved, Chain& chain, const Needs& needs,
                   int64_t threads) {
    PyObject* like = gy.held.get();
    const int64_t layers = chain.layers.size(), ld = leading_dim(x.rows), feature = ld * x.size();
    if (!x.rows || gy.dtype.get() != x.dtype.get() || gy.rows != x.rows || gy.columns != chain.width(layers) ||
        saved.size != chain.saved() * ld)
        throw Unfit();
    Gradients out{needs.x ? empty(like, x.rows, x.columns, x.packed) : none(), {}, {}};
    // Packed: gy, then the gradients of hidden layers, then the inputs that are not saved as they are computed with.
    const int64_t features = gy.columns + chain.hidden + chain.own(true);
    char* const packed_gy = static_cast<char*>(sparselottery_workspace(features * feature));
    char* ginput = packed_gy + gy.columns * feature;
    chain.place(ginput + chain.hidden * feature, static_cast<char*>(saved.data));
    const auto gradient = [like](std::vector<Object>& all, bool needed, int64_t elements) {
        all.push_back(needed ? empty(like, elements) : none());
        return needed ? address(all.back().get()) : nullptr;
    };
    for (int64_t l = 0; l < layers; ++l) {
        ChainLayer& layer = chain.layers[l];
        layer.gvalues = gradient(out.values, needs.values[l], layer.nnz);
        layer.gbias = gradient(out.bias, needs.bias[l], layer.rows);
        if (l) layer.ginput = ginput, ginput += chain.width(l) * feature;
    }
    const ChainMatrix gx{needs.x ? address(out.x.get()) : nullptr, x.packed ? ld : x.columns, x.packed};
    const ChainArgs args{x.element, threads, layers, x.rows, x.columns, gy.as, gx, x.packed ? x.as : ChainMatrix{},
                         packed_gy};
    int64_t code;
    {
        const Unlocked unlocked;
        code = sparselottery_chain_backward(&args, chain.layers.data());
    }
    checked(code);
    return out;
}

Object tuple(const std::vector<Object>& each) {
    Object all(PyTuple_New(each.size()));
    for (size_t i = 0; i < each.size(); ++i) PyTuple_SET_ITEM(all.get(), i, Py_NewRef(each[i].get()));
    return all;
}

std::vector<bool> truths(PyObject* sequence, int64_t expected) {
    const Sequence each(sequence);
    if (each.size() != expected) throw Unfit();
    std::vector<bool> out;
    for (int64_t i = 0; i < expected; ++i) out.push_back(is_true(each[i]));
    return out;
}

}  // namespace

// (gy, x, saved, values, crow_indices, plans, need_x, need_values, need_bias, threads) -> gx, (gvalues, ...), (gbias, ...)
PyObject* chain_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 10);
        const Matrix gy(args[0]), x(args[1]);
        const Vector saved(args[2], x.dtype.get());
        Chain chain(x, args[3], args[4], args[5]);
        const int64_t layers = chain.layers.size();
        const Needs needs{is_true(args[6]), truths(args[7], layers), truths(args[8], layers)};
        const Gradients out = run_back(gy, x, saved, chain, needs, integer(args[9]));
        return PyTuple_Pack(3, out.x.get(), tuple(out.values).get(), tuple(out.bias).get());
    });
}

// A layer's gradients (gy, ORDINARY, (x, saved, values, bias), plan, needs of the last three as autograd has them, threads)
// -> gx, gvalues, gbias. None if anything is unusual.
PyObject* linear_backward(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return usual([=]() -> PyObject* {
        take(count, 6);
        const Sequence kept(args[2]), needed(args[4]);
        PyObject *ordinary = args[1], *bias = kept[3];
        if (!is_ordinary(args[0], ordinary) || !is_plain(kept[0], ordinary) || is_grad_enabled()) throw Unfit();
        const Matrix gy(args[0]), x(kept[0]);
        if (x.packed) throw Unfit();
        const Vector saved(kept[1], x.dtype.get()), plan(args[3], known.int32);
        Chain chain(x);
        chain.add(kept[2], plan.held, plan.data, plan.size, gy.columns);
        const int64_t first = needed.size() - 3;
        const bool need_bias = bias != Py_None && is_true(needed[first + 2]);
        const Needs needs{is_true(needed[first]), {is_true(needed[first + 1])}, {need_bias}};
        const int64_t threads = x.rows * chain.layers[0].nnz < kWorth ? 1 : integer(args[5]);
        const Gradients out = run_back(gy, x, saved, chain, needs, threads);
        return PyTuple_Pack(3, out.x.get(), out.values[0].get(), out.bias[0].get());
    });
}

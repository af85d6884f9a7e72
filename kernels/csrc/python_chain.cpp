// Calls on chains of layers, from tensors: those of `ops`, and the short way from layers as they are.
#include <vector>

#include "python_tensor.h"

extern "C" {
void* sparselottery_workspace(int64_t bytes);
int64_t sparselottery_chain_forward(const ChainArgs*, const ChainLayer*);
int64_t sparselottery_chain_backward(const ChainArgs*, const ChainLayer*);
}

namespace {

// The layers of a chain, from tensors: what forward and backward both read of them.
class Chain {
  public:
    explicit Chain(const Matrix& x) : x_(x) {}
    Chain(const Matrix& x, PyObject* values, PyObject* crow_indices, PyObject* plans) : Chain(x) {
        const Sequence each(values), crows(crow_indices), compiled(plans);
        if (!each.size() || crows.size() != each.size() || compiled.size() != each.size()) throw Unfit();
        for (int64_t l = 0; l < each.size(); ++l) {
            add(each[l], crows[l], compiled[l]);
        }
    }
    void add(PyObject* values, PyObject* crow_indices, PyObject* plan) {
        const Vector value(values, x_.kind), words(plan, INT32);
        if (words.held.get() != plan) throw NoPlan();  // a copy: it was not contiguous
        if (!words.size) throw Unfit();
        hidden += layers.empty() ? 0 : layers.back().rows;
        const int64_t rows = View(crow_indices, INT32, 1).shape[0] - 1;
        layers.push_back({static_cast<const int32_t*>(words.data), words.size, rows, value.size, value.data});
        kept_.push_back(value.held);
        kept_.push_back(words.held);
    }
    void set_bias(int64_t l, PyObject* tensor) {
        if (tensor == Py_None) return;
        const Vector bias(tensor, x_.kind);
        if (bias.size != layers[l].rows) throw Unfit();
        layers[l].bias = bias.data;
        kept_.push_back(bias.held);
    }
    int64_t multiply_adds() const {
        int64_t all = 0;
        for (const ChainLayer& each : layers) all += x_.rows * each.nnz;
        return all;
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
    Output out{x.rank > 2 ? empty(x.held.get(), x.rank, x.shape, width) : empty(x.held.get(), x.rows, width, batch_minor),
               save ? empty(x.held.get(), chain.saved() * leading_dim(x.rows)) : none()};
    // What is not saved is in memory of our own.
    const int64_t own = chain.own(save) * feature;
    char* room = own ? static_cast<char*>(sparselottery_workspace(own)) : nullptr;
    chain.place(room, save ? static_cast<char*>(address(out.saved)) : nullptr);
    const ChainMatrix y{address(out.y), batch_minor ? leading_dim(x.rows) : width, batch_minor};
    const ChainArgs args{x.kind, threads, layers, x.rows, x.columns, x.as, y, {}, nullptr, !save};
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
        for (int64_t l = 0; l < biases.size(); ++l) chain.set_bias(l, biases[l]);
        const Output out = run(x, chain, is_true(args[5]), is_true(args[6]), integer(args[7]));
        return PyTuple_Pack(2, out.y.get(), out.saved.get());
    });
}

// A call of layers (x, ORDINARY of native.py, layers, batch_minor, threads) -> y or, of a matrix with gradients, ((y, saved),
// (crow_indices, col_indices, plans), (x, values..., biases...)). None if anything is unusual: Python then finds out what.
PyObject* chain(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return usual([=]() -> PyObject* {
        take(count, 5);
        PyObject* input = args[0];
        if (!is_ordinary(input, args[1])) throw Unfit();
        const Matrix x(input, true);
        const bool minor = is_true(args[3]);
        if (x.as.batch_minor || (minor && x.rank > 2)) throw Unfit();
        const Sequence layers(args[2]);
        const int64_t size = layers.size();
        std::vector<Tables> tables;
        Chain chain(x);
        bool save = false;
        for (int64_t l = 0; l < size; ++l) {
            const Tables& of = tables.emplace_back(layers[l]);
            chain.add(of.values, of.crow_indices, of.plan);
            chain.set_bias(l, of.bias);
            save = save || is_trained({of.values, of.bias});
        }
        save = is_grad_enabled() && (save || is_trained({input}));
        if (save && x.rank > 2) throw Unfit();  // autograd has matrices
        const Output out = run(x, chain, minor, save, threads_for(chain.multiply_adds(), args[4]));
        if (!save) return Py_NewRef(out.y.get());
        const Object crows(PyTuple_New(size)), cols(PyTuple_New(size)), plans(PyTuple_New(size));
        const Object inputs(PyTuple_New(1 + 2 * size));
        PyTuple_SET_ITEM(inputs.get(), 0, Py_NewRef(input));
        for (int64_t l = 0; l < size; ++l) {
            PyTuple_SET_ITEM(crows.get(), l, Py_NewRef(tables[l].crow_indices));
            PyTuple_SET_ITEM(cols.get(), l, Py_NewRef(tables[l].col_indices));
            PyTuple_SET_ITEM(plans.get(), l, Py_NewRef(tables[l].plan));
            PyTuple_SET_ITEM(inputs.get(), 1 + l, Py_NewRef(tables[l].values));
            PyTuple_SET_ITEM(inputs.get(), 1 + size + l, Py_NewRef(tables[l].bias));
        }
        const Object done(PyTuple_Pack(2, out.y.get(), out.saved.get()));
        const Object indices(PyTuple_Pack(3, crows.get(), cols.get(), plans.get()));
        return PyTuple_Pack(3, done.get(), indices.get(), inputs.get());
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
    if (!x.rows || gy.kind != x.kind || gy.rows != x.rows || gy.columns != chain.width(layers) ||
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
        return needed ? address(all.back()) : nullptr;
    };
    for (int64_t l = 0; l < layers; ++l) {
        ChainLayer& layer = chain.layers[l];
        layer.gvalues = gradient(out.values, needs.values[l], layer.nnz);
        layer.gbias = gradient(out.bias, needs.bias[l], layer.rows);
        if (l) layer.ginput = ginput, ginput += chain.width(l) * feature;
    }
    const ChainMatrix gx{needs.x ? address(out.x) : nullptr, x.packed ? ld : x.columns, x.packed};
    const ChainArgs args{x.kind, threads, layers, x.rows, x.columns, gy.as, gx, x.packed ? x.as : ChainMatrix{},
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
        const Vector saved(args[2], x.kind);
        Chain chain(x, args[3], args[4], args[5]);
        const int64_t layers = chain.layers.size();
        const Needs needs{is_true(args[6]), truths(args[7], layers), truths(args[8], layers)};
        const Gradients out = run_back(gy, x, saved, chain, needs, integer(args[9]));
        return PyTuple_Pack(3, out.x.get(), tuple(out.values).get(), tuple(out.bias).get());
    });
}

// The gradients of `chain` (gy, ORDINARY, (x, saved, values..., biases...), indices, what of x, values and biases needs
// them, threads) -> gx, gvalues..., gbiases... None if anything is unusual.
PyObject* chain_gradients(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return usual([=]() -> PyObject* {
        take(count, 6);
        const Sequence kept(args[2]), indices(args[3]), needed(args[4]);
        if (!is_ordinary(args[0], args[1]) || is_grad_enabled()) throw Unfit();
        const Matrix gy(args[0]), x(kept[0]);
        if (x.packed) throw Unfit();
        const Vector saved(kept[1], x.kind);
        const Sequence crows(indices[0]), plans(indices[2]);
        const int64_t layers = plans.size();
        Chain chain(x);
        Needs needs{is_true(needed[0]), {}, {}};
        for (int64_t l = 0; l < layers; ++l) {
            chain.add(kept[2 + l], crows[l], plans[l]);
            needs.values.push_back(is_true(needed[1 + l]));
            needs.bias.push_back(kept[2 + layers + l] != Py_None && is_true(needed[1 + layers + l]));
        }
        const Gradients out = run_back(gy, x, saved, chain, needs, threads_for(chain.multiply_adds(), args[5]));
        Object all(PyTuple_New(1 + 2 * layers));
        PyTuple_SET_ITEM(all.get(), 0, Py_NewRef(out.x.get()));
        for (int64_t l = 0; l < layers; ++l) {
            PyTuple_SET_ITEM(all.get(), 1 + l, Py_NewRef(out.values[l].get()));
            PyTuple_SET_ITEM(all.get(), 1 + layers + l, Py_NewRef(out.bias[l].get()));
        }
        return all.give();
    });
}

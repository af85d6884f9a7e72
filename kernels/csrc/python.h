// Python's objects in C++: references, numbers, the tables of layers, and whether a call is one that nobody observes.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <new>
#include <utility>

#include "plan.h"

struct Failed {};  // Python has its exception
struct Unfit {};   // the arguments are none that the kernels take
struct NoPlan {};  // nor is a plan that of its layer

extern struct Known {
    PyObject *bias, *buffers, *col_indices, *contiguous, *copy, *crow_indices, *current_level, *data_ptr, *dtype;  // names
    PyObject *geometry, *is_cpu, *itemsize, *new_empty, *new_empty_strided, *pad_first, *parameters, *plan, *raw_repr, *remembered;
    PyObject *requires_grad, *shape, *stride, *values, *version;
    PyObject *bfloat16, *float16, *float32, *float64, *int32, *uint8, *get_num_threads, *is_grad_enabled;  // of torch
} known;

class Object {  // holds a reference
  public:
    explicit Object(PyObject* owned) : owned_(owned) {
        if (!owned) throw Failed();
    }
    Object(const Object& other) : owned_(Py_XNewRef(other.owned_)) {}
    Object(Object&& other) noexcept : owned_(std::exchange(other.owned_, nullptr)) {}
    Object& operator=(Object&& other) noexcept {
        std::swap(owned_, other.owned_);
        return *this;
    }
    ~Object() { Py_XDECREF(owned_); }
    PyObject* get() const { return owned_; }
    PyObject* give() { return std::exchange(owned_, nullptr); }

  private:
    PyObject* owned_;
};

class Unlocked {  // other threads of Python run meanwhile
  public:
    Unlocked() : state_(PyEval_SaveThread()) {}
    ~Unlocked() { PyEval_RestoreThread(state_); }

  private:
    PyThreadState* state_;
};

inline int64_t integer(PyObject* number) {
    const int64_t value = PyLong_AsLongLong(number);
    if (value == -1 && PyErr_Occurred()) throw Failed();
    return value;
}

inline bool is_true(PyObject* object) {
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) throw Failed();
    return truth;
}

// f(), with C++'s exceptions as Python's; None where it is Unfit.
template <class F>
PyObject* guarded(F f) {
    try {
        return f();
    } catch (const Failed&) {
        return nullptr;
    } catch (const Unfit&) {
        Py_RETURN_NONE;
    } catch (const NoPlan&) {
        PyErr_SetString(PyExc_ValueError,
                        "plan: expected one that was compiled for these indices and values, got another or none");
        return nullptr;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    }
}

inline int64_t checked(int64_t outcome) {
    if (outcome == NO_PLAN) throw NoPlan();
    return outcome;
}

inline Object none() { return Object(Py_NewRef(Py_None)); }

inline bool is(PyObject* object, PyObject* attribute, PyObject* value) {
    return Object(PyObject_GetAttr(object, attribute)).get() == value;
}

inline int64_t version(PyObject* tensor) { return integer(Object(PyObject_GetAttr(tensor, known.version)).get()); }

class Sequence {
  public:
    explicit Sequence(PyObject* sequence) : fast_(PySequence_Fast(sequence, "expected a sequence")) {}
    int64_t size() const { return PySequence_Fast_GET_SIZE(fast_.get()); }
    PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(fast_.get(), i); }

  private:
    Object fast_;
};

inline void take(int64_t count, int64_t expected) {
    if (count == expected) return;
    PyErr_Format(PyExc_TypeError, "expected %lld arguments, got %lld", (long long)expected, (long long)count);
    throw Failed();
}

enum Ordinary { TYPE, KEYS, KINDS, DENSE, FORWARD_AD, OBSERVERS };  // of native.ORDINARY

// Is x a tensor as `native.ORDINARY` describes it?
inline bool is_plain(PyObject* x, PyObject* ordinary) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != PyTuple_GET_ITEM(ordinary, TYPE)) return false;
    const Object keys(PyObject_CallOneArg(PyTuple_GET_ITEM(ordinary, KEYS), x));
    const Object bits(PyObject_CallMethodNoArgs(keys.get(), known.raw_repr));
    const Object kinds(PyNumber_And(bits.get(), PyTuple_GET_ITEM(ordinary, KINDS)));
    return PyObject_RichCompareBool(kinds.get(), PyTuple_GET_ITEM(ordinary, DENSE), Py_EQ) == 1;
}

// Is x so, and does nobody observe what is called now?
inline bool is_ordinary(PyObject* x, PyObject* ordinary) {
    PyObject* observers = PyTuple_GET_ITEM(ordinary, OBSERVERS);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(observers); ++i)
        if (is_true(Object(PyObject_CallNoArgs(PyTuple_GET_ITEM(observers, i))).get())) return false;
    const Object level(PyObject_GetAttr(PyTuple_GET_ITEM(ordinary, FORWARD_AD), known.current_level));
    return integer(level.get()) < 0 && is_plain(x, ordinary);
}

inline bool is_grad_enabled() { return is_true(Object(PyObject_CallNoArgs(known.is_grad_enabled)).get()); }

// Does any of these ask for gradients?
inline bool is_trained(std::initializer_list<PyObject*> tensors) {
    for (PyObject* each : tensors)
        if (each != Py_None && is(each, known.requires_grad, Py_True)) return true;
    return false;
}

constexpr int64_t kWorth = 1 << 13;  // multiply-adds that take about as long as to wake a thread

inline int64_t threads_for(int64_t multiply_adds, PyObject* threads) {
    return multiply_adds < kWorth ? 1 : integer(threads);
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

// The tables of a masked layer (nn.indices), whose buffers are those that it remembers, as IndexedLayer.check looks.
struct Tables {
    explicit Tables(PyObject* layer) : own(PyObject_GenericGetDict(layer, nullptr)) {
        parameters = at(own.get(), known.parameters), buffers = at(own.get(), known.buffers);
        PyObject* remembered = at(own.get(), known.remembered);
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(remembered); ++i) {
            PyObject *each = PyTuple_GET_ITEM(remembered, i), *tensor = PyTuple_GET_ITEM(each, 1);
            if (tensor == Py_None || at(buffers, PyTuple_GET_ITEM(each, 0)) != tensor) throw Unfit();
            if (version(tensor) != integer(PyTuple_GET_ITEM(each, 2))) throw Unfit();
        }
        values = at(parameters, known.values), bias = at(parameters, known.bias), plan = at(buffers, known.plan);
        crow_indices = at(buffers, known.crow_indices), col_indices = at(buffers, known.col_indices);
    }
    static PyObject* at(PyObject* table, PyObject* name) {
        PyObject* found = PyDict_GetItemWithError(table, name);
        if (!found) PyErr_Occurred() ? throw Failed() : throw Unfit();
        return found;
    }
    Object own;
    PyObject *parameters, *buffers, *values, *bias, *plan, *crow_indices, *col_indices;  // borrowed
};

// Of python_chain.cpp.
PyObject* chain_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* chain_backward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* chain(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* chain_gradients(PyObject*, PyObject* const* args, Py_ssize_t count);

// Of python_conv.cpp.
PyObject* conv_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* conv_backward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* conv(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* conv_after_conv(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* conv_gradients(PyObject*, PyObject* const* args, Py_ssize_t count);

// Of python_pattern.cpp.
PyObject* compiled(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* copied(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* carried(PyObject*, PyObject* const* args, Py_ssize_t count);

// Of python_frozen.cpp.
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* bound(PyObject*, PyObject* const* args, Py_ssize_t count);

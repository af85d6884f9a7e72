// Python's objects in C++: references, numbers, and tensors as memory.
//
// Tensors are asked by the names of their methods, as Python asks: one build serves every version of torch, and what
// torch allocates, it allocates as for anybody.
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <new>
#include <utility>

#include "chain.h"
#include "plan.h"
#include "simd.h"

struct Failed {};  // Python has its exception
struct Unfit {};   // the arguments are none that the kernels take
struct NoPlan {};  // nor is a plan that of its layer

extern struct Known {
    PyObject *bias, *contiguous, *crow_indices, *current_level, *data_ptr, *dtype, *is_cpu, *new_empty;  // names
    PyObject *new_empty_strided, *numel, *plan, *raw_repr, *requires_grad, *shape, *stride, *values, *version;
    PyObject *bfloat16, *float16, *float32, *float64, *int32, *is_grad_enabled;  // of torch
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

inline int64_t number(PyObject* tensor, PyObject* method) {
    return integer(Object(PyObject_CallMethodNoArgs(tensor, method)).get());
}

inline void* address(PyObject* tensor) {
    return reinterpret_cast<void*>(number(tensor, known.data_ptr));
}

inline bool is(PyObject* tensor, PyObject* attribute, PyObject* value) {
    return Object(PyObject_GetAttr(tensor, attribute)).get() == value;
}

// The numbers of a tensor's shape or strides, of which there are D.
template <int D>
struct Numbers {
    explicit Numbers(const Object& tuple) {
        if (!PyTuple_Check(tuple.get()) || PyTuple_GET_SIZE(tuple.get()) != D) throw Unfit();
        for (int i = 0; i < D; ++i) at[i] = integer(PyTuple_GET_ITEM(tuple.get(), i));
    }
    int64_t at[D];
};

template <int D>
Numbers<D> shape(PyObject* tensor) {
    return Numbers<D>(Object(PyObject_GetAttr(tensor, known.shape)));
}

inline Element element_of(PyObject* dtype) {
    for (const auto& [known_dtype, element] : {std::pair(known.float32, FLOAT32), std::pair(known.float64, FLOAT64),
                                            std::pair(known.bfloat16, BFLOAT16), std::pair(known.float16, FLOAT16)})
        if (dtype == known_dtype) return element;
    throw Unfit();
}

// A matrix (N, I) on the CPU, as it stands, or a copy where its strides are none we read.
struct Matrix {
    explicit Matrix(PyObject* tensor) : held(Py_NewRef(tensor)), dtype(PyObject_GetAttr(tensor, known.dtype)) {
        element = element_of(dtype.get());
        if (!is(tensor, known.is_cpu, Py_True)) throw Unfit();
        const Numbers<2> size = shape<2>(tensor);
        const Numbers<2> strides(Object(PyObject_CallMethodNoArgs(tensor, known.stride)));
        rows = size.at[0], columns = size.at[1];
        const int64_t row = strides.at[0], column = strides.at[1];
        // As reference.is_packed.
        packed = row == 1 && column % kLanes == 0 && rows % kLanes == 0 && column >= rows;
        as = {nullptr, column == 1 ? row : column, packed || (column != 1 && row == 1)};
        if (packed) as.stride = column;
        if (column != 1 && row != 1) {
            held = Object(PyObject_CallMethodNoArgs(tensor, known.contiguous));
            as.stride = columns;
        }
        as.data = address(held.get());
    }
    Object held, dtype;
    bool narrow() const { return element == BFLOAT16 || element == FLOAT16; }
    int64_t size() const { return element == FLOAT64 ? 8 : 4; }  // bytes of a number that is computed with
    Element element;
    bool packed;
    int64_t rows, columns;
    ChainMatrix as;
};

// A vector on the CPU, contiguous.
struct Vector {
    Vector(PyObject* tensor, PyObject* dtype) : held(PyObject_CallMethodNoArgs(tensor, known.contiguous)) {
        if (!is(tensor, known.dtype, dtype) || !is(tensor, known.is_cpu, Py_True)) throw Unfit();
        size = shape<1>(tensor).at[0], data = address(held.get());
    }
    Object held;
    int64_t size;
    void* data;
};

class Sequence {
  public:
    explicit Sequence(PyObject* sequence) : fast_(PySequence_Fast(sequence, "expected a sequence")) {}
    int64_t size() const { return PySequence_Fast_GET_SIZE(fast_.get()); }
    PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(fast_.get(), i); }

  private:
    Object fast_;
};

// Like torch's new_empty; new_empty_strided takes two thirds of its time.
template <int D>
Object empty(PyObject* like, const int64_t (&sizes)[D]) {
    const Object shape(PyTuple_New(D)), strides(PyTuple_New(D));
    int64_t stride = 1;
    for (int d = D - 1; d >= 0; stride *= sizes[d--]) {
        PyTuple_SET_ITEM(shape.get(), d, Object(PyLong_FromLongLong(sizes[d])).give());
        PyTuple_SET_ITEM(strides.get(), d, Object(PyLong_FromLongLong(stride)).give());
    }
    PyObject* args[] = {like, shape.get(), strides.get()};
    return Object(PyObject_VectorcallMethod(known.new_empty_strided, args, 3, nullptr));
}

// As reference.leading_dim.
inline int64_t leading_dim(int64_t batch) {
    const int64_t groups = (batch + kLanes - 1) / kLanes;
    return (groups + groups / 16) * kLanes;
}

inline Object empty(PyObject* like, int64_t elements) { return empty<1>(like, {elements}); }

// (N, I), row-major or packed (I, ld).
inline Object empty(PyObject* like, int64_t rows, int64_t columns, bool packed) {
    return packed ? empty<2>(like, {columns, leading_dim(rows)}) : empty<2>(like, {rows, columns});
}

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

// Of python_chain.cpp.
PyObject* chain_forward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* chain_backward(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* linear(PyObject*, PyObject* const* args, Py_ssize_t count);
PyObject* linear_backward(PyObject*, PyObject* const* args, Py_ssize_t count);

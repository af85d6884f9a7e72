// Tensors as memory. One build serves every version of torch, and what torch allocates, it allocates as for anybody.
#pragma once
#include <algorithm>

#include "chain.h"
#include "python.h"
#include "simd.h"

// Of DLPack, whose layout is the same for all versions of this number.
constexpr uint32_t kDLPackMajor = 1;
struct DLTensor {
    void* data;
    int32_t device_type, device_id, ndim;  // of the type 1: the CPU
    uint8_t code, bits;                    // of an element: 0 signed, 1 unsigned, 2 floating, 4 bfloat
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};
struct DLPackExchangeAPI {
    uint32_t major, minor;
    void *previous, *allocate, *export_tensor, *import_tensor;
    int (*view)(void* tensor, DLTensor* out);
    void* stream;
};
extern const DLPackExchangeAPI* exchange;  // torch's; null before torch 2.10

// Of an element; those of chains first.
enum Kind : int64_t { FLOAT = FLOAT32, DOUBLE = FLOAT64, BRAIN = BFLOAT16, HALF = FLOAT16, INT32, UINT8, OTHER };

// A tensor on the CPU of up to five dimensions. By DLPack's table of functions where torch has it, in a tenth of the time
// of asking for one attribute after the other.
struct View {
    explicit View(PyObject* tensor) { exchange ? by_table(tensor) : by_names(tensor); }
    View(PyObject* tensor, Kind expected, int64_t dimensions) : View(tensor) {
        if (kind != expected || dims != dimensions) throw Unfit();
    }
    int64_t elements() const {
        int64_t all = 1;
        for (int64_t d = 0; d < dims; ++d) all *= shape[d];
        return all;
    }
    // As torch's is_contiguous, with the dimensions in this order, the innermost first.
    bool is_packed(std::initializer_list<int> order) const {
        int64_t expected = 1;
        for (const int d : order) {
            if (shape[d] != 1 && strides[d] != expected) return false;
            expected *= shape[d];
        }
        return true;
    }
    void* data;
    Kind kind = OTHER;
    int64_t dims, shape[5], strides[5];

  private:
    void by_table(PyObject* tensor) {
        DLTensor as;
        if (exchange->view(tensor, &as)) {  // it has no memory
            PyErr_Clear();
            throw Unfit();
        }
        if (as.device_type != 1 || as.ndim > 5) throw Unfit();
        dims = as.ndim, data = static_cast<char*>(as.data) + as.byte_offset;
        if (as.lanes == 1 && as.code == 2)
            kind = as.bits == 32 ? FLOAT : as.bits == 64 ? DOUBLE : as.bits == 16 ? HALF : OTHER;
        if (as.lanes == 1 && as.code == 4 && as.bits == 16) kind = BRAIN;
        if (as.lanes == 1 && as.code == 0 && as.bits == 32) kind = INT32;
        if (as.lanes == 1 && as.code == 1 && as.bits == 8) kind = UINT8;
        std::copy_n(as.shape, dims, shape);
        std::copy_n(as.strides, dims, strides);
        if (!as.data && elements()) throw Unfit();
    }
    void by_names(PyObject* tensor) {
        if (!is(tensor, known.is_cpu, Py_True)) throw Unfit();
        const Object dtype(PyObject_GetAttr(tensor, known.dtype)), sizes(PyObject_GetAttr(tensor, known.shape));
        const Object steps(PyObject_CallMethodNoArgs(tensor, known.stride));
        dims = PyTuple_Check(sizes.get()) ? PyTuple_GET_SIZE(sizes.get()) : 6;
        if (dims > 5) throw Unfit();
        for (int64_t d = 0; d < dims; ++d) {
            shape[d] = integer(PyTuple_GET_ITEM(sizes.get(), d));
            strides[d] = integer(PyTuple_GET_ITEM(steps.get(), d));
        }
        const std::pair<PyObject*, Kind> kinds[] = {
            {known.float32, FLOAT}, {known.float64, DOUBLE}, {known.bfloat16, BRAIN},
            {known.float16, HALF},  {known.int32, INT32},    {known.uint8, UINT8}};
        for (const auto& [each, as] : kinds)
            if (dtype.get() == each) kind = as;
        data = reinterpret_cast<void*>(integer(Object(PyObject_CallMethodNoArgs(tensor, known.data_ptr)).get()));
        if (!data && elements()) throw Unfit();
    }
};

inline Object contiguous(PyObject* tensor) { return Object(PyObject_CallMethodNoArgs(tensor, known.contiguous)); }

// A matrix (N, I) of floating numbers, as it stands, or a copy where its strides are none we read. With `any_rank` (*, I).
struct Matrix {
    explicit Matrix(PyObject* tensor, bool any_rank = false) : held(Py_NewRef(tensor)) {
        const View view(tensor);
        kind = view.kind, rank = view.dims;
        if (kind > HALF || rank < 2 || (rank > 2 && !any_rank)) throw Unfit();
        std::copy_n(view.shape, rank, shape);
        rows = shape[rank - 2], columns = shape[rank - 1];
        int64_t row = view.strides[rank - 2];
        const int64_t column = view.strides[rank - 1];
        for (int64_t d = rank - 3; d >= 0; rows *= shape[d--]) {
            if (rows == 1) row = view.strides[d];
            else if (shape[d] != 1 && view.strides[d] != row * rows) row = 0;  // no equal steps from row to row: a copy
        }
        // As reference.is_packed.
        packed = row == 1 && column % kLanes == 0 && rows % kLanes == 0 && column >= rows;
        as = {view.data, column == 1 ? row : column, packed || (column != 1 && row == 1)};
        if (packed) as.stride = column;
        if ((column != 1 && row != 1) || (!row && rank > 2)) {
            held = contiguous(tensor);
            as.data = View(held.get()).data, as.stride = columns;
        }
    }
    Object held;
    Kind kind;
    bool narrow() const { return kind == BRAIN || kind == HALF; }
    int64_t size() const { return kind == DOUBLE ? 8 : 4; }  // bytes of a number that is computed with
    bool packed;
    int64_t rank, shape[5];  // as it was given
    int64_t rows, columns;
    ChainMatrix as;
};

// A vector, contiguous, of any kind or of one.
struct Vector {
    explicit Vector(PyObject* tensor) : Vector(tensor, View(tensor)) {}
    Vector(PyObject* tensor, Kind kind) : Vector(tensor, View(tensor, kind, 1)) {}
    Object held;
    int64_t size;
    void* data;

  private:
    Vector(PyObject* tensor, const View& view) : held(Py_NewRef(tensor)) {
        if (view.dims != 1) throw Unfit();
        size = view.shape[0], data = view.data;
        if (size > 1 && view.strides[0] != 1) held = contiguous(tensor), data = View(held.get()).data;
    }
};

inline void* address(const Object& tensor) { return View(tensor.get()).data; }

inline Object empty(PyObject* like, PyObject* shape, PyObject* strides) {  // in two thirds of the time of new_empty
    PyObject* args[] = {like, shape, strides};
    return Object(PyObject_VectorcallMethod(known.new_empty_strided, args, 3, nullptr));
}

inline Object empty(PyObject* like, PyObject* shape) {
    const Object strides(PyTuple_New(PyTuple_GET_SIZE(shape)));
    int64_t stride = 1;
    for (Py_ssize_t d = PyTuple_GET_SIZE(shape); d-- > 0; stride *= integer(PyTuple_GET_ITEM(shape, d)))
        PyTuple_SET_ITEM(strides.get(), d, Object(PyLong_FromLongLong(stride)).give());
    return empty(like, shape, strides.get());
}

template <int D>
Object empty(PyObject* like, const int64_t (&sizes)[D], const int64_t (&steps)[D]) {
    const Object shape(PyTuple_New(D)), strides(PyTuple_New(D));
    for (int d = 0; d < D; ++d) {
        PyTuple_SET_ITEM(shape.get(), d, Object(PyLong_FromLongLong(sizes[d])).give());
        PyTuple_SET_ITEM(strides.get(), d, Object(PyLong_FromLongLong(steps[d])).give());
    }
    return empty(like, shape.get(), strides.get());
}

// As reference.leading_dim.
inline int64_t leading_dim(int64_t batch) {
    const int64_t groups = ceil_div(batch, kLanes);
    return (groups + groups / 16) * kLanes;
}

inline Object empty(PyObject* like, int64_t elements) { return empty<1>(like, {elements}, {1}); }

// (*, I), of the shape of another but for I.
inline Object empty(PyObject* like, int64_t rank, const int64_t* shape, int64_t columns) {
    const Object sizes(PyTuple_New(rank));
    for (int64_t d = 0; d < rank; ++d)
        PyTuple_SET_ITEM(sizes.get(), d, Object(PyLong_FromLongLong(d + 1 < rank ? shape[d] : columns)).give());
    return empty(like, sizes.get());
}

// (N, I), row-major or packed (I, ld).
inline Object empty(PyObject* like, int64_t rows, int64_t columns, bool packed) {
    if (packed) rows = std::exchange(columns, leading_dim(rows));
    return empty<2>(like, {rows, columns}, {columns, 1});
}

template <int D>
Object empty_bytes(PyObject* like, const int64_t (&sizes)[D]) {
    const Object shape(PyTuple_New(D)), names(PyTuple_Pack(1, known.dtype));
    for (int d = 0; d < D; ++d) PyTuple_SET_ITEM(shape.get(), d, Object(PyLong_FromLongLong(sizes[d])).give());
    PyObject* args[] = {like, shape.get(), known.uint8};
    return Object(PyObject_VectorcallMethod(known.new_empty, args, 2, names.get()));
}

// Patterns of masks, and what of tensors stays when one pattern follows another.
#include <memory>
#include <vector>

#include "python_tensor.h"

extern "C" {
int64_t sparselottery_mask_rows(const uint8_t*, int64_t, int64_t, int32_t*, int64_t);
int64_t sparselottery_mask_columns(const uint8_t*, int64_t, int64_t, const int32_t*, int32_t*, int64_t);
int64_t sparselottery_sources(int64_t, int64_t, const int32_t*, const int32_t*, const int32_t*, const int32_t*, int32_t*,
                              int64_t);
int64_t sparselottery_is_pattern(int64_t, int64_t, int64_t, const int32_t*, const int32_t*);
int64_t sparselottery_carry(const int32_t*, int64_t, int64_t, int64_t, const void*, void*, const void*, int64_t);
}

namespace {

struct Indices {
    Indices(PyObject* crow_indices, PyObject* col_indices) : rows(crow_indices, INT32), columns(col_indices, INT32) {}
    const int32_t* crow() const { return static_cast<const int32_t*>(rows.data); }
    const int32_t* col() const { return static_cast<const int32_t*>(columns.data); }
    Vector rows, columns;
};

}  // namespace

// (mask (O, I), a bool tensor, contiguous; an int32 tensor, like which indices are made; most, threads) -> (crow_indices,
// col_indices, nnz); where there are more than `most`, None for col_indices.
PyObject* compiled(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=]() -> PyObject* {
        take(count, 4);
        const View mask(args[0]);
        if (mask.dims != 2) throw Unfit();
        const int64_t rows = mask.shape[0], columns = mask.shape[1], threads = integer(args[3]);
        const uint8_t* const flags = static_cast<const uint8_t*>(mask.data);
        Object crow_indices = empty(args[1], rows + 1), col_indices = none();
        int32_t* const begins = static_cast<int32_t*>(address(crow_indices));
        int64_t nnz;
        {
            const Unlocked unlocked;
            nnz = sparselottery_mask_rows(flags, rows, columns, begins, threads);
        }
        if (nnz <= integer(args[2])) {
            col_indices = empty(args[1], nnz);
            int32_t* const found = static_cast<int32_t*>(address(col_indices));
            const Unlocked unlocked;
            sparselottery_mask_columns(flags, rows, columns, begins, found, threads);
        }
        return Py_BuildValue("NNL", crow_indices.give(), col_indices.give(), static_cast<long long>(nnz));
    });
}

// (crow_indices, col_indices, rows, columns, ORDINARY of native.py) -> copies of the indices, checked. None where they are
// no ordinary tensors, or no pattern's.
PyObject* copied(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 5);
        if (!is_ordinary(args[0], args[4]) || !is_plain(args[1], args[4])) throw Unfit();
        const Indices from(args[0], args[1]);
        const int64_t rows = integer(args[2]), columns = integer(args[3]), nnz = from.columns.size;
        if (rows < 0 || from.rows.size != rows + 1) throw Unfit();
        Object crow_indices = empty(args[0], rows + 1), col_indices = empty(args[1], nnz);
        int32_t* const begins = static_cast<int32_t*>(address(crow_indices));
        int32_t* const found = static_cast<int32_t*>(address(col_indices));
        {
            const Unlocked unlocked;  // so the copy is checked: others may write to what was given
            std::copy_n(from.crow(), rows + 1, begins);
            std::copy_n(from.col(), nnz, found);
            if (!sparselottery_is_pattern(rows, columns, nnz, begins, found)) throw Unfit();
        }
        return PyTuple_Pack(2, crow_indices.get(), col_indices.get());
    });
}

// (crow_indices, col_indices, those of a pattern before, columns, tensors with an element for each value of it, of each a
// newcomer's or None for zero, ORDINARY of native.py, threads) -> the tensors of the survivors and newcomers. None where one
// is no ordinary tensor of elements of 2, 4 or 8 bytes.
PyObject* carried(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 9);
        const Indices ours(args[0], args[1]), theirs(args[2], args[3]);
        const Sequence tensors(args[5]), newcomers(args[6]);
        const int64_t columns = integer(args[4]), threads = integer(args[8]), survivors = ours.columns.size;
        std::vector<Vector> from;
        std::vector<int64_t> bytes;
        for (int64_t i = 0; i < tensors.size(); ++i) {
            if (i ? !is_plain(tensors[i], args[7]) : !is_ordinary(tensors[i], args[7])) throw Unfit();
            from.emplace_back(tensors[i]);
            bytes.push_back(integer(Object(PyObject_GetAttr(tensors[i], known.itemsize)).get()));
            if (from[i].size != theirs.columns.size || (bytes[i] != 2 && bytes[i] != 4 && bytes[i] != 8)) throw Unfit();
        }
        const std::unique_ptr<int32_t[]> sources(new int32_t[survivors]);  // not written yet
        {
            const Unlocked unlocked;
            sparselottery_sources(ours.rows.size - 1, columns, ours.crow(), ours.col(), theirs.crow(), theirs.col(),
                                  sources.get(), threads);
        }
        Object moved(PyList_New(tensors.size()));
        for (int64_t i = 0; i < tensors.size(); ++i) {
            Object to = empty(tensors[i], survivors);
            void* const data = address(to);
            const void* const fill = newcomers[i] == Py_None ? nullptr : View(newcomers[i]).data;
            {
                const Unlocked unlocked;
                sparselottery_carry(sources.get(), survivors, from[i].size, bytes[i], from[i].data, data, fill, threads);
            }
            PyList_SET_ITEM(moved.get(), i, to.give());
        }
        return moved.give();
    });
}

// What a call relies on and Python may change meanwhile: facts, looked at in a fraction of the time that Python takes.
#include "python_tensor.h"

namespace {

bool are_values(PyObject* table, PyObject* expected) {
    if (PyDict_CheckExact(table)) {
        PyObject* value;
        Py_ssize_t at = 0, i = 0;
        while (PyDict_Next(table, &at, nullptr, &value))
            if (i == PyTuple_GET_SIZE(expected) || PyTuple_GET_ITEM(expected, i++) != value) return false;
        return i == PyTuple_GET_SIZE(expected);
    }
    const Object values(PyMapping_Values(table));  // in an order of its own
    const Sequence each(values.get());
    bool same = each.size() == PyTuple_GET_SIZE(expected);
    for (int64_t i = 0; same && i < each.size(); ++i) same = each[i] == PyTuple_GET_ITEM(expected, i);
    return same;
}

bool holds(PyObject* of, PyObject* name, PyObject* expected) {
    if (PyType_Check(expected) && name == Py_None) return reinterpret_cast<PyObject*>(Py_TYPE(of)) == expected;
    if (!PyDict_Check(of)) return version(of) == integer(expected);
    if (PyTuple_CheckExact(expected) && name == Py_None) return are_values(of, expected);
    if (name == Py_None) return PyDict_GET_SIZE(of) == integer(expected);
    PyObject* found = PyDict_GetItemWithError(of, name);
    if (!found && PyErr_Occurred()) throw Failed();
    return found ? found == expected : expected == Py_Ellipsis;
}

bool hold(PyObject* facts) {
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(facts); ++i) {
        PyObject* fact = PyTuple_GET_ITEM(facts, i);
        if (!holds(PyTuple_GET_ITEM(fact, 0), PyTuple_GET_ITEM(fact, 1), PyTuple_GET_ITEM(fact, 2))) return false;
    }
    return true;
}

}  // namespace

// (facts): native.unchanged.
PyObject* unchanged(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 1);
        return PyBool_FromLong(hold(args[0]));
    });
}

// (x, ORDINARY, bound): native.call.
PyObject* bound(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=]() -> PyObject* {
        take(count, 3);
        const Sequence bound(args[2]);
        PyObject *input = args[0], *shape = bound[1];
        if (!is_ordinary(input, args[1])) throw Unfit();
        const View x(input, FLOAT, PyTuple_GET_SIZE(shape));
        for (int64_t d = 0; d < x.dims; ++d)
            if (x.shape[d] != integer(PyTuple_GET_ITEM(shape, d))) throw Unfit();
        int64_t expected = 1;
        for (int64_t d = x.dims; d-- > 0; expected *= x.shape[d])
            if (x.shape[d] != 1 && x.strides[d] != expected) throw Unfit();
        const Object threads(PyObject_CallNoArgs(known.get_num_threads));
        if (integer(threads.get()) != integer(bound[2]) || !hold(bound[0])) throw Unfit();
        PyObject* const call[] = {bound[4], input, bound[5]};
        return PyObject_Vectorcall(bound[3], call, 3, nullptr);
    });
}

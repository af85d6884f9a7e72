// The library as a module of Python's, `_native`. Functions take numbers and addresses; those of layers take the tensors,
// as all of a small layer's call may take no longer than thirty lines of Python.
#include <cstring>
#include <tuple>
#include <vector>

#include "python_tensor.h"

extern "C" {
int64_t sparselottery_plan(int32_t, int32_t, const int32_t*, const int32_t*, int32_t, int32_t, int32_t, int32_t, int32_t, bool,
                           int64_t, int32_t**);
int64_t sparselottery_conv_plan(int32_t, const Taps*, const int32_t*, const int32_t*, int32_t, int32_t, int32_t, bool,
                                int64_t, int32_t**);
int64_t sparselottery_quads(int32_t, const int32_t*, const int32_t*, int32_t*);
void sparselottery_free(void* memory);
int64_t sparselottery_unpack(bool is_double, const void* packed, int64_t batch, int64_t features, void* y, int64_t values,
                             int64_t all_features);
void sparselottery_net(const void* net, const float* x, float* y, int64_t batch);
void sparselottery_rows(const void* net, const float* x, float* y, int64_t batch);
void sparselottery_chain_infer(const void* net, const float* x, float* y, int64_t batch);
void sparselottery_train(const void* args);
int64_t sparselottery_is_pattern(int64_t, int64_t, int64_t, const int32_t*, const int32_t*);
int64_t sparselottery_scatter(const int32_t*, const uint64_t*, int64_t, int64_t, int64_t, void*, void*, int64_t);
int64_t sparselottery_gather(const int32_t*, const uint64_t*, int64_t, int64_t, int64_t, void*, void*, int64_t);
int64_t sparselottery_positions(int64_t, int64_t, const int32_t*, const int32_t*, int64_t*);
int64_t sparselottery_at_positions(int64_t, int64_t, int64_t, const int64_t*, int32_t*, int32_t*);
int64_t sparselottery_sources(int64_t, int64_t, const int32_t*, const int32_t*, const int32_t*, const int32_t*, int32_t*,
                              int64_t);
extern const int64_t sparselottery_abi_chain[], sparselottery_abi_net[],
    sparselottery_abi_plan[], sparselottery_abi_rows[], sparselottery_abi_train[];
}

Known known;
const DLPackExchangeAPI* exchange;

namespace {

// Fills `known` and `exchange`.
void know() {
    const std::pair<const char*, PyObject**> names[] = {
        {"bias", &known.bias},
        {"_buffers", &known.buffers},
        {"col_indices", &known.col_indices},
        {"contiguous", &known.contiguous},
        {"copy_", &known.copy},
        {"crow_indices", &known.crow_indices},
        {"_current_level", &known.current_level},
        {"data_ptr", &known.data_ptr},
        {"dtype", &known.dtype},
        {"geometry", &known.geometry},
        {"is_cpu", &known.is_cpu},
        {"itemsize", &known.itemsize},
        {"new_empty", &known.new_empty},
        {"new_empty_strided", &known.new_empty_strided},
        {"_pad_first", &known.pad_first},
        {"_parameters", &known.parameters},
        {"plan", &known.plan},
        {"raw_repr", &known.raw_repr},
        {"_known", &known.remembered},
        {"requires_grad", &known.requires_grad},
        {"shape", &known.shape},
        {"stride", &known.stride},
        {"values", &known.values},
        {"_version", &known.version},
    };
    for (const auto& [name, to] : names) *to = Object(PyUnicode_InternFromString(name)).give();
    const Object torch(PyImport_ImportModule("torch"));
    const std::pair<const char*, PyObject**> of_torch[] = {{"bfloat16", &known.bfloat16},
                                                           {"float16", &known.float16},
                                                           {"float32", &known.float32},
                                                           {"float64", &known.float64},
                                                           {"int32", &known.int32},
                                                           {"uint8", &known.uint8},
                                                           {"get_num_threads", &known.get_num_threads},
                                                           {"is_grad_enabled", &known.is_grad_enabled}};
    for (const auto& [name, to] : of_torch) *to = Object(PyObject_GetAttrString(torch.get(), name)).give();
    const Object tensor(PyObject_GetAttrString(torch.get(), "Tensor"));
    PyObject* table = PyObject_GetAttrString(tensor.get(), "__dlpack_c_exchange_api__");
    PyErr_Clear();
    if (table) exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(table, "dlpack_exchange_api"));
    Py_XDECREF(table);
    PyErr_Clear();
    if (exchange && (exchange->major != kDLPackMajor || !exchange->view)) exchange = nullptr;
}

// (x, ORDINARY of native.py)
PyObject* ordinary(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 2);
        return PyBool_FromLong(is_ordinary(args[0], args[1]));
    });
}

// A frozen net's call (address, x, shape of y) -> y. x is fp32, contiguous, on the CPU, and not empty.
template <void (*F)(const void*, const float*, float*, int64_t)>
PyObject* infer(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return guarded([=] {
        take(count, 3);
        Object y = empty(args[1], args[2]);
        const void* net = reinterpret_cast<const void*>(integer(args[0]));
        const float* x = static_cast<const float*>(View(args[1]).data);
        float* out = static_cast<float*>(address(y));
        const int64_t batch = integer(PySequence_Fast_GET_ITEM(args[2], 0));
        {
            const Unlocked unlocked;
            F(net, x, out, batch);
        }
        return y.give();
    });
}

// A number or an address.
template <class T>
T from(PyObject* number) {
    if constexpr (std::is_pointer_v<T>)
        return reinterpret_cast<T>(integer(number));
    else
        return static_cast<T>(integer(number));
}

// (the fields of a Training and its layers, 8 bytes each, as a list)
PyObject* train(PyObject*, PyObject* list) {
    return guarded([=] {
        const Sequence numbers(list);
        std::vector<int64_t> words(numbers.size());
        for (size_t i = 0; i < words.size(); ++i) words[i] = integer(numbers[i]);
        {
            const Unlocked unlocked;
            sparselottery_train(words.data());
        }
        return Py_NewRef(Py_None);
    });
}

// The words that a builder of plans leaves, as memory that goes with its last reader.
struct Words {
    PyObject_HEAD
    int32_t* words;
    Py_ssize_t bytes;
};

int words_buffer(PyObject* self, Py_buffer* view, int flags) {
    auto* mine = reinterpret_cast<Words*>(self);
    return PyBuffer_FillInfo(view, self, mine->words, mine->bytes, 0, flags);
}

void words_free(PyObject* self) {
    PyTypeObject* type = Py_TYPE(self);
    sparselottery_free(reinterpret_cast<Words*>(self)->words);
    PyObject_Free(self);
    Py_DECREF(type);
}

PyType_Slot words_slots[] = {{Py_bf_getbuffer, reinterpret_cast<void*>(words_buffer)},
                             {Py_tp_dealloc, reinterpret_cast<void*>(words_free)},
                             {0, nullptr}};
PyType_Spec words_spec{"_native.Words", sizeof(Words), 0, Py_TPFLAGS_DEFAULT, words_slots};
PyObject* words_type;

// A builder of plans, (numbers and addresses) -> Words.
template <auto F>
struct Build;
template <class... A, int64_t (*F)(A...)>
struct Build<F> {
    template <size_t... I>
    static int64_t call(PyObject* const* args, int32_t** words, std::index_sequence<I...>) {
        const auto numbers = std::make_tuple(from<std::tuple_element_t<I, std::tuple<A...>>>(args[I])...);
        const Unlocked unlocked;
        return F(std::get<I>(numbers)..., words);
    }
    static PyObject* function(PyObject*, PyObject* const* args, Py_ssize_t count) {
        return guarded([=] {
            take(count, sizeof...(A) - 1);
            int32_t* words = nullptr;
            const int64_t size = call(args, &words, std::make_index_sequence<sizeof...(A) - 1>());
            Words* out = PyObject_New(Words, reinterpret_cast<PyTypeObject*>(words_type));
            if (!out) sparselottery_free(words);
            if (out) out->words = words, out->bytes = 4 * size;
            return reinterpret_cast<PyObject*>(out);
        });
    }
};

// A function of numbers and addresses -> its number.
template <auto F>
struct Call;
template <class R, class... A, R (*F)(A...)>
struct Call<F> {
    template <size_t... I>
    static PyObject* call(PyObject* const* args, std::index_sequence<I...>) {
        const std::tuple<A...> numbers{from<A>(args[I])...};
        R result;
        {
            const Unlocked unlocked;
            result = F(std::get<I>(numbers)...);
        }
        return PyLong_FromLongLong(result);
    }
    static PyObject* function(PyObject*, PyObject* const* args, Py_ssize_t count) {
        return guarded([=] {
            take(count, sizeof...(A));
            return call(args, std::index_sequence_for<A...>());
        });
    }
};

// (source, count) -> what it says of itself by ABI (plan.h).
PyObject* abi(PyObject*, PyObject* args) {
    const char* source;
    Py_ssize_t count;
    if (!PyArg_ParseTuple(args, "sn", &source, &count)) return nullptr;
    const std::pair<const char*, const int64_t*> tables[] = {
        {"chain", sparselottery_abi_chain}, {"net", sparselottery_abi_net},     {"plan", sparselottery_abi_plan},
        {"rows", sparselottery_abi_rows},   {"train", sparselottery_abi_train}};
    for (const auto& [name, numbers] : tables)
        if (!std::strcmp(name, source)) {
            PyObject* found = PyTuple_New(count);
            for (Py_ssize_t i = 0; found && i < count; ++i) PyTuple_SET_ITEM(found, i, PyLong_FromLongLong(numbers[i]));
            return found;
        }
    Py_RETURN_NONE;
}

PyCFunction fast(PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"chain_forward", fast(chain_forward), METH_FASTCALL, nullptr},
    {"chain", fast(chain), METH_FASTCALL, nullptr},
    {"chain_backward", fast(chain_backward), METH_FASTCALL, nullptr},
    {"chain_gradients", fast(chain_gradients), METH_FASTCALL, nullptr},
    {"conv_forward", fast(conv_forward), METH_FASTCALL, nullptr},
    {"conv_backward", fast(conv_backward), METH_FASTCALL, nullptr},
    {"conv", fast(conv), METH_FASTCALL, nullptr},
    {"conv_after_conv", fast(conv_after_conv), METH_FASTCALL, nullptr},
    {"conv_gradients", fast(conv_gradients), METH_FASTCALL, nullptr},
    {"train", train, METH_O, nullptr},
    {"plan", fast(Build<sparselottery_plan>::function), METH_FASTCALL, nullptr},
    {"conv_plan", fast(Build<sparselottery_conv_plan>::function), METH_FASTCALL, nullptr},
    {"quads", fast(Call<sparselottery_quads>::function), METH_FASTCALL, nullptr},
    {"unpack", fast(Call<sparselottery_unpack>::function), METH_FASTCALL, nullptr},
    {"is_pattern", fast(Call<sparselottery_is_pattern>::function), METH_FASTCALL, nullptr},
    {"compiled", fast(compiled), METH_FASTCALL, nullptr},
    {"copied", fast(copied), METH_FASTCALL, nullptr},
    {"carried", fast(carried), METH_FASTCALL, nullptr},
    {"gather", fast(Call<sparselottery_gather>::function), METH_FASTCALL, nullptr},
    {"positions", fast(Call<sparselottery_positions>::function), METH_FASTCALL, nullptr},
    {"scatter", fast(Call<sparselottery_scatter>::function), METH_FASTCALL, nullptr},
    {"at_positions", fast(Call<sparselottery_at_positions>::function), METH_FASTCALL, nullptr},
    {"sources", fast(Call<sparselottery_sources>::function), METH_FASTCALL, nullptr},
    {"net", fast(infer<sparselottery_net>), METH_FASTCALL, nullptr},
    {"rows", fast(infer<sparselottery_rows>), METH_FASTCALL, nullptr},
    {"chain_infer", fast(infer<sparselottery_chain_infer>), METH_FASTCALL, nullptr},
    {"is_ordinary", fast(ordinary), METH_FASTCALL, nullptr},
    {"unchanged", fast(unchanged), METH_FASTCALL, nullptr},
    {"bound", fast(bound), METH_FASTCALL, nullptr},
    {"abi", abi, METH_VARARGS, nullptr},
    {},
};

int prepare(PyObject* self) {
    PyObject* done = guarded([self] {
        know();
        words_type = Object(PyType_FromSpec(&words_spec)).give();
        if (PyModule_AddIntConstant(self, "VECTOR_BYTES", VECTOR_BYTES)) throw Failed();
        return Py_NewRef(Py_None);
    });
    Py_XDECREF(done);
    return done ? 0 : -1;
}

PyModuleDef_Slot slots[] = {
    {Py_mod_exec, reinterpret_cast<void*>(prepare)},
#ifdef Py_GIL_DISABLED
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, nullptr},
};

PyModuleDef module{PyModuleDef_HEAD_INIT, "_native", nullptr, 0, methods, slots, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModuleDef_Init(&module); }

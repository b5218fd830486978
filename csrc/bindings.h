// The arguments of a kernel, by name: a Python dict becomes the kernel's parameter struct. Shared by the bindings of
// the CPU and of the CUDA kernels. No Torch header, and of Python only the limited API, so that one build fits any
// version of torch and any CPython from 3.10 on.
//
// As usual in Python's API, a function that fails sets Python's error and returns null, or false.
#pragma once

#define Py_LIMITED_API 0x03090000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <array>
#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <utility>

#include "generalized_masked.h"
#include "mean_prediction.h"
#include "reverse.h"
#include "reverse_mean.h"
#include "score_entropy.h"
#include "transition.h"
#include "unmask.h"

namespace sedd {

// The number of threads of a CPU launcher.
struct CpuLaunch {
    int threads;
};

// ---- the names of the arguments: those of the struct's members ----

template <class Struct, class Value>
struct Field {
    const char* name;
    Value Struct::* member;
};

template <class Struct, class Value>
constexpr Field<Struct, Value> field(const char* name, Value Struct::* member) {
    return {name, member};
}

#define SEDD_FIELD(member) field(#member, &Struct::member)

constexpr auto fields_of(const ScoreEntropyParams*) {
    using Struct = ScoreEntropyParams;
    return std::make_tuple(SEDD_FIELD(log_score), SEDD_FIELD(x_t), SEDD_FIELD(x_0), SEDD_FIELD(sigma),
                           SEDD_FIELD(shift), SEDD_FIELD(stationary), SEDD_FIELD(grad_loss), SEDD_FIELD(unless_one),
                           SEDD_FIELD(out), SEDD_FIELD(neg_entropy), SEDD_FIELD(rows), SEDD_FIELD(dim),
                           SEDD_FIELD(dtype), SEDD_FIELD(family));
}

constexpr auto fields_of(const ScoreEntropyTileParams*) {
    using Struct = ScoreEntropyTileParams;
    return std::make_tuple(SEDD_FIELD(log_score), SEDD_FIELD(x_t), SEDD_FIELD(x_0), SEDD_FIELD(sigma),
                           SEDD_FIELD(shift), SEDD_FIELD(stationary), SEDD_FIELD(grad_loss), SEDD_FIELD(gradient),
                           SEDD_FIELD(sweeps), SEDD_FIELD(out), SEDD_FIELD(neg_entropy), SEDD_FIELD(rows),
                           SEDD_FIELD(width), SEDD_FIELD(stride), SEDD_FIELD(first), SEDD_FIELD(begin), SEDD_FIELD(dim),
                           SEDD_FIELD(dtype), SEDD_FIELD(family));
}

constexpr auto fields_of(const MeanPredictionParams*) {
    using Struct = MeanPredictionParams;
    return std::make_tuple(SEDD_FIELD(logits), SEDD_FIELD(x_t), SEDD_FIELD(x_0), SEDD_FIELD(sigma), SEDD_FIELD(sigma_s),
                           SEDD_FIELD(stationary), SEDD_FIELD(grad_loss), SEDD_FIELD(numbers), SEDD_FIELD(row_logits),
                           SEDD_FIELD(row_sums), SEDD_FIELD(out), SEDD_FIELD(rows), SEDD_FIELD(width),
                           SEDD_FIELD(stride), SEDD_FIELD(first), SEDD_FIELD(dim), SEDD_FIELD(mask), SEDD_FIELD(dtype),
                           SEDD_FIELD(family), SEDD_FIELD(stage));
}

constexpr auto fields_of(const ReverseParams*) {
    using Struct = ReverseParams;
    return std::make_tuple(SEDD_FIELD(log_score), SEDD_FIELD(x_t), SEDD_FIELD(noise), SEDD_FIELD(shift),
                           SEDD_FIELD(stationary), SEDD_FIELD(out), SEDD_FIELD(seed), SEDD_FIELD(rows), SEDD_FIELD(dim),
                           SEDD_FIELD(forbidden), SEDD_FIELD(dtype), SEDD_FIELD(family), SEDD_FIELD(step));
}

constexpr auto fields_of(const ReverseTileParams*) {
    using Struct = ReverseTileParams;
    return std::make_tuple(SEDD_FIELD(log_score), SEDD_FIELD(x_t), SEDD_FIELD(noise), SEDD_FIELD(shift),
                           SEDD_FIELD(stationary), SEDD_FIELD(draws), SEDD_FIELD(sums), SEDD_FIELD(targets),
                           SEDD_FIELD(out), SEDD_FIELD(seed), SEDD_FIELD(row_ids), SEDD_FIELD(rows), SEDD_FIELD(width),
                           SEDD_FIELD(stride), SEDD_FIELD(first), SEDD_FIELD(dim), SEDD_FIELD(forbidden),
                           SEDD_FIELD(dtype), SEDD_FIELD(family), SEDD_FIELD(step), SEDD_FIELD(sweep));
}

constexpr auto fields_of(const ReverseChoiceParams*) {
    using Struct = ReverseChoiceParams;
    return std::make_tuple(SEDD_FIELD(sums), SEDD_FIELD(draws), SEDD_FIELD(targets), SEDD_FIELD(out), SEDD_FIELD(seed),
                           SEDD_FIELD(row_ids), SEDD_FIELD(rows), SEDD_FIELD(parts), SEDD_FIELD(width),
                           SEDD_FIELD(most), SEDD_FIELD(dim), SEDD_FIELD(sweep));
}

constexpr auto fields_of(const ReverseMeanParams*) {
    using Struct = ReverseMeanParams;
    return std::make_tuple(SEDD_FIELD(logits), SEDD_FIELD(x_t), SEDD_FIELD(noise), SEDD_FIELD(sigma),
                           SEDD_FIELD(stationary), SEDD_FIELD(cumulative), SEDD_FIELD(power), SEDD_FIELD(sums),
                           SEDD_FIELD(targets), SEDD_FIELD(out), SEDD_FIELD(seed), SEDD_FIELD(row_ids),
                           SEDD_FIELD(rows), SEDD_FIELD(width), SEDD_FIELD(stride), SEDD_FIELD(first), SEDD_FIELD(most),
                           SEDD_FIELD(dim), SEDD_FIELD(mask), SEDD_FIELD(forbidden), SEDD_FIELD(dtype),
                           SEDD_FIELD(family), SEDD_FIELD(step));
}

constexpr auto fields_of(const UnmaskParams*) {
    using Struct = UnmaskParams;
    return std::make_tuple(SEDD_FIELD(logits), SEDD_FIELD(states), SEDD_FIELD(out), SEDD_FIELD(argmax),
                           SEDD_FIELD(numbers), SEDD_FIELD(seed), SEDD_FIELD(row_ids), SEDD_FIELD(rows),
                           SEDD_FIELD(width), SEDD_FIELD(stride), SEDD_FIELD(first), SEDD_FIELD(dim), SEDD_FIELD(mask),
                           SEDD_FIELD(temperature), SEDD_FIELD(top_p), SEDD_FIELD(dtype));
}

constexpr auto fields_of(const TransitionParams*) {
    using Struct = TransitionParams;
    return std::make_tuple(SEDD_FIELD(x), SEDD_FIELD(sigma), SEDD_FIELD(stationary), SEDD_FIELD(cumulative),
                           SEDD_FIELD(out), SEDD_FIELD(seed), SEDD_FIELD(rows), SEDD_FIELD(dim), SEDD_FIELD(dtype),
                           SEDD_FIELD(family), SEDD_FIELD(first_row));
}

constexpr auto fields_of(const GeneralizedMaskedParams*) {
    using Struct = GeneralizedMaskedParams;
    return std::make_tuple(SEDD_FIELD(logits), SEDD_FIELD(power), SEDD_FIELD(x_t), SEDD_FIELD(x_0), SEDD_FIELD(t),
                           SEDD_FIELD(grad_loss), SEDD_FIELD(numbers), SEDD_FIELD(row_sums), SEDD_FIELD(out),
                           SEDD_FIELD(rows), SEDD_FIELD(width), SEDD_FIELD(stride), SEDD_FIELD(first), SEDD_FIELD(dim),
                           SEDD_FIELD(dtype), SEDD_FIELD(stage));
}

constexpr auto fields_of(const CpuLaunch*) {
    using Struct = CpuLaunch;
    return std::make_tuple(SEDD_FIELD(threads));
}

constexpr auto fields_of(const CudaLaunch*) {
    using Struct = CudaLaunch;
    return std::make_tuple(SEDD_FIELD(workspace), SEDD_FIELD(stream), SEDD_FIELD(device));
}

#undef SEDD_FIELD

template <class Struct>
constexpr auto kFields = fields_of(static_cast<const Struct*>(nullptr));

template <class Struct>
constexpr size_t kFieldCount = std::tuple_size_v<std::remove_const_t<decltype(kFields<Struct>)>>;

// Whether `Struct{...}` accepts this many values. It accepts at most as many as the struct has members.
struct AnyValue {
    template <class T>
    operator T() const;
};
template <class Struct, class Indices, class = void>
struct TakesValues : std::false_type {};
template <class Struct, size_t... kIndex>
struct TakesValues<Struct, std::index_sequence<kIndex...>,
                   std::void_t<decltype(Struct{(static_cast<void>(kIndex), AnyValue{})...})>> : std::true_type {};

template <class Struct>
constexpr bool kAllMembersListed = !TakesValues<Struct, std::make_index_sequence<kFieldCount<Struct> + 1>>::value;

// ---- values ----

// The address of a tensor. None gives null. An int is already an address.
inline bool to_address(PyObject* value, const char* name, void*& result) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    result = nullptr;
    if (value == Py_None) return true;
    if (PyLong_CheckExact(value)) {
        result = PyLong_AsVoidPtr(value);
        return !PyErr_Occurred();
    }
    PyObject* const address = PyObject_CallMethodObjArgs(value, data_ptr, nullptr);
    if (address == nullptr) {
        if (PyErr_ExceptionMatches(PyExc_AttributeError)) {
            PyErr_Clear();
            PyObject* const type = PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(value)), "__name__");
            if (type == nullptr) return false;
            PyErr_Format(PyExc_TypeError, "%s: expected a tensor, an address or None, got %S", name, type);
            Py_DECREF(type);
        }
        return false;
    }
    result = PyLong_AsVoidPtr(address);
    Py_DECREF(address);
    return !PyErr_Occurred();
}

template <class Value>
bool convert(PyObject* value, const char* name, Value& result) {
    if constexpr (std::is_pointer_v<Value>) {
        void* address;
        if (!to_address(value, name, address)) return false;
        result = static_cast<Value>(address);
        return true;
    } else if constexpr (std::is_floating_point_v<Value>) {
        result = PyFloat_AsDouble(value);
    } else {
        result = static_cast<Value>(PyLong_AsLongLong(value));
    }
    return !PyErr_Occurred();
}

// ---- a dict becomes structs ----

template <class Struct>
const std::array<PyObject*, kFieldCount<Struct>>& interned_names() {
    static const auto names = std::apply(
        [](const auto&... fields) { return std::array{PyUnicode_InternFromString(fields.name)...}; }, kFields<Struct>);
    return names;
}

// The names of the arguments, a new tuple.
template <class... Structs>
PyObject* argument_names() {
    PyObject* const names = PyTuple_New((kFieldCount<Structs> + ...));
    Py_ssize_t index = 0;
    const auto add = [&](const auto& interned) {
        for (PyObject* const name : interned) {
            Py_INCREF(name);
            PyTuple_SetItem(names, index++, name);
        }
    };
    if (names != nullptr) (add(interned_names<Structs>()), ...);
    return names;
}

// Reads the members for which Wanted<Value> is true from the dict.
template <template <class> class Wanted, class Struct>
bool read_members(PyObject* given, const char* kernel, Struct& result) {
    static_assert(kAllMembersListed<Struct>, "fields_of must list every member of the struct");
    const auto& names = interned_names<Struct>();
    size_t index = 0;
    const auto read = [&](const auto& field) {
        PyObject* const name = names[index++];
        using Value = std::remove_reference_t<decltype(result.*field.member)>;
        if constexpr (Wanted<Value>::value) {
            PyObject* const value = PyDict_GetItemWithError(given, name);
            if (value == nullptr) {
                if (!PyErr_Occurred()) {
                    PyErr_Format(PyExc_TypeError, "%s: expected an argument %s, got none", kernel, field.name);
                }
                return false;
            }
            return convert(value, field.name, result.*field.member);
        } else {
            return true;
        }
    };
    return std::apply([&](const auto&... fields) { return (read(fields) && ...); }, kFields<Struct>);
}

template <class>
using Every = std::true_type;
template <class Value>
using IsNumber = std::bool_constant<!std::is_pointer_v<Value>>;

inline bool is_dict(PyObject* given, const char* kernel) {
    if (PyDict_Check(given)) return true;
    PyErr_Format(PyExc_TypeError, "%s: expected a dict of its arguments", kernel);
    return false;
}

// Sets the error for a name that the kernel does not have. Takes the tuple of those that it has.
inline void refuse_unknown(PyObject* given, const char* kernel, PyObject* expected) {
    PyObject* const comma = PyUnicode_FromString(", ");
    PyObject* const list = comma && expected ? PyUnicode_Join(comma, expected) : nullptr;
    PyObject* name;
    PyObject* value;
    Py_ssize_t position = 0;
    while (list != nullptr && PyDict_Next(given, &position, &name, &value)) {
        if (PySequence_Contains(expected, name) == 0) {
            PyErr_Format(PyExc_TypeError, "%s: expected the arguments %S; got %S too", kernel, list, name);
            break;
        }
    }
    Py_XDECREF(list);
    Py_XDECREF(comma);
    Py_XDECREF(expected);
}

// Reads the members of the structs from a dict, which must have exactly their names.
template <class... Structs>
bool read_arguments(PyObject* given, const char* kernel, Structs&... results) {
    if (!is_dict(given, kernel) || !(read_members<Every>(given, kernel, results) && ...)) return false;
    if (PyDict_Size(given) != static_cast<Py_ssize_t>((kFieldCount<Structs> + ...))) {
        refuse_unknown(given, kernel, argument_names<Structs...>());
        return false;
    }
    return true;
}

// ---- the module ----

// Calls a function without Python's lock; false after a C++ exception, which becomes Python's error.
template <class Function>
bool without_lock(const Function& function) {
    PyThreadState* const thread = PyEval_SaveThread();
    try {
        function();
    } catch (const std::bad_alloc&) {
        PyEval_RestoreThread(thread);
        PyErr_NoMemory();
        return false;
    } catch (const std::exception& error) {
        PyEval_RestoreThread(thread);
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return false;
    }
    PyEval_RestoreThread(thread);
    return true;
}

// Adds a new object to a module or another object under a name, and releases it. False if it is null.
inline bool add(PyObject* to, const char* name, PyObject* value) {
    const bool added = value != nullptr && PyObject_SetAttrString(to, name, value) == 0;
    Py_XDECREF(value);
    return added;
}

// The same for a dict.
inline bool add_item(PyObject* dict, const char* name, PyObject* value) {
    const bool added = value != nullptr && PyDict_SetItemString(dict, name, value) == 0;
    Py_XDECREF(value);
    return added;
}

// Adds NAME_cuda(arguments) to the module for every kernel, NAME_workspace(arguments), which returns the bytes of
// workspace that the kernel needs, and the names of the arguments to cuda_arguments.
bool add_cuda(PyObject* module);

}  // namespace sedd

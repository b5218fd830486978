// The arguments of a kernel, by name: a Python dict becomes the kernel's parameter struct. Shared by the bindings of
// the CPU and of the CUDA kernels. No Torch header, so that any version of torch fits.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <string>
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
inline void* to_address(PyObject* value, const char* name) {
    static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
    if (value == Py_None) return nullptr;
    if (PyLong_CheckExact(value)) return PyLong_AsVoidPtr(value);
    PyObject* const address = PyObject_CallMethodNoArgs(value, data_ptr);
    if (address == nullptr) {
        pybind11::raise_from(
            PyExc_TypeError,
            (std::string(name) + ": expected a tensor, an address or None, got " + Py_TYPE(value)->tp_name).c_str());
        return nullptr;
    }
    void* const result = PyLong_AsVoidPtr(address);
    Py_DECREF(address);
    return result;
}

template <class Value>
void convert(PyObject* value, const char* name, Value& result) {
    if constexpr (std::is_pointer_v<Value>) {
        result = static_cast<Value>(to_address(value, name));
    } else if constexpr (std::is_floating_point_v<Value>) {
        result = PyFloat_AsDouble(value);
    } else {
        result = static_cast<Value>(PyLong_AsLongLong(value));
    }
    if (PyErr_Occurred()) throw pybind11::error_already_set();
}

// ---- a dict becomes structs ----

template <class Struct>
const std::array<PyObject*, kFieldCount<Struct>>& interned_names() {
    static const auto names = std::apply(
        [](const auto&... fields) { return std::array{PyUnicode_InternFromString(fields.name)...}; }, kFields<Struct>);
    return names;
}

template <class... Structs>
pybind11::tuple argument_names() {
    pybind11::list names;
    const auto add = [&](const auto& fields) {
        std::apply([&](const auto&... field) { (names.append(field.name), ...); }, fields);
    };
    (add(kFields<Structs>), ...);
    return pybind11::tuple(names);
}

// Reads the members for which kWanted<Value> is true from the dict.
template <template <class> class Wanted, class Struct>
void read_members(const pybind11::dict& given, const char* kernel, Struct& result) {
    static_assert(kAllMembersListed<Struct>, "fields_of must list every member of the struct");
    const auto& names = interned_names<Struct>();
    size_t index = 0;
    const auto read = [&](const auto& field) {
        PyObject* const name = names[index++];
        using Value = std::remove_reference_t<decltype(result.*field.member)>;
        if constexpr (Wanted<Value>::value) {
            PyObject* const value = PyDict_GetItemWithError(given.ptr(), name);
            if (value == nullptr) {
                if (PyErr_Occurred()) throw pybind11::error_already_set();
                throw pybind11::type_error(std::string(kernel) + ": expected an argument " + field.name + ", got none");
            }
            convert(value, field.name, result.*field.member);
        }
    };
    std::apply([&](const auto&... fields) { (read(fields), ...); }, kFields<Struct>);
}

template <class>
using Every = std::true_type;
template <class Value>
using IsNumber = std::bool_constant<!std::is_pointer_v<Value>>;

[[noreturn]] inline void refuse_unknown(const pybind11::dict& given, const char* kernel,
                                        const pybind11::tuple& expected) {
    for (const auto& item : given) {
        if (!expected.contains(item.first)) {
            throw pybind11::type_error(std::string(kernel) + ": expected the arguments " +
                                       pybind11::str(pybind11::str(", ").attr("join")(expected)).cast<std::string>() +
                                       "; got " + pybind11::str(item.first).cast<std::string>() + " too");
        }
    }
    throw pybind11::type_error(std::string(kernel) + ": expected each argument once");
}

// Reads the members of the structs from a dict, which must have exactly their names.
template <class... Structs>
void read_arguments(const pybind11::dict& given, const char* kernel, Structs&... results) {
    (read_members<Every>(given, kernel, results), ...);
    if (given.size() != (kFieldCount<Structs> + ...)) {
        refuse_unknown(given, kernel, argument_names<Structs...>());
    }
}

// Adds name_cuda(arguments) to the module for every kernel, name_workspace(arguments), which returns the bytes of
// workspace that the kernel needs, and the names of the arguments to cuda_arguments.
void bind_cuda(pybind11::module_& m);

}  // namespace sedd

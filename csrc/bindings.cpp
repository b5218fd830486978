// The Python module: the CPU launchers, which return the first bad row; the codes of arguments; and how it was built.
#include "bindings.h"

#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace {

// ---- the kernels ----

template <class Params>
using Launcher = sedd::Status (*)(const Params&, int);

// The result is (fault, row); fault is 0 if all rows are good.
template <class Params>
PyObject* launch(PyObject* given, const char* kernel, Launcher<Params> launcher) {
    Params params;
    sedd::CpuLaunch where;
    if (!sedd::read_arguments(given, kernel, params, where)) return nullptr;
    sedd::Status status;
    if (!sedd::without_lock([&] { status = launcher(params, where.threads); })) return nullptr;
    return Py_BuildValue("(iL)", static_cast<int>(status.fault), static_cast<long long>(status.row));
}

template <class Params>
PyObject* names_of(Launcher<Params>) {
    return sedd::argument_names<Params, sedd::CpuLaunch>();
}

struct Kernel {
    PyMethodDef run;
    PyObject* (*names)();
};

#define SEDD_KERNEL(name)                                                                                   \
    {{#name, [](PyObject*, PyObject* given) { return launch(given, #name, sedd::name##_cpu); }, METH_O, 0}, \
     [] { return names_of(sedd::name##_cpu); }}

Kernel kernels[] = {
    SEDD_KERNEL(score_entropy),
    SEDD_KERNEL(score_entropy_backward),
    SEDD_KERNEL(score_entropy_tile),
    SEDD_KERNEL(mean_prediction),
    SEDD_KERNEL(mean_prediction_backward),
    SEDD_KERNEL(transition_column),
    SEDD_KERNEL(transition_row),
    SEDD_KERNEL(sample_transition),
    SEDD_KERNEL(reverse_probs),
    SEDD_KERNEL(reverse_sample),
    SEDD_KERNEL(reverse_tile),
    SEDD_KERNEL(reverse_choose),
    SEDD_KERNEL(reverse_mean_probs),
    SEDD_KERNEL(reverse_mean_sample),
    SEDD_KERNEL(reverse_mean_choose),
    SEDD_KERNEL(unmask),
    SEDD_KERNEL(generalized_masked),
    SEDD_KERNEL(generalized_masked_backward),
    SEDD_KERNEL(generalized_masked_power),
};

bool add_kernels(PyObject* module) {
    PyObject* const arguments = PyDict_New();
    if (!sedd::add(module, "arguments", arguments)) return false;
    for (Kernel& kernel : kernels) {
        if (!sedd::add(module, kernel.run.ml_name, PyCFunction_New(&kernel.run, nullptr))) return false;
        if (!sedd::add_item(arguments, kernel.run.ml_name, kernel.names())) return false;
    }
    return true;
}

// ---- other functions ----

// Asks for huge pages for a buffer before its first write, because page faults of 4 KiB pages take longer than
// computing the gradient that is written. This is a hint; errors are ignored.
PyObject* advise_huge_pages(PyObject*, PyObject* arguments) {
    unsigned long long address;
    long long bytes;
    if (!PyArg_ParseTuple(arguments, "KL", &address, &bytes)) return nullptr;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr unsigned long long huge = 2ull << 20;
    const unsigned long long begin = (address + huge - 1) / huge * huge;
    const unsigned long long end = (address + static_cast<unsigned long long>(bytes)) / huge * huge;
    if (begin < end) madvise(reinterpret_cast<void*>(static_cast<uintptr_t>(begin)), end - begin, MADV_HUGEPAGE);
#endif
    Py_RETURN_NONE;
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_FromString(sedd::kernels().isa); }

PyObject* available_isas(PyObject*, PyObject*) {
    const char* names[8];
    PyObject* const list = PyList_New(0);
    const int count = sedd::available_isas(names, 8);
    for (int i = 0; i < count && list != nullptr; ++i) {
        PyObject* const name = PyUnicode_FromString(names[i]);
        const bool added = name != nullptr && PyList_Append(list, name) == 0;
        Py_XDECREF(name);
        if (!added) {
            Py_DECREF(list);
            return nullptr;
        }
    }
    return list;
}

PyObject* select_isa(PyObject*, PyObject* arguments) {
    const char* name;
    if (!PyArg_ParseTuple(arguments, "s", &name)) return nullptr;
    if (!sedd::select_isa(name)) {
        return PyErr_Format(PyExc_ValueError, "isa: '%s' was not built or does not run on this machine", name);
    }
    Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"advise_huge_pages", advise_huge_pages, METH_VARARGS, nullptr},
    {"isa", isa, METH_NOARGS, nullptr},
    {"available_isas", available_isas, METH_NOARGS, nullptr},
    {"select_isa", select_isa, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

// ---- constants ----

// Adds the codes of an enumeration, by name.
template <class Enum>
bool add_codes(PyObject* module, const char* name, std::initializer_list<std::pair<const char*, Enum>> values) {
    PyObject* const codes = PyDict_New();
    if (!sedd::add(module, name, codes)) return false;
    for (const auto& [key, value] : values) {
        if (!sedd::add_item(codes, key, PyLong_FromLong(static_cast<long>(value)))) return false;
    }
    return true;
}

// Adds how many float64 numbers a struct takes in a tensor.
template <class Struct>
bool add_numbers(PyObject* module, const char* name) {
    return PyModule_AddIntConstant(module, name, sizeof(Struct) / sizeof(double)) == 0;
}

bool add_constants(PyObject* m) {
    using sedd::DType;
    using sedd::Family;
    using sedd::Fault;
    using sedd::MeanStep;
    using sedd::Stage;
    using sedd::Step;
    return PyModule_AddStringConstant(m, "__version__", SEDD_VERSION) == 0 &&
           PyModule_AddStringConstant(m, "cuda", SEDD_CUDA_VERSION) == 0 &&  // "" without CUDA kernels
           PyModule_AddStringConstant(m, "compiler", SEDD_COMPILER) == 0 &&
           sedd::add(m, "least_noise", PyFloat_FromDouble(sedd::kLeastNoise)) &&
           sedd::add(m, "step_slack", PyFloat_FromDouble(sedd::kStepSlack)) &&
           sedd::add(m, "sweep_again", PyLong_FromLongLong(sedd::kSweepAgain)) &&
           add_numbers<sedd::ReverseDraw>(m, "reverse_draw_numbers") &&
           add_numbers<sedd::UnmaskState>(m, "unmask_state_numbers") &&
           add_numbers<sedd::UnmaskNumbers>(m, "unmask_numbers") &&
           add_numbers<sedd::MeanSums>(m, "mean_sums_numbers") &&
           add_numbers<sedd::ScoreEntropySweep>(m, "score_entropy_sweep_numbers") &&
           add_numbers<sedd::MeanPredictionGradient>(m, "mean_prediction_numbers") &&
           add_numbers<sedd::MeanPredictionLogits>(m, "mean_prediction_logits") &&
           add_numbers<sedd::MeanPredictionSums>(m, "mean_prediction_sums") &&
           add_numbers<sedd::GeneralizedMaskedSums>(m, "generalized_masked_sums") &&
           add_numbers<sedd::GeneralizedMaskedRow>(m, "generalized_masked_row_numbers") &&
           add_codes<DType>(m, "dtypes",
                            {{"float32", DType::float32},
                             {"float64", DType::float64},
                             {"bfloat16", DType::bfloat16},
                             {"float16", DType::float16}}) &&
           add_codes<Family>(
               m, "families",
               {{"absorbing", Family::absorbing}, {"uniform", Family::uniform}, {"rank_one", Family::rank_one}}) &&
           add_codes<Step>(m, "steps", {{"euler", Step::euler}, {"tweedie", Step::tweedie}}) &&
           add_codes<MeanStep>(m, "mean_steps",
                               {{"euler", MeanStep::euler},
                                {"tweedie", MeanStep::tweedie},
                                {"generalized_masked", MeanStep::generalized_masked}}) &&
           add_codes<Stage>(
               m, "stages",
               {{"whole", Stage::whole}, {"logits", Stage::logits}, {"sums", Stage::sums}, {"loss", Stage::loss}}) &&
           add_codes<Fault>(m, "faults",
                            {{"x_t", Fault::x_t},
                             {"x_0", Fault::x_0},
                             {"sigma", Fault::sigma},
                             {"total", Fault::total},
                             {"sigma_s", Fault::sigma_s},
                             {"noise", Fault::noise}});
}

PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Kernels of sedd_ext. Private: the Python modules of the package check the tensors.",
    -1,
    functions,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
    PyObject* const module = PyModule_Create(&definition);
    if (module == nullptr) return nullptr;
    bool complete = add_constants(module) && add_kernels(module);
#if defined(SEDD_HAS_CUDA)
    complete = complete && sedd::add_cuda(module);
#endif
    if (complete) return module;
    Py_DECREF(module);
    return nullptr;
}

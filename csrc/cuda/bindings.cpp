// Python: the CUDA launchers, which return None or the error message of the CUDA runtime. An ordinary C++ file
// without headers of CUDA: tests/cuda_on_cpu compiles it too.
#include "bindings.h"

namespace sedd {
namespace {

template <class Params>
int64_t columns(const Params& p) {
    return p.dim;
}
int64_t columns(const ScoreEntropyTileParams& p) { return p.width; }
int64_t columns(const ReverseTileParams& p) { return p.width; }
int64_t columns(const UnmaskParams& p) { return p.width; }
int64_t columns(const MeanPredictionParams& p) { return p.width; }
int64_t columns(const GeneralizedMaskedParams& p) { return p.width; }

template <class Params>
DType dtype_of(const Params& p) {
    return p.dtype;
}
DType dtype_of(const ReverseChoiceParams&) { return DType::float64; }

int64_t none(int64_t, int64_t, DType) { return 0; }

template <class Params>
using Launcher = const char* (*)(const Params&, const CudaLaunch&);
using Workspace = int64_t (*)(int64_t rows, int64_t columns, DType dtype);

template <class Params>
PyObject* launch(PyObject* given, const char* kernel, Launcher<Params> launcher) {
    Params params;
    CudaLaunch where;
    if (!read_arguments(given, kernel, params, where)) return nullptr;
    const char* error = nullptr;
    if (!without_lock([&] { error = launcher(params, where); })) return nullptr;
    if (error != nullptr) return PyUnicode_FromString(error);
    Py_RETURN_NONE;
}

// Takes the launcher for the type of its parameters only.
template <class Params>
PyObject* bytes_of(PyObject* given, const char* kernel, Launcher<Params>, Workspace workspace) {
    Params params;
    if (!is_dict(given, kernel) || !read_members<IsNumber>(given, kernel, params)) return nullptr;
    return PyLong_FromLongLong(workspace(params.rows, columns(params), dtype_of(params)));
}

template <class Params>
PyObject* names_of(Launcher<Params>) {
    return argument_names<Params, CudaLaunch>();
}

struct Kernel {
    const char* name;
    PyMethodDef run;
    PyMethodDef workspace;
    PyObject* (*names)();
};

#define SEDD_KERNEL(name, workspace)                                                                                 \
    {#name,                                                                                                          \
     {#name "_cuda", [](PyObject*, PyObject* given) { return launch(given, #name, name##_cuda); }, METH_O, 0},       \
     {#name "_workspace", [](PyObject*, PyObject* given) { return bytes_of(given, #name, name##_cuda, workspace); }, \
      METH_O, 0},                                                                                                    \
     [] { return names_of(name##_cuda); }}

Kernel kernels[] = {
    SEDD_KERNEL(score_entropy, score_entropy_workspace),
    SEDD_KERNEL(score_entropy_backward, score_entropy_backward_workspace),
    SEDD_KERNEL(score_entropy_tile, score_entropy_tile_workspace),
    SEDD_KERNEL(mean_prediction, mean_prediction_workspace),
    SEDD_KERNEL(mean_prediction_backward, none),
    SEDD_KERNEL(transition_column, transition_workspace),
    SEDD_KERNEL(transition_row, transition_workspace),
    SEDD_KERNEL(sample_transition, none),
    SEDD_KERNEL(reverse_probs, reverse_workspace),
    SEDD_KERNEL(reverse_sample, reverse_workspace),
    SEDD_KERNEL(reverse_tile, none),
    SEDD_KERNEL(reverse_choose, none),
    SEDD_KERNEL(reverse_mean_probs, none),
    SEDD_KERNEL(reverse_mean_sample, none),
    SEDD_KERNEL(reverse_mean_choose, none),
    SEDD_KERNEL(unmask, none),
    SEDD_KERNEL(generalized_masked, generalized_masked_workspace),
    SEDD_KERNEL(generalized_masked_backward, generalized_masked_backward_workspace),
    SEDD_KERNEL(generalized_masked_power, generalized_masked_power_workspace),
};

}  // namespace

bool add_cuda(PyObject* module) {
    PyObject* const arguments = PyDict_New();
    if (!add(module, "cuda_arguments", arguments)) return false;
    for (Kernel& kernel : kernels) {
        if (!add(module, kernel.run.ml_name, PyCFunction_New(&kernel.run, nullptr))) return false;
        if (!add(module, kernel.workspace.ml_name, PyCFunction_New(&kernel.workspace, nullptr))) return false;
        if (!add_item(arguments, kernel.name, kernel.names())) return false;
    }
    return true;
}

}  // namespace sedd

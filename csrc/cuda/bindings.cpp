// pybind11: the CUDA launchers, which return None or the error message of the CUDA runtime. An ordinary C++ file
// without headers of CUDA: tests/cuda_on_cpu compiles it too.
#include "bindings.h"

namespace py = pybind11;

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
void bind(py::module_& m, const char* name, const char* (*launch)(const Params&, const CudaLaunch&),
          int64_t (*workspace)(int64_t rows, int64_t columns, DType dtype)) {
    m.def((std::string(name) + "_cuda").c_str(), [name, launch](const py::dict& arguments) {
        Params params;
        CudaLaunch where;
        read_arguments(arguments, name, params, where);
        const py::gil_scoped_release release;
        return launch(params, where);
    });
    m.def((std::string(name) + "_workspace").c_str(), [name, workspace](const py::dict& arguments) {
        Params params;
        read_members<IsNumber>(arguments, name, params);
        return workspace(params.rows, columns(params), dtype_of(params));
    });
    m.attr("cuda_arguments")[name] = argument_names<Params, CudaLaunch>();
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.attr("cuda_arguments") = py::dict();
    bind(m, "score_entropy", score_entropy_cuda, score_entropy_workspace);
    bind(m, "score_entropy_backward", score_entropy_backward_cuda, score_entropy_backward_workspace);
    bind(m, "score_entropy_tile", score_entropy_tile_cuda, score_entropy_tile_workspace);
    bind(m, "mean_prediction", mean_prediction_cuda, mean_prediction_workspace);
    bind(m, "mean_prediction_backward", mean_prediction_backward_cuda, none);
    bind(m, "transition_column", transition_column_cuda, transition_workspace);
    bind(m, "transition_row", transition_row_cuda, transition_workspace);
    bind(m, "sample_transition", sample_transition_cuda, none);
    bind(m, "reverse_probs", reverse_probs_cuda, reverse_workspace);
    bind(m, "reverse_sample", reverse_sample_cuda, reverse_workspace);
    bind(m, "reverse_tile", reverse_tile_cuda, none);
    bind(m, "reverse_choose", reverse_choose_cuda, none);
    bind(m, "reverse_mean_probs", reverse_mean_probs_cuda, none);
    bind(m, "reverse_mean_sample", reverse_mean_sample_cuda, none);
    bind(m, "reverse_mean_choose", reverse_mean_choose_cuda, none);
    bind(m, "unmask", unmask_cuda, none);
    bind(m, "generalized_masked", generalized_masked_cuda, generalized_masked_workspace);
    bind(m, "generalized_masked_backward", generalized_masked_backward_cuda, generalized_masked_backward_workspace);
    bind(m, "generalized_masked_power", generalized_masked_power_cuda, generalized_masked_power_workspace);
}

}  // namespace sedd

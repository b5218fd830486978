// pybind11: the CUDA launchers. They give back None, or what the CUDA runtime said. An ordinary C++ file without CUDA's
// headers: tests/cuda_on_cpu makes a module of it too.
#include "bindings.h"

namespace py = pybind11;

namespace sedd {
namespace {

template <auto kLaunch>
struct Cuda {
    template <class Params>
    const char* operator()(const Params& params, uintptr_t workspace, uintptr_t stream, int device) const {
        const py::gil_scoped_release release;
        return kLaunch(params, CudaLaunch{pointer(workspace), pointer(stream), device});
    }
};

template <auto kBytes>
int64_t workspace(int64_t rows, int64_t dim, int dtype) {
    return kBytes(rows, dim, static_cast<DType>(dtype));
}

int64_t none(int64_t, int64_t, DType) { return 0; }

}  // namespace

void bind_cuda(py::module_& m) {
    using Address = uintptr_t;
    m.def("score_entropy_cuda", bind_score_entropy<Cuda<score_entropy_cuda>, Address, Address, int>);
    m.def("score_entropy_backward_cuda", bind_score_entropy<Cuda<score_entropy_backward_cuda>, Address, Address, int>);
    m.def("score_entropy_tile_cuda", bind_score_entropy_tile<Cuda<score_entropy_tile_cuda>, Address, Address, int>);
    m.def("transition_column_cuda", bind_transition<Cuda<transition_column_cuda>, Address, Address, int>);
    m.def("transition_row_cuda", bind_transition<Cuda<transition_row_cuda>, Address, Address, int>);
    m.def("sample_transition_cuda", bind_transition<Cuda<sample_transition_cuda>, Address, Address, int>);
    m.def("reverse_probs_cuda", bind_reverse<Cuda<reverse_probs_cuda>, Address, Address, int>);
    m.def("reverse_sample_cuda", bind_reverse<Cuda<reverse_sample_cuda>, Address, Address, int>);
    m.def("reverse_tile_cuda", bind_reverse_tile<Cuda<reverse_tile_cuda>, Address, Address, int>);
    m.def("score_entropy_workspace", workspace<score_entropy_workspace>);
    m.def("score_entropy_backward_workspace", workspace<score_entropy_backward_workspace>);
    m.def("score_entropy_tile_workspace", workspace<score_entropy_tile_workspace>);
    m.def("transition_column_workspace", workspace<transition_workspace>);
    m.def("transition_row_workspace", workspace<transition_workspace>);
    m.def("sample_transition_workspace", workspace<none>);
    m.def("reverse_probs_workspace", workspace<reverse_workspace>);
    m.def("reverse_sample_workspace", workspace<reverse_workspace>);
    m.def("reverse_tile_workspace", workspace<none>);
}

}  // namespace sedd

// pybind11: the CPU's launchers, which give back the first bad row, and what was built.
#include "bindings.h"

#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

using sedd::pointer;

// (fault, row): 0 when all rows were good.
template <auto kLaunch>
struct Cpu {
    template <class Params>
    py::tuple operator()(const Params& params, int threads) const {
        sedd::Status status;
        {
            const py::gil_scoped_release release;
            status = kLaunch(params, threads);
        }
        return py::make_tuple(static_cast<int>(status.fault), status.row);
    }
};

// Asks for huge pages under a buffer that is about to be written for the first time: faulting in 4 KiB pages costs more
// than the gradient that goes into them. A hint only; what the system says is not looked at.
void advise_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t{2} << 20;
    const uintptr_t begin = (address + huge - 1) / huge * huge;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / huge * huge;
    if (begin < end) madvise(pointer(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)address, (void)bytes;
#endif
}

py::list available_isas() {
    const char* names[8];
    py::list list;
    const int count = sedd::available_isas(names, 8);
    for (int i = 0; i < count; ++i) list.append(names[i]);
    return list;
}

void select_isa(const std::string& name) {
    if (!sedd::select_isa(name.c_str())) {
        throw std::invalid_argument("isa: '" + name + "' was not built or does not run on this machine");
    }
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of sedd_ext. Private: addresses are not checked here but in the package's Python modules.";
    m.attr("__version__") = SEDD_VERSION;
    m.attr("cuda") = SEDD_CUDA_VERSION;  // "" without CUDA kernels
    m.attr("compiler") = SEDD_COMPILER;
    m.attr("least_noise") = sedd::kLeastNoise;
    m.attr("reverse_draw_numbers") = sizeof(sedd::ReverseDraw) / sizeof(double);  // rows of them lie in float64 tensors
    m.attr("score_entropy_sweep_numbers") = sizeof(sedd::ScoreEntropySweep) / sizeof(double);
    m.def("score_entropy", sedd::bind_score_entropy<Cpu<sedd::score_entropy_cpu>, int>);
    m.def("score_entropy_backward", sedd::bind_score_entropy<Cpu<sedd::score_entropy_backward_cpu>, int>);
    m.def("score_entropy_tile", sedd::bind_score_entropy_tile<Cpu<sedd::score_entropy_tile_cpu>, int>);
    m.def("transition_column", sedd::bind_transition<Cpu<sedd::transition_column_cpu>, int>);
    m.def("transition_row", sedd::bind_transition<Cpu<sedd::transition_row_cpu>, int>);
    m.def("sample_transition", sedd::bind_transition<Cpu<sedd::sample_transition_cpu>, int>);
    m.def("reverse_probs", sedd::bind_reverse<Cpu<sedd::reverse_probs_cpu>, int>);
    m.def("reverse_sample", sedd::bind_reverse<Cpu<sedd::reverse_sample_cpu>, int>);
    m.def("reverse_tile", sedd::bind_reverse_tile<Cpu<sedd::reverse_tile_cpu>, int>);
    m.def("advise_huge_pages", advise_huge_pages);
    m.def("isa", [] { return sedd::kernels().isa; });
    m.def("available_isas", available_isas);
    m.def("select_isa", select_isa);
#if defined(SEDD_HAS_CUDA)
    sedd::bind_cuda(m);
#endif
}

// pybind11: raw pointers, sizes and codes in, the first bad row out. No Torch header: any torch's tensors fit.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"
#include "reverse.h"
#include "score_entropy.h"
#include "transition.h"

namespace py = pybind11;

namespace {

using sedd::Status;

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// (fault, row): 0 when all rows were good.
template <class Launch>
py::tuple without_gil(const Launch& launch) {
    Status status;
    {
        const py::gil_scoped_release release;
        status = launch();
    }
    return py::make_tuple(static_cast<int>(status.fault), status.row);
}

template <Status (*kLaunch)(const sedd::ScoreEntropyParams&, int)>
py::tuple score_entropy(uintptr_t log_score, uintptr_t x_t, uintptr_t x_0, uintptr_t sigma, uintptr_t shift,
                        uintptr_t stationary, uintptr_t grad_loss, uintptr_t out, double neg_entropy, int64_t rows,
                        int64_t dim, int dtype, int process, int threads) {
    const sedd::ScoreEntropyParams p{pointer(log_score),
                                     pointer<int64_t>(x_t),
                                     pointer<int64_t>(x_0),
                                     pointer<double>(sigma),
                                     pointer<double>(shift),
                                     pointer(stationary),
                                     pointer(grad_loss),
                                     pointer(out),
                                     neg_entropy,
                                     rows,
                                     dim,
                                     static_cast<sedd::DType>(dtype),
                                     static_cast<sedd::Process>(process)};
    return without_gil([&] { return kLaunch(p, threads); });
}

template <Status (*kLaunch)(const sedd::TransitionParams&, int)>
py::tuple transition(uintptr_t x, uintptr_t sigma, uintptr_t stationary, uintptr_t cumulative, uintptr_t out,
                     int64_t seed, int64_t rows, int64_t dim, int dtype, int process, int threads) {
    const sedd::TransitionParams p{pointer<int64_t>(x),
                                   pointer<double>(sigma),
                                   pointer(stationary),
                                   pointer<double>(cumulative),
                                   pointer(out),
                                   static_cast<uint64_t>(seed),
                                   rows,
                                   dim,
                                   static_cast<sedd::DType>(dtype),
                                   static_cast<sedd::Process>(process)};
    return without_gil([&] { return kLaunch(p, threads); });
}

template <Status (*kLaunch)(const sedd::ReverseParams&, int)>
py::tuple reverse(uintptr_t log_score, uintptr_t x_t, uintptr_t step, uintptr_t shift, uintptr_t stationary,
                  uintptr_t out, int64_t seed, int64_t rows, int64_t dim, int64_t forbidden, int dtype, int process,
                  int kind, int threads) {
    const sedd::ReverseParams p{pointer(log_score),
                                pointer<int64_t>(x_t),
                                pointer<double>(step),
                                pointer<double>(shift),
                                pointer(stationary),
                                pointer(out),
                                static_cast<uint64_t>(seed),
                                rows,
                                dim,
                                forbidden,
                                static_cast<sedd::DType>(dtype),
                                static_cast<sedd::Process>(process),
                                static_cast<sedd::Step>(kind)};
    return without_gil([&] { return kLaunch(p, threads); });
}

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
    m.def("score_entropy", score_entropy<sedd::score_entropy_cpu>);
    m.def("score_entropy_backward", score_entropy<sedd::score_entropy_backward_cpu>);
    m.def("transition_column", transition<sedd::transition_column_cpu>);
    m.def("transition_row", transition<sedd::transition_row_cpu>);
    m.def("sample_transition", transition<sedd::sample_transition_cpu>);
    m.def("reverse_probs", reverse<sedd::reverse_probs_cpu>);
    m.def("reverse_sample", reverse<sedd::reverse_sample_cpu>);
    m.def("advise_huge_pages", advise_huge_pages);
    m.def("isa", [] { return sedd::kernels().isa; });
    m.def("available_isas", available_isas);
    m.def("select_isa", select_isa);
}

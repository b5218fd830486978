// pybind11: the CPU launchers, which return the first bad row; the codes of arguments; and how the module was built.
#include "bindings.h"

#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

// Binds a launcher of the CPU. The result is (fault, row); fault is 0 if all rows are good.
template <class Params>
void bind(py::module_& m, const char* name, sedd::Status (*launch)(const Params&, int)) {
    m.def(name, [name, launch](const py::dict& arguments) {
        Params params;
        sedd::CpuLaunch where;
        sedd::read_arguments(arguments, name, params, where);
        sedd::Status status;
        {
            const py::gil_scoped_release release;
            status = launch(params, where.threads);
        }
        return py::make_tuple(static_cast<int>(status.fault), status.row);
    });
    m.attr("arguments")[name] = sedd::argument_names<Params, sedd::CpuLaunch>();
}

// The codes of an enumeration, by name.
template <class Enum>
py::dict codes(std::initializer_list<std::pair<const char*, Enum>> values) {
    py::dict result;
    for (const auto& [name, value] : values) result[name] = static_cast<int>(value);
    return result;
}

// Asks for huge pages for a buffer before its first write, because page faults of 4 KiB pages take longer than
// computing the gradient that is written. This is a hint; errors are ignored.
void advise_huge_pages(uintptr_t address, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t huge = uintptr_t{2} << 20;
    const uintptr_t begin = (address + huge - 1) / huge * huge;
    const uintptr_t end = (address + static_cast<uintptr_t>(bytes)) / huge * huge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
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
    using sedd::DType;
    using sedd::Family;
    using sedd::Fault;
    using sedd::MeanStep;
    using sedd::Stage;
    using sedd::Step;
    m.doc() = "Kernels of sedd_ext. Private: the Python modules of the package check the tensors.";
    m.attr("__version__") = SEDD_VERSION;
    m.attr("cuda") = SEDD_CUDA_VERSION;  // "" without CUDA kernels
    m.attr("compiler") = SEDD_COMPILER;
    m.attr("least_noise") = sedd::kLeastNoise;
    // sizes of structs in float64 tensors
    m.attr("reverse_draw_numbers") = sizeof(sedd::ReverseDraw) / sizeof(double);
    m.attr("unmask_state_numbers") = sizeof(sedd::UnmaskState) / sizeof(double);
    m.attr("unmask_numbers") = sizeof(sedd::UnmaskNumbers) / sizeof(double);
    m.attr("mean_sums_numbers") = sizeof(sedd::MeanSums) / sizeof(double);
    m.attr("score_entropy_sweep_numbers") = sizeof(sedd::ScoreEntropySweep) / sizeof(double);
    m.attr("mean_prediction_numbers") = sizeof(sedd::MeanPredictionGradient) / sizeof(double);
    m.attr("mean_prediction_logits") = sizeof(sedd::MeanPredictionLogits) / sizeof(double);
    m.attr("mean_prediction_sums") = sizeof(sedd::MeanPredictionSums) / sizeof(double);
    m.attr("generalized_masked_sums") = sizeof(sedd::GeneralizedMaskedSums) / sizeof(double);
    m.attr("generalized_masked_row_numbers") = sizeof(sedd::GeneralizedMaskedRow) / sizeof(double);
    m.attr("sweep_again") = sedd::kSweepAgain;
    m.attr("dtypes") = codes<DType>({{"float32", DType::float32},
                                     {"float64", DType::float64},
                                     {"bfloat16", DType::bfloat16},
                                     {"float16", DType::float16}});
    m.attr("families") =
        codes<Family>({{"absorbing", Family::absorbing}, {"uniform", Family::uniform}, {"rank_one", Family::rank_one}});
    m.attr("steps") = codes<Step>({{"euler", Step::euler}, {"tweedie", Step::tweedie}});
    m.attr("mean_steps") = codes<MeanStep>({{"euler", MeanStep::euler},
                                            {"tweedie", MeanStep::tweedie},
                                            {"generalized_masked", MeanStep::generalized_masked}});
    m.attr("stages") = codes<Stage>(
        {{"whole", Stage::whole}, {"logits", Stage::logits}, {"sums", Stage::sums}, {"loss", Stage::loss}});
    m.attr("step_slack") = sedd::kStepSlack;
    m.attr("faults") = codes<Fault>({{"x_t", Fault::x_t},
                                     {"x_0", Fault::x_0},
                                     {"sigma", Fault::sigma},
                                     {"total", Fault::total},
                                     {"sigma_s", Fault::sigma_s},
                                     {"noise", Fault::noise}});
    m.attr("arguments") = py::dict();
    bind(m, "score_entropy", sedd::score_entropy_cpu);
    bind(m, "score_entropy_backward", sedd::score_entropy_backward_cpu);
    bind(m, "score_entropy_tile", sedd::score_entropy_tile_cpu);
    bind(m, "mean_prediction", sedd::mean_prediction_cpu);
    bind(m, "mean_prediction_backward", sedd::mean_prediction_backward_cpu);
    bind(m, "transition_column", sedd::transition_column_cpu);
    bind(m, "transition_row", sedd::transition_row_cpu);
    bind(m, "sample_transition", sedd::sample_transition_cpu);
    bind(m, "reverse_probs", sedd::reverse_probs_cpu);
    bind(m, "reverse_sample", sedd::reverse_sample_cpu);
    bind(m, "reverse_tile", sedd::reverse_tile_cpu);
    bind(m, "reverse_choose", sedd::reverse_choose_cpu);
    bind(m, "reverse_mean_probs", sedd::reverse_mean_probs_cpu);
    bind(m, "reverse_mean_sample", sedd::reverse_mean_sample_cpu);
    bind(m, "reverse_mean_choose", sedd::reverse_mean_choose_cpu);
    bind(m, "unmask", sedd::unmask_cpu);
    bind(m, "generalized_masked", sedd::generalized_masked_cpu);
    bind(m, "generalized_masked_backward", sedd::generalized_masked_backward_cpu);
    bind(m, "generalized_masked_power", sedd::generalized_masked_power_cpu);
    m.def("advise_huge_pages", advise_huge_pages);
    m.def("isa", [] { return sedd::kernels().isa; });
    m.def("available_isas", available_isas);
    m.def("select_isa", select_isa);
#if defined(SEDD_HAS_CUDA)
    sedd::bind_cuda(m);
#endif
}

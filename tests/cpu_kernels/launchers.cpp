// The CPU's launchers under the names of CUDA's, so that tests/cuda_on_cpu/driver.cpp runs them: its schedules are
// instruction sets here. What CUDA kernels mark bad rows with is put in by hand, as the CPU's report them instead.
#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/kernels.h"
#include "reverse_mean.h"
#include "transition.h"

namespace sedd {
namespace {

int64_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
DType compute_type(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// NaN in all of a row's results, of rows at this distance.
void mark(void* out, DType dtype, int64_t row, int64_t count, int64_t stride) {
    char* at = static_cast<char*>(out) + row * stride * bytes_of(dtype);
    for (int64_t i = 0; i < count; ++i, at += bytes_of(dtype)) {
        const double nan = std::numeric_limits<double>::quiet_NaN();
        const float single = std::numeric_limits<float>::quiet_NaN();
        const uint16_t half = 0x7fff;
        const void* value = dtype == DType::float64   ? static_cast<const void*>(&nan)
                            : dtype == DType::float32 ? static_cast<const void*>(&single)
                                                      : static_cast<const void*>(&half);
        std::memcpy(at, value, static_cast<size_t>(bytes_of(dtype)));
    }
}

// Does the row by itself have a fault? Into an output of its own, of exactly its size.
bool has_fault(const ReverseParams& p, int64_t row, Status (*run)(const ReverseParams&, int)) {
    ReverseParams one = p;
    std::vector<char> out(static_cast<size_t>(8 * p.dim));
    one.log_score = static_cast<const char*>(p.log_score) + row * p.dim * bytes_of(p.dtype);
    one.x_t += row, one.noise += row, one.rows = 1, one.out = out.data();
    if (p.shift != nullptr) one.shift += row;
    return run(one, 1).fault != Fault::none;
}

bool has_fault(const ReverseMeanParams& p, int64_t row) {
    ReverseMeanParams one = p;
    std::vector<char> out(static_cast<size_t>(8 * p.dim));
    one.logits = static_cast<const char*>(p.logits) + row * p.stride * bytes_of(p.dtype);
    one.x_t += row, one.noise += row, one.rows = 1, one.out = out.data();
    if (p.sigma != nullptr) one.sigma += row;
    return reverse_mean_probs_cpu(one, 1).fault != Fault::none;
}

// The driver asks where launches ran. The CPU runs all of them, wherever they are told to.
int launch_device = -1;
unsigned contexts = 0;
void note(const CudaLaunch& launch) { launch_device = launch.device, contexts |= 1u << launch.device; }

}  // namespace

const char* score_entropy_cuda(const ScoreEntropyParams& p, const CudaLaunch& launch) {
    note(launch);
    score_entropy_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (score_entropy_fault(p, row) != Fault::none) mark(p.out, compute_type(p.dtype), row, 1, 1);
    }
    return nullptr;
}

const char* score_entropy_backward_cuda(const ScoreEntropyParams& p, const CudaLaunch&) {
    score_entropy_backward_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (score_entropy_fault(p, row) != Fault::none) mark(p.out, p.dtype, row, p.dim, p.dim);
    }
    return nullptr;
}

const char* score_entropy_tile_cuda(const ScoreEntropyTileParams& p, const CudaLaunch&) {
    score_entropy_tile_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (score_entropy_fault(p, row) == Fault::none) continue;
        mark(p.out, compute_type(p.dtype), row, 1, 1);
        if (p.gradient != nullptr) mark(p.gradient, p.dtype, row, p.width, p.stride);
    }
    return nullptr;
}

const char* mean_prediction_cuda(const MeanPredictionParams& p, const CudaLaunch& launch) {
    note(launch);
    mean_prediction_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (mean_prediction_fault(p, row) != Fault::none) mark(p.out, compute_type(p.dtype), row, 1, 1);
    }
    return nullptr;
}

const char* mean_prediction_backward_cuda(const MeanPredictionParams& p, const CudaLaunch&) {
    mean_prediction_backward_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (mean_prediction_fault(p, row) != Fault::none) mark(p.out, p.dtype, row, p.width, p.stride);
    }
    return nullptr;
}

const char* transition_column_cuda(const TransitionParams& p, const CudaLaunch&) {
    transition_column_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (transition_fault(p, row) != Fault::none) mark(p.out, compute_type(p.dtype), row, p.dim, p.dim);
    }
    return nullptr;
}

const char* transition_row_cuda(const TransitionParams& p, const CudaLaunch&) {
    transition_row_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (transition_fault(p, row) != Fault::none) mark(p.out, compute_type(p.dtype), row, p.dim, p.dim);
    }
    return nullptr;
}

const char* sample_transition_cuda(const TransitionParams& p, const CudaLaunch& launch) {
    note(launch);
    sample_transition_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (transition_fault(p, row) != Fault::none) static_cast<int64_t*>(p.out)[row] = -1;
    }
    return nullptr;
}

const char* reverse_probs_cuda(const ReverseParams& p, const CudaLaunch&) {
    reverse_probs_cpu(p, 1);
    if (p.rows > 2000) return nullptr;
    for (int64_t row = 0; row < p.rows; ++row) {
        if (has_fault(p, row, reverse_probs_cpu)) mark(p.out, compute_type(p.dtype), row, p.dim, p.dim);
    }
    return nullptr;
}

const char* reverse_sample_cuda(const ReverseParams& p, const CudaLaunch& launch) {
    note(launch);
    reverse_sample_cpu(p, 1);
    if (p.rows > 2000) return nullptr;  // the row beyond 2^31 elements alone is looked at
    for (int64_t row = 0; row < p.rows; ++row) {
        if (has_fault(p, row, reverse_probs_cpu)) static_cast<int64_t*>(p.out)[row] = -1;
    }
    return nullptr;
}

const char* reverse_tile_cuda(const ReverseTileParams& p, const CudaLaunch&) {
    reverse_tile_cpu(p, 1);
    if (p.sums != nullptr || p.targets != nullptr) return nullptr;
    for (int64_t row = 0; row < p.rows; ++row) {
        const bool stays = p.family == Family::absorbing && p.x_t[row] != p.dim - 1;
        if (reverse_fault(p, row) != Fault::none || (stays && p.x_t[row] == p.forbidden)) p.out[row] = -1;
    }
    return nullptr;
}

const char* reverse_choose_cuda(const ReverseChoiceParams& p, const CudaLaunch&) {
    reverse_choose_cpu(p, 1);
    return nullptr;
}

const char* reverse_mean_probs_cuda(const ReverseMeanParams& p, const CudaLaunch&) {
    reverse_mean_probs_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (has_fault(p, row)) mark(p.out, compute_type(p.dtype), row, p.dim, p.dim);
    }
    return nullptr;
}

const char* reverse_mean_sample_cuda(const ReverseMeanParams& p, const CudaLaunch& launch) {
    note(launch);
    if (p.targets != nullptr) std::fill_n(static_cast<int64_t*>(p.out), p.rows, 0);
    reverse_mean_sample_cpu(p, 1);
    if (p.sums != nullptr || p.targets != nullptr) return nullptr;
    for (int64_t row = 0; row < p.rows; ++row) {
        if (has_fault(p, row)) static_cast<int64_t*>(p.out)[row] = -1;
    }
    return nullptr;
}

const char* reverse_mean_choose_cuda(const ReverseMeanParams& p, const CudaLaunch&) {
    reverse_mean_choose_cpu(p, 1);
    return nullptr;
}

const char* unmask_cuda(const UnmaskParams& p, const CudaLaunch& launch) {
    note(launch);
    unmask_cpu(p, 1);
    return nullptr;
}

const char* generalized_masked_cuda(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    note(launch);
    generalized_masked_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (generalized_masked_fault(p, row) != Fault::none) mark(p.out, compute_type(p.dtype), row, 1, 1);
    }
    return nullptr;
}

const char* generalized_masked_backward_cuda(const GeneralizedMaskedParams& p, const CudaLaunch&) {
    generalized_masked_backward_cpu(p, 1);
    for (int64_t row = 0; row < p.rows; ++row) {
        if (generalized_masked_fault(p, row) != Fault::none) mark(p.out, p.dtype, row, p.width, p.stride);
    }
    return nullptr;
}

const char* generalized_masked_power_cuda(const GeneralizedMaskedParams& p, const CudaLaunch&) {
    if (generalized_masked_power_cpu(p, 1).fault != Fault::none) {
        mark(p.out, DType::float64, 0, generalized_masked_tokens(p), 0);
    }
    return nullptr;
}

int64_t generalized_masked_workspace(int64_t, int64_t, DType) { return 0; }
int64_t generalized_masked_backward_workspace(int64_t, int64_t, DType) { return 0; }
int64_t generalized_masked_power_workspace(int64_t, int64_t, DType) { return 0; }
int64_t score_entropy_workspace(int64_t, int64_t, DType) { return 0; }
int64_t score_entropy_backward_workspace(int64_t, int64_t, DType) { return 0; }
int64_t score_entropy_tile_workspace(int64_t, int64_t, DType) { return 0; }
int64_t mean_prediction_workspace(int64_t, int64_t, DType) { return 0; }
int64_t transition_workspace(int64_t, int64_t, DType) { return 0; }
int64_t reverse_workspace(int64_t, int64_t, DType) { return 0; }

}  // namespace sedd

extern "C" int cuda_on_cpu_set_schedule(const char* name, unsigned long long) {
    return sedd::select_isa(name) ? 0 : -1;
}

extern "C" int cuda_on_cpu_launch_device() { return sedd::launch_device; }
extern "C" unsigned cuda_on_cpu_contexts() { return sedd::contexts; }

// There is no shared memory to keep rows in.
extern "C" void cuda_on_cpu_set_max_shared(int) {}
extern "C" size_t cuda_on_cpu_launch_shared_bytes() { return 0; }

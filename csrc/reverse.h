// One reverse step of a position: Euler (τ-leaping, SEDD eq. 17) and Tweedie (eq. 19), for any rank-one process.
//
// Up to a factor of the row, which the normalisation drops, both have the form
//   w(y) = max(0, s_y - drain π_y S) for y ≠ x,   w(x) = max(0, stay - leave Σ_{y≠x} s_y),   S = 1 + Σ_{y≠x} s_y
// Euler divided by Δt σ π_x; Tweedie by (e^Δ - 1) π_x, so that no Δ overflows.
#pragma once

#include "common/random.h"
#include "common/rank_one.h"

namespace sedd {

enum class Step : int32_t { euler = 0, tweedie = 1 };

struct ReverseParams {
    const void* log_score;   // [rows, dim] of dtype, contiguous
    const int64_t* x_t;      // [rows]
    const double* step;      // [rows] Δσ (Tweedie) or Δt·σ(t) (Euler)
    const double* shift;     // [rows] subtracted from the row's log-scores, or null
    const void* stationary;  // [dim] of the compute type, for a vector π; else null
    void* out;               // probabilities [rows, dim] of the compute type, or int64 tokens [rows]
    const int64_t* seed;     // [1]; sampling only
    int64_t rows;
    int64_t dim;
    int64_t forbidden;  // a token the step must not return (MASK, at the last step), or -1
    DType dtype;
    Process process;
    Step kind;
};

struct ReverseRow {
    double drain;
    double stay;
    double leave;
};

// For π_x > 0; a token with π_x = 0 stays.
SEDD_HD ReverseRow reverse_row(Step kind, double step, double pi_x) {
    if (kind == Step::euler) return {0.0, 1.0 / (step * pi_x), 1.0};
    const Decay d = decay(step);
    const double self = d.a + d.b * pi_x;  // p(x_t = x | x_{t-Δt} = x)
    return {d.b, self * (d.a + d.b * (1.0 - pi_x)) / (d.b * pi_x), self};
}

// What multiplies π_y in max(0, s_y - drain π_y S); a constant π is part of it already.
SEDD_HD double reverse_drain(Process process, const ReverseRow& row, double others, double pi_x) {
    return row.drain * (1.0 + others) * (process == Process::uniform ? pi_x : 1.0);
}

// w(x), given Σ_{y≠x} s_y.
SEDD_HD double reverse_stay(const ReverseRow& row, double others, bool forbidden) {
    const double w = row.stay - row.leave * others;
    return forbidden || !(w > 0.0) ? 0.0 : w;
}

SEDD_HD bool valid_total(double total) { return total > 0.0 && total <= 1.7976931348623157e308; }

SEDD_HD Fault reverse_fault(const ReverseParams& p, int64_t row) {
    return !valid_token(p.x_t[row], p.dim) ? Fault::x_t : !valid_sigma(p.step[row]) ? Fault::sigma : Fault::none;
}

Status reverse_probs_cpu(const ReverseParams& params, int threads);
Status reverse_sample_cpu(const ReverseParams& params, int threads);

// Return before the kernels have run: null, or what the CUDA runtime said. A bad row's probabilities are NaN, its token
// is -1.
const char* reverse_probs_cuda(const ReverseParams& params, const CudaLaunch& launch);
const char* reverse_sample_cuda(const ReverseParams& params, const CudaLaunch& launch);
int64_t reverse_workspace(int64_t rows, int64_t dim, DType dtype);

}  // namespace sedd

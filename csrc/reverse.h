// One reverse step of a position: Euler (τ-leaping, SEDD eq. 17) and Tweedie (eq. 19), for any rank-one process.
//
// Both have the form  w(y) = max(0, scale s_y - drain π_y S) for y ≠ x  and  w(x) = max(0, stay - leave Σ_{y≠x} s_y)
// with S = 1 + Σ_{y≠x} s_y; the step's probabilities are w over its sum.
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
    uint64_t seed;           // sampling only
    int64_t rows;
    int64_t dim;
    int64_t forbidden;  // a token the step must not return (MASK, at the last step), or -1
    DType dtype;
    Process process;
    Step kind;
};

struct ReverseRow {
    double scale;
    double drain;
    double stay;
    double leave;
};

// Tweedie's weights are taken times e^{-Δ}, which the normalisation drops again: no Δ overflows them.
SEDD_HD ReverseRow reverse_row(Step kind, double step, double pi_x) {
    if (kind == Step::euler) return {step * pi_x, 0.0, 1.0, step * pi_x};
    const Decay d = decay(step);
    const double self = d.a + d.b * pi_x;  // p(x_t = x | x_{t-Δt} = x)
    ReverseRow row;
    row.scale = d.b * pi_x;
    row.drain = d.b * d.b * pi_x;
    row.stay = self * (d.a + d.b * (1.0 - pi_x));
    row.leave = self * d.b * pi_x;
    return row;
}

Status reverse_probs_cpu(const ReverseParams& params, int threads);
Status reverse_sample_cpu(const ReverseParams& params, int threads);

}  // namespace sedd

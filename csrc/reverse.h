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
    uint64_t seed;           // sampling only
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

Status reverse_probs_cpu(const ReverseParams& params, int threads);
Status reverse_sample_cpu(const ReverseParams& params, int threads);

}  // namespace sedd

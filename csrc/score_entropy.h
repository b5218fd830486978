// Diffusion-weighted denoising score entropy of one position (SEDD, Theorem 3.6), for any rank-one process.
//
//   L(x, x0) = π_x { Σ_{y≠x} s_y - c Σ_{y≠x} π_y ℓ_y - [x≠x0] (a/D) ℓ_{x0} + C },   s = exp(ℓ), D = a [x=x0] + b π_x, c
//   = b/D ∂L/∂ℓ_y  = π_x ( s_y - c π_y - [y=x0≠x] a/D ) for y ≠ x, 0 at y = x
//
// Everything but the two sums over y is a number of the row: that is what this header computes, on every device.
#pragma once

#include "common/rank_one.h"

namespace sedd {

struct ScoreEntropyParams {
    const void* log_score;   // [rows, dim] of dtype, contiguous
    const int64_t* x_t;      // [rows]
    const int64_t* x_0;      // [rows]
    const double* sigma;     // [rows] total noise
    const double* shift;     // [rows] subtracted from the row's log-scores, or null
    const void* stationary;  // [dim] of the compute type, for a vector π; else null
    const void* grad_loss;   // [rows] of the compute type; backward only
    void* out;               // forward: loss [rows] of the compute type; backward: gradient [rows, dim] of dtype
    double neg_entropy;      // H = Σ π log π
    int64_t rows;
    int64_t dim;
    DType dtype;
    Family family;
};

// The numbers of one row, π_x multiplied in: c and a/D alone grow like 1/π_x.
struct ScoreEntropyRow {
    double weight;    // π_x: the rate x -> y, the same for every y
    double slope;     // π_x c: what multiplies Σ π_y ℓ_y
    double pull;      // π_x a/D if x ≠ x0, else 0: what multiplies ℓ_{x0}
    double constant;  // π_x C
};

SEDD_HD ScoreEntropyRow score_entropy_row(double sigma, double pi_x, double pi_x0, bool same, double neg_entropy) {
    const Decay d = decay(sigma);
    const double stayed = d.a + d.b * pi_x;  // D = p(x_t | x_0) where x = x0; else D = b π_x
    const double c = same ? d.b / stayed : 1.0 / pi_x;
    ScoreEntropyRow row;
    row.weight = pi_x;
    row.slope = same ? d.b * pi_x / stayed : 1.0;
    row.pull = same ? 0.0 : d.a / d.b;
    // K(r) = r (log r - 1) summed over y ≠ x with r_y = c π_y, and once r = (a + b π_x0)/D at y = x0 ≠ x.
    const double mass = same ? 1.0 - pi_x : 1.0 - pi_x - pi_x0;
    const double entropy = neg_entropy - x_log_x(pi_x) - (same ? 0.0 : x_log_x(pi_x0));
    row.constant = row.slope * ((log(c) - 1.0) * mass + entropy);
    const double ratio = same ? 0.0 : d.a / d.b + pi_x0;  // π_x r
    if (ratio > 0.0) row.constant += ratio * (log(ratio / pi_x) - 1.0);
    return row;
}

// L from Σ_{y≠x} s_y, Σ_{y≠x} π_y ℓ_y and ℓ_{x0}.
SEDD_HD double score_entropy_value(const ScoreEntropyRow& row, double scores, double dot, double log_score_x_0) {
    double value = row.weight * scores + row.constant - row.slope * dot;
    if (row.pull != 0.0) value -= row.pull * log_score_x_0;  // at -∞, no pull is none
    return value;
}

// ∂L/∂ℓ_y, times what comes down from above: factor s_y - offset π_y, 0 at y = x, at_x_0 at y = x0 ≠ x.
struct ScoreEntropyGradient {
    double factor;
    double offset;
    double at_x_0;
};

SEDD_HD ScoreEntropyGradient score_entropy_gradient(const ScoreEntropyRow& row, double grad_loss, double log_score_x_0,
                                                    double pi_x0) {
    return {grad_loss * row.weight, grad_loss * row.slope,
            grad_loss * (row.weight * exp(log_score_x_0) - row.slope * pi_x0 - row.pull)};
}

// ---- rows that come in tiles of the vocabulary, from left to right, as the head's matrix product makes them ----
//
// The gradient needs no normaliser, so that a tile becomes its gradient in the same sweep that adds up the loss, and
// nothing of a row need be there at once.

struct ScoreEntropySweep {
    ScoreEntropyRow row;
    double scores;         // Σ s_y and
    double dot;            // Σ π_y ℓ_y (Σ ℓ_y for a constant π), y ≠ x, of the tiles seen
    double log_score_x_0;  // once its tile has been seen
};

struct ScoreEntropyTileParams {
    void* log_score;            // [rows, width] of dtype, contiguous: entries [first, first + width) of every row
    const int64_t* x_t;         // [rows]
    const int64_t* x_0;         // [rows]
    const double* sigma;        // [rows]
    const double* shift;        // [rows] or null
    const void* stationary;     // [dim] of the compute type, for a vector π; else null
    const double* grad_loss;    // [rows], and the gradient takes the place of the log-scores; or null: the loss alone
    ScoreEntropySweep* sweeps;  // [rows] from one tile to the next; the first one sets them
    void* out;                  // loss [rows] of the compute type, written with the last tile, which ends at dim
    double neg_entropy;
    int64_t rows;
    int64_t width;
    int64_t first;
    int64_t dim;
    DType dtype;
    Family family;
};

template <class Params>
SEDD_HD Fault score_entropy_fault(const Params& p, int64_t row) {
    return !valid_token(p.x_t[row], p.dim)   ? Fault::x_t
           : !valid_token(p.x_0[row], p.dim) ? Fault::x_0
           : !valid_sigma(p.sigma[row])      ? Fault::sigma
                                             : Fault::none;
}

// Rows are split over `threads`; the first bad row comes back in the status.
Status score_entropy_cpu(const ScoreEntropyParams& params, int threads);
Status score_entropy_backward_cpu(const ScoreEntropyParams& params, int threads);
Status score_entropy_tile_cpu(const ScoreEntropyTileParams& params, int threads);

// Return before the kernels have run: null, or what the CUDA runtime said. A bad row's loss and gradient are NaN.
const char* score_entropy_cuda(const ScoreEntropyParams& params, const CudaLaunch& launch);
const char* score_entropy_backward_cuda(const ScoreEntropyParams& params, const CudaLaunch& launch);
const char* score_entropy_tile_cuda(const ScoreEntropyTileParams& params, const CudaLaunch& launch);
// Bytes of workspace that they take.
int64_t score_entropy_workspace(int64_t rows, int64_t dim, DType dtype);
int64_t score_entropy_backward_workspace(int64_t rows, int64_t dim, DType dtype);
int64_t score_entropy_tile_workspace(int64_t rows, int64_t width, DType dtype);

}  // namespace sedd

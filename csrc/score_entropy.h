// Diffusion-weighted denoising score entropy of one position (SEDD, Theorem 3.6), for any rank-one process.
//
// clang-format off
//   L(x, x0) = π_x { Σ_{y≠x} s_y - c Σ_{y≠x} π_y ℓ_y - [x≠x0] (a/D) ℓ_{x0} + C }
//   ∂L/∂ℓ_y  = π_x ( s_y - c π_y - [y=x0≠x] a/D ) for y ≠ x,   0 for y = x
//   with the log-scores ℓ, s = exp(ℓ), D = a [x=x0] + b π_x, c = b/D
// clang-format on
//
// This header computes the numbers of a row, on every device. The kernels add the two sums over y.
#pragma once

#include "common/rank_one.h"

namespace sedd {

struct ScoreEntropyParams {
    const void* log_score;     // [rows, dim] of dtype, contiguous
    const int64_t* x_t;        // [rows]
    const int64_t* x_0;        // [rows]
    const double* sigma;       // [rows] total noise
    const double* shift;       // [rows] subtracted from the row's log-scores, or null
    const void* stationary;    // [dim] of the compute type, for a vector π; else null
    const void* grad_loss;     // [rows] of the compute type; backward only
    const double* unless_one;  // [1] or null; backward only: if it is 1, out holds the gradient already and is kept
    void* out;                 // forward: loss [rows] of the compute type; backward: gradient [rows, dim] of dtype
    double neg_entropy;        // H = Σ π log π
    int64_t rows;
    int64_t dim;
    DType dtype;
    Family family;
};

// The numbers of one row. They include the factor π_x, because c and a/D alone grow like 1/π_x.
struct ScoreEntropyRow {
    double weight;    // π_x, the factor of Σ s_y
    double slope;     // π_x c, the factor of Σ π_y ℓ_y
    double pull;      // π_x a/D if x ≠ x0, else 0; the factor of ℓ_{x0}
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
    if (row.pull != 0.0) value -= row.pull * log_score_x_0;  // 0 · (-∞) would be NaN
    return value;
}

// ∂L/∂ℓ_y times the upstream gradient: factor s_y - offset π_y; 0 for y = x; at_x_0 for y = x0 ≠ x.
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

// ---- loss and gradient in one sweep, over whole rows or over tiles of the vocabulary from left to right ----
//
// The gradient needs no normaliser. So one sweep adds up the loss and writes the gradient; the fused head overwrites
// each tile with it. If the vocabulary is split over processes, the sweep of each process begins and ends with its own
// entries. The loss is then computed from the sweeps of all of them, whose members linear_score_entropy.py reads in
// this order.

// The state of a row between two tiles.
struct ScoreEntropySweep {
    ScoreEntropyRow row;
    double scores;         // Σ s_y over y ≠ x of the tiles so far
    double dot;            // Σ π_y ℓ_y (Σ ℓ_y for a constant π) over the same
    double log_score_x_0;  // set by the tile that contains x0
};

struct ScoreEntropyTileParams {
    const void* log_score;      // [rows, width] of dtype, contiguous: entries [first, first + width) of every row
    const int64_t* x_t;         // [rows]
    const int64_t* x_0;         // [rows]
    const double* sigma;        // [rows]
    const double* shift;        // [rows] or null
    const void* stationary;     // [dim] of the compute type, for a vector π; else null
    const double* grad_loss;    // [rows], or null without a gradient
    void* gradient;             // [rows, width] of dtype, may be log_score; or null for the loss alone
    ScoreEntropySweep* sweeps;  // [rows] state between tiles; the first tile, which starts at begin, initialises it
    void* out;                  // loss [rows] of the compute type; written by the last tile, which ends at dim
    double neg_entropy;
    int64_t rows;
    int64_t width;
    int64_t stride;  // elements from a row of the log-scores, or of their gradient, to the next
    int64_t first;
    int64_t begin;  // the first entry of this process, 0 unless the vocabulary is split over processes
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

// Run on `threads` threads. The status names the first bad row.
Status score_entropy_cpu(const ScoreEntropyParams& params, int threads);
Status score_entropy_backward_cpu(const ScoreEntropyParams& params, int threads);
Status score_entropy_tile_cpu(const ScoreEntropyTileParams& params, int threads);

// Asynchronous. Return null, or the error message of the CUDA runtime. A bad row gets a loss and gradient of NaN.
const char* score_entropy_cuda(const ScoreEntropyParams& params, const CudaLaunch& launch);
const char* score_entropy_backward_cuda(const ScoreEntropyParams& params, const CudaLaunch& launch);
const char* score_entropy_tile_cuda(const ScoreEntropyTileParams& params, const CudaLaunch& launch);
// Bytes of workspace that they need.
int64_t score_entropy_workspace(int64_t rows, int64_t dim, DType dtype);
int64_t score_entropy_backward_workspace(int64_t rows, int64_t dim, DType dtype);
int64_t score_entropy_tile_workspace(int64_t rows, int64_t width, DType dtype);

}  // namespace sedd

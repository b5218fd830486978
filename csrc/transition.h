// Columns, rows and samples of exp(σQ) = a I + (1 - a) π 1ᵀ, in closed form, without an N×N matrix.
#pragma once

#include "common/random.h"
#include "common/rank_one.h"

namespace sedd {

struct TransitionParams {
    const int64_t* x;          // [rows] tokens whose column or row to compute
    const double* sigma;       // [rows]
    const void* stationary;    // [dim] of the output type, for a vector π; else null
    const double* cumulative;  // [dim] cumulative sums of a vector π; sampling only
    void* out;                 // probabilities [rows, dim] of dtype (float32 or float64), or int64 tokens [rows]
    const int64_t* seed;       // [1]; sampling only
    int64_t rows;
    int64_t dim;
    DType dtype;
    Family family;
    int64_t first_row;  // the random numbers of the rows are those of the rows from here on; sampling only
};

// A draw from π by inverse CDF: the first token whose cumulative sum exceeds u. A token with π_y = 0 is never drawn.
SEDD_HD int64_t draw_stationary(Family family, const double* cumulative, int64_t dim, double u) {
    if (family == Family::absorbing) return dim - 1;
    if (family == Family::uniform) {
        const int64_t y = static_cast<int64_t>(u * static_cast<double>(dim));
        return y < dim ? y : dim - 1;
    }
    const double target = u * cumulative[dim - 1];
    int64_t low = 0, high = dim - 1;
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (cumulative[middle] > target) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// x_t ~ p(· | x_0): draw from π with probability b = 1 - e^{-σ}, else keep the token.
SEDD_HD int64_t draw_transition(const TransitionParams& p, int64_t row, double b) {
    const Uniforms u = row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(p.first_row + row));
    const bool moves = u.first < b;
    // Whether a token moves is unpredictable, so there is no branch on it, except around the search in a vector π.
    const bool needs = p.family != Family::rank_one || moves;
    const int64_t y = needs ? draw_stationary(p.family, p.cumulative, p.dim, u.second) : 0;
    return moves ? y : p.x[row];
}

// A row of the result: `vector` π_y for a vector π, else `constant`. The entries x and, in a column of absorbing
// diffusion, MASK have values of their own.
struct TransitionRow {
    double vector;
    double constant;
    double at_x;
    double at_mask;
};

// A column is a [y = x] + b π_y over y, the distribution of what x becomes. A row is a [y = x] + b π_x over y, the
// likelihood of each origin y of x.
SEDD_HD TransitionRow transition_row(bool column, Family family, double sigma, double pi_x) {
    const Decay d = decay(sigma);
    const double at_x = family == Family::absorbing && pi_x == 1.0 && column ? 1.0 : d.a + d.b * pi_x;
    if (column && family == Family::absorbing) return {0.0, 0.0, at_x, d.b};
    return {d.b, d.b * pi_x, at_x, 0.0};
}

SEDD_HD Fault transition_fault(const TransitionParams& p, int64_t row) {
    return !valid_token(p.x[row], p.dim) ? Fault::x_0 : !valid_sigma(p.sigma[row]) ? Fault::sigma : Fault::none;
}

Status transition_column_cpu(const TransitionParams& params, int threads);
Status transition_row_cpu(const TransitionParams& params, int threads);
Status sample_transition_cpu(const TransitionParams& params, int threads);

// Asynchronous. Return null, or the error message of the CUDA runtime. A bad row gets probabilities of NaN, or token
// -1.
const char* transition_column_cuda(const TransitionParams& params, const CudaLaunch& launch);
const char* transition_row_cuda(const TransitionParams& params, const CudaLaunch& launch);
const char* sample_transition_cuda(const TransitionParams& params, const CudaLaunch& launch);
int64_t transition_workspace(int64_t rows, int64_t dim, DType dtype);

}  // namespace sedd

// Columns, rows and samples of exp(σQ) = a I + (1 - a) π 1ᵀ, in closed form: never an N×N matrix.
#pragma once

#include "common/random.h"
#include "common/rank_one.h"

namespace sedd {

struct TransitionParams {
    const int64_t* x;          // [rows] token the column or row belongs to
    const double* sigma;       // [rows]
    const void* stationary;    // [dim] of the output type, for a vector π; else null
    const double* cumulative;  // [dim] cumulative sums of a vector π; sampling only
    void* out;                 // probabilities [rows, dim] of dtype (float32 or float64), or int64 tokens [rows]
    uint64_t seed;             // sampling only
    int64_t rows;
    int64_t dim;
    DType dtype;
    Process process;
};

// One draw from π by inverse CDF: the first token whose cumulative sum exceeds u, so that π_y = 0 is never drawn.
SEDD_HD int64_t draw_stationary(Process process, const double* cumulative, int64_t dim, double u) {
    if (process == Process::absorbing) return dim - 1;
    if (process == Process::uniform) {
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
    const Uniforms u = row_uniforms(p.seed, static_cast<uint64_t>(row));
    return u.first < b ? draw_stationary(p.process, p.cumulative, p.dim, u.second) : p.x[row];
}

Status transition_column_cpu(const TransitionParams& params, int threads);
Status transition_row_cpu(const TransitionParams& params, int threads);
Status sample_transition_cpu(const TransitionParams& params, int threads);

}  // namespace sedd

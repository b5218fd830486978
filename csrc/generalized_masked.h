// Loss of generalised masked diffusion (GenMD4): masked diffusion with the schedule α_k(t) = 1 - t^{w_k} for token k.
//
// clang-format off
//   L(MASK, v)     = (1/t) { Σ_k w_k μ_k - w_v - w_v log μ_v } = (1/t) { D + w_v f },   0 where x_t is not MASK
//   ∂L/∂logit_k    = (1/t) μ_k (w_k + w_v (1 - μ_v) - D) for k ≠ v,   -(1/t) { D μ_v + w_v (1 - μ_v)² } for k = v
//   ∂L/∂w_k        = (1/t) μ_k                           for k ≠ v,    (1/t) f                        for k = v
//   with μ = softmax of the logits without MASK's, v = x_0, D = Σ_{k≠v} w_k μ_k, f = μ_v - 1 - log μ_v
// clang-format on
//
// D and f are sums of terms that are not negative. They are computed from the entries other than v, because 1 - μ_v
// would lose its digits near the minimum, μ_v = 1. This header computes the numbers of a row, on every device.
// If the vocabulary is split over processes, each of them computes GeneralizedMaskedSums of its slice, and with those
// of the whole row, the loss. linear_generalized_masked.py combines them and reads their members in this order.
//
// Source: Shi et al. 2024.
#pragma once

#include "common/rank_one.h"

namespace sedd {

// What the backward pass needs to know of a row. The forward pass writes it; zeros where x_t is not MASK.
struct GeneralizedMaskedRow {
    double top;     // the largest logit
    double total;   // Σ_k exp(l_k - top), at least 1
    double others;  // D
    double miss;    // 1 - μ_v
    double excess;  // f
};

// Sums over a row, or a slice of it, without v and MASK: Σ e^{l_k} = rest e^top and Σ w_k e^{l_k} = dot e^top, where
// top is the largest l_k; and l_v, -inf where v is not in the slice.
struct GeneralizedMaskedSums {
    double top, rest, dot, logit_v;
};

struct GeneralizedMaskedParams {
    const void* logits;               // [rows, width] of dtype, contiguous: the entries from `first` on
    const void* power;                // [dim] of the compute type, w
    const int64_t* x_t;               // [rows]
    const int64_t* x_0;               // [rows]
    const double* t;                  // [rows]
    const void* grad_loss;            // [rows] of the compute type; backward and power only
    GeneralizedMaskedRow* numbers;    // [rows] written by the forward pass
    GeneralizedMaskedSums* row_sums;  // [rows] of the slice, written by Stage::logits; of the row, read by Stage::loss
    void* out;  // forward: loss [rows] of the compute type; backward: gradient [rows, width] of dtype, which may be the
                // logits' memory; power: float64 [width], the gradient of w
    int64_t rows;
    int64_t width;   // dim, unless the vocabulary is split over processes
    int64_t stride;  // elements from a row of the logits, or of their gradient, to the next
    int64_t first;   // 0, unless it is
    int64_t dim;     // MASK is the last token
    DType dtype;
    Stage stage;  // forward only, and not Stage::sums
};

// The number of entries of the slice without MASK.
SEDD_HD int64_t generalized_masked_tokens(const GeneralizedMaskedParams& p) {
    return p.first + p.width == p.dim ? p.width - 1 : p.width;
}

SEDD_HD Fault generalized_masked_fault(const GeneralizedMaskedParams& p, int64_t row) {
    const int64_t mask = p.dim - 1, x_t = p.x_t[row], x_0 = p.x_0[row];
    const double t = p.t[row];
    return !valid_token(x_t, p.dim)                                   ? Fault::x_t
           : !valid_token(x_0, p.dim) || (x_t == mask && x_0 == mask) ? Fault::x_0
           : !(valid_sigma(t) && t <= 1.0)                            ? Fault::sigma
                                                                      : Fault::none;
}

// f = -log(1 - miss) - miss for the ratio q = (1 - μ_v) / μ_v.
SEDD_HD double generalized_masked_excess(double ratio, double cost, double miss) {
    if (!(ratio < 1e-2)) return cost - miss;
    double series = 0.0;  // Σ_{n≥2} (-1)^n q^n (n-1)/n, in which nothing cancels
    for (int n = 10; n >= 2; --n) series = (n - 1.0) / n - ratio * series;
    return ratio * ratio * series;
}

// The numbers of a row from its sums.
SEDD_HD GeneralizedMaskedRow generalized_masked_row(const GeneralizedMaskedSums& sums) {
    GeneralizedMaskedRow row;
    row.top = sums.logit_v > sums.top ? sums.logit_v : sums.top;
    const double scale = sums.rest == 0.0 ? 0.0 : exp(sums.top - row.top), hit = exp(sums.logit_v - row.top);
    const double rest = sums.rest * scale;
    row.total = rest + hit;
    row.others = sums.dot * scale / row.total;
    row.miss = rest / row.total;
    const double ratio = rest / hit;
    // -log μ_v; for a large ratio without the exponential of l_v, which may be 0
    const double cost = ratio < 1.0 ? log1p(ratio) : log(row.total) - (sums.logit_v - row.top);
    row.excess = generalized_masked_excess(ratio, cost, row.miss);
    return row;
}

SEDD_HD double generalized_masked_value(const GeneralizedMaskedRow& row, double power_v, double t) {
    return (row.others + power_v * row.excess) / t;
}

// The gradients of a row times the upstream one. With e_k = exp(l_k - top): in the logits, factor e_k (w_k + lift) for
// k ≠ v and at_v for v; in w, factor e_k for k ≠ v and power_at_v for v.
struct GeneralizedMaskedGradient {
    double factor;
    double lift;
    double at_v;
    double power_at_v;
};

SEDD_HD GeneralizedMaskedGradient generalized_masked_gradient(const GeneralizedMaskedRow& row, double power_v, double t,
                                                              double grad_loss) {
    const double c = grad_loss / t;
    return {c / row.total, power_v * row.miss - row.others,
            -c * ((1.0 - row.miss) * row.others + power_v * row.miss * row.miss), c * row.excess};
}

// Run on `threads` threads. The status names the first bad row.
Status generalized_masked_cpu(const GeneralizedMaskedParams& params, int threads);
Status generalized_masked_backward_cpu(const GeneralizedMaskedParams& params, int threads);
Status generalized_masked_power_cpu(const GeneralizedMaskedParams& params, int threads);

// Asynchronous. Return null, or the error message of the CUDA runtime. A bad row gets a loss and gradient of NaN; with
// one, the gradient of w is NaN but for MASK's entry.
const char* generalized_masked_cuda(const GeneralizedMaskedParams& params, const CudaLaunch& launch);
const char* generalized_masked_backward_cuda(const GeneralizedMaskedParams& params, const CudaLaunch& launch);
const char* generalized_masked_power_cuda(const GeneralizedMaskedParams& params, const CudaLaunch& launch);
// Bytes of workspace that they need.
int64_t generalized_masked_workspace(int64_t rows, int64_t width, DType dtype);
int64_t generalized_masked_backward_workspace(int64_t rows, int64_t width, DType dtype);
int64_t generalized_masked_power_workspace(int64_t rows, int64_t width, DType dtype);

}  // namespace sedd

// Score entropy of a mean prediction, for any rank-one process. The network predicts the clean token, μ =
// softmax(logits) without MASK's logit, and L is that of score_entropy.h at the score that μ implies. With a = e^{-σ},
// b = 1 - a:
//
// clang-format off
//   π_x s_y = α π_y + (a/b) μ_y  for y ≠ x,   α = 1 - μ_x a / (a + b π_x)
//   L = (1/b) Σ_{y≠x} q_y h(e_y / q_y),   h(r) = r - log(1 + r),   e_y / q_y + 1 = t_y / q_y
//   t_y = b α π_y + a μ_y,   q_y = t_y at μ = e_{x0},   e_y = t_y - q_y
// clang-format on
//
// Every term is ≥ 0. An entry with q_y = 0 has the term e_y.
//
// In discrete time (D3PM) the loss is D_KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) for a step from t to s. Its probabilities
// of y ≠ x are t_y and q_y with a_s and b_s in place of a and b in front of μ and α π, times (1 - e^{-(σ_t - σ_s)}) /
// b_t in place of 1/b. There is one more term, for y = x.
//
// clang-format off
//   ∂L/∂logit_k ∝ μ_k (a (g_k - g_x) - m),   g = e/t (g_x = 0 in continuous time),   m = Σ_j μ_j ∂L/∂μ_j
// clang-format on
//
// If the vocabulary is split over processes, each of them computes MeanPredictionLogits of its slice; then, unless the
// process is absorbing, with those of the whole row, MeanPredictionSums of its slice; then, with those of the whole
// row, the loss. linear_mean_prediction.py combines the numbers of the slices and reads their members in this order.
#pragma once

#include "common/rank_one.h"

namespace sedd {

// What the backward pass needs of a row, for an upstream gradient of 1.
struct MeanPredictionGradient {
    double top;  // log Σ e^{logit} = top + log_total; top has the precision of a logit
    double log_total;
    double excess;  // e_y = excess π_y + a μ_y
    double keep;    // t_y = keep π_y + a μ_y
    double a;
    double base;  // gradient = scale μ_y (a e_y / t_y - base)
    double scale;
    double at_x;    // gradient at y = x
    double at_x_0;  // gradient at y = x0 ≠ x
};

// The logits of a row, or of a slice of it: those of x and x0, log Σ e^{logit} over all other tokens but MASK, and the
// largest of these others. x is -inf for MASK, x0 for x0 = x, and each of them where it is not in the slice.
struct MeanPredictionLogits {
    double x, x_0, others, top;
};

// Σ over y ∉ {x, x0, MASK}.
struct MeanPredictionSums {
    double entropy = 0.0;   // Σ q_y h(e_y / q_y)
    double pi_ratio = 0.0;  // Σ π_y g_y
    double mu_ratio = 0.0;  // Σ μ_y g_y
};

struct MeanPredictionParams {
    const void* logits;                // [rows, width] of dtype, contiguous: the entries from `first` on
    const int64_t* x_t;                // [rows]
    const int64_t* x_0;                // [rows]
    const double* sigma;               // [rows] total noise at t
    const double* sigma_s;             // [rows] total noise at s < t, for the loss of a discrete step; else null
    const void* stationary;            // [dim] of the compute type, for a vector π; else null
    const void* grad_loss;             // [rows] of the compute type; backward only
    MeanPredictionGradient* numbers;   // [rows] written by the forward pass, unless null; read by the backward pass
    MeanPredictionLogits* row_logits;  // [rows] of the slice, written by Stage::logits; of the row, read later
    MeanPredictionSums* row_sums;      // [rows] of the slice, written by Stage::sums; of the row, read by Stage::loss
    void* out;  // forward: loss [rows] of the compute type; backward: gradient [rows, width] of dtype, which may be
                // the memory of the logits
    int64_t rows;
    int64_t width;   // dim, unless the vocabulary is split over processes
    int64_t stride;  // elements from a row of the logits, or of their gradient, to the next
    int64_t first;   // 0, unless it is
    int64_t dim;
    int64_t mask;  // the token whose logit is ignored, or -1
    DType dtype;
    Family family;
    Stage stage;  // forward only
};

// The numbers of one row.
struct MeanPredictionRow {
    double top, log_total;   // of all tokens but MASK
    double mu_x, mu_x0;      // 0 for MASK, and mu_x0 = 0 for x0 = x
    double rest_x, rest_x0;  // 1 - μ_x and 1 - μ_x0, to full precision
    double log_mu_x0;
    double scale, a, excess, keep;  // as in MeanPredictionGradient
    double rate;                    // q_y = rate π_y for y ≠ x0
    double bend;                    // -∂t_y/∂μ_x = bend π_y
    double stay_t, stay_q, stay_e;  // t, q and e of y = x, in discrete time; else 0
    bool moved;                     // x ≠ x0
};

// h(r) = r - log(1 + r), given log(1 + r) where r is not small; never below 0.
SEDD_HD double excess_over_log(double r, double log_ratio) {
    if (r > -1e-3 && r < 1e-3) {
        return r * r * (1.0 / 2 - r * (1.0 / 3 - r * (1.0 / 4 - r * (1.0 / 5 - r * (1.0 / 6)))));
    }
    return r - (r > -0.5 && r < 0.5 ? log1p(r) : log_ratio);
}

// q h(e/q) with t = q + e, or e if q = 0. log_t is used if e is near -q, where t may underflow.
SEDD_HD double excess_entropy(double e, double q, double t, double log_t) {
    if (q == 0.0) return e;
    return q * excess_over_log(e / q, (t > 0.0 ? log(t) : log_t) - log(q));
}

SEDD_HD double positive_ratio(double e, double t) { return t > 0.0 ? e / t : 0.0; }

// sigma_s < 0: continuous time.
SEDD_HD MeanPredictionRow mean_prediction_row(const MeanPredictionLogits& logits, double sigma, double sigma_s,
                                              double pi_x, bool same) {
    MeanPredictionRow r{};
    double top = logits.top;
    top = logits.x > top ? logits.x : top;
    top = logits.x_0 > top ? logits.x_0 : top;
    const auto relative = [top](double logit) { return logit == -INFINITY ? 0.0 : exp(logit - top); };
    const double others = relative(logits.others), at_x = relative(logits.x), at_x0 = relative(logits.x_0);
    const double total = others + at_x + at_x0;
    r.moved = !same;
    r.top = top;
    r.log_total = log(total);
    r.mu_x = at_x / total;
    r.mu_x0 = at_x0 / total;
    r.rest_x = (others + at_x0) / total;
    r.rest_x0 = (others + at_x) / total;
    r.log_mu_x0 = r.rest_x0 < 0.5 ? log1p(-r.rest_x0) : logits.x_0 - top - r.log_total;
    const Decay t = decay(sigma);
    const double stays = t.a + t.b * pi_x, lost = t.a / stays, kept = t.b * pi_x / stays;  // lost + kept = 1
    const Decay s = sigma_s >= 0.0 ? decay(sigma_s) : t;
    const double slope = same ? kept : 1.0, alpha = r.rest_x + r.mu_x * kept;
    r.a = s.a;
    r.excess = s.b * lost * (same ? r.rest_x : -r.mu_x);
    r.keep = s.b * alpha;
    r.rate = s.b * slope;
    r.bend = s.b * lost;
    r.scale = 1.0 / t.b;
    if (sigma_s >= 0.0) {
        const Decay d = decay(sigma - sigma_s);
        r.scale = d.b / t.b;
        const double back = (d.a + d.b * pi_x) / d.b;
        r.stay_t = back * (s.a * t.b * r.mu_x / stays + s.b * alpha);
        r.stay_q = back * (same ? s.a * t.b / stays + s.b * slope : s.b);
        r.stay_e = -(r.excess * (1.0 - pi_x) + r.a * (same ? r.rest_x : -r.mu_x));
    }
    return r;
}

// The sums of an absorbing process, where q_y = 0 and e_y = t_y = a μ_y.
SEDD_HD MeanPredictionSums mean_prediction_absorbing_sums(const MeanPredictionRow& r) {
    const double mass = r.moved ? r.rest_x0 - r.mu_x : r.rest_x;
    MeanPredictionSums sums;
    sums.entropy = r.a * mass;
    sums.mu_ratio = mass;
    return sums;
}

// The loss, and what the backward pass needs. `pi_mask` is 0 if MASK is x or x0, or if there is none.
SEDD_HD double mean_prediction_value(const MeanPredictionRow& r, const MeanPredictionSums& sums, double pi_x,
                                     double pi_x0, double pi_mask, MeanPredictionGradient& gradient) {
    double entropy = sums.entropy, pi_ratio = sums.pi_ratio, mu_ratio = sums.mu_ratio, x_0_ratio = 0.0;
    if (r.moved) {
        const double spread = r.keep * pi_x0, t = spread + r.a * r.mu_x0;
        const double e = r.excess * pi_x0 - r.a * r.rest_x0;
        entropy += excess_entropy(e, r.rate * pi_x0 + r.a, spread > 0.0 ? t : 0.0, log(r.a) + r.log_mu_x0);
        x_0_ratio = spread > 0.0 ? r.mu_x0 * e / t : e / r.a;  // μ_{x0} g_{x0}
        if (pi_x0 > 0.0) pi_ratio += pi_x0 * positive_ratio(e, t);
        mu_ratio += x_0_ratio;
    }
    if (pi_mask > 0.0) {
        const double e = r.excess * pi_mask, t = r.keep * pi_mask;
        entropy += excess_entropy(e, r.rate * pi_mask, t, 0.0);
        pi_ratio += pi_mask * positive_ratio(e, t);
    }
    // In discrete time, g_x is subtracted from every g_y. μ_x g_x is finite, but g_x grows like 1/μ_x.
    double g_x = 0.0, x_ratio = 0.0;
    if (r.stay_t > 0.0 || r.stay_q > 0.0) {
        entropy += excess_entropy(r.stay_e, r.stay_q, r.stay_t, -INFINITY);
        g_x = positive_ratio(r.stay_e, r.stay_t);
        x_ratio = positive_ratio(r.mu_x * r.stay_e, r.stay_t);
    }
    const double d_x = -r.bend * (pi_ratio - g_x * (1.0 - pi_x));
    gradient.top = r.top;
    gradient.log_total = r.log_total;
    gradient.excess = r.excess;
    gradient.keep = r.keep;
    gradient.a = r.a;
    gradient.base = r.a * (mu_ratio + x_ratio) + r.mu_x * d_x;
    gradient.scale = r.scale;
    gradient.at_x = r.scale * (r.mu_x * r.rest_x * d_x + r.a * (x_ratio * r.rest_x - r.mu_x * mu_ratio));
    gradient.at_x_0 = r.scale * (r.a * x_0_ratio - r.mu_x0 * gradient.base);
    return r.scale * (entropy < 0.0 ? 0.0 : entropy);  // terms with a tiny q are not computed exactly
}

SEDD_HD Fault mean_prediction_fault(const MeanPredictionParams& p, int64_t row) {
    if (!valid_token(p.x_t[row], p.dim)) return Fault::x_t;
    if (!valid_token(p.x_0[row], p.dim)) return Fault::x_0;
    if (!valid_sigma(p.sigma[row])) return Fault::sigma;
    return p.sigma_s == nullptr || (p.sigma_s[row] >= 0.0 && p.sigma_s[row] < p.sigma[row]) ? Fault::none
                                                                                            : Fault::sigma_s;
}

// Run on `threads` threads. The status names the first bad row.
Status mean_prediction_cpu(const MeanPredictionParams& params, int threads);
Status mean_prediction_backward_cpu(const MeanPredictionParams& params, int threads);

// Asynchronous. Return null, or the error message of the CUDA runtime. A bad row gets a loss and gradient of NaN.
const char* mean_prediction_cuda(const MeanPredictionParams& params, const CudaLaunch& launch);
const char* mean_prediction_backward_cuda(const MeanPredictionParams& params, const CudaLaunch& launch);
// Bytes of workspace that the forward pass needs; the backward pass needs none.
int64_t mean_prediction_workspace(int64_t rows, int64_t width, DType dtype);

}  // namespace sedd

// One reverse step of a position from a mean prediction: μ = softmax(logits) over all tokens but MASK predicts the
// clean token. With a = e^{-σ̄}, b = 1 - a (a_s, b_s at the earlier time; a_d, b_d of the step) and D = a + b π_x:
//
// clang-format off
//   α = (1 - μ_x) + μ_x b π_x / D
//   Tweedie, the posterior Σ_k μ_k q(x_s | x_t, x_0 = k):
//     p(y) = (b_d / b) (a_s μ_y + b_s α π_y) for y ≠ x,   p(x) = (a_d + b_d π_x) (a_s μ_x / D + b_s α / b)
//   Euler, with π_x s_y = α π_y + (a / b) μ_y:
//     p(y) = step (α π_y + (a / b) μ_y) for y ≠ x,         p(x) = max(0, 1 - Σ_{y≠x} p(y))
//   Generalized masked (GenMD4), from MASK:
//     p(k) = μ_k v_k, v_k = 1 - (s/t)^{w_k},               p(x) = 1 - Σ_k p(k)
// clang-format on
//
// A forbidden token gets 0, and the rest is normalised.
#pragma once

#include "common/random.h"
#include "common/rank_one.h"

namespace sedd {

enum class MeanStep : int32_t { euler = 0, tweedie = 1, generalized_masked = 2 };

// If the vocabulary is split over processes, each process has the logits of its entries. It computes their sums. From
// the sums of all processes, reverse_mean_choose computes the masses and where each token comes from. If it comes from
// μ, the process that has the random number's part of the sum draws it.

// The sums of the entries of a row that one process has.
struct MeanSums {
    double top;       // the largest logit of y ≠ x without MASK
    double exps;      // Σ exp(l_y - top) over these y
    double weighted;  // Σ exp(l_y - top) v_y, for generalized masked
    double logit_x;   // if x is among the entries
};

struct ReverseMeanParams {
    const void* logits;        // [rows, width] of dtype, contiguous: entries [first, first + width) of every row
    const int64_t* x_t;        // [rows]
    const double* noise;       // [rows] Δ (Tweedie), Δt σ(t) (Euler) or log(s/t) (generalized masked)
    const double* sigma;       // [rows] σ̄(t); null for generalized masked
    const void* stationary;    // [dim] of the compute type, for a vector π; else null
    const double* cumulative;  // [dim] cumulative sums of a vector π; else null
    const void* power;         // [dim] w of the compute type, for generalized masked; else null
    MeanSums* sums;            // [rows] or null; if given, a sampler writes the sums and draws nothing; to
                               // reverse_mean_choose, [P, rows]
    double* targets;           // [rows] or null; if given, a sampler draws the entry at this share of its sum of μ, or
                               // nothing and writes 0 if it is negative; reverse_mean_choose writes [P, rows]
    void* out;                 // probabilities [rows, dim] of the compute type, or int64 tokens [rows]
    const int64_t* seed;       // [1]; sampling only
    const int64_t* row_ids;    // [rows] index of the row in the whole batch, or null; selects its random numbers
    int64_t rows;
    int64_t width;   // dim, unless the vocabulary is split
    int64_t stride;  // elements from a row of the logits to the next; for probabilities dim
    int64_t first;
    int64_t most;  // process r of P has the entries [r most, (r + 1) most)
    int64_t dim;
    int64_t mask;       // MASK, whose logit is ignored, or -1
    int64_t forbidden;  // a token the step must not return (MASK, at the last step), or -1
    DType dtype;
    Family family;
    MeanStep step;
};

// How much longer than σ̄ a step may be, relative to σ̄, before it is an error: a float32 number rounds by less.
constexpr double kStepSlack = 1e-6;

SEDD_HD Fault reverse_mean_fault(const ReverseMeanParams& p, int64_t row) {
    if (!valid_token(p.x_t[row], p.dim)) return Fault::x_t;
    const double noise = p.noise[row];
    if (p.step == MeanStep::generalized_masked) return noise < 0.0 ? Fault::none : Fault::noise;
    if (!valid_sigma(p.sigma[row])) return Fault::sigma;
    if (!valid_sigma(noise)) return Fault::noise;
    const bool too_long = p.step == MeanStep::tweedie && noise > p.sigma[row] * (1.0 + kStepSlack);
    return too_long ? Fault::noise : Fault::none;
}

// The numbers of one row that do not depend on its logits.
struct MeanRow {
    double mu;          // p(y) contains mu μ_y and
    double pi;          // pi α π_y
    double kept;        // α = (1 - μ_x) + kept μ_x
    double stay_mu;     // Tweedie: p(x) = stay_mu μ_x +
    double stay_alpha;  // stay_alpha α
};

// Requires π_x > 0; a token with π_x = 0 stays.
SEDD_HD MeanRow reverse_mean_row(MeanStep step, double noise, double sigma, double pi_x) {
    if (step == MeanStep::generalized_masked) return {1.0, 0.0, 0.0, 0.0, 0.0};
    const Decay now = decay(sigma);
    const double here = now.a + now.b * pi_x;  // p(x_t = x | x_0 = x)
    const double kept = now.b * pi_x / here;
    if (step == MeanStep::euler) return {noise * (now.a / now.b), noise, kept, 0.0, 0.0};
    const Decay before = decay(noise < sigma ? sigma - noise : 0.0), between = decay(noise);
    const double ratio = between.b / now.b, self = between.a + between.b * pi_x;
    return {ratio * before.a, ratio * before.b, kept, self * (before.a / here), self * (before.b / now.b)};
}

// The share of the tokens y ≠ x in a softmax, and that of x, to full relative precision. `others` is Σ exp(l_y - top)
// over y ≠ x without MASK.
struct MeanShares {
    double others, x;
};

SEDD_HD MeanShares mean_shares(double others, double top, double logit_x, bool x_is_mask) {
    const double largest = 1.7976931348623157e308, nan = (others - others) / (others - others);
    if (x_is_mask) return others > 0.0 && others <= largest ? MeanShares{1.0, 0.0} : MeanShares{nan, nan};
    if (!(logit_x <= largest)) return {nan, nan};
    if (others == 0.0) return logit_x >= -largest ? MeanShares{0.0, 1.0} : MeanShares{nan, nan};
    const double odds = logit_x - top - log(others);
    return {1.0 / (1.0 + exp(odds)), 1.0 / (1.0 + exp(-odds))};
}

// The parts of a row's weight. p(y) = unit exp(l_y - top) [v_y] + pi π_y for y ≠ x, before the division by the total.
struct MeanMasses {
    double stay;      // w(x)
    double mu_mass;   // of the entries that are drawn from μ
    double pi_mass;   // of those that are drawn from π
    double unit, pi;  // factors
    double total;     // NaN or infinite if the row has no distribution
};

// Up to two tokens that a draw from π leaves out, in ascending order; dim if there is no second one.
struct Excluded {
    int64_t first, second;
};

SEDD_HD Excluded excluded_tokens(const ReverseMeanParams& p, int64_t x) {
    if (p.forbidden < 0 || p.forbidden == x) return {x, p.dim};
    return x < p.forbidden ? Excluded{x, p.forbidden} : Excluded{p.forbidden, x};
}

// Σ π_y over [begin, end). Sums of float64, because 1 - π_x in float32 has few digits if π_x is close to 1.
SEDD_HD double stationary_between(const double* cumulative, int64_t begin, int64_t end) {
    if (begin >= end) return 0.0;
    return cumulative[end - 1] - (begin > 0 ? cumulative[begin - 1] : 0.0);
}

// Σ π_y over all tokens but the excluded ones. Requires π_x > 0 for an excluded x.
SEDD_HD double stationary_without(const ReverseMeanParams& p, const Excluded& out) {
    if (p.family == Family::absorbing) return 0.0;
    if (p.family == Family::uniform) {
        const int64_t left = p.dim - (out.second < p.dim ? 2 : 1);
        return static_cast<double>(left) / static_cast<double>(p.dim);
    }
    const double sum =
        stationary_between(p.cumulative, 0, out.first) + stationary_between(p.cumulative, out.first + 1, out.second);
    return sum + stationary_between(p.cumulative, out.second + 1, p.dim);
}

// A draw from π without the excluded tokens, by inverse CDF. Requires that their complement has π > 0. `u` is in [0,
// 1).
SEDD_HD int64_t draw_stationary_without(const ReverseMeanParams& p, const Excluded& out, double u) {
    if (p.family == Family::uniform) {
        const int64_t left = p.dim - (out.second < p.dim ? 2 : 1);
        int64_t y = static_cast<int64_t>(u * static_cast<double>(left));
        y = y < left ? y : left - 1;
        y += y >= out.first;
        return y + (y >= out.second);
    }
    double target = u * stationary_without(p, out);
    const int64_t begins[3] = {0, out.first + 1, out.second + 1}, ends[3] = {out.first, out.second, p.dim};
    int64_t low = 0, high = -1;
    for (int i = 0; i < 3; ++i) {
        const double mass = stationary_between(p.cumulative, begins[i], ends[i]);
        if (!(mass > 0.0)) continue;
        low = begins[i], high = ends[i] - 1;
        if (target < mass) break;
        target -= mass;
    }
    // The first entry whose cumulative sum exceeds the target; if rounding moved the target beyond the end, the first
    // one that reaches the end. Neither has π = 0.
    target += low > 0 ? p.cumulative[low - 1] : 0.0;
    const double end = p.cumulative[high];
    const bool beyond = !(target < end);
    while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (beyond ? p.cumulative[middle] >= end : p.cumulative[middle] > target) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

// The masses of a row. `others` is Σ exp(l_y - top) over y ≠ x without MASK, `weighted` the same with the factors v_y.
SEDD_HD MeanMasses mean_masses(const ReverseMeanParams& p, const MeanRow& row, int64_t x, double others,
                               double weighted, double top, double logit_x) {
    const MeanShares share = mean_shares(others, top, logit_x, x == p.mask);
    const bool stays_out = x == p.forbidden;
    MeanMasses m{};
    if (p.step == MeanStep::generalized_masked) {
        const double leave = share.others * (weighted / others);
        m.stay = stays_out || !(leave < 1.0) ? 0.0 : 1.0 - leave;
        m.mu_mass = leave;
        m.unit = share.others / others;
    } else {
        const double alpha = share.others + row.kept * share.x;
        m.pi = row.pi * alpha;
        m.mu_mass = row.mu * share.others;
        m.pi_mass = m.pi * stationary_without(p, excluded_tokens(p, x));
        m.unit = others > 0.0 ? m.mu_mass / others : 0.0;
        if (!stays_out && p.step == MeanStep::tweedie) m.stay = row.stay_mu * share.x + row.stay_alpha * alpha;
        if (!stays_out && p.step == MeanStep::euler) {
            const double rest = 1.0 - m.mu_mass - m.pi * stationary_without(p, {x, p.dim});
            m.stay = rest > 0.0 ? rest : 0.0;
        }
    }
    m.total = m.stay + m.mu_mass + m.pi_mass;
    return m;
}

SEDD_HD bool valid_masses(const MeanMasses& m) { return m.total > 0.0 && m.total <= 1.7976931348623157e308; }

// Where a row's token comes from. `u` is in [0, 1).
enum class MeanPart { x, mu, pi };

SEDD_HD MeanPart mean_part(const MeanMasses& m, double u) {
    const double target = u * m.total;
    if (target < m.stay || !(m.mu_mass + m.pi_mass > 0.0)) return MeanPart::x;
    return m.pi_mass > 0.0 && !(target < m.stay + m.mu_mass) ? MeanPart::pi
           : m.mu_mass > 0.0                                 ? MeanPart::mu
                                                             : MeanPart::pi;
}

SEDD_HD Uniforms mean_uniforms(const ReverseMeanParams& p, int64_t row) {
    return row_uniforms(static_cast<uint64_t>(*p.seed),
                        static_cast<uint64_t>(p.row_ids != nullptr ? p.row_ids[row] : row));
}

// The token of a row from the sums of all processes if it is x or comes from π. If it comes from μ: 0, and the target
// of the process that draws it. -1 if the row has no distribution.
template <class Real>
SEDD_HD int64_t choose_mean(const ReverseMeanParams& p, int64_t row) {
    const int64_t processes = (p.dim + p.most - 1) / p.most;
    const auto sums = [&](int64_t r) -> const MeanSums& { return p.sums[r * p.rows + row]; };
    const auto target_of = [&](int64_t r) -> double& { return p.targets[r * p.rows + row]; };
    for (int64_t r = 0; r < processes; ++r) target_of(r) = -1.0;
    if (reverse_mean_fault(p, row) != Fault::none) return -1;
    const int64_t x = p.x_t[row];
    const double pi_x = stationary_at(p.family, static_cast<const Real*>(p.stationary), p.dim, x);
    if (pi_x == 0.0) return x == p.forbidden ? -1 : x;
    double top = sums(0).top;
    for (int64_t r = 1; r < processes; ++r) top = sums(r).top > top ? sums(r).top : top;
    const auto scale = [&](int64_t r) { return sums(r).top == top ? 1.0 : exp(sums(r).top - top); };
    double exps = 0.0, weighted = 0.0;
    for (int64_t r = 0; r < processes; ++r) {
        exps += sums(r).exps * scale(r);
        weighted += sums(r).weighted * scale(r);
    }
    const MeanRow numbers = reverse_mean_row(p.step, p.noise[row], p.sigma != nullptr ? p.sigma[row] : 0.0, pi_x);
    const MeanMasses masses = mean_masses(p, numbers, x, exps, weighted, top, sums(x / p.most).logit_x);
    if (!valid_masses(masses)) return -1;
    const Uniforms u = mean_uniforms(p, row);
    const MeanPart part = mean_part(masses, u.first);
    if (part == MeanPart::x) return x;
    if (part == MeanPart::pi) return draw_stationary_without(p, excluded_tokens(p, x), u.second);
    const bool powers = p.step == MeanStep::generalized_masked;
    double target = u.second * (powers ? weighted : exps);
    int64_t owner = -1;
    double share = 1.0;  // if rounding moves the target beyond the end: the end of the last sum above 0
    for (int64_t r = 0; r < processes; ++r) {
        const double sum = (powers ? sums(r).weighted : sums(r).exps) * scale(r);
        if (!(sum > 0.0)) continue;
        owner = r;
        if (target < sum) {
            share = target / sum;
            break;
        }
        target -= sum;
    }
    if (owner >= 0) target_of(owner) = share;
    return 0;
}

Status reverse_mean_probs_cpu(const ReverseMeanParams& params, int threads);
Status reverse_mean_sample_cpu(const ReverseMeanParams& params, int threads);
Status reverse_mean_choose_cpu(const ReverseMeanParams& params, int threads);

// Asynchronous. Return null, or the error message of the CUDA runtime. A bad row gets probabilities of NaN, or token
// -1.
const char* reverse_mean_probs_cuda(const ReverseMeanParams& params, const CudaLaunch& launch);
const char* reverse_mean_sample_cuda(const ReverseMeanParams& params, const CudaLaunch& launch);
const char* reverse_mean_choose_cuda(const ReverseMeanParams& params, const CudaLaunch& launch);

}  // namespace sedd

// One reverse step of a position: Euler (τ-leaping, SEDD eq. 17) and Tweedie (eq. 19), for any rank-one process.
//
// Up to a factor of the row, which the normalisation drops, both have the form
//   w(y) = max(0, s_y - drain π_y S) for y ≠ x,   w(x) = max(0, stay - leave Σ_{y≠x} s_y),   S = 1 + Σ_{y≠x} s_y
// Euler divided by Δt σ π_x; Tweedie by (e^Δ - 1) π_x, so that no Δ overflows. Tweedie's w(x) is `stay` (1 - drain π_x
// S).
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
    Family family;
    Step kind;
};

struct ReverseRow {
    double drain;
    double kept;  // 1 - drain, to full precision
    double stay;
};

// For π_x > 0; a token with π_x = 0 stays.
SEDD_HD ReverseRow reverse_row(Step kind, double step, double pi_x) {
    if (kind == Step::euler) return {0.0, 1.0, 1.0 / (step * pi_x)};
    const Decay d = decay(step);
    const double self = d.a + d.b * pi_x;  // p(x_t = x | x_{t-Δt} = x)
    // Where all scores are equal every weight is proportional to a, which float32 holds up to Δ = 80; beyond it, a is
    // nothing beside any difference of scores.
    return {d.b, d.a > 1e-35 ? d.a : 1e-35, self / (d.b * pi_x)};
}

// drain · amount as high + low: float32 has no number for 1 - e^{-Δ} with Δ > 17, and float64 none with Δ > 37. What
// remains of a score, (s - high) - low, is then right even where all scores are equal and only e^{-Δ} of them remains.
template <class Real>
struct Drain {
    Real high, low;
};

template <class Real>
SEDD_HD Real drained(Real score, const Drain<Real>& drain, Real pi) {
    return (score - drain.high * pi) - drain.low * pi;
}

template <class Real>
SEDD_HD Drain<Real> drain_of(const ReverseRow& row, double amount) {
    const double product = row.drain * amount;
    const Real high = static_cast<Real>(product);
    const double rest = static_cast<double>(high);
    return {high, static_cast<Real>(row.drain > 0.5 ? (amount - rest) - row.kept * amount : product - rest)};
}

// From double to float and back, as it was.
template <class To, class From>
SEDD_HD Drain<To> converted(const Drain<From>& drain) {
    return {static_cast<To>(drain.high), static_cast<To>(drain.low)};
}

// What multiplies π_y in max(0, s_y - drain π_y S), given Σ_{y≠x} s_y; a constant π is part of it already.
template <class Real, class Params>
SEDD_HD Drain<Real> reverse_drain(const Params& p, const ReverseRow& row, double others) {
    const double all = 1.0 + others;
    return drain_of<Real>(row, p.family == Family::uniform ? all / static_cast<double>(p.dim) : all);
}

// w(x), given Σ_{y≠x} s_y.
template <class Params>
SEDD_HD double reverse_stay(const Params& p, const ReverseRow& row, double others, double pi_x, bool forbidden) {
    const double all = 1.0 + others;
    const double amount = p.family == Family::uniform ? all / static_cast<double>(p.dim) : all * pi_x;
    const double w =
        p.kind == Step::euler ? row.stay - others : row.stay * drained(1.0, drain_of<double>(row, amount), 1.0);
    return forbidden || !(w > 0.0) ? 0.0 : w;
}

SEDD_HD bool valid_total(double total) { return total > 0.0 && total <= 1.7976931348623157e308; }

template <class Params>
SEDD_HD Fault reverse_fault(const Params& p, int64_t row) {
    return !valid_token(p.x_t[row], p.dim) ? Fault::x_t : !valid_sigma(p.step[row]) ? Fault::sigma : Fault::none;
}

// ---- samples ----
//
// The weights are not known before the scores' total is. So an entry is drawn from the scores (x from its own weight),
// and where the two differ it is taken with probability w / s ≤ 1; a row whose entry is refused goes through a second
// sweep, of the weights. The law is exact, and at the step sizes of a sampler nearly all rows are read once.

// Do the weights of y ≠ x differ from the scores?
template <class Params>
SEDD_HD bool reverse_weighs(const Params& p, const ReverseRow& row, int64_t x) {
    return p.family != Family::absorbing && (row.drain > 0.0 || (p.forbidden >= 0 && p.forbidden != x));
}

// w_y where s_y is known; for y ≠ x.
template <class Params>
SEDD_HD double reverse_weight(const Params& p, double score, const Drain<double>& drain, double pi_y, int64_t y) {
    const double w = drained(score, drain, p.family == Family::uniform ? 1.0 : pi_y);
    return y == p.forbidden || !(w > 0.0) ? 0.0 : w;
}

// ---- a row that comes in tiles of the vocabulary, from left to right ----
//
// One sweep keeps the running total T and one entry, which a tile of sum S replaces by a draw from itself with
// probability S / T: after the last tile every entry has had its due.

struct ReverseDraw {
    double others;        // Σ_{y≠x} s_y, and
    Drain<double> drain;  // what multiplies π_y: since the end of the first sweep
    double total;         // of the tiles seen in this sweep
    double score;         // s_y of the entry drawn
    int64_t token;        // the entry
};

struct ReverseTileParams {
    const void* log_score;   // [rows, width] of dtype, contiguous: entries [first, first + width) of every row
    const int64_t* x_t;      // [rows]
    const double* step;      // [rows]
    const double* shift;     // [rows] or null
    const void* stationary;  // [dim] of the compute type, for a vector π; else null
    ReverseDraw* draws;      // [rows] from one tile to the next; the first one of a sweep sets them
    int64_t* out;            // [rows] tokens, or kSweepAgain; written with the last tile, which ends at dim
    const int64_t* seed;     // [1]
    const int64_t* places;   // [rows] a row's number, which its random numbers follow from
    int64_t rows;
    int64_t width;
    int64_t first;
    int64_t dim;
    int64_t forbidden;
    DType dtype;
    Family family;
    Step kind;
    int32_t sweep;  // 0, or 1 for the second
};

constexpr int64_t kSweepAgain = -2;

// The tile's random number, on the axis of the total so far: below the tile's sum, it picks a new entry.
SEDD_HD double tile_target(const ReverseTileParams& p, int64_t row, double total) {
    const uint64_t draw = static_cast<uint64_t>(p.first) + (static_cast<uint64_t>(p.sweep) << 32);
    return row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(p.places[row]), draw).first * total;
}

// The row's token after the last tile; -1 if it has no distribution. Leaves what a second sweep needs to know. For π_x
// > 0; pi_y is that of the entry drawn.
template <class Real>
SEDD_HD int64_t finish_draw(const ReverseTileParams& p, int64_t row, const ReverseRow& r, ReverseDraw& d, double pi_x,
                            double pi_y) {
    const int64_t x = p.x_t[row];
    if (p.sweep == 0) {
        d.others = d.total;
        d.drain = converted<double>(reverse_drain<Real>(p, r, d.others));
    }
    const double self = reverse_stay(p, r, d.others, pi_x, x == p.forbidden), total = self + d.total;
    if (!valid_total(1.0 + d.others)) return -1;
    const Uniforms u = row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(p.places[row]),
                                    static_cast<uint64_t>(2 + p.sweep) << 32);
    if (!valid_total(total)) return -1;
    if (u.first * total < self || d.total == 0.0) return self > 0.0 ? x : -1;
    if (!reverse_weighs(p, r, x) || p.sweep == 1) return d.token;
    return u.second * d.score < reverse_weight(p, d.score, d.drain, pi_y, d.token) ? d.token : kSweepAgain;
}

Status reverse_probs_cpu(const ReverseParams& params, int threads);
Status reverse_sample_cpu(const ReverseParams& params, int threads);
Status reverse_tile_cpu(const ReverseTileParams& params, int threads);

// Return before the kernels have run: null, or what the CUDA runtime said. A bad row's probabilities are NaN, its token
// is -1.
const char* reverse_probs_cuda(const ReverseParams& params, const CudaLaunch& launch);
const char* reverse_sample_cuda(const ReverseParams& params, const CudaLaunch& launch);
const char* reverse_tile_cuda(const ReverseTileParams& params, const CudaLaunch& launch);
int64_t reverse_workspace(int64_t rows, int64_t dim, DType dtype);

}  // namespace sedd

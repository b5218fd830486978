// One reverse step of a position: Euler (τ-leaping, SEDD eq. 17) and Tweedie (eq. 19), for any rank-one process.
//
// The probabilities are the weights w, normalised. S = 1 + Σ_{y≠x} s_y is the sum of the scores with s_x = 1.
//
// clang-format off
//   Tweedie, divided by (e^Δ - 1) π_x so that no Δ overflows, with drain = 1 - e^{-Δ}:
//     w(y) = max(0, s_y - drain π_y S) for y ≠ x,   w(x) = max(0, stay (1 - drain π_x S))
//   Euler, divided by Δt σ π_x, with drain = 0:
//     w(y) = s_y for y ≠ x,                         w(x) = max(0, stay - Σ_{y≠x} s_y)
// clang-format on
#pragma once

#include "common/random.h"
#include "common/rank_one.h"

namespace sedd {

enum class Step : int32_t { euler = 0, tweedie = 1 };

struct ReverseParams {
    const void* log_score;   // [rows, dim] of dtype, contiguous
    const int64_t* x_t;      // [rows]
    const double* noise;     // [rows] Δ (Tweedie) or Δt σ(t) (Euler)
    const double* shift;     // [rows] subtracted from the row's log-scores, or null
    const void* stationary;  // [dim] of the compute type, for a vector π; else null
    void* out;               // probabilities [rows, dim] of the compute type, or int64 tokens [rows]
    const int64_t* seed;     // [1]; sampling only
    int64_t rows;
    int64_t dim;
    int64_t forbidden;  // a token the step must not return (MASK, at the last step), or -1
    DType dtype;
    Family family;
    Step step;
};

// The numbers of one row.
struct ReverseRow {
    double drain;
    double kept;  // 1 - drain, to full precision
    double stay;
};

// Requires π_x > 0; a token with π_x = 0 stays.
SEDD_HD ReverseRow reverse_row(Step step, double noise, double pi_x) {
    if (step == Step::euler) return {0.0, 1.0, 1.0 / (noise * pi_x)};
    const Decay d = decay(noise);
    const double self = d.a + d.b * pi_x;  // p(x_t = x | x_{t-Δt} = x)
    // If all scores are equal, every weight is proportional to a. float32 represents a up to Δ = 80. For a larger Δ, a
    // is negligible beside any difference of scores.
    return {d.b, d.a > 1e-35 ? d.a : 1e-35, self / (d.b * pi_x)};
}

// drain · amount, split into high + low. 1 - e^{-Δ} rounds to 1 for Δ > 17 in float32 and for Δ > 37 in float64. With
// the split, (s - high) - low is accurate even if all scores are equal and only e^{-Δ} of them remains.
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

// Converts between float and double.
template <class To, class From>
SEDD_HD Drain<To> converted(const Drain<From>& drain) {
    return {static_cast<To>(drain.high), static_cast<To>(drain.low)};
}

// The factor of π_y in max(0, s_y - drain π_y S), given others = Σ_{y≠x} s_y. It includes π_y if π is constant.
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
        p.step == Step::euler ? row.stay - others : row.stay * drained(1.0, drain_of<double>(row, amount), 1.0);
    return forbidden || !(w > 0.0) ? 0.0 : w;
}

SEDD_HD bool valid_total(double total) { return total > 0.0 && total <= 1.7976931348623157e308; }

template <class Params>
SEDD_HD Fault reverse_fault(const Params& p, int64_t row) {
    return !valid_token(p.x_t[row], p.dim) ? Fault::x_t : !valid_sigma(p.noise[row]) ? Fault::sigma : Fault::none;
}

// ---- samples ----
//
// The weights depend on the total of the scores, which is known only after a pass over the row. So the kernels draw an
// entry from the scores (x from its weight) and accept it with probability w / s ≤ 1. A rejected row takes a second
// sweep, which draws from the weights. The distribution is exact, and at a sampler's step sizes nearly all rows are
// read once.

// Whether the weights of y ≠ x differ from the scores.
template <class Params>
SEDD_HD bool reverse_weighs(const Params& p, const ReverseRow& row, int64_t x) {
    return p.family != Family::absorbing && (row.drain > 0.0 || (p.forbidden >= 0 && p.forbidden != x));
}

// w_y, given s_y, for y ≠ x.
template <class Params>
SEDD_HD double reverse_weight(const Params& p, double score, const Drain<double>& drain, double pi_y, int64_t y) {
    const double w = drained(score, drain, p.family == Family::uniform ? 1.0 : pi_y);
    return y == p.forbidden || !(w > 0.0) ? 0.0 : w;
}

// ---- rows in tiles of the vocabulary, from left to right ----
//
// A sweep keeps the running total T and one drawn entry. A tile with the sum S replaces the drawn entry, with
// probability S / T, by an entry drawn from the tile. After the last tile, the probability of each entry is
// proportional to its score (first sweep) or weight (second sweep).
//
// If the vocabulary is split over processes, each process has some parts of tiles. It computes their sums. From the
// sums of all processes, reverse_choose computes which tile replaced the drawn entry last, which part of it contains
// the random number, and where. The process that has this part draws the entry. A launch of width 0, which starts at
// dim, then finishes the sweep.

// The state of a row between two tiles.
struct ReverseDraw {
    double others;        // Σ_{y≠x} s_y; set at the end of the first sweep
    Drain<double> drain;  // the factor of π_y; set at the end of the first sweep
    double total;         // of the tiles of this sweep so far
    double score;         // s_y of the drawn entry
    int64_t token;        // the drawn entry
};

struct ReverseTileParams {
    const void* log_score;   // [rows, width] of dtype, contiguous: entries [first, first + width) of every row
    const int64_t* x_t;      // [rows]
    const double* noise;     // [rows]
    const double* shift;     // [rows] or null
    const void* stationary;  // [dim] of the compute type, for a vector π; else null
    ReverseDraw* draws;      // [rows] state between tiles; the first tile of a sweep initialises it
    double* sums;            // [rows] or null; if given, the kernel writes the sums of the tile and does nothing else
    const double* targets;   // [rows] or null; if given, it draws the entry at this part of the tile's sum
    int64_t* out;            // [rows] tokens, or kSweepAgain; written by the last tile, which ends at dim
    const int64_t* seed;     // [1]
    const int64_t* row_ids;  // [rows] index of the row in the whole batch; selects its random numbers
    int64_t rows;
    int64_t width;
    int64_t stride;  // elements from a row of the log-scores to the next
    int64_t first;
    int64_t dim;
    int64_t forbidden;
    DType dtype;
    Family family;
    Step step;
    int32_t sweep;  // 0, or 1 for the second
};

// The "token" of a row whose draw was rejected and that needs the second sweep.
constexpr int64_t kSweepAgain = -2;

// The tiles of all processes. Process r of P has the entries [r most, (r + 1) most) of the vocabulary.
struct ReverseChoiceParams {
    const double* sums;      // [P, parts, rows] sums of the parts of tiles that each process has, from left to right
    ReverseDraw* draws;      // [rows] receives the total; no entry is drawn yet
    double* targets;         // [rows] receives where the entry lies in the sum of its part
    int64_t* out;            // [rows] receives the part r parts + i that contains the entry, or -1
    const int64_t* seed;     // [1]
    const int64_t* row_ids;  // [rows]
    int64_t rows;
    int64_t parts;  // the largest number of parts that a process has
    int64_t width;  // of a tile; tile k starts at k width
    int64_t most;
    int64_t dim;
    int32_t sweep;
};

// A random number in [0, total), where total includes the tile that starts at `first`. If it is below the tile's sum,
// it selects an entry of the tile.
template <class Params>
SEDD_HD double tile_target(const Params& p, int64_t first, int64_t row, double total) {
    const uint64_t draw = static_cast<uint64_t>(first) + (static_cast<uint64_t>(p.sweep) << 32);
    return row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(p.row_ids[row]), draw).first * total;
}

// The row's token after the last tile, or -1 if the row has no distribution. Stores in `d` what a second sweep needs.
// Requires π_x > 0. pi_y belongs to the drawn entry.
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
    const Uniforms u = row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(p.row_ids[row]),
                                    static_cast<uint64_t>(2 + p.sweep) << 32);
    if (!valid_total(total)) return -1;
    if (u.first * total < self || d.total == 0.0) return self > 0.0 ? x : -1;
    if (!reverse_weighs(p, r, x) || p.sweep == 1) return d.token;
    return u.second * d.score < reverse_weight(p, d.score, d.drain, pi_y, d.token) ? d.token : kSweepAgain;
}

// The index in [P, parts] of the part of the tile at `first` that process r has.
SEDD_HD int64_t part_of_tile(const ReverseChoiceParams& p, int64_t first, int64_t r) {
    return r * p.parts + first / p.width - r * p.most / p.width;
}

// Adds up the tiles of a row as the sweep of one process does.
SEDD_HD void choose_part(const ReverseChoiceParams& p, int64_t row) {
    double total = 0.0, rest = 0.0;
    int64_t chosen = -1;
    for (int64_t first = 0; first < p.dim; first += p.width) {
        const int64_t last = (first + p.width < p.dim ? first + p.width : p.dim) - 1;
        double sum = 0.0;
        for (int64_t r = first / p.most; r <= last / p.most; ++r)
            sum += p.sums[part_of_tile(p, first, r) * p.rows + row];
        total += sum;
        const double target = tile_target(p, first, row, total);
        if (target < sum) chosen = first, rest = target;
    }
    p.draws[row] = {p.draws[row].others, p.draws[row].drain, total, 0.0, -1};
    int64_t part = -1;
    double target = 0.0;
    if (chosen >= 0) {
        const int64_t last = (chosen + p.width < p.dim ? chosen + p.width : p.dim) - 1;
        // If rounding moves the target beyond the end: the end of the last part with a sum above 0.
        for (int64_t r = chosen / p.most; r <= last / p.most; ++r) {
            const int64_t here = part_of_tile(p, chosen, r);
            const double sum = p.sums[here * p.rows + row];
            if (!(sum > 0.0)) continue;
            part = here, target = rest < sum ? rest : sum;
            if (rest < sum) break;
            rest -= sum;
        }
    }
    p.out[row] = part;
    p.targets[row] = target;
}

Status reverse_probs_cpu(const ReverseParams& params, int threads);
Status reverse_sample_cpu(const ReverseParams& params, int threads);
Status reverse_tile_cpu(const ReverseTileParams& params, int threads);
Status reverse_choose_cpu(const ReverseChoiceParams& params, int threads);

// Asynchronous. Return null, or the error message of the CUDA runtime. A bad row gets probabilities of NaN, or token
// -1.
const char* reverse_probs_cuda(const ReverseParams& params, const CudaLaunch& launch);
const char* reverse_sample_cuda(const ReverseParams& params, const CudaLaunch& launch);
const char* reverse_tile_cuda(const ReverseTileParams& params, const CudaLaunch& launch);
const char* reverse_choose_cuda(const ReverseChoiceParams& params, const CudaLaunch& launch);
int64_t reverse_workspace(int64_t rows, int64_t dim, DType dtype);

}  // namespace sedd

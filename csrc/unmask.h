// A position of text from a prediction of the clean token: a token drawn from softmax(l / T), where l are the logits
// without MASK's; the most probable token; and numbers that describe softmax(l). With top = max l_y and
// Z = Σ exp(l_y - top):
//
// clang-format off
//   log p(y) = l_y - top - log Z
//   H        = log Z - (1/Z) Σ (l_y - top) exp(l_y - top)
// clang-format on
//
// The logits come in tiles of the vocabulary, from left to right; a whole row is one tile. A sweep keeps the state of
// each row. Its sums are relative to the largest logit so far. A tile replaces the drawn token, with probability
// Σ_tile exp(l / T) / Σ_so far exp(l / T), by one drawn from the tile, so that in the end the probability of each token
// is proportional to exp(l / T).
//
// With top_p below 1 the token is drawn from the nucleus: the tokens y for which the more probable tokens together have
// less than top_p. A drawn token that is not in the nucleus is rejected, and the next one is drawn from the tokens that
// are more probable than it. The nucleus is among them, so that the distribution is exact. This needs whole rows.
#pragma once

#include "common/random.h"
#include "common/rank_one.h"

namespace sedd {

// The state of a row between two tiles.
struct UnmaskState {
    double top;       // the largest logit
    double second;    // the second largest; equal to `top` if two tokens have it
    double exps;      // Σ exp(l - top)
    double weighted;  // Σ (l - top) exp(l - top)
    double draws;     // Σ exp((l - top) / T)
    double logit;     // of the drawn token
    int64_t token;    // the drawn token, or -1
    int64_t argmax;   // the first token with the largest logit, or -1
};

// The numbers of a row.
struct UnmaskNumbers {
    double log_prob;  // of the drawn token
    double max_prob;
    double margin;  // the largest probability minus the second largest
    double entropy;
};

struct UnmaskParams {
    const void* logits;      // [rows, width] of dtype, contiguous: entries [first, first + width) of every row
    UnmaskState* states;     // [rows] state between tiles; the first tile initialises it
    int64_t* out;            // [rows] drawn tokens; written by the last tile, which ends at dim
    int64_t* argmax;         // [rows] the most probable tokens; written by the last tile
    UnmaskNumbers* numbers;  // [rows], written by the last tile; or null: the sums for them are not computed
    const int64_t* seed;     // [1]
    const int64_t* row_ids;  // [rows] selects the random numbers of a row; null: its index
    int64_t rows;
    int64_t width;
    int64_t stride;  // elements from a row of the logits to the next
    int64_t first;
    int64_t dim;
    int64_t mask;        // MASK, whose logit is ignored, or -1
    double temperature;  // T ≥ 0; with 0 the token is the most probable one
    double top_p;        // in (0, 1]; below 1 only if width is dim
    DType dtype;
};

// The sums that a kernel computes of a tile.
enum class UnmaskSums {
    draws,       // only what draws need
    statistics,  // the statistics, whose exps are what draws need too (T = 1) or are not drawn from (T = 0)
    both,
};

SEDD_HD UnmaskSums unmask_sums(const UnmaskParams& p) {
    if (p.numbers == nullptr && p.temperature != 0.0) return UnmaskSums::draws;
    return p.temperature == 0.0 || p.temperature == 1.0 ? UnmaskSums::statistics : UnmaskSums::both;
}

// The factor of the logits of a draw, 1 / T, within the range of float32.
SEDD_HD double unmask_factor(const UnmaskParams& p) {
    const double factor = p.temperature == 0.0 ? 1.0 : 1.0 / p.temperature;
    return factor < 1e-30 ? 1e-30 : factor > 1e30 ? 1e30 : factor;
}

SEDD_HD UnmaskState unmask_start() {
    const double none = -exp(1000.0);
    return {none, none, 0.0, 0.0, 0.0, none, -1, -1};
}

// The random number of a tile, in [0, 1). `draw` counts the draws from a nucleus.
SEDD_HD double unmask_uniform(const UnmaskParams& p, int64_t row, uint64_t draw) {
    const int64_t id = p.row_ids != nullptr ? p.row_ids[row] : row;
    return row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(id),
                        static_cast<uint64_t>(p.first) + (draw << 32))
        .first;
}

// Makes the sums relative to a logit that is larger by -by ≥ 0.
SEDD_HD void unmask_lower(UnmaskState& s, double by, double factor) {
    if (by == 0.0 || (s.exps == 0.0 && s.draws == 0.0)) return;
    const double scale = exp(by);
    s.weighted = (s.weighted + by * s.exps) * scale;
    s.exps *= scale;
    s.draws *= exp(by * factor);
}

// Adds a tile to the state of a row, with the random number of the tile. Returns where the tile's sum of draws contains
// the new drawn token, as a share in [0, 1); or -1 if the token stays.
SEDD_HD double unmask_add(const UnmaskParams& p, UnmaskState& s, UnmaskState tile, double uniform) {
    const double factor = unmask_factor(p), before = s.top;
    const bool higher = tile.top > before;
    const double top = higher ? tile.top : before, lower = higher ? before : tile.top;
    const double rest = higher ? tile.second : s.second;
    unmask_lower(s, before - top, factor);
    unmask_lower(tile, tile.top - top, factor);
    s.top = top;
    s.second = lower > rest ? lower : rest;
    s.exps += tile.exps;
    s.weighted += tile.weighted;
    s.draws += tile.draws;
    if (higher) s.argmax = tile.argmax;
    if (p.temperature == 0.0) return -1.0;
    const double target = uniform * s.draws;
    return target < tile.draws ? target / tile.draws : -1.0;
}

// Whether the row has a distribution, after the last tile.
SEDD_HD bool unmask_valid(const UnmaskParams& p, const UnmaskState& s) {
    const double total = unmask_sums(p) == UnmaskSums::draws ? s.draws : s.exps;
    return total > 0.0 && total <= 1.7976931348623157e308;
}

// Writes the results of a row after the last tile.
SEDD_HD void unmask_finish(const UnmaskParams& p, int64_t row, const UnmaskState& s) {
    const bool valid = unmask_valid(p, s);
    p.out[row] = !valid ? -1 : p.temperature == 0.0 ? s.argmax : s.token;
    p.argmax[row] = valid ? s.argmax : -1;
    if (p.numbers == nullptr) return;
    const double nan = s.exps * 0.0 / 0.0;
    const double log_total = log(s.exps), logit = p.temperature == 0.0 ? s.top : s.logit;
    p.numbers[row] = {valid ? (logit - s.top) - log_total : nan, valid ? 1.0 / s.exps : nan,
                      valid ? -expm1(s.second - s.top) / s.exps : nan, valid ? log_total - s.weighted / s.exps : nan};
}

Status unmask_cpu(const UnmaskParams& params, int threads);

// Asynchronous. Returns null, or the error message of the CUDA runtime. A bad row gets tokens -1 and numbers NaN.
const char* unmask_cuda(const UnmaskParams& params, const CudaLaunch& launch);

}  // namespace sedd

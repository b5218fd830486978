// Reverse steps on the CPU. A kernel reads a row once and keeps the sums of blocks; one random number selects a block,
// and only this block is read again. Where the clamp max(0, ·) needs the total first (Tweedie with a π that is spread
// out), the entry is drawn from the scores and accepted with probability w / s; only rejected rows are read again. The
// lower bound of the time is that of a plain read.
#include "reverse.h"

#include "cpu/draw.h"

namespace sedd::SEDD_ISA {
namespace {

// Σ s_y over [begin, end), which is at most a block. kSkip leaves out y = skip. kKeep stores the scores in `scores`.
template <bool kKeep, bool kSkip, class T, class Real = Compute<T>>
double sum_scores(const T* log_score, int64_t begin, int64_t end, int64_t skip, Real shift, Real* scores) {
    constexpr int width = Lanes<Real>::width;
    using Vec = typename Lanes<Real>::Vec;
    const Vec shifts = broadcast(shift);
    Vec sums[kUnroll] = {};
    const auto add = [&](int64_t y, auto count) {
        Vec s[count.value];
        prefetch<count.value>(log_score + y);
        load_vectors<kKeep || kSkip>(log_score + y, s);
        SEDD_UNROLL for (int k = 0; k < count.value; ++k) s[k] -= shifts;
        if constexpr (kSkip) {
            SEDD_UNROLL for (int k = 0; k < count.value; ++k) s[k] = without(s[k], skip - y - k * width);
        }
        exp_lanes(s);
        SEDD_UNROLL for (int k = 0; k < count.value; ++k) {
            if constexpr (kKeep) store(scores + y + k * width, s[k]);
            sums[k] += s[k];
        }
    };
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) add(y, Count<kUnroll>{});
    sweep<width>(
        y, end, [&](int64_t z) { add(z, Count<1>{}); },
        [&](int64_t z, int64_t n) {
            Vec s = load_partial(log_score + z, n, -__builtin_inff()) - shifts;
            if constexpr (kSkip) s = without(s, skip - z);
            s = exp_lanes(s);
            if constexpr (kKeep) store_partial(scores + z, s, n);
            sums[1] += s;
        });
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Σ w_y over [begin, end) with w_y = max(0, s_y - drain π_y). The drain includes a constant π. kKeep overwrites s with
// w.
template <Family P, bool kKeep, class Real>
double sum_weights(Real* scores, const Real* stationary, int64_t begin, int64_t end, const Drain<Real>& drain) {
    constexpr int width = Lanes<Real>::width;
    using Vec = typename Lanes<Real>::Vec;
    const Vec high = broadcast(drain.high), low = broadcast(drain.low), zero = {};
    Vec sums[kUnroll] = {};
    const auto weigh = [&](Vec s, auto load_pi) {
        if constexpr (P == Family::rank_one) {
            const Vec pi = load_pi();
            return max_or_second((s - high * pi) - low * pi, zero);
        } else {
            return max_or_second((s - high) - low, zero);
        }
    };
    const auto add = [&](int64_t y, Vec& sum) {
        const Vec w = weigh(load(scores + y), [&] { return load(stationary + y); });
        if constexpr (kKeep) store(scores + y, w);
        sum += w;
    };
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        SEDD_UNROLL for (int k = 0; k < kUnroll; ++k) add(y + k * width, sums[k]);
    }
    sweep<width>(
        y, end, [&](int64_t z) { add(z, sums[0]); },
        [&](int64_t z, int64_t n) {
            const Vec w =
                weigh(load_partial(scores + z, n, 0.0f), [&] { return load_partial(stationary + z, n, 0.0f); });
            if constexpr (kKeep) store_partial(scores + z, w, n);
            sums[1] += w;  // the lanes beyond the end hold max(0, -drain π) = 0
        });
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The sums of blocks over the entries [first, first + width) of a row, of the scores s_y or, in a second sweep, of the
// weights w_y; and the entry at a given point of the running sum.
template <Family P, class T>
struct BlockSums {
    using Real = Compute<T>;

    const T* log_score;      // points to entry `first`
    const Real* stationary;  // points to token 0
    int64_t first, width;
    int64_t x, forbidden;  // tokens
    Real shift;
    double* blocks;  // [reverse_blocks(width)]
    Real* scores;    // [kReverseBlock]
    bool weighted = false;
    Drain<Real> drain{};

    int64_t size(int64_t block) const {
        const int64_t rest = width - block * kReverseBlock;
        return rest < kReverseBlock ? rest : kReverseBlock;
    }

    // kKeep stores the scores or weights of the block in `scores`.
    template <bool kKeep>
    double sum_block(int64_t block) const {
        const int64_t begin = block * kReverseBlock, n = size(block), token = first + begin;
        const auto add = [&](auto keep) {
            const bool has_x = token <= x && x < token + n;
            return has_x ? sum_scores<keep.value != 0, true>(log_score + begin, 0, n, x - token, shift, scores)
                         : sum_scores<keep.value != 0, false>(log_score + begin, 0, n, 0, shift, scores);
        };
        if (!weighted) return add(Count<kKeep>{});
        add(Count<1>{});
        if (token <= forbidden && forbidden < token + n) scores[forbidden - token] = Real(0);
        return sum_weights<P, kKeep>(scores, P == Family::rank_one ? stationary + token : nullptr, 0, n, drain);
    }

    double sum() const {
        const int64_t count = reverse_blocks(width);
        if (count == 1) return blocks[0] = sum_block<true>(0);
        double total = 0.0;
        for (int64_t k = 0; k < count; ++k) total += blocks[k] = sum_block<false>(k);
        return total;
    }

    // After sum(): the token at `target`, and its score or weight.
    int64_t pick(double target, double& score) const {
        const int64_t count = reverse_blocks(width), k = pick_block(blocks, count, target);
        if (count > 1) sum_block<true>(k);
        const int64_t y = entry_at(scores, size(k), target / blocks[k]);
        score = static_cast<double>(scores[y]);
        return first + k * kReverseBlock + y;
    }
};

// Checks a row and computes its numbers. Rows of one sequence share their noise, and so, unless π is a vector, all of
// their numbers.
template <Family P, class Real, class Params>
class Rows {
  public:
    explicit Rows(const Params& p) : p_(p), stationary_(static_cast<const Real*>(p.stationary)) {}

    // Reports a bad row and returns false.
    bool load(int64_t row, Status& status) {
        const Fault fault = reverse_fault(p_, row);
        if (fault != Fault::none) {
            report(status, fault, row);
            return false;
        }
        x = p_.x_t[row];
        shift = p_.shift != nullptr ? static_cast<Real>(p_.shift[row]) : Real(0);
        const double pi = stationary_at(P, stationary_, p_.dim, x);
        if (pi > 0.0 && (p_.noise[row] != noise_ || pi != pi_x))
            numbers = reverse_row(p_.step, noise_ = p_.noise[row], pi);
        pi_x = pi;
        return true;
    }

    int64_t x = 0;
    double pi_x = 0.0;
    Real shift = Real(0);
    ReverseRow numbers{};

  private:
    const Params& p_;
    const Real* stationary_;
    double noise_ = -1.0;
};

template <Family P, class T>
void probs_rows(const ReverseParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    Rows<P, Real, ReverseParams> row(p);
    for (int64_t i = begin; i < end; ++i) {
        if (!row.load(i, status)) continue;
        Real* out = static_cast<Real*>(p.out) + i * p.dim;
        if (row.pi_x == 0.0) {
            memset(out, 0, sizeof(Real) * static_cast<size_t>(p.dim));
            out[row.x] = Real(1);
            if (row.x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        const T* l = static_cast<const T*>(p.log_score) + i * p.dim;
        double others = 0.0;
        for (int64_t b = 0; b < p.dim; b += kReverseBlock) {
            const int64_t stop = b + kReverseBlock < p.dim ? b + kReverseBlock : p.dim;
            others += b <= row.x && row.x < stop ? sum_scores<true, true>(l, b, stop, row.x, row.shift, out)
                                                 : sum_scores<true, false>(l, b, stop, row.x, row.shift, out);
        }
        if (!valid_total(1.0 + others)) {
            report(status, Fault::total, i);
            continue;
        }
        const double self = reverse_stay(p, row.numbers, others, row.pi_x, row.x == p.forbidden);
        double total = self;
        if (p.forbidden >= 0) out[p.forbidden] = Real(0);
        if constexpr (P == Family::absorbing) {  // π_y = 0: the weights are the scores
            total += others;
        } else {
            total += sum_weights<P, true>(out, stationary, 0, p.dim, reverse_drain<Real>(p, row.numbers, others));
        }
        if (!valid_total(total)) {
            report(status, Fault::total, i);
            continue;
        }
        const double inverse = 1.0 / total;
        for (int64_t y = 0; y < p.dim; ++y) out[y] = static_cast<Real>(out[y] * inverse);
        out[row.x] = static_cast<Real>(self * inverse);
    }
}

template <Family P, class T>
void sample_rows(const ReverseParams& p, int64_t begin, int64_t end, void* scratch, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    double* blocks = static_cast<double*>(scratch);
    Real* scores = reinterpret_cast<Real*>(blocks + reverse_blocks(p.dim));
    int64_t* out = static_cast<int64_t*>(p.out);
    const uint64_t seed = static_cast<uint64_t>(*p.seed);
    Rows<P, Real, ReverseParams> row(p);
    for (int64_t i = begin; i < end; ++i) {
        if (!row.load(i, status)) continue;
        const int64_t x = out[i] = row.x;
        if (row.pi_x == 0.0) {
            if (x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        const T* l = static_cast<const T*>(p.log_score) + i * p.dim;
        BlockSums<P, T> sums{l, stationary, 0, p.dim, x, p.forbidden, row.shift, blocks, scores};
        const double others = sums.sum();
        const double self = reverse_stay(p, row.numbers, others, row.pi_x, x == p.forbidden);
        sums.drain = reverse_drain<Real>(p, row.numbers, others);
        const Drain<double> drain = converted<double>(sums.drain);
        // The token at a point in [0, 1) of the running sum, in which x comes first; -1 if there is no distribution.
        const auto draw = [&](double sum, double point, double& score) {
            if (!valid_total(1.0 + others) || !valid_total(self + sum)) return int64_t{-1};
            const double target = point * (self + sum) - self;
            return target < 0.0 || sum == 0.0 ? x : sums.pick(target, score);
        };
        const Uniforms u = row_uniforms(seed, static_cast<uint64_t>(i));
        double score = 0.0;
        int64_t y = draw(others, u.first, score);
        if (reverse_weighs(p, row.numbers, x) && y >= 0 && y != x &&
            !(u.second * score < reverse_weight(p, score, drain, stationary_at(P, stationary, p.dim, y), y))) {
            sums.weighted = true;
            y = draw(sums.sum(), row_uniforms(seed, static_cast<uint64_t>(i), 1).first, score);
        }
        if (y < 0) {
            report(status, Fault::total, i);
        } else {
            out[i] = y;
        }
    }
}

template <Family P, class T>
void tile_rows(const ReverseTileParams& p, int64_t begin, int64_t end, void* scratch, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const bool last = p.first + p.width == p.dim;
    const bool weighted = P != Family::absorbing && p.sweep != 0;  // absorbing: the weights are the scores
    double* blocks = static_cast<double*>(scratch);
    Real* scores = reinterpret_cast<Real*>(blocks + reverse_blocks(p.width));
    Rows<P, Real, ReverseTileParams> row(p);
    for (int64_t i = begin; i < end; ++i) {
        if (!row.load(i, status)) continue;
        if (row.pi_x == 0.0) {
            p.out[i] = row.x;
            if (row.x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        ReverseDraw& draw = p.draws[i];
        const T* l = static_cast<const T*>(p.log_score) + i * p.stride;
        const BlockSums<P, T> sums{l,
                                   stationary,
                                   p.first,
                                   p.width,
                                   row.x,
                                   p.forbidden,
                                   row.shift,
                                   blocks,
                                   scores,
                                   weighted,
                                   weighted ? converted<Real>(draw.drain) : Drain<Real>{}};
        const double sum = sums.sum();
        if (p.sums != nullptr) {
            p.sums[i] = sum;
            continue;
        }
        if (p.targets != nullptr) {
            draw.token = sums.pick(p.targets[i], draw.score);
            continue;
        }
        if (p.first == 0) draw = {draw.others, draw.drain, 0.0, 0.0, -1};
        draw.total += sum;
        const double target = tile_target(p, p.first, i, draw.total);
        if (target < sum) draw.token = sums.pick(target, draw.score);
        if (!last) continue;
        const double pi_y = draw.token >= 0 ? stationary_at(P, stationary, p.dim, draw.token) : 0.0;
        p.out[i] = finish_draw<Real>(p, i, row.numbers, draw, row.pi_x, pi_y);
        if (p.out[i] == -1) report(status, Fault::total, i);
    }
}

}  // namespace

RowKernel<ReverseParams> reverse_probs(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<ReverseParams> {
        return probs_rows<family.value, typename decltype(element)::Type>;
    });
}

RowKernel<ReverseParams> reverse_sample(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<ReverseParams> {
        return sample_rows<family.value, typename decltype(element)::Type>;
    });
}

RowKernel<ReverseTileParams> reverse_tile(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<ReverseTileParams> {
        return tile_rows<family.value, typename decltype(element)::Type>;
    });
}

}  // namespace sedd::SEDD_ISA

// Reverse steps on the CPU: block sums of the scores in one read of the row, one random number, and a second look at
// the one block that it falls in. Where the clamp max(0, ·) needs the total first (Tweedie with π spread out), the
// scores wait in a buffer of one row, which the cache holds. Limit: a plain read.
#include "reverse.h"

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sedd::SEDD_ISA {
namespace {

// Visits [begin, end): visit(y) at whole vectors, part(y, n) at the n < width elements behind them.
template <int width, class Visit, class Part>
inline void sweep(int64_t begin, int64_t end, Visit visit, Part part) {
    int64_t y = begin;
    for (; y + width <= end; y += width) visit(y);
    if (y < end) part(y, end - y);
}

template <int n>
struct Count {
    static constexpr int value = n;
};

// Σ s_y over [begin, end) without y = skip; the scores go to `scores` too unless it is null (0 at skip).
template <bool kKeep, class T, class Real = Compute<T>>
double sum_scores(const T* log_score, int64_t begin, int64_t end, int64_t skip, Real shift, Real* scores) {
    constexpr int width = Lanes<Real>::width;
    using Vec = typename Lanes<Real>::Vec;
    const Vec shifts = broadcast(shift);
    if (begin <= skip && skip < end) {
        if constexpr (kKeep) scores[skip] = Real(0);
        return sum_scores<kKeep>(log_score, begin, skip, int64_t{-1}, shift, scores) +
               sum_scores<kKeep>(log_score, skip + 1, end, int64_t{-1}, shift, scores);
    }
    Vec sums[kUnroll] = {};
    const auto add = [&](int64_t y, auto count) {
        Vec s[count.value];
        prefetch<count.value>(log_score + y);
        load_vectors<kKeep>(log_score + y, s);
        SEDD_UNROLL for (int k = 0; k < count.value; ++k) s[k] -= shifts;
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
            const Vec s = exp_lanes(load_partial(log_score + z, n, -__builtin_inff()) - shifts);
            if constexpr (kKeep) store_partial(scores + z, s, n);
            sums[1] += s;
        });
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Σ w_y over [begin, end) with w_y = max(0, s_y - drain π_y), a constant π being part of the drain already; with kKeep,
// w takes the place of s.
template <Process P, bool kKeep, class Real>
double sum_weights(Real* scores, const Real* stationary, int64_t begin, int64_t end, Real drain) {
    constexpr int width = Lanes<Real>::width;
    using Vec = typename Lanes<Real>::Vec;
    const Vec drains = broadcast(drain), zero = {};
    Vec sums[kUnroll] = {};
    const auto add = [&](int64_t y, Vec& sum) {
        const Vec drained = P == Process::rank_one ? drains * load(stationary + y) : drains;
        const Vec w = max_or_second(load(scores + y) - drained, zero);
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
            const Vec drained = P == Process::rank_one ? drains * load_partial(stationary + z, n, 0.0f) : drains;
            const Vec w = max_or_second(load_partial(scores + z, n, 0.0f) - drained, zero);
            if constexpr (kKeep) store_partial(scores + z, w, n);
            sums[1] += w;  // the lanes behind the end hold max(0, -drain π) = 0
        });
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The token of weights[0, n), n ≤ kReverseBlock, on whose stretch of the axis of their running sum the part `share` of
// the whole lies. Sums of a vector's lanes first: 512 additions one after the other take longer than the block's exps.
template <class Real>
int64_t find(const Real* weights, int64_t n, double share) {
    constexpr int width = Lanes<Real>::width;
    double sums[kReverseBlock / width];
    double total = 0.0;
    int64_t groups = 0;
    const auto group = [&](auto w) { total += sums[groups++] = sum_lanes(w); };
    sweep<width>(
        0, n, [&](int64_t y) { group(load(weights + y)); },
        [&](int64_t y, int64_t count) { group(load_partial(weights + y, count, 0.0f)); });
    // The last one with any weight where rounding lets the target past the end.
    double target = share * total;
    const auto walk = [&target](const auto* values, int64_t count) {
        int64_t last = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (!(values[i] > 0)) continue;
            last = i;
            if (target < values[i]) break;
            target -= values[i];
        }
        return last;
    };
    const int64_t first = walk(sums, groups) * width;
    return first + walk(weights + first, n - first < width ? n - first : width);
}

// Checks a row; false if it is bad (reported).
template <class Params>
inline bool enter(const Params& p, int64_t row, Status& status) {
    const Fault fault = reverse_fault(p, row);
    if (fault != Fault::none) report(status, fault, row);
    return fault == Fault::none;
}

inline int64_t block_end(int64_t begin, int64_t dim) {
    return begin + kReverseBlock < dim ? begin + kReverseBlock : dim;
}

template <Process P, class T>
void probs_rows(const ReverseParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    for (int64_t i = begin; i < end; ++i) {
        if (!enter(p, i, status)) continue;
        const int64_t x = p.x_t[i];
        const T* l = static_cast<const T*>(p.log_score) + i * p.dim;
        Real* out = static_cast<Real*>(p.out) + i * p.dim;
        const double pi_x = stationary_at(P, stationary, p.dim, x);
        if (pi_x == 0.0) {
            memset(out, 0, sizeof(Real) * static_cast<size_t>(p.dim));
            out[x] = Real(1);
            if (x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        const ReverseRow r = reverse_row(p.kind, p.step[i], pi_x);
        const Real shift = p.shift != nullptr ? static_cast<Real>(p.shift[i]) : Real(0);
        double others = 0.0;
        for (int64_t b = 0; b < p.dim; b += kReverseBlock) {
            others += sum_scores<true>(l, b, block_end(b, p.dim), x, shift, out);
        }
        if (!valid_total(1.0 + others)) {
            report(status, Fault::total, i);
            continue;
        }
        const double self = reverse_stay(r, others, x == p.forbidden);
        double total = self;
        if (p.forbidden >= 0) out[p.forbidden] = Real(0);
        if constexpr (P == Process::absorbing) {  // π_y = 0: nothing to drain
            total += others;
        } else {
            const Real drain = static_cast<Real>(reverse_drain(P, r, others, pi_x));
            for (int64_t b = 0; b < p.dim; b += kReverseBlock) {
                total += sum_weights<P, true>(out, stationary, b, block_end(b, p.dim), drain);
            }
        }
        if (!valid_total(total)) {
            report(status, Fault::total, i);
            continue;
        }
        const double inverse = 1.0 / total;
        for (int64_t y = 0; y < p.dim; ++y) out[y] = static_cast<Real>(out[y] * inverse);
        out[x] = static_cast<Real>(self * inverse);
    }
}

// The block that the target falls on; what of the target lies on it stays. Where rounding lets it past the end, it is
// the end of the last block with any weight.
inline int64_t pick_block(const double* blocks, int64_t count, double& target) {
    int64_t last = 0;
    for (int64_t k = 0; k < count; ++k) {
        if (blocks[k] > 0.0) last = k;
        if (target < blocks[k]) return k;
        target -= blocks[k];
    }
    target = blocks[last];
    return last;
}

template <Process P, class T>
void sample_rows(const ReverseParams& p, int64_t begin, int64_t end, void* scratch, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    double* blocks = static_cast<double*>(scratch);
    Real* scores = reinterpret_cast<Real*>(blocks + reverse_blocks(p.dim));
    int64_t* out = static_cast<int64_t*>(p.out);
    for (int64_t i = begin; i < end; ++i) {
        if (!enter(p, i, status)) continue;
        const int64_t x = p.x_t[i];
        out[i] = x;
        const double pi_x = stationary_at(P, stationary, p.dim, x);
        if (pi_x == 0.0) {
            if (x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        const T* l = static_cast<const T*>(p.log_score) + i * p.dim;
        const ReverseRow r = reverse_row(p.kind, p.step[i], pi_x);
        const Real shift = p.shift != nullptr ? static_cast<Real>(p.shift[i]) : Real(0);
        // Without a clamp and without a token to leave out, the weights are the scores, and need no place to wait in.
        const bool linear = P == Process::absorbing || (r.drain == 0.0 && (p.forbidden < 0 || p.forbidden == x));
        int64_t num_blocks = 0;
        double others = 0.0;
        for (int64_t b = 0; b < p.dim; b += kReverseBlock) {
            const int64_t stop = block_end(b, p.dim);
            blocks[num_blocks] = linear ? sum_scores<false>(l, b, stop, x, shift, scores)
                                        : sum_scores<true>(l, b, stop, x, shift, scores);
            others += blocks[num_blocks++];
        }
        if (!valid_total(1.0 + others)) {
            report(status, Fault::total, i);
            continue;
        }
        const Real drain = static_cast<Real>(reverse_drain(P, r, others, pi_x));
        double weights = others;
        if (!linear) {
            weights = 0.0;
            if (p.forbidden >= 0) scores[p.forbidden] = Real(0);
            for (int64_t k = 0; k < num_blocks; ++k) {
                const int64_t b = k * kReverseBlock;
                blocks[k] = sum_weights<P, false>(scores, stationary, b, block_end(b, p.dim), drain);
                weights += blocks[k];
            }
        }
        const double self = reverse_stay(r, others, x == p.forbidden);
        const double total = self + weights;
        if (!valid_total(total)) {
            report(status, Fault::total, i);
            continue;
        }
        // x lies first on the axis of the weights, then the blocks.
        double target = row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(i)).first * total - self;
        if (target < 0.0 || weights == 0.0) continue;
        const int64_t k = pick_block(blocks, num_blocks, target);
        const int64_t b = k * kReverseBlock, stop = block_end(b, p.dim);
        if (linear) {
            sum_scores<true>(l, b, stop, x, shift, scores);
        } else {
            sum_weights<P, true>(scores, stationary, b, stop, drain);
        }
        out[i] = b + find(scores + b, stop - b, target / blocks[k]);
    }
}

template <Process P, class T>
void tile_rows(const ReverseTileParams& p, int64_t begin, int64_t end, void* scratch, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const bool first = p.first == 0, last = p.first + p.width == p.dim;
    const int64_t num_blocks = reverse_blocks(p.width);
    double* blocks = static_cast<double*>(scratch);
    Real* scores = reinterpret_cast<Real*>(blocks + num_blocks);  // of one block
    for (int64_t i = begin; i < end; ++i) {
        if (!enter(p, i, status)) continue;
        const int64_t x = p.x_t[i];
        const double pi_x = stationary_at(P, stationary, p.dim, x);
        if (pi_x == 0.0) {
            p.out[i] = x;
            if (x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        ReverseDraw& draw = p.draws[i];
        if (first) draw = {draw.others, draw.drain, 0.0, 0.0, -1};
        const T* l = static_cast<const T*>(p.log_score) + i * p.width;
        const Real shift = p.shift != nullptr ? static_cast<Real>(p.shift[i]) : Real(0);
        const Real drain = p.sweep == 0 ? Real(0) : static_cast<Real>(draw.drain);
        // Σ w_y of a block, or Σ s_y in the first sweep; with keep, its terms are left in `scores`
        const auto sum_block = [&](int64_t k, auto keep) {
            const int64_t b = k * kReverseBlock, n = block_end(b, p.width) - b, place = p.first + b;
            if (p.sweep == 0) return sum_scores<keep.value != 0>(l + b, 0, n, x - place, shift, scores);
            sum_scores<true>(l + b, 0, n, x - place, shift, scores);
            if (place <= p.forbidden && p.forbidden < place + n) scores[p.forbidden - place] = Real(0);
            return sum_weights<P, keep.value != 0>(scores, P == Process::rank_one ? stationary + place : nullptr, 0, n,
                                                   drain);
        };
        double sum = 0.0;
        for (int64_t k = 0; k < num_blocks; ++k) sum += blocks[k] = sum_block(k, Count<0>{});
        draw.total += sum;
        double target = tile_target(p, i, draw.total);
        if (target < sum) {
            const int64_t k = pick_block(blocks, num_blocks, target);
            const double block = sum_block(k, Count<1>{});
            const int64_t y = find(scores, block_end(k * kReverseBlock, p.width) - k * kReverseBlock, target / block);
            draw.token = p.first + k * kReverseBlock + y;
            draw.score = scores[y];
        }
        if (!last) continue;
        const double pi_y = draw.token >= 0 ? stationary_at(P, stationary, p.dim, draw.token) : 0.0;
        p.out[i] = finish_draw(p, i, draw, pi_x, pi_y);
        if (p.out[i] == -1) report(status, Fault::total, i);
    }
}

}  // namespace

RowKernel<ReverseParams> reverse_probs(DType dtype, Process process) {
    return pick(dtype, process, [](auto element, auto kind) -> RowKernel<ReverseParams> {
        return probs_rows<kind.value, typename decltype(element)::Type>;
    });
}

RowKernel<ReverseParams> reverse_sample(DType dtype, Process process) {
    return pick(dtype, process, [](auto element, auto kind) -> RowKernel<ReverseParams> {
        return sample_rows<kind.value, typename decltype(element)::Type>;
    });
}

RowKernel<ReverseTileParams> reverse_tile(DType dtype, Process process) {
    return pick(dtype, process, [](auto element, auto kind) -> RowKernel<ReverseTileParams> {
        return tile_rows<kind.value, typename decltype(element)::Type>;
    });
}

}  // namespace sedd::SEDD_ISA

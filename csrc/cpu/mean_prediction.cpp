// Score entropy of a mean prediction on the CPU. The loss takes one sweep over a row for the normaliser of the softmax,
// and unless the process is absorbing a second one, from the cache, for the sums of score entropy. The gradient takes
// one sweep that reads and writes. The lower bounds of the time are those of a plain read and a plain copy.
#include "mean_prediction.h"

#include "cpu/kernels.h"
#include "cpu/softmax.h"

namespace sedd::SEDD_ISA {
namespace {

constexpr int64_t kBlock = kSoftmaxBlock;
// A smaller q_y counts as 0: its term is then e_y, which differs by less than 100 q_y.
constexpr float kLeast = 1e-30f;

// h(r) = r - log(1 + r), given r and u = 1 + r, each to full precision, to about one unit in the last place of the
// larger of r and log u, and of r² if both are small. u must be a normal number above 0, or NaN.
//
// u = 2^k (1 + f) with |f| ≤ 0.42, and log(1 + f) = f - f²/2 + f³ p(f). For k = 0, f = r, so that h = f²/2 - f³ p(f)
// has no cancellation. The coefficients of p are those of Cephes' logf.
template <int kCount>
inline void excess_lanes(const VecF (&r)[kCount], const VecF (&u)[kCount], VecF (&h)[kCount]) {
    constexpr float ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
    VecF f[kCount], p[kCount];
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        const VecI bits = bit_cast<VecI>(u[k]);
        const VecI exponent = (bits - 0x3f3504f3) >> 23;  // of u / √½
        const VecF n = __builtin_convertvector(exponent, VecF);
        f[k] = bit_cast<VecF>(bits - (exponent << 23)) - 1.0f;
        f[k] = exponent == 0 ? r[k] : f[k];
        h[k] = ((r[k] - f[k]) - n * ln2_high) - n * ln2_low;
    }
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = f[k] * 7.0376836292e-2f - 1.1514610310e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 1.1676998740e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] - 1.2420140846e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 1.4249322787e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] - 1.6668057665e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 2.0000714765e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] - 2.4999993993e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * f[k] + 3.3333331174e-1f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) h[k] += f[k] * f[k] * (0.5f - f[k] * p[k]);
}
template <int kCount>
inline void excess_lanes(const double (&r)[kCount], const double (&u)[kCount], double (&h)[kCount]) {
    for (int k = 0; k < kCount; ++k) h[k] = excess_over_log(r[k], log(u[k]));
}

// The numbers of a row in the compute type. For a uniform π, excess, keep and rate include it.
template <class Real>
struct LaneNumbers {
    Real top, log_total, a, excess, keep, rate;
};

// μ_y, t_y and e_y of kCount vectors from y on, given the logits.
template <Family P, int kCount, class Real, class Vec>
inline void unfold(const LaneNumbers<Real>& n, const Vec (&pi)[kCount], Vec (&mu)[kCount], Vec (&t)[kCount],
                   Vec (&e)[kCount]) {
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) mu[k] = (mu[k] - n.top) - n.log_total;
    exp_lanes(mu);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        const Vec moved = mu[k] * n.a;
        t[k] = pi[k] * n.keep + moved;
        e[k] = pi[k] * n.excess + moved;
    }
}

inline VecF at_least(VecF a, float least) { return max_or_second(broadcast(least), a); }
inline double at_least(double a, double least) { return max_or_second(least, a); }

// a where q is large enough for h, else b.
inline VecF where_counts(VecF q, VecF a, VecF b) { return q > kLeast ? a : b; }
inline double where_counts(double q, double a, double b) { return q > static_cast<double>(kLeast) ? a : b; }

// Sums over entries whose vectors hold the logits and π; entries that do not count have the logit -inf and π = 0.
template <Family P, bool kGradient, int kCount, class Real, class Vec>
inline void add_terms(const LaneNumbers<Real>& n, const Vec (&pi)[kCount], Vec (&l)[kCount], Vec* entropy,
                      Vec* pi_ratio, Vec* mu_ratio) {
    constexpr Real least = static_cast<Real>(1.2e-38f);
    Vec t[kCount], e[kCount], r[kCount], u[kCount], h[kCount], q[kCount];
    unfold<P>(n, pi, l, t, e);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        q[k] = pi[k] * n.rate;
        const Vec inverse = Real(1) / at_least(q[k], kLeast);
        r[k] = e[k] * inverse;
        u[k] = at_least(t[k] * inverse, least);
    }
    excess_lanes(r, u, h);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) entropy[k] += where_counts(q[k], q[k] * h[k], e[k]);
    if constexpr (kGradient) {
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
            const Vec ratio = e[k] / at_least(t[k], least);
            pi_ratio[k] += pi[k] * ratio;
            mu_ratio[k] += l[k] * ratio;
        }
    }
}

// π of kCount vectors: that of a vector π, or 1 for a uniform π, whose numbers include it.
template <Family P, int kCount, class Real, class Vec>
inline void load_pi(const Real* stationary, int64_t y, Vec (&pi)[kCount]) {
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        if constexpr (P == Family::rank_one) {
            pi[k] = load(stationary + y + k * Lanes<Real>::width);
        } else {
            pi[k] = broadcast(Real(1));
        }
    }
}

// Adds the sums over [begin, end).
template <Family P, bool kGradient, class T, class Real = Compute<T>>
void add_sums(MeanPredictionSums& sums, const LaneNumbers<Real>& n, const T* logits, const Real* stationary,
              int64_t begin, int64_t end) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    for (int64_t block = begin; block < end; block += kBlock) {
        const int64_t stop = block + kBlock < end ? block + kBlock : end;
        Vec entropy[kUnroll] = {}, pi_ratio[kUnroll] = {}, mu_ratio[kUnroll] = {};
        int64_t y = block;
        const auto add = [&](auto& l, auto& pi) {
            load_vectors<true>(logits + y, l);
            load_pi<P>(stationary, y, pi);
            add_terms<P, kGradient>(n, pi, l, entropy, pi_ratio, mu_ratio);
        };
        for (; y + kUnroll * width <= stop; y += kUnroll * width) {
            Vec l[kUnroll], pi[kUnroll];
            add(l, pi);
        }
        for (; y + width <= stop; y += width) {
            Vec l[1], pi[1];
            add(l, pi);
        }
        if (y < stop) {
            Vec l[1] = {load_partial(logits + y, stop - y, -__builtin_inff())}, pi[1];
            if constexpr (P == Family::rank_one) {
                pi[0] = load_partial(stationary + y, stop - y, 0.0f);
            } else {
                Real ones[width];
                for (Real& one : ones) one = Real(1);
                pi[0] = load_partial(ones, stop - y, 0.0f);
            }
            add_terms<P, kGradient>(n, pi, l, entropy, pi_ratio, mu_ratio);
        }
        const auto total = [](const Vec* v) { return sum_lanes((v[0] + v[1]) + (v[2] + v[3])); };
        sums.entropy += total(entropy);
        sums.pi_ratio += total(pi_ratio);
        sums.mu_ratio += total(mu_ratio);
    }
}

// out_y = scale μ_y (a e_y / t_y - base) over kCount vectors, given the logits; e/t is 1 for an absorbing process.
template <Family P, int kCount, class Real, class Vec>
inline void differentiate(const LaneNumbers<Real>& n, Real base, Real scale, const Vec (&pi)[kCount],
                          Vec (&l)[kCount]) {
    if constexpr (P == Family::absorbing) {
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) l[k] = (l[k] - n.top) - n.log_total;
        exp_lanes(l);
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) l[k] *= scale;  // scale (a - base)
    } else {
        Vec t[kCount], e[kCount];
        unfold<P>(n, pi, l, t, e);
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
            const Vec ratio = e[k] / at_least(t[k], static_cast<Real>(1.2e-38f));
            l[k] *= scale * (n.a * ratio - base);
        }
    }
}

template <Family P, class T, class Real = Compute<T>>
void write_gradient(T* out, const LaneNumbers<Real>& n, Real base, Real scale, const T* logits, const Real* stationary,
                    int64_t begin, int64_t end) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    constexpr bool ordered = P == Family::rank_one;
    int64_t y = begin;
    const auto write = [&](auto& l, auto& pi) {
        load_vectors<ordered>(logits + y, l);
        if constexpr (P != Family::absorbing) load_pi<P>(stationary, y, pi);
        differentiate<P>(n, base, scale, pi, l);
        store_vectors<ordered>(out + y, l);
    };
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        Vec l[kUnroll], pi[kUnroll];
        prefetch<kUnroll>(logits + y);
        write(l, pi);
    }
    for (; y + width <= end; y += width) {
        Vec l[1], pi[1];
        write(l, pi);
    }
    if (y >= end) return;
    Vec l[1] = {load_partial(logits + y, end - y, 0.0f)}, pi[1] = {broadcast(Real(1))};
    if constexpr (P == Family::rank_one) pi[0] = load_partial(stationary + y, end - y, 0.0f);
    differentiate<P>(n, base, scale, pi, l);
    store_partial(out + y, l[0], end - y);
}

// Calls work(begin, end) for the ranges of [0, dim) between the given entries, some of which may lie outside.
template <class Work>
void between(int64_t dim, const int64_t (&tokens)[3], Work work) {
    int64_t begin = 0;
    while (begin < dim) {
        int64_t next = dim;
        for (const int64_t token : tokens) {
            if (token >= begin && token < next) next = token;
        }
        if (begin < next) work(begin, next);
        begin = next + 1;
    }
}

template <Family P, class Real, class Numbers>
LaneNumbers<Real> lane_numbers(const Numbers& n, double rate, int64_t dim) {
    const double pi = P == Family::uniform ? 1.0 / static_cast<double>(dim) : 1.0;
    return {static_cast<Real>(n.top),         static_cast<Real>(n.log_total), static_cast<Real>(n.a),
            static_cast<Real>(n.excess * pi), static_cast<Real>(n.keep * pi), static_cast<Real>(rate * pi)};
}

// The indices in the slice of the entries that the sums leave out: x, x0 and MASK. Those that it does not have, and no
// MASK, are negative or at least its width.
struct Special {
    int64_t tokens[3];

    Special(const MeanPredictionParams& p, int64_t row)
        : tokens{p.x_t[row] - p.first, p.x_0[row] - p.first, p.mask - p.first} {}
    int64_t x() const { return tokens[0]; }
    int64_t x_0() const { return tokens[1]; }
    int64_t mask() const { return tokens[2]; }
};

bool has(const MeanPredictionParams& p, int64_t index) { return index >= 0 && index < p.width; }

// A vector π of the slice.
template <Family P, class Real>
const Real* slice_stationary(const MeanPredictionParams& p) {
    return P == Family::rank_one ? static_cast<const Real*>(p.stationary) + p.first : nullptr;
}

// Inlined, as is slice_sums: the forward pass of bfloat16 takes a fifth less time.
template <class T>
inline __attribute__((always_inline)) MeanPredictionLogits slice_logits(const MeanPredictionParams& p, int64_t row) {
    const T* l = static_cast<const T*>(p.logits) + row * p.stride;
    const Special special(p, row);
    Normaliser others;
    between(p.width, special.tokens, [&](int64_t begin, int64_t end) { others.add(l, begin, end); });
    const auto logit = [&](int64_t y) {
        return y == special.mask() || !has(p, y) ? -__builtin_inf() : read_one(l + y);
    };
    return {logit(special.x()), special.x() == special.x_0() ? -__builtin_inf() : logit(special.x_0()),
            others.log_total(), others.top};
}

template <Family P, class T>
inline __attribute__((always_inline)) MeanPredictionSums slice_sums(const MeanPredictionParams& p, int64_t row,
                                                                    const MeanPredictionRow& numbers) {
    using Real = Compute<T>;
    const Real* stationary = slice_stationary<P, Real>(p);
    const T* l = static_cast<const T*>(p.logits) + row * p.stride;
    const LaneNumbers<Real> n = lane_numbers<P, Real>(numbers, numbers.rate, p.dim);
    MeanPredictionSums sums;
    between(p.width, Special(p, row).tokens, [&](int64_t begin, int64_t end) {
        if (p.numbers != nullptr) {
            add_sums<P, true>(sums, n, l, stationary, begin, end);
        } else {
            add_sums<P, false>(sums, n, l, stationary, begin, end);
        }
    });
    if constexpr (P == Family::uniform) sums.pi_ratio /= static_cast<double>(p.dim);
    return sums;
}

// Works on the stage of a row. Returns the loss, or 0 before the last stage.
template <Family P, class T>
double row_loss(const MeanPredictionParams& p, int64_t row, double pi_x) {
    if (p.stage == Stage::logits) {
        p.row_logits[row] = slice_logits<T>(p, row);
        return 0.0;
    }
    const int64_t x = p.x_t[row], x_0 = p.x_0[row];
    const MeanPredictionLogits logits = p.stage == Stage::whole ? slice_logits<T>(p, row) : p.row_logits[row];
    const MeanPredictionRow numbers =
        mean_prediction_row(logits, p.sigma[row], p.sigma_s != nullptr ? p.sigma_s[row] : -1.0, pi_x, x == x_0);
    MeanPredictionSums sums;
    if constexpr (P == Family::absorbing) {
        sums = mean_prediction_absorbing_sums(numbers);
    } else {
        sums = p.stage == Stage::loss ? p.row_sums[row] : slice_sums<P, T>(p, row, numbers);
        if (p.stage == Stage::sums) {
            p.row_sums[row] = sums;
            return 0.0;
        }
    }
    const auto* stationary = static_cast<const Compute<T>*>(p.stationary);
    const bool has_mask = p.mask >= 0 && p.mask != x && p.mask != x_0;
    MeanPredictionGradient gradient;
    const double loss = mean_prediction_value(numbers, sums, pi_x, stationary_at(P, stationary, p.dim, x_0),
                                              has_mask ? stationary_at(P, stationary, p.dim, p.mask) : 0.0, gradient);
    if (p.numbers != nullptr) p.numbers[row] = gradient;
    return loss;
}

template <Family P, class T>
void forward_rows(const MeanPredictionParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    for (int64_t i = begin; i < end; ++i) {
        const Fault fault = mean_prediction_fault(p, i);
        if (fault != Fault::none) {
            report(status, fault, i);
            continue;
        }
        const double pi_x = stationary_at(P, static_cast<const Real*>(p.stationary), p.dim, p.x_t[i]);
        if (pi_x == 0.0 && p.numbers != nullptr) p.numbers[i] = {};
        static_cast<Real*>(p.out)[i] = pi_x == 0.0 ? Real(0) : static_cast<Real>(row_loss<P, T>(p, i, pi_x));
    }
}

template <Family P, class T>
void backward_rows(const MeanPredictionParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    for (int64_t i = begin; i < end; ++i) {
        const Fault fault = mean_prediction_fault(p, i);
        if (fault != Fault::none) {
            report(status, fault, i);
            continue;
        }
        const T* l = static_cast<const T*>(p.logits) + i * p.stride;
        T* out = static_cast<T*>(p.out) + i * p.stride;
        if (stationary_at(P, static_cast<const Real*>(p.stationary), p.dim, p.x_t[i]) == 0.0) {
            memset(out, 0, sizeof(T) * static_cast<size_t>(p.width));
            continue;
        }
        const Special special(p, i);
        const MeanPredictionGradient& g = p.numbers[i];
        const LaneNumbers<Real> n = lane_numbers<P, Real>(g, 0.0, p.dim);
        const double upstream = static_cast<double>(static_cast<const Real*>(p.grad_loss)[i]);
        const double scale = upstream * g.scale * (P == Family::absorbing ? g.a - g.base : 1.0);
        write_gradient<P>(out, n, static_cast<Real>(g.base), static_cast<Real>(scale), l, slice_stationary<P, Real>(p),
                          0, p.width);
        const auto write = [&](int64_t y, double value) {
            if (has(p, y)) write_one(out + y, value);
        };
        write(special.x_0(), upstream * g.at_x_0);
        write(special.x(), upstream * g.at_x);
        write(special.mask(), 0.0);
    }
}

}  // namespace

RowKernel<MeanPredictionParams> mean_prediction(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<MeanPredictionParams> {
        return forward_rows<family.value, typename decltype(element)::Type>;
    });
}

RowKernel<MeanPredictionParams> mean_prediction_backward(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<MeanPredictionParams> {
        return backward_rows<family.value, typename decltype(element)::Type>;
    });
}

}  // namespace sedd::SEDD_ISA

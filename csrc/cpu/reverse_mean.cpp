// Reverse steps from a mean prediction on the CPU. A kernel reads a row once and keeps, for each block, the sum of
// exp(l - top) and the largest logit so far, `top`. The masses of staying, of μ and of π follow in closed form. One
// random number selects among them, another one an entry: of μ by the sums of blocks, so that only one block is read
// again, and of π by its cumulative sums.
#include "reverse_mean.h"

#include "cpu/draw.h"
#include "cpu/softmax.h"

namespace sedd::SEDD_ISA {
namespace {

// 1 - e^x for x ≤ 0, to full relative precision; near 0 by the polynomial of exp_lanes. NaN remains NaN.
inline VecF one_minus_exp(VecF x) {
    VecF p = x * 0x1.6a23d0p-10f + 0x1.123a20p-7f;
    p = p * x + 0x1.5558f2p-5f;
    p = p * x + 0x1.555492p-3f;
    p = p * x + 0x1.fffffcp-2f;
    const VecF near = -((p * x + 1.0f) * x), far = 1.0f - exp_lanes(x);
    return x > broadcast(-0.34f) ? near : far;
}
inline double one_minus_exp(double x) { return -expm1(x); }

// The factors v_y = 1 - (s/t)^{w_y} of generalized masked diffusion; w is null for all other steps.
template <class Real>
struct Power {
    const Real* w;
    Real log_ratio;  // log(s/t)
};

template <class T>
inline double load_one(const T* p) {
    return static_cast<double>(load_partial(p, 1, 0.0f)[0]);
}
inline double load_one(const double* p) { return *p; }

struct Sums {
    double exps = 0.0, weighted = 0.0;  // Σ exp(l_y - top), Σ exp(l_y - top) v_y
};

// The sums over [begin, end), which is at most a block. kKeep stores the terms of the sum that draws use in `terms`.
template <bool kKeep, bool kPower, class T, class Real = Compute<T>>
Sums sum_terms(const T* logits, int64_t begin, int64_t end, Real top, const Power<Real>& power, Real* terms) {
    constexpr int width = Lanes<Real>::width;
    using Vec = typename Lanes<Real>::Vec;
    const Vec tops = broadcast(top), ratio = broadcast(power.log_ratio);
    Vec sums[kUnroll] = {}, weighted[kUnroll] = {};
    const auto add = [&](int64_t y, auto count) {
        Vec e[count.value];
        load_vectors<kKeep || kPower>(logits + y, e);
        SEDD_UNROLL for (int k = 0; k < count.value; ++k) e[k] -= tops;
        exp_lanes(e);
        SEDD_UNROLL for (int k = 0; k < count.value; ++k) {
            sums[k] += e[k];
            if constexpr (kPower) {
                e[k] *= one_minus_exp(load(power.w + y + k * width) * ratio);
                weighted[k] += e[k];
            }
            if constexpr (kKeep) store(terms + y + k * width, e[k]);
        }
    };
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) add(y, Count<kUnroll>{});
    sweep<width>(
        y, end, [&](int64_t z) { add(z, Count<1>{}); },
        [&](int64_t z, int64_t n) {
            Vec e = exp_lanes(load_partial(logits + z, n, -__builtin_inff()) - tops);
            sums[1] += e;
            if constexpr (kPower) {
                e *= one_minus_exp(load_partial(power.w + z, n, 1.0f) * ratio);
                weighted[1] += e;
            }
            if constexpr (kKeep) store_partial(terms + z, e, n);
        });
    const auto total = [](const auto& s) { return sum_lanes((s[0] + s[1]) + (s[2] + s[3])); };
    return {total(sums), kPower ? total(weighted) : 0.0};
}

// The sums of blocks of a row over the entries y ≠ x without MASK.
template <class T, bool kPower>
struct MeanBlocks {
    using Real = Compute<T>;

    const T* logits;
    int64_t dim, x, mask;
    Power<Real> power;
    double* sums;  // [reverse_blocks(dim)] of the terms that draws use, each relative to its `tops`
    double* tops;  // [reverse_blocks(dim)]
    Sums total{};  // of the row, relative to `top`
    double top = -__builtin_inf();

    int64_t begin(int64_t block) const { return block * kReverseBlock; }
    int64_t end(int64_t block) const { return begin(block) + kReverseBlock < dim ? begin(block) + kReverseBlock : dim; }

    // Calls f for the parts of [from, to) between x and MASK.
    template <class F>
    void parts(int64_t from, int64_t to, F f) const {
        const int64_t cuts[2] = {x < mask ? x : mask, x < mask ? mask : x};
        for (const int64_t cut : cuts) {
            if (cut < from || cut >= to) continue;
            if (from < cut) f(from, cut);
            from = cut + 1;
        }
        if (from < to) f(from, to);
    }

    // kKeep stores the terms of a block in terms[begin, end).
    template <bool kKeep>
    Sums sum_block(int64_t block, Real relative_to, Real* terms) const {
        const int64_t from = begin(block), to = end(block);
        Sums result;
        parts(from, to, [&](int64_t a, int64_t b) {
            const Sums part = sum_terms<kKeep, kPower>(logits, a, b, relative_to, power, terms);
            result.exps += part.exps;
            result.weighted += part.weighted;
        });
        if constexpr (kKeep) {
            const int64_t left_out[2] = {x, mask};
            for (const int64_t y : left_out) {
                if (from <= y && y < to) terms[y] = Real(0);
            }
        }
        return result;
    }

    // Reads the row.
    template <bool kKeep>
    void sum(Real* terms) {
        const int64_t count = reverse_blocks(dim);
        for (int64_t k = 0; k < count; ++k) {
            double largest = top;
            parts(begin(k), end(k), [&](int64_t a, int64_t b) {
                const double l = largest_logit(logits, a, b);
                largest = l > largest ? l : largest;
            });
            if (largest > top) {
                const double factor = exp(top - largest);
                total.exps *= factor, total.weighted *= factor;
                top = largest;
            }
            tops[k] = top == -__builtin_inf() ? 0.0 : top;
            const Sums block = sum_block<kKeep>(k, static_cast<Real>(tops[k]), terms);
            total.exps += block.exps, total.weighted += block.weighted;
            sums[k] = kPower ? block.weighted : block.exps;
        }
    }

    // After sum(): makes the sums of all blocks relative to `top`. Returns their sum.
    double rescale() const {
        double all = 0.0;
        for (int64_t k = 0; k < reverse_blocks(dim); ++k) {
            if (tops[k] != top && sums[k] != 0.0) sums[k] *= exp(tops[k] - top);
            all += sums[k];
        }
        return all;
    }

    // After sum(): the token at a point in [0, 1) of the running sum.
    int64_t pick(double point, Real* terms, bool kept) const {
        double target = point * rescale();
        const int64_t k = pick_block(sums, reverse_blocks(dim), target);
        // `terms` has room for a block
        Real* const block = terms - begin(k);
        if (!kept) sum_block<true>(k, static_cast<Real>(tops[k]), block);
        return begin(k) + entry_at(block + begin(k), end(k) - begin(k), target / sums[k]);
    }
};

// Checks a row and computes its numbers, as Rows in reverse.cpp.
template <Family P, class Real>
class MeanRows {
  public:
    explicit MeanRows(const ReverseMeanParams& p) : p_(p), stationary_(static_cast<const Real*>(p.stationary)) {}

    // Reports a bad row and returns false.
    bool load(int64_t row, Status& status) {
        const Fault fault = reverse_mean_fault(p_, row);
        if (fault != Fault::none) {
            report(status, fault, row);
            return false;
        }
        x = p_.x_t[row];
        const double pi = stationary_at(P, stationary_, p_.dim, x), noise = p_.noise[row];
        const double sigma = p_.sigma != nullptr ? p_.sigma[row] : 0.0;
        if (pi > 0.0 && (noise != noise_ || sigma != sigma_ || pi != pi_of_numbers_)) {
            noise_ = noise, sigma_ = sigma, pi_of_numbers_ = pi;
            numbers_ = reverse_mean_row(p_.step, noise, sigma, pi);
        }
        pi_x = pi;
        log_ratio = static_cast<Real>(p_.step == MeanStep::generalized_masked ? noise : 0.0);
        return true;
    }

    template <class Blocks>
    MeanMasses masses(const Blocks& b) const {
        const double logit_x = static_cast<double>(load_one(b.logits + x));
        return mean_masses(p_, numbers_, x, b.total.exps, b.total.weighted, b.top, logit_x);
    }

    int64_t x = 0;
    double pi_x = 0.0;
    Real log_ratio = Real(0);

  private:
    const ReverseMeanParams& p_;
    const Real* stationary_;
    MeanRow numbers_{};
    double noise_ = 0.0, sigma_ = -1.0, pi_of_numbers_ = -1.0;
};

// Makes probabilities of the terms of a row in out[0, dim).
template <Family P, class Blocks, class Real>
void normalise(const ReverseMeanParams& p, const Blocks& blocks, const MeanMasses& m, int64_t x, Real* out) {
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const Real pi = static_cast<Real>(m.pi / m.total * (P == Family::uniform ? 1.0 / static_cast<double>(p.dim) : 1.0));
    for (int64_t k = 0; k < reverse_blocks(p.dim); ++k) {
        // a block of -inf alone, before any other logit, may have tops[k] > top
        const double relative = blocks.tops[k] < blocks.top ? exp(blocks.tops[k] - blocks.top) : 1.0;
        const Real factor = static_cast<Real>(m.unit / m.total * relative);
        for (int64_t y = blocks.begin(k); y < blocks.end(k); ++y) {
            if constexpr (P == Family::absorbing) out[y] = factor * out[y];
            if constexpr (P == Family::uniform) out[y] = factor * out[y] + pi;
            if constexpr (P == Family::rank_one) out[y] = factor * out[y] + pi * stationary[y];
        }
    }
    if (p.forbidden >= 0) out[p.forbidden] = Real(0);
    out[x] = static_cast<Real>(m.stay / m.total);
}

template <Family P, class T, bool kPower>
void probs_rows(const ReverseMeanParams& p, int64_t begin, int64_t end, void* scratch, Status& status) {
    using Real = Compute<T>;
    double* const sums = static_cast<double*>(scratch);
    MeanRows<P, Real> row(p);
    for (int64_t i = begin; i < end; ++i) {
        if (!row.load(i, status)) continue;
        Real* out = static_cast<Real*>(p.out) + i * p.dim;
        if (row.pi_x == 0.0) {
            memset(out, 0, sizeof(Real) * static_cast<size_t>(p.dim));
            out[row.x] = Real(1);
            if (row.x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        MeanBlocks<T, kPower> blocks{static_cast<const T*>(p.logits) + i * p.dim,
                                     p.dim,
                                     row.x,
                                     p.mask,
                                     {static_cast<const Real*>(p.power), row.log_ratio},
                                     sums,
                                     sums + reverse_blocks(p.dim)};
        blocks.template sum<true>(out);
        const MeanMasses m = row.masses(blocks);
        if (valid_masses(m)) {
            normalise<P>(p, blocks, m, row.x, out);
        } else {
            report(status, Fault::total, i);
        }
    }
}

template <Family P, class T, bool kPower>
void sample_rows(const ReverseMeanParams& p, int64_t begin, int64_t end, void* scratch, Status& status) {
    using Real = Compute<T>;
    const int64_t count = reverse_blocks(p.width);
    const Real* const power = p.power != nullptr ? static_cast<const Real*>(p.power) + p.first : nullptr;
    double* const sums = static_cast<double*>(scratch);
    Real* const terms = reinterpret_cast<Real*>(sums + 2 * count);
    int64_t* const out = static_cast<int64_t*>(p.out);
    MeanRows<P, Real> row(p);
    for (int64_t i = begin; i < end; ++i) {
        if (!row.load(i, status)) continue;
        const int64_t x = out[i] = row.x;
        if (p.targets != nullptr) {
            out[i] = 0;
            if (p.targets[i] < 0.0) continue;
        }
        if (row.pi_x == 0.0) {
            if (x == p.forbidden) report(status, Fault::total, i);
            continue;
        }
        const T* const logits = static_cast<const T*>(p.logits) + i * p.stride;
        const int64_t x_here = x - p.first;
        MeanBlocks<T, kPower> blocks{logits, p.width,     x_here, p.mask - p.first, {power, row.log_ratio},
                                     sums,   sums + count};
        if (count == 1) {
            blocks.template sum<true>(terms);
        } else {
            blocks.template sum<false>(nullptr);
        }
        if (p.sums != nullptr) {
            const bool is_here = 0 <= x_here && x_here < p.width;
            p.sums[i] = {blocks.top, blocks.total.exps, blocks.total.weighted,
                         is_here ? load_one(logits + x_here) : 0.0};
            continue;
        }
        if (p.targets != nullptr) {
            out[i] = p.first + blocks.pick(p.targets[i], terms, count == 1);
            continue;
        }
        const MeanMasses m = row.masses(blocks);
        if (!valid_masses(m)) {
            report(status, Fault::total, i);
            continue;
        }
        const Uniforms u = mean_uniforms(p, i);
        const MeanPart part = mean_part(m, u.first);
        if (part == MeanPart::mu) out[i] = blocks.pick(u.second, terms, count == 1);
        if (part == MeanPart::pi) out[i] = draw_stationary_without(p, excluded_tokens(p, x), u.second);
    }
}

}  // namespace

RowKernel<ReverseMeanParams> reverse_mean_probs(DType dtype, Family family, bool has_power) {
    return dispatch(dtype, family, [=](auto element, auto family) -> RowKernel<ReverseMeanParams> {
        using T = typename decltype(element)::Type;
        if constexpr (family.value == Family::absorbing) {
            if (has_power) return probs_rows<family.value, T, true>;
        }
        return probs_rows<family.value, T, false>;
    });
}

RowKernel<ReverseMeanParams> reverse_mean_sample(DType dtype, Family family, bool has_power) {
    return dispatch(dtype, family, [=](auto element, auto family) -> RowKernel<ReverseMeanParams> {
        using T = typename decltype(element)::Type;
        if constexpr (family.value == Family::absorbing) {
            if (has_power) return sample_rows<family.value, T, true>;
        }
        return sample_rows<family.value, T, false>;
    });
}

}  // namespace sedd::SEDD_ISA

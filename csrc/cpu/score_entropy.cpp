// Score entropy on the CPU. The loss takes one sweep over a row: exp, its sum and, unless the process is absorbing, the
// dot product of π with the log-scores. The gradient takes a sweep that reads and writes once, and can be written in
// the sweep of the loss. The lower bounds of the time are those of a plain read and a plain copy.
#include "score_entropy.h"

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sedd::SEDD_ISA {
namespace {

// Lanes are added up in the compute type within a block, and blocks in float64, so that the error does not grow with
// the size of the vocabulary.
constexpr int64_t kBlock = 2048;

struct Sums {
    double scores = 0.0;  // Σ s_y
    double dot = 0.0;     // Σ π_y ℓ_y for a vector π, Σ ℓ_y for a uniform π
};

// Adds the sums over kCount vectors from y on, vector k to accumulator k.
template <Family P, int kCount, class T, class Real, class Vec>
inline void add_vectors(Vec* scores, Vec* dot, const T* log_score, const Real* stationary, int64_t y, Vec shift) {
    Vec l[kCount];
    prefetch<kCount>(log_score + y);
    load_vectors<P == Family::rank_one>(log_score + y, l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) l[k] -= shift;
    if constexpr (P == Family::uniform) {
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) dot[k] += l[k];
    }
    if constexpr (P == Family::rank_one) {
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
            const Vec pi = load(stationary + y + k * Lanes<Real>::width);
            dot[k] += where_nonzero(pi, pi * l[k]);
        }
    }
    exp_lanes(l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) scores[k] += l[k];
}

// Adds the sums over [begin, end).
template <Family P, class T, class Real = Compute<T>>
void add_sums(Sums& sums, const T* log_score, const Real* stationary, int64_t begin, int64_t end, Real shift) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    const Vec shifts = broadcast(shift);
    for (int64_t block = begin; block < end; block += kBlock) {
        const int64_t stop = block + kBlock < end ? block + kBlock : end;
        Vec scores[kUnroll] = {}, dot[kUnroll] = {};
        int64_t y = block;
        for (; y + kUnroll * width <= stop; y += kUnroll * width) {
            add_vectors<P, kUnroll>(scores, dot, log_score, stationary, y, shifts);
        }
        for (; y + width <= stop; y += width) add_vectors<P, 1>(scores, dot, log_score, stationary, y, shifts);
        if (y < stop) {
            const int64_t n = stop - y;
            const Vec l = load_partial(log_score + y, n, -__builtin_inff()) - shifts;
            scores[1] += exp_lanes(l);
            if constexpr (P == Family::uniform) {
                dot[1] += load_partial(log_score + y, n, static_cast<float>(shift)) - shifts;
            }
            if constexpr (P == Family::rank_one) {
                const Vec pi = load_partial(stationary + y, n, 0.0f);
                dot[1] += where_nonzero(pi, pi * l);
            }
        }
        sums.scores += sum_lanes((scores[0] + scores[1]) + (scores[2] + scores[3]));
        if (P != Family::absorbing) sums.dot += sum_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]));
    }
}

// Adds the sums over kCount vectors and writes the gradient, factor s_y - offset π_y, to out, which may be log_score.
template <Family P, int kCount, class T, class Real, class Vec>
inline void add_and_write_vectors(Vec* scores, Vec* dot, T* out, const T* log_score, const Real* stationary, int64_t y,
                                  Vec shift, Vec factor, Vec offset) {
    constexpr bool ordered = P == Family::rank_one;
    [[maybe_unused]] Vec pi[kCount];
    Vec l[kCount];
    prefetch<kCount>(log_score + y);
    load_vectors<ordered>(log_score + y, l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) l[k] -= shift;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        if constexpr (P == Family::uniform) dot[k] += l[k];
        if constexpr (P == Family::rank_one) {
            pi[k] = load(stationary + y + k * Lanes<Real>::width);
            dot[k] += where_nonzero(pi[k], pi[k] * l[k]);
        }
    }
    exp_lanes(l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        scores[k] += l[k];
        l[k] *= factor;
        if constexpr (P == Family::uniform) l[k] -= offset;
        if constexpr (P == Family::rank_one) l[k] -= offset * pi[k];
    }
    store_vectors<ordered>(out + y, l);
}

// The same over [begin, end).
template <Family P, class T, class Real = Compute<T>>
void add_sums_and_write_gradient(Sums& sums, T* out, const T* log_score, const Real* stationary, int64_t begin,
                                 int64_t end, Real shift, Real factor, Real offset) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    const Vec shifts = broadcast(shift), factors = broadcast(factor), offsets = broadcast(offset);
    for (int64_t block = begin; block < end; block += kBlock) {
        const int64_t stop = block + kBlock < end ? block + kBlock : end;
        Vec scores[kUnroll] = {}, dot[kUnroll] = {};
        int64_t y = block;
        for (; y + kUnroll * width <= stop; y += kUnroll * width) {
            add_and_write_vectors<P, kUnroll>(scores, dot, out, log_score, stationary, y, shifts, factors, offsets);
        }
        for (; y + width <= stop; y += width) {
            add_and_write_vectors<P, 1>(scores, dot, out, log_score, stationary, y, shifts, factors, offsets);
        }
        if (y < stop) {
            const int64_t n = stop - y;
            const Vec s = exp_lanes(load_partial(log_score + y, n, -__builtin_inff()) - shifts);
            Vec gradient = factors * s;
            scores[1] += s;
            if constexpr (P == Family::uniform) {
                dot[1] += load_partial(log_score + y, n, static_cast<float>(shift)) - shifts;
                gradient -= offsets;
            }
            if constexpr (P == Family::rank_one) {
                const Vec pi = load_partial(stationary + y, n, 0.0f);
                dot[1] += where_nonzero(pi, pi * (load_partial(log_score + y, n, 0.0f) - shifts));
                gradient -= offsets * pi;
            }
            store_partial(out + y, gradient, n);
        }
        sums.scores += sum_lanes((scores[0] + scores[1]) + (scores[2] + scores[3]));
        if (P != Family::absorbing) sums.dot += sum_lanes((dot[0] + dot[1]) + (dot[2] + dot[3]));
    }
}

// out_y = factor s_y - offset π_y over kCount vectors from y on. The offset includes a constant π.
template <Family P, int kCount, class T, class Real, class Vec>
inline void write_vectors(T* out, const T* log_score, const Real* stationary, int64_t y, Vec shift, Vec factor,
                          Vec offset) {
    constexpr bool ordered = P == Family::rank_one;
    Vec l[kCount];
    prefetch<kCount>(log_score + y);
    load_vectors<ordered>(log_score + y, l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) l[k] -= shift;
    exp_lanes(l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        l[k] *= factor;
        if constexpr (P == Family::uniform) l[k] -= offset;
        if constexpr (P == Family::rank_one) l[k] -= offset * load(stationary + y + k * Lanes<Real>::width);
    }
    store_vectors<ordered>(out + y, l);
}

template <Family P, class T, class Real = Compute<T>>
void write_gradient(T* out, const T* log_score, const Real* stationary, int64_t begin, int64_t end, Real shift,
                    Real factor, Real offset) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    const Vec shifts = broadcast(shift), factors = broadcast(factor), offsets = broadcast(offset);
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        write_vectors<P, kUnroll>(out, log_score, stationary, y, shifts, factors, offsets);
    }
    for (; y + width <= end; y += width) {
        write_vectors<P, 1>(out, log_score, stationary, y, shifts, factors, offsets);
    }
    if (y >= end) return;
    if (end - begin >= width) {  // overlaps the last vector, with the same values
        write_vectors<P, 1>(out, log_score, stationary, end - width, shifts, factors, offsets);
    } else {
        const int64_t n = end - y;
        Vec gradient = factors * exp_lanes(load_partial(log_score + y, n, 0.0f) - shifts);
        if constexpr (P == Family::uniform) gradient -= offsets;
        if constexpr (P == Family::rank_one) gradient -= offsets * load_partial(stationary + y, n, 0.0f);
        store_partial(out + y, gradient, n);
    }
}

// Checks a row and computes its numbers. Rows of one sequence share σ, and so, unless π is a vector, all of their
// numbers.
template <Family P, class Real, class Params>
class Rows {
  public:
    explicit Rows(const Params& p) : p_(p), stationary_(static_cast<const Real*>(p.stationary)) {}

    // Reports a bad row and returns false.
    bool load(int64_t row, Status& status) {
        x = p_.x_t[row];
        x_0 = p_.x_0[row];
        const double sigma = p_.sigma[row];
        const Fault fault = score_entropy_fault(p_, row);
        if (fault != Fault::none) {
            report(status, fault, row);
            return false;
        }
        pi_x = stationary_at(P, stationary_, p_.dim, x);
        if (pi_x == 0.0) return true;
        shift = p_.shift != nullptr ? p_.shift[row] : 0.0;
        const int same = x == x_0;
        if (P == Family::rank_one || sigma_[same] != sigma) {
            sigma_[same] = sigma;
            const double pi_x0 = stationary_at(P, stationary_, p_.dim, x_0);
            numbers_[same] = score_entropy_row(sigma, pi_x, pi_x0, same != 0, p_.neg_entropy);
        }
        numbers = numbers_[same];
        return true;
    }

    int64_t x = 0, x_0 = 0;
    double pi_x = 0.0, shift = 0.0;
    ScoreEntropyRow numbers{};

  private:
    const Params& p_;
    const Real* stationary_;
    double sigma_[2] = {-1.0, -1.0};
    ScoreEntropyRow numbers_[2] = {};
};

template <Family P, class T>
void forward_rows(const ScoreEntropyParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    Real* loss = static_cast<Real*>(p.out);
    Rows<P, Real, ScoreEntropyParams> row(p);
    for (int64_t i = begin; i < end; ++i) {
        if (!row.load(i, status)) continue;
        if (row.pi_x == 0.0) {
            loss[i] = Real(0);
            continue;
        }
        const T* l = static_cast<const T*>(p.log_score) + i * p.dim;
        const Real shift = static_cast<Real>(row.shift);
        Sums sums;
        add_sums<P>(sums, l, stationary, 0, row.x, shift);
        add_sums<P>(sums, l, stationary, row.x + 1, p.dim, shift);
        const double dot = P == Family::uniform ? sums.dot / static_cast<double>(p.dim) : sums.dot;
        const double l_x_0 = read_one(l + row.x_0) - row.shift;
        loss[i] = static_cast<Real>(score_entropy_value(row.numbers, sums.scores, dot, l_x_0));
    }
}

template <Family P, class T>
void backward_rows(const ScoreEntropyParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    Rows<P, Real, ScoreEntropyParams> row(p);
    if (p.unless_one != nullptr && *p.unless_one == 1.0) return;
    for (int64_t i = begin; i < end; ++i) {
        if (!row.load(i, status)) continue;
        const T* l = static_cast<const T*>(p.log_score) + i * p.dim;
        T* out = static_cast<T*>(p.out) + i * p.dim;
        if (row.pi_x == 0.0) {
            memset(out, 0, sizeof(T) * static_cast<size_t>(p.dim));
            continue;
        }
        const Real shift = static_cast<Real>(row.shift);
        const ScoreEntropyGradient gradient =
            score_entropy_gradient(row.numbers, static_cast<const Real*>(p.grad_loss)[i],
                                   read_one(l + row.x_0) - row.shift, stationary_at(P, stationary, p.dim, row.x_0));
        const double offset = P == Family::uniform ? gradient.offset * row.pi_x : gradient.offset;
        const auto write = [&](int64_t from, int64_t to) {
            write_gradient<P>(out, l, stationary, from, to, shift, static_cast<Real>(gradient.factor),
                              static_cast<Real>(offset));
        };
        write(0, row.x);
        write_one(out + row.x, 0.0);
        write(row.x + 1, p.dim);
        if (row.x != row.x_0) write_one(out + row.x_0, gradient.at_x_0);
    }
}

template <Family P, class T>
void tile_rows(const ScoreEntropyTileParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    if (P == Family::rank_one) stationary += p.first;
    Rows<P, Real, ScoreEntropyTileParams> row(p);
    for (int64_t i = begin; i < end; ++i) {
        ScoreEntropySweep& sweep = p.sweeps[i];
        if (p.first == p.begin) {
            if (!row.load(i, status)) continue;
            sweep = {};
            if (row.pi_x != 0.0) sweep.row = row.numbers;
        }
        const T* l = static_cast<const T*>(p.log_score) + i * p.stride;
        T* out = p.gradient != nullptr ? static_cast<T*>(p.gradient) + i * p.stride : nullptr;
        const int64_t x = p.x_t[i] - p.first, x_0 = p.x_0[i] - p.first;
        const bool has_x = 0 <= x && x < p.width, has_x_0 = 0 <= x_0 && x_0 < p.width;
        const double shift = p.shift != nullptr ? p.shift[i] : 0.0;
        if (has_x_0) sweep.log_score_x_0 = read_one(l + x_0) - shift;
        Sums sums;
        const auto add = [&](int64_t from, int64_t to) {
            if (out == nullptr) {
                add_sums<P>(sums, l, stationary, from, to, static_cast<Real>(shift));
            } else {
                const double factor = p.grad_loss[i] * sweep.row.weight;
                const double offset =
                    p.grad_loss[i] * sweep.row.slope * (P == Family::uniform ? sweep.row.weight : 1.0);
                add_sums_and_write_gradient<P>(sums, out, l, stationary, from, to, static_cast<Real>(shift),
                                               static_cast<Real>(factor), static_cast<Real>(offset));
            }
        };
        if (sweep.row.weight == 0.0) {
            if (out != nullptr) memset(out, 0, sizeof(T) * static_cast<size_t>(p.width));
        } else {
            add(0, has_x ? x : p.width);
            if (has_x) add(x + 1, p.width);
            sweep.scores += sums.scores;
            sweep.dot += sums.dot;
            if (out != nullptr) {
                if (has_x) write_one(out + x, 0.0);
                if (has_x_0 && x != x_0) {
                    const double pi = stationary_at(P, static_cast<const Real*>(p.stationary), p.dim, p.x_0[i]);
                    write_one(out + x_0,
                              score_entropy_gradient(sweep.row, p.grad_loss[i], sweep.log_score_x_0, pi).at_x_0);
                }
            }
        }
        if (p.first + p.width < p.dim) continue;
        const double dot = P == Family::uniform ? sweep.dot / static_cast<double>(p.dim) : sweep.dot;
        static_cast<Real*>(p.out)[i] =
            sweep.row.weight == 0.0
                ? Real(0)
                : static_cast<Real>(score_entropy_value(sweep.row, sweep.scores, dot, sweep.log_score_x_0));
    }
}

}  // namespace

RowKernel<ScoreEntropyParams> score_entropy(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<ScoreEntropyParams> {
        return forward_rows<family.value, typename decltype(element)::Type>;
    });
}

RowKernel<ScoreEntropyParams> score_entropy_backward(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<ScoreEntropyParams> {
        return backward_rows<family.value, typename decltype(element)::Type>;
    });
}

RowKernel<ScoreEntropyTileParams> score_entropy_tile(DType dtype, Family family) {
    return dispatch(dtype, family, [](auto element, auto family) -> RowKernel<ScoreEntropyTileParams> {
        return tile_rows<family.value, typename decltype(element)::Type>;
    });
}

}  // namespace sedd::SEDD_ISA

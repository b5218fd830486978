// The normaliser of a softmax in one sweep over a row. Logits may have any size, so the sum is kept relative to the
// largest logit so far.
#pragma once

#include "cpu/simd.h"

namespace sedd::SEDD_ISA {
namespace {

// Lanes are added up in the compute type within a block, and blocks in float64.
constexpr int64_t kSoftmaxBlock = 2048;

// The largest of [begin, end), which is at most a block; -inf if it is empty. A NaN may get lost here, but not in the
// sum.
template <class T, class Real = Compute<T>>
double largest_logit(const T* logits, int64_t begin, int64_t end) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    Vec top[kUnroll];
    for (Vec& t : top) t = broadcast(static_cast<Real>(-__builtin_inff()));
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        Vec l[kUnroll];
        prefetch<kUnroll>(logits + y);
        load_vectors<false>(logits + y, l);
        SEDD_UNROLL for (int k = 0; k < kUnroll; ++k) top[k] = max_or_second(l[k], top[k]);
    }
    for (; y + width <= end; y += width) top[0] = max_or_second(load(logits + y), top[0]);
    if (y < end) top[1] = max_or_second(load_partial(logits + y, end - y, -__builtin_inff()), top[1]);
    top[0] = max_or_second(max_or_second(top[0], top[1]), max_or_second(top[2], top[3]));
    Real lane[width];
    memcpy(lane, &top[0], sizeof(lane));
    Real result = lane[0];
    for (int i = 1; i < width; ++i) result = lane[i] > result ? lane[i] : result;
    return static_cast<double>(result);
}

// Σ exp(l_y - top) over [begin, end), which is at most a block.
template <class T, class Real = Compute<T>>
double sum_relative(const T* logits, int64_t begin, int64_t end, Real top) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    const Vec tops = broadcast(top);
    Vec sum[kUnroll] = {};
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        Vec l[kUnroll];
        load_vectors<false>(logits + y, l);
        SEDD_UNROLL for (int k = 0; k < kUnroll; ++k) l[k] -= tops;
        exp_lanes(l);
        SEDD_UNROLL for (int k = 0; k < kUnroll; ++k) sum[k] += l[k];
    }
    for (; y + width <= end; y += width) sum[0] += exp_lanes(load(logits + y) - tops);
    if (y < end) sum[1] += exp_lanes(load_partial(logits + y, end - y, -__builtin_inff()) - tops);
    return sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// The sum Σ exp(l_y) = total · exp(top) of the entries added so far.
struct Normaliser {
    double top = -__builtin_inf();
    double total = 0.0;

    // Adds the entries [begin, end).
    template <class T, class Real = Compute<T>>
    void add(const T* logits, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block += kSoftmaxBlock) {
            const int64_t stop = block + kSoftmaxBlock < end ? block + kSoftmaxBlock : end;
            raise(largest_logit(logits, block, stop));
            const double from = top == -__builtin_inf() ? 0.0 : top;
            total += sum_relative(logits, block, stop, static_cast<Real>(from));
        }
    }

    // Adds one logit.
    void add(double logit) {
        raise(logit);
        total += logit == -__builtin_inf() ? 0.0 : exp(logit - top);
    }

    // log Σ exp(l_y)
    double log_total() const { return total == 0.0 ? -__builtin_inf() : top + log(total); }

  private:
    void raise(double logit) {
        if (logit > top) {
            total *= exp(top - logit);
            top = logit;
        }
    }
};

}  // namespace
}  // namespace sedd::SEDD_ISA

// The normaliser of a softmax over segments of a row. Logits may have any size, so a sum is kept relative to the
// largest logit so far.
#pragma once

#include "cuda/segments.cuh"

namespace sedd {
namespace {

// Σ exp(l_y) = total · exp(top), of logits of type T
template <class T>
struct Normaliser {
    using Real = RealOf<T>;
    Real top, total;

    static __device__ __forceinline__ Normaliser none() { return {-bit_cast<float>(0x7f800000u), Real(0)}; }

    // exp((l - top) · by) for l ≤ top; 0 for l = -inf, even if top is -inf too. What is compared with -inf is `top`,
    // which the logits of a vector have in common, except in float64, where it saves a call.
    static __device__ __forceinline__ Real relative(Real l, Real top, Real by = Real(1)) {
        if constexpr (sizeof(T) == 8) return l == none().top ? Real(0) : exponential((l - top) * by);
        return exponential_of<T>(l - (top == none().top ? Real(0) : top), by);
    }

    __device__ __forceinline__ void add(Real l) {
        const Real higher = l > top ? l : top;
        total = total * relative(top, higher) + relative(l, higher);
        top = higher;
    }

    template <int kWidth>
    __device__ __forceinline__ void add(const Real (&l)[kWidth]) {
        Real higher = top, terms[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) higher = l[j] > higher ? l[j] : higher;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) terms[j] = relative(l[j], higher);
        total = total * relative(top, higher) + sum_of(terms);
        top = higher;
    }

    // log Σ exp(l_y)
    __device__ __forceinline__ double log_total() const {
        return total == Real(0) ? -INFINITY : static_cast<double>(top) + log(static_cast<double>(total));
    }

    __device__ __forceinline__ void add(const Normaliser& other) {
        const Real higher = other.top > top ? other.top : top;
        total = total * relative(top, higher) + other.total * relative(other.top, higher);
        top = higher;
    }
};

// The normaliser of all lanes, the same on every lane. Called by a whole warp.
template <class T, class Real = RealOf<T>>
__device__ __forceinline__ Normaliser<T> warp_normaliser(Normaliser<T> n) {
    Real top = n.top;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const Real other = __shfl_xor_sync(kAll, top, offset);
        top = other > top ? other : top;
    }
    return {top, warp_sum(n.total * Normaliser<T>::relative(n.top, top))};
}

// The normaliser of a row from those of its segments, in float64; the same on every lane. Called by a whole warp.
template <class T>
__device__ __forceinline__ Normaliser<double> row_normaliser(const Normaliser<T>* segments, int count) {
    Normaliser<double> n = Normaliser<double>::none();
    for (int s = lane_of(); s < count; s += kWarp) {
        n.add(Normaliser<double>{static_cast<double>(segments[s].top), static_cast<double>(segments[s].total)});
    }
    return warp_normaliser(n);
}

}  // namespace
}  // namespace sedd

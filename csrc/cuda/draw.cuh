// Draws an entry of a row from the sums of its segments.
#pragma once

#include "cuda/segments.cuh"

namespace sedd {
namespace {

// The running sum over the lanes, including the lane's own value.
__device__ __forceinline__ double scan(double value) {
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        const double before = __shfl_up_sync(kAll, value, offset);
        if (lane_of() >= offset) value += before;
    }
    return value;
}

// Searches the running sum of the lanes' values for `target`. Returns the lane whose value contains it, with the target
// relative to the lane; or -1, with the target relative to the end. Never returns a lane with the value 0.
struct Walk {
    int lane;
    double target;
};

__device__ __forceinline__ Walk walk(double value, double target) {
    const double end = scan(value);
    const unsigned hits = __ballot_sync(kAll, value > 0.0 && target < end);
    const int lane = hits != 0 ? __ffs(static_cast<int>(hits)) - 1 : -1;
    const int from = lane >= 0 ? lane : kWarp - 1;
    const double behind = __shfl_sync(kAll, end, from), own = __shfl_sync(kAll, value, from);
    return {lane, target - (lane >= 0 ? behind - own : behind)};
}

// The last lane with a value above 0, or -1.
__device__ __forceinline__ int last_lane(double value) {
    const unsigned some = __ballot_sync(kAll, value > 0.0);
    return some != 0 ? kWarp - 1 - __clz(static_cast<int>(some)) : -1;
}

// The segment that contains the target, and the share of its sum before the target. Called by a whole warp.
struct Pick {
    int segment;
    double share;
};

template <class Real>
__device__ __forceinline__ Pick pick_segment(const Real* sums, int segments, double target) {
    int last = 0;
    for (int begin = 0; begin < segments; begin += kWarp) {
        const int s = begin + lane_of();
        const double sum = s < segments ? static_cast<double>(sums[s]) : 0.0;
        const Walk w = walk(sum, target);
        if (w.lane >= 0) return {begin + w.lane, w.target / __shfl_sync(kAll, sum, w.lane)};
        const int some = last_lane(sum);
        if (some >= 0) last = begin + some;
        target = w.target;
    }
    return {last, 1.0};  // rounding moved the target beyond the end
}

// The entry of a segment at the given share of its weights, or -1 if all weights are 0. weights(y, l) is the weight of
// entry y, whose value is l; x has none. Called by a whole warp.
template <class T, class Weights, class Real = RealOf<T>>
__device__ __forceinline__ int pick_entry(const T* row, int dim, int segment, int x, const Weights& weights,
                                          double share) {
    constexpr int width = Vector<T>::kWidth;
    const auto weight = [&](int y) {
        return y >= 0 && y < dim && y != x ? weights(y, Vector<T>::read(row + y)) : Real(0);
    };
    const int first = first_entry(row, segment);
    const auto vector = [&](int i) {
        double sum = 0.0;
#pragma unroll 1
        for (int j = 0; j < width; ++j) sum += static_cast<double>(weight(first + i * kWarp * width + j));
        return sum;
    };
    double total = 0.0;
#pragma unroll 1
    for (int i = 0; i < kWarpVectors; ++i) total += vector(i);
    double target = share * warp_sum(total);
    int entry = -1;
#pragma unroll 1
    for (int i = 0; i < kWarpVectors; ++i) {
        const double sum = vector(i);
        const Walk w = walk(sum, target);
        // Keeps the last entry with a weight above 0, in case rounding moves the target beyond the end.
        const int lane = w.lane >= 0 ? w.lane : last_lane(sum);
        if (lane >= 0) {
            double rest = w.lane >= 0 ? w.target : sum;
            int found = 0;
#pragma unroll 1
            for (int j = 0; j < width; ++j) {  // only the result of `lane` is used
                const double value = static_cast<double>(weight(first + i * kWarp * width + j));
                if (!(value > 0.0)) continue;
                found = j;
                if (rest < value) break;
                rest -= value;
            }
            entry = __shfl_sync(kAll, first + i * kWarp * width + found, lane);
            if (w.lane >= 0) return entry;
        }
        target = w.target;
    }
    return entry;
}

}  // namespace
}  // namespace sedd

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
// entry y, whose value is l; x has none. Called by a whole warp. Waits for memory twice: for the four vectors of each
// lane, whose sums select a vector, and for the entries of this vector, one per lane.
template <class T, class Weights, class Real = RealOf<T>>
__device__ __forceinline__ int pick_entry(const T* row, int dim, int segment, int x, const Weights& weights,
                                          double share) {
    constexpr int width = Vector<T>::kWidth, stride = kWarp * width;
    const int first = first_entry(row, segment);
    double sums[kWarpVectors]{};
    const auto add = [&](int y, double value) {
#pragma unroll
        for (int i = 0; i < kWarpVectors; ++i) {  // no index into registers
            if (y >= first + i * stride && y < first + i * stride + width) sums[i] += value;
        }
    };
    visit<true>(
        row, dim, segment, x,
        [&](int y, Real(&l)[width]) {
            double sum = 0.0;
#pragma unroll
            for (int j = 0; j < width; ++j) sum += static_cast<double>(weights(y + j, l[j]));
            add(y, sum);
        },
        [&](int y, Real l) { add(y, static_cast<double>(weights(y, l))); });
    double target = share * warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    int begin = 0;
    double rest = -1.0;
#pragma unroll
    for (int i = 0; i < kWarpVectors; ++i) {
        const Walk w = walk(sums[i], target);
        // Keeps the last vector with a weight above 0, in case rounding moves the target beyond the end.
        const int lane = w.lane >= 0 ? w.lane : last_lane(sums[i]);
        if (lane >= 0) {
            begin = first + (lane - lane_of()) * width + i * stride;
            rest = w.lane >= 0 ? w.target : INFINITY;
        }
        if (w.lane >= 0) break;
        target = w.target;
    }
    if (rest < 0.0) return -1;
    const int y = begin + lane_of();
    const bool has = lane_of() < width && y >= 0 && y < dim && y != x;
    const double value = has ? static_cast<double>(weights(y, Vector<T>::read(row + y))) : 0.0;
    const Walk w = walk(value, rest);
    const int lane = w.lane >= 0 ? w.lane : last_lane(value);
    return lane >= 0 ? begin + lane : -1;
}

}  // namespace
}  // namespace sedd

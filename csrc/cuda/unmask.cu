// Tokens and statistics of positions. The warps of a block read a tile of a row once and keep, for each segment, its
// sums and its two largest logits. The first warp combines them, adds the tile to the state of the row and draws the
// tile's token, for which it reads one segment again.
//
// Bytes per element: 4 (float32) or 2, read once, and 2 KiB of a tile again where the token comes from it. A draw from
// a nucleus reads the row again, from the L2 cache, once and again after each rejection.
//
// Configuration: as in reverse_mean.cu, but two blocks fit a multiprocessor. A block has one row if there is a nucleus,
// because its warps wait for one another after each draw. Shared memory holds a float64 sum and the numbers of each
// segment.
//
// A row without a softmax gets tokens -1 and numbers NaN.
#include "unmask.h"

#include "cuda/draw.cuh"
#include "cuda/softmax.cuh"

namespace sedd {
namespace {

constexpr int64_t kSharedBytes = 48 << 10;

// The numbers of a segment; the sums are relative to its largest logit.
template <class Real>
struct UnmaskSegment {
    Real top, second, exps, weighted, draws;
    int argmax;  // an entry of the tile, or -1

    // Takes the largest logits of other entries. Of equal ones, the first is the largest.
    __device__ __forceinline__ void add_largest(Real l, Real next, int y) {
        const bool higher = l > top || (l == top && argmax >= 0 && y >= 0 && y < argmax);
        const Real lower = l > top ? top : l, rest = l > top ? next : second;
        second = lower > rest ? lower : rest;
        top = l > top ? l : top;
        argmax = higher ? y : argmax;
    }
};

template <UnmaskSums kSums, class T, class Real = RealOf<T>>
__device__ __forceinline__ UnmaskSegment<Real> segment_numbers(const T* row, int dim, int segment, int mask,
                                                               Real factor) {
    constexpr bool statistics = kSums != UnmaskSums::draws, draws = kSums != UnmaskSums::statistics;
    constexpr int width = Vector<T>::kWidth;
    const Real none = Normaliser<T>::none().top;
    UnmaskSegment<Real> s{none, none, Real(0), Real(0), Real(0), -1};
    const auto raise = [&](Real top) {  // makes the sums relative to it
        if (!(s.top < top)) return;
        if constexpr (statistics) {
            const Real scale = Normaliser<T>::relative(s.top, top);
            s.weighted = s.top == none ? Real(0) : (s.weighted + (s.top - top) * s.exps) * scale;
            s.exps *= scale;
        }
        if constexpr (draws) s.draws *= Normaliser<T>::relative(s.top, top, factor);
    };
    const auto add = [&](Real l) {
        if constexpr (statistics) {
            const Real e = Normaliser<T>::relative(l, s.top);
            s.exps += e;
            if (l != none) s.weighted += (l - s.top) * e;
        }
        if constexpr (draws) s.draws += Normaliser<T>::relative(l, s.top, factor);
    };
    visit(
        row, dim, segment, mask,
        [&](int y, Real(&l)[width]) {
            Real higher = none;
#pragma unroll
            for (int j = 0; j < width; ++j) higher = l[j] > higher ? l[j] : higher;
            raise(higher);
            if (higher > s.second) {  // seldom
#pragma unroll
                for (int j = 0; j < width; ++j) s.add_largest(l[j], none, y + j);
            }
#pragma unroll
            for (int j = 0; j < width; ++j) add(l[j]);
        },
        [&](int y, Real l) {
            raise(l);
            s.add_largest(l, none, y);
            add(l);
        });
    const Real own = s.top;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        s.add_largest(__shfl_xor_sync(kAll, s.top, offset), __shfl_xor_sync(kAll, s.second, offset),
                      __shfl_xor_sync(kAll, s.argmax, offset));
    }
    if constexpr (statistics) {
        const Real scale = Normaliser<T>::relative(own, s.top);
        const Real by = own == none ? Real(0) : own - s.top;
        s.weighted = warp_sum((s.weighted + by * s.exps) * scale);
        s.exps = warp_sum(s.exps * scale);
    }
    if constexpr (draws) {
        s.draws = warp_sum(s.draws * Normaliser<T>::relative(own, s.top, factor));
    } else {
        s.draws = s.exps;
    }
    return s;
}

// The state of a tile from its segments; makes picks[s] the sums of draws relative to the largest logit. Called by a
// whole warp; the result is the same on every lane. A lane reads only those picks that it wrote.
template <class Real>
__device__ __forceinline__ UnmaskState tile_state(const UnmaskSegment<Real>* segments, int count, double factor,
                                                  double* picks) {
    const double none = Normaliser<double>::none().top;
    UnmaskSegment<double> s{none, none, 0.0, 0.0, 0.0, -1};
    for (int k = lane_of(); k < count; k += kWarp) {
        s.add_largest(static_cast<double>(segments[k].top), static_cast<double>(segments[k].second),
                      segments[k].argmax);
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        s.add_largest(__shfl_xor_sync(kAll, s.top, offset), __shfl_xor_sync(kAll, s.second, offset),
                      __shfl_xor_sync(kAll, s.argmax, offset));
    }
    UnmaskState sums = unmask_start();
    for (int k = lane_of(); k < count; k += kWarp) {
        const UnmaskSegment<Real>& segment = segments[k];
        UnmaskState part{0.0,
                         0.0,
                         static_cast<double>(segment.exps),
                         static_cast<double>(segment.weighted),
                         static_cast<double>(segment.draws),
                         0.0,
                         0,
                         0};
        unmask_lower(part, static_cast<double>(segment.top) - s.top, factor);
        sums.exps += part.exps;
        sums.weighted += part.weighted;
        sums.draws += picks[k] = part.draws;
    }
    return {s.top, s.second, warp_sum(sums.exps), warp_sum(sums.weighted), warp_sum(sums.draws), none, -1, s.argmax};
}

// exp((l - top) / T) of an entry with l > low; MASK has none.
template <class T, class Real = RealOf<T>>
struct UnmaskTerm {
    Real top, factor, low;
    int mask;

    __device__ __forceinline__ Real operator()(int y, Real l) const {
        return y != mask && l > low ? exponential_of<T>(l - top, factor) : Real(0);
    }
};

template <class T, class Real = RealOf<T>>
__device__ __forceinline__ Real segment_above(const T* row, int dim, int segment, const UnmaskTerm<T>& term) {
    Real sum = 0;
    visit(
        row, dim, segment, term.mask,
        [&](int y, Real(&l)[Vector<T>::kWidth]) {
#pragma unroll
            for (int j = 0; j < Vector<T>::kWidth; ++j) l[j] = term(y + j, l[j]);
            sum += sum_of(l);
        },
        [&](int y, Real l) { sum += term(y, l); });
    return warp_sum(sum);
}

// An entry at a point in [0, 1] of the running sum of picks. Called by a whole warp.
template <class T, class Real = RealOf<T>>
__device__ __forceinline__ int pick_token(const T* row, int dim, const double* picks, int segments, double point,
                                          const UnmaskTerm<T>& term) {
    const double all = sum_segments(picks, segments);
    const Pick pick = pick_segment(picks, segments, point * all);
    return pick_entry(row, dim, pick.segment, -1, term, pick.share);
}

template <UnmaskSums kSums, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 2) unmask_kernel(UnmaskParams p, int segments, int row_warps) {
    using Real = RealOf<T>;
    SEDD_DYNAMIC_SHARED(double, memory);
    __shared__ double total, top;
    __shared__ int drawn;
    const int warp = static_cast<int>(threadIdx.x) / kWarp, slot = warp / row_warps, first = warp % row_warps;
    const int block_rows = static_cast<int>(blockDim.x) / (kWarp * row_warps);
    const int64_t row = static_cast<int64_t>(blockIdx.x) * block_rows + slot;
    const int dim = static_cast<int>(p.width), mask = static_cast<int>(p.mask - p.first);
    const bool exists = row < p.rows;
    const T* const logits = static_cast<const T*>(p.logits) + (exists ? row * p.stride : 0);
    double* const picks = memory + slot * segments;
    UnmaskSegment<Real>* const numbers =
        reinterpret_cast<UnmaskSegment<Real>*>(memory + block_rows * segments) + slot * segments;
    const double factor = unmask_factor(p);
    // Every warp reaches the barrier, whether its row exists or not.
    if (exists) {
        for (int s = first; s < segments; s += row_warps) {
            const UnmaskSegment<Real> segment = segment_numbers<kSums>(logits, dim, s, mask, static_cast<Real>(factor));
            if (lane_of() == 0) numbers[s] = segment;
        }
    }
    __syncthreads();  // wait for the segments
    const bool leads = exists && first == 0;
    UnmaskTerm<T> term{Real(0), static_cast<Real>(factor), Normaliser<T>::none().top, mask};
    int y = -1;
    for (uint64_t draw = 0;; ++draw) {
        if (leads) {
            double point = unmask_uniform(p, row, draw);
            if (draw == 0) {
                UnmaskState tile = tile_state(numbers, segments, factor, picks);
                tile.argmax += tile.argmax >= 0 ? p.first : 0;
                UnmaskState state = p.first > 0 ? p.states[row] : unmask_start();
                point = unmask_add(p, state, tile, point);
                term.top = static_cast<Real>(tile.top);
                __syncwarp();  // wait until every lane has read the state
                if (lane_of() == 0) p.states[row] = state;
                if (threadIdx.x == 0) total = state.draws, top = state.top;
            }
            y = point < 0.0 ? -1 : pick_token(logits, dim, picks, segments, point, term);
        }
        if (p.top_p == 1.0) break;
        // All warps of the block, which has one row, add up what is more probable than the drawn token.
        if (threadIdx.x == 0) drawn = y;
        __syncthreads();  // wait for the drawn token
        y = drawn;
        if (y < 0) break;
        term.top = static_cast<Real>(top);
        term.low = Vector<T>::read(logits + y);
        for (int s = first; s < segments; s += row_warps) {
            const double above = static_cast<double>(segment_above(logits, dim, s, term));
            if (lane_of() == 0) picks[s] = above;
        }
        __syncthreads();  // wait for the sums
        if (!(sum_segments(picks, segments) >= p.top_p * total)) break;
    }
    if (!leads || lane_of() != 0) return;
    UnmaskState state = p.states[row];
    if (y >= 0) {
        state.token = p.first + y;
        state.logit = static_cast<double>(Vector<T>::read(logits + y));
    }
    p.states[row] = state;
    if (p.first + p.width == p.dim) unmask_finish(p, row, state);
}

template <UnmaskSums kSums, class T>
const char* launch_typed(const UnmaskParams& p, const CudaLaunch& launch) {
    if (const char* why = too_large(p.rows, p.width, p.rows)) return why;
    const int segments = static_cast<int>(num_segments(p.width, p.dtype));
    int row_warps = 1;
    while (row_warps < kWarps && row_warps < segments) row_warps *= 2;
    const int block_rows = p.top_p < 1.0 ? 1 : kWarps / row_warps;
    const int64_t shared_bytes =
        block_rows * segments * static_cast<int64_t>(sizeof(double) + sizeof(UnmaskSegment<RealOf<T>>));
    if (shared_bytes > kSharedBytes) return "rows too wide for the CUDA kernel that unmasks";
    SEDD_LAUNCH((unmask_kernel<kSums, T>), blocks_for(p.rows, block_rows), block_rows * row_warps * kWarp,
                static_cast<size_t>(shared_bytes), stream_of(launch), p, segments, row_warps);
    return launch_error();
}

}  // namespace

const char* unmask_cuda(const UnmaskParams& p, const CudaLaunch& launch) {
    if (p.rows == 0) return nullptr;
    if (const char* why = use_device(launch.device)) return why;
    return with_type(p.dtype, [&](auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        switch (unmask_sums(p)) {
            case UnmaskSums::draws:
                return launch_typed<UnmaskSums::draws, T>(p, launch);
            case UnmaskSums::statistics:
                return launch_typed<UnmaskSums::statistics, T>(p, launch);
            default:
                return launch_typed<UnmaskSums::both, T>(p, launch);
        }
    });
}

}  // namespace sedd

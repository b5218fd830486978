// Score entropy. Forward: sums_kernel reads a row once and computes the sum of exp and, unless π is all on MASK, the
// dot product of π with the log-scores. loss_kernel then computes the formula of the row. Backward: numbers_kernel
// computes the numbers of the row. gradient_kernel then reads an element, computes exp, one product and one difference,
// and writes the result. No intermediate tensor has the size rows × N.
//
// Bytes per element: the forward pass reads 4 (float32) or 2; the backward pass reads and writes 8 or 4. In addition,
// each segment of 2 KiB writes 4 or 8 bytes of partial sums, which are read once. A vector π is read from the L2 cache,
// 4 bytes per element.
//
// Instructions per element: expf takes 8, with one MUFU.EX2; the exp of 16-bit types takes 2. For whole vectors, the
// forward pass takes 12 (absorbing), 13 (uniform) or 16 (vector π), and 5, 7 or 11 for 16-bit types; the backward pass
// takes 16 to 24, and 7 to 10. The start and the end of a segment take another 4 (16-bit types) to 9 (float32). At 128
// lanes per clock, a multiprocessor of an H100 issues the instructions of 6 float32 or 14 bfloat16 elements per clock,
// and its share of the memory bandwidth is 14 bytes per clock. So memory limits both. With a vector π, which is read in
// words of 4 bytes, the L1 cache limits bfloat16. docs/kernels.md has the counts from the machine code.
//
// Configuration: one warp per segment and eight warps per block, without shared memory or barriers (see segments.cuh).
// The double-precision functions of a row, about 200 instructions, run once per row in separate kernels. In
// gradient_kernel they would take as long for every segment as its elements.
//
// Rows with π_x = 0 (unmasked tokens of absorbing diffusion) are not read. Their loss is 0; that of a bad row is NaN.
#include "score_entropy.h"

#include "cuda/segments.cuh"

namespace sedd {
namespace {

constexpr int kRowThreads = 128;  // per block, in the kernels with one thread or one warp per row

// Whether the row has a valid x that can move. Other rows are not read.
template <Family P, class Real, class Params>
__device__ __forceinline__ bool is_live(const Params& p, int64_t row) {
    const int64_t x = p.x_t[row];
    return valid_token(x, p.dim) && can_move<P>(static_cast<const Real*>(p.stationary), p.dim, x);
}

template <class Real>
__device__ __forceinline__ Real shift_of(const double* shift, int64_t row) {
    return shift != nullptr ? static_cast<Real>(shift[row]) : Real(0);
}

// scores[row, segment] = Σ s_y, dots[row, segment] = Σ ℓ_y (uniform) or Σ π_y ℓ_y (vector π), over y ≠ x.
template <Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    sums_kernel(ScoreEntropyParams p, RowSplit split, RealOf<T>* scores, RealOf<T>* dots) {
    using Real = RealOf<T>;
    constexpr int width = Vector<T>::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments || !is_live<P, Real>(p, place.row)) return;
    const T* row = static_cast<const T*>(p.log_score) + place.row * p.dim;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const int x = static_cast<int>(p.x_t[place.row]);
    const Real shift = shift_of<Real>(p.shift, place.row);
    const Shifted<T> exp_of(shift);
    Real score = 0, dot = 0;
    visit(
        row, static_cast<int>(p.dim), place.segment, x,
        [&](int y, Real(&l)[width]) {
            Real terms[width];
#pragma unroll
            for (int j = 0; j < width; ++j) {
                terms[j] = l[j] - shift;
                if constexpr (P == Family::rank_one) {
                    const Real pi = stationary[y + j];
                    terms[j] = pi != Real(0) ? pi * terms[j] : Real(0);  // avoids 0 · ∞
                }
                l[j] = exp_of(l[j]);
            }
            score += sum_of(l);
            if constexpr (P != Family::absorbing) dot += sum_of(terms);
        },
        [&](int y, Real l) {
            score += exp_of(l);
            if constexpr (P == Family::uniform) dot += l - shift;
            if constexpr (P == Family::rank_one) {
                const Real pi = stationary[y];
                if (pi != Real(0)) dot += pi * (l - shift);
            }
        });
    score = warp_sum(score);
    if constexpr (P != Family::absorbing) dot = warp_sum(dot);
    if (lane_of() != 0) return;
    const int64_t at = place.row * split.segments + place.segment;
    scores[at] = score;
    if constexpr (P != Family::absorbing) dots[at] = dot;
}

// The numbers of a row. Requires a live row without a fault.
template <Family P, class Real, class Params>
__device__ __forceinline__ ScoreEntropyRow row_numbers(const Params& p, int64_t row) {
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const int64_t x = p.x_t[row], x_0 = p.x_0[row];
    return score_entropy_row(p.sigma[row], stationary_at(P, stationary, p.dim, x),
                             stationary_at(P, stationary, p.dim, x_0), x == x_0, p.neg_entropy);
}

template <class T>
__device__ __forceinline__ double log_score_x_0(const ScoreEntropyParams& p, int64_t row) {
    const double l = Vector<T>::read(static_cast<const T*>(p.log_score) + row * p.dim + p.x_0[row]);
    return p.shift != nullptr ? l - p.shift[row] : l;
}

// Computes the loss of a row from the sums of its segments: one thread per row if it has one segment, else one warp.
template <Family P, class T>
__global__ void __launch_bounds__(kRowThreads)
    loss_kernel(ScoreEntropyParams p, int segments, const RealOf<T>* scores, const RealOf<T>* dots) {
    using Real = RealOf<T>;
    const int lanes = segments == 1 ? 1 : kWarp;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / lanes;
    if (row >= p.rows) return;
    Real* loss = static_cast<Real*>(p.out) + row;
    const bool first = lanes == 1 || lane_of() == 0;
    const bool fault = score_entropy_fault(p, row) != Fault::none;
    if (fault || !is_live<P, Real>(p, row)) {
        if (first) *loss = fault ? not_a_number<Real>() : Real(0);
        return;
    }
    const Real* row_scores = scores + row * segments;
    const Real* row_dots = dots + row * segments;
    double score = lanes == 1 ? row_scores[0] : sum_segments(row_scores, segments), dot = 0.0;
    if constexpr (P != Family::absorbing) dot = lanes == 1 ? row_dots[0] : sum_segments(row_dots, segments);
    if constexpr (P == Family::uniform) dot /= static_cast<double>(p.dim);
    if (!first) return;
    *loss = static_cast<Real>(score_entropy_value(row_numbers<P, Real>(p, row), score, dot, log_score_x_0<T>(p, row)));
}

// Whether the gradient has been written with the loss, for the upstream gradient that has come.
__device__ __forceinline__ bool is_done(const ScoreEntropyParams& p) {
    return p.unless_one != nullptr && *p.unless_one == 1.0;
}

template <class Real>
struct GradientNumbers {
    Real factor, offset, at_x_0;
};

template <Family P, class T>
__global__ void __launch_bounds__(kRowThreads)
    numbers_kernel(ScoreEntropyParams p, GradientNumbers<RealOf<T>>* numbers) {
    using Real = RealOf<T>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (row >= p.rows || is_done(p)) return;
    if (score_entropy_fault(p, row) != Fault::none) {
        const Real nan = not_a_number<Real>();
        numbers[row] = {nan, nan, nan};
        return;
    }
    if (!is_live<P, Real>(p, row)) return;  // gradient_kernel does not use the numbers of such a row
    const double pi_x0 = stationary_at(P, static_cast<const Real*>(p.stationary), p.dim, p.x_0[row]);
    const ScoreEntropyGradient g = score_entropy_gradient(
        row_numbers<P, Real>(p, row), static_cast<const Real*>(p.grad_loss)[row], log_score_x_0<T>(p, row), pi_x0);
    numbers[row] = {static_cast<Real>(g.factor),
                    static_cast<Real>(P == Family::uniform ? g.offset / static_cast<double>(p.dim) : g.offset),
                    static_cast<Real>(g.at_x_0)};
}

template <Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    gradient_kernel(ScoreEntropyParams p, RowSplit split, const GradientNumbers<RealOf<T>>* numbers) {
    using Real = RealOf<T>;
    using V = Vector<T>;
    constexpr int width = V::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments || is_done(p)) return;
    const int64_t offset = place.row * p.dim;
    const int dim = static_cast<int>(p.dim);
    const T* row = static_cast<const T*>(p.log_score) + offset;
    T* out = static_cast<T*>(p.out) + offset;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const bool fault = score_entropy_fault(p, place.row) != Fault::none;
    if (!fault && !is_live<P, Real>(p, place.row)) {
        write_segment(out, dim, place.segment, [](int) { return Real(0); });
        return;
    }
    // In a bad row no entry counts as x or x_0, so that all entries get the NaN of the factor.
    const int x = fault ? -1 : static_cast<int>(p.x_t[place.row]),
              x_0 = fault ? -1 : static_cast<int>(p.x_0[place.row]);
    const GradientNumbers<Real> n = numbers[place.row];
    const Shifted<T> exp_of(shift_of<Real>(p.shift, place.row));
    const auto gradient = [&](int y, Real l) {
        const Real s = n.factor * exp_of(l);
        if constexpr (P == Family::absorbing) return s;
        if constexpr (P == Family::uniform) return s - n.offset;
        if constexpr (P == Family::rank_one) return s - n.offset * stationary[y];
    };
    const auto special = [&](int y, Real g) { return y == x ? Real(0) : y == x_0 ? n.at_x_0 : g; };
    const auto in_vector = [](int entry, int y) {
        return static_cast<unsigned>(entry - y) < static_cast<unsigned>(width);
    };
    visit(
        row, dim, place.segment, -1,
        [&](int y, Real(&l)[width]) {
#pragma unroll
            for (int j = 0; j < width; ++j) l[j] = gradient(y + j, l[j]);
            if (in_vector(x, y) || in_vector(x_0, y)) {
#pragma unroll
                for (int j = 0; j < width; ++j) l[j] = special(y + j, l[j]);
            }
            write_vector(out + y, l);
        },
        [&](int y, Real l) { V::write(out + y, special(y, gradient(y, l))); });
}

// ---- the sums and the gradient in one read and one write, over whole rows or tiles ----

// The index in the tile of entry y of the row, or -1 if it lies outside.
__device__ __forceinline__ int in_tile(const ScoreEntropyTileParams& p, int64_t y) {
    return y >= p.first && y < p.first + p.width ? static_cast<int>(y - p.first) : -1;
}

// Prepares a row for the other kernels: its numbers (first tile), the numbers of its gradient, and ℓ_{x0} before the
// gradient overwrites it. A bad row gets the weight NaN.
template <Family P, class T>
__global__ void __launch_bounds__(kRowThreads, 1)  // without the 1, nvcc stops at 48 registers and spills two
    tile_numbers_kernel(ScoreEntropyTileParams p, GradientNumbers<RealOf<T>>* numbers) {
    using Real = RealOf<T>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (row >= p.rows) return;
    ScoreEntropySweep sweep{};
    const bool fault = score_entropy_fault(p, row) != Fault::none;
    if (p.first > p.begin) {
        sweep = p.sweeps[row];
    } else {
        if (fault) sweep.row.weight = not_a_number<double>();
        if (!fault && is_live<P, Real>(p, row)) sweep.row = row_numbers<P, Real>(p, row);
    }
    const int x_0 = fault ? -1 : in_tile(p, p.x_0[row]);
    if (x_0 >= 0) {
        const double l = Vector<T>::read(static_cast<const T*>(p.log_score) + row * p.stride + x_0);
        sweep.log_score_x_0 = p.shift != nullptr ? l - p.shift[row] : l;
    }
    p.sweeps[row] = sweep;
    if (p.gradient == nullptr) return;
    const double pi_x0 = x_0 >= 0 ? stationary_at(P, static_cast<const Real*>(p.stationary), p.dim, p.x_0[row]) : 0.0;
    const ScoreEntropyGradient g =
        score_entropy_gradient(sweep.row, p.grad_loss[row], x_0 >= 0 ? sweep.log_score_x_0 : 0.0, pi_x0);
    numbers[row] = {static_cast<Real>(g.factor),
                    static_cast<Real>(P == Family::uniform ? g.offset / static_cast<double>(p.dim) : g.offset),
                    static_cast<Real>(g.at_x_0)};
}

template <bool kGradient, Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    tile_kernel(ScoreEntropyTileParams p, RowSplit split, const GradientNumbers<RealOf<T>>* numbers, RealOf<T>* scores,
                RealOf<T>* dots) {
    using Real = RealOf<T>;
    using V = Vector<T>;
    constexpr int width = V::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments) return;
    const T* row = static_cast<const T*>(p.log_score) + place.row * p.stride;
    T* out = kGradient ? static_cast<T*>(p.gradient) + place.row * p.stride : nullptr;
    const int entries = static_cast<int>(p.width);
    const double weight = p.sweeps[place.row].row.weight;
    if (!(weight > 0.0)) {  // the row cannot move, or is bad
        if constexpr (kGradient) {
            const Real rest = weight == 0.0 ? Real(0) : not_a_number<Real>();
            write_segment(out, entries, place.segment, [rest](int) { return rest; });
        }
        return;
    }
    const Real* stationary = P == Family::rank_one ? static_cast<const Real*>(p.stationary) + p.first : nullptr;
    const int x = in_tile(p, p.x_t[place.row]), x_0 = kGradient ? in_tile(p, p.x_0[place.row]) : -1;
    const Real shift = shift_of<Real>(p.shift, place.row);
    const Shifted<T> exp_of(shift);
    GradientNumbers<Real> n{};
    if constexpr (kGradient) n = numbers[place.row];
    Real score = 0, dot = 0;
    // Computes the terms of an entry for the sums, and returns its gradient.
    const auto term = [&](int y, Real l, Real& s, Real& d) {
        s = exp_of(l);
        d = l - shift;
        const Real gradient = n.factor * s;
        if constexpr (P == Family::absorbing) return gradient;
        if constexpr (P == Family::uniform) return gradient - n.offset;
        if constexpr (P == Family::rank_one) {
            const Real pi = stationary[y];
            d = pi != Real(0) ? pi * d : Real(0);  // avoids 0 · ∞
            return gradient - n.offset * pi;
        }
    };
    visit(
        row, entries, place.segment, x,
        [&](int y, Real(&l)[width]) {
            Real s[width], d[width];
#pragma unroll
            for (int j = 0; j < width; ++j) l[j] = term(y + j, l[j], s[j], d[j]);
            score += sum_of(s);
            if constexpr (P != Family::absorbing) dot += sum_of(d);
            if constexpr (kGradient) {
                if (static_cast<unsigned>(x_0 - y) < static_cast<unsigned>(width)) {
#pragma unroll
                    for (int j = 0; j < width; ++j) l[j] = y + j == x_0 ? n.at_x_0 : l[j];
                }
                write_vector(out + y, l);
            }
        },
        [&](int y, Real l) {
            Real s, d;
            const Real g = term(y, l, s, d);
            score += s;
            if constexpr (P != Family::absorbing) dot += d;
            if constexpr (kGradient) V::write(out + y, y == x_0 ? n.at_x_0 : g);
        });
    score = warp_sum(score);
    if constexpr (P != Family::absorbing) dot = warp_sum(dot);
    if (lane_of() != 0) return;
    if constexpr (kGradient) {  // visit() skips x
        if (x >= 0 && x / (kSegmentVectors * width) == place.segment) V::write(out + x, Real(0));
    }
    const int64_t at = place.row * split.segments + place.segment;
    scores[at] = score;
    if constexpr (P != Family::absorbing) dots[at] = dot;
}

// Adds the sums of a tile's segments to those of the row. With the last tile, computes the loss.
template <Family P, class T>
__global__ void __launch_bounds__(kRowThreads)
    tile_loss_kernel(ScoreEntropyTileParams p, int segments, const RealOf<T>* scores, const RealOf<T>* dots) {
    using Real = RealOf<T>;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kWarp;
    if (row >= p.rows) return;
    ScoreEntropySweep& sweep = p.sweeps[row];
    const double weight = sweep.row.weight;
    double score = 0.0, dot = 0.0;
    if (weight > 0.0) {
        score = sum_segments(scores + row * segments, segments);
        if constexpr (P != Family::absorbing) dot = sum_segments(dots + row * segments, segments);
    }
    if (lane_of() != 0) return;
    sweep.scores += score;
    sweep.dot += dot;
    if (p.first + p.width < p.dim) return;
    const double whole_dot = P == Family::uniform ? sweep.dot / static_cast<double>(p.dim) : sweep.dot;
    static_cast<Real*>(p.out)[row] =
        weight == 0.0 ? Real(0)
                      : static_cast<Real>(score_entropy_value(sweep.row, sweep.scores, whole_dot, sweep.log_score_x_0));
}

// ---- launchers ----

template <Family P, class T>
const char* launch_typed(const ScoreEntropyTileParams& p, const CudaLaunch& launch) {
    using Real = RealOf<T>;
    const RowSplit split = split_rows(p.width, p.dtype);
    const int64_t blocks = split_blocks(split, p.rows);
    if (const char* why = too_large(p.rows * kWarp, p.width, blocks)) return why;
    Real* scores = static_cast<Real*>(launch.workspace);
    Real* dots = scores + p.rows * split.segments;
    auto* numbers = reinterpret_cast<GradientNumbers<Real>*>(dots + p.rows * split.segments);
    SEDD_LAUNCH((tile_numbers_kernel<P, T>), blocks_for(p.rows, kRowThreads), kRowThreads, 0, stream_of(launch), p,
                numbers);
    if (p.gradient != nullptr) {
        SEDD_LAUNCH((tile_kernel<true, P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split,
                    numbers, scores, dots);
    } else {
        SEDD_LAUNCH((tile_kernel<false, P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split,
                    numbers, scores, dots);
    }
    SEDD_LAUNCH((tile_loss_kernel<P, T>), blocks_for(p.rows * kWarp, kRowThreads), kRowThreads, 0, stream_of(launch), p,
                split.segments, scores, dots);
    return launch_error();
}

template <bool kBackward, Family P, class T>
const char* launch_typed(const ScoreEntropyParams& p, const CudaLaunch& launch) {
    using Real = RealOf<T>;
    const RowSplit split = split_rows(p.dim, p.dtype);
    const int64_t blocks = split_blocks(split, p.rows);
    if (const char* why = too_large(p.rows, p.dim, blocks)) return why;
    if constexpr (kBackward) {
        auto* numbers = static_cast<GradientNumbers<Real>*>(launch.workspace);
        SEDD_LAUNCH((numbers_kernel<P, T>), blocks_for(p.rows, kRowThreads), kRowThreads, 0, stream_of(launch), p,
                    numbers);
        SEDD_LAUNCH((gradient_kernel<P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split,
                    numbers);
    } else {
        Real* scores = static_cast<Real*>(launch.workspace);
        Real* dots = scores + p.rows * split.segments;
        const int64_t row_lanes = split.segments == 1 ? 1 : kWarp;
        SEDD_LAUNCH((sums_kernel<P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split, scores,
                    dots);
        SEDD_LAUNCH((loss_kernel<P, T>), blocks_for(p.rows * row_lanes, kRowThreads), kRowThreads, 0, stream_of(launch),
                    p, split.segments, scores, dots);
    }
    return launch_error();
}

template <bool kBackward>
const char* launch_all(const ScoreEntropyParams& p, const CudaLaunch& launch) {
    return on_device(p, launch, [&](auto family, auto* type) {
        return launch_typed<kBackward, family.value, std::remove_pointer_t<decltype(type)>>(p, launch);
    });
}

}  // namespace

const char* score_entropy_cuda(const ScoreEntropyParams& p, const CudaLaunch& launch) {
    return launch_all<false>(p, launch);
}

const char* score_entropy_backward_cuda(const ScoreEntropyParams& p, const CudaLaunch& launch) {
    return launch_all<true>(p, launch);
}

const char* score_entropy_tile_cuda(const ScoreEntropyTileParams& p, const CudaLaunch& launch) {
    return on_device(p, launch, [&](auto family, auto* type) {
        return launch_typed<family.value, std::remove_pointer_t<decltype(type)>>(p, launch);
    });
}

int64_t score_entropy_workspace(int64_t rows, int64_t dim, DType dtype) {
    return 2 * rows * num_segments(dim, dtype) * real_bytes(dtype);
}

int64_t score_entropy_backward_workspace(int64_t rows, int64_t, DType dtype) { return 3 * rows * real_bytes(dtype); }

int64_t score_entropy_tile_workspace(int64_t rows, int64_t width, DType dtype) {
    return score_entropy_workspace(rows, width, dtype) + score_entropy_backward_workspace(rows, width, dtype);
}

}  // namespace sedd

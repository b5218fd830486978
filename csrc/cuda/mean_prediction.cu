// Score entropy of a mean prediction. Forward: others_kernel computes the normaliser of each segment, and row_kernel
// the numbers of the row; an absorbing process then needs no more. For other processes sums_kernel reads the row again
// and adds up the terms of score entropy, and loss_kernel computes the loss. Backward: gradient_kernel reads an
// element, computes its gradient and writes it; the result may overwrite the logits. If the vocabulary is split over
// processes, a launch runs the kernels of one stage: others_kernel and row_kernel for the logits, row_kernel,
// sums_kernel and loss_kernel for the sums, row_kernel and loss_kernel for the loss.
//
// Bytes per element: the forward pass reads 4 (float32) or 2, twice unless the process is absorbing; the backward pass
// reads and writes 8 or 4. Each segment of 2 KiB writes 8 to 20 bytes of partial sums. A vector π is read from the L2
// cache, 4 bytes per element. Instructions per element: docs/kernels.md has the counts from the machine code.
//
// Configuration: one warp per segment and eight warps per block, without shared memory or barriers (see segments.cuh).
// The double-precision functions of a row run once per row in separate kernels.
//
// Rows with π_x = 0 (unmasked tokens of absorbing diffusion) are not read. Their loss is 0; that of a bad row is NaN.
#include "mean_prediction.h"

#include "cuda/softmax.cuh"

namespace sedd {
namespace {

constexpr int kRowThreads = 128;  // per block, in the kernels with one warp per row
constexpr float kLeast = 1e-30f;  // a smaller q_y counts as 0, as on the CPU
constexpr float kLeastNormal = 1.2e-38f;

template <Family P, class Real>
__device__ __forceinline__ bool is_live(const MeanPredictionParams& p, int64_t row) {
    return mean_prediction_fault(p, row) == Fault::none &&
           can_move<P>(static_cast<const Real*>(p.stationary), p.dim, p.x_t[row]);
}

// The indices in the slice of the entries that the sums leave out: x, x0 and MASK. Those that it does not have, and no
// MASK, are negative or at least its width.
struct Special {
    int x, x_0, mask;

    __device__ __forceinline__ Special(const MeanPredictionParams& p, int64_t row)
        : x(static_cast<int>(p.x_t[row] - p.first)),
          x_0(static_cast<int>(p.x_0[row] - p.first)),
          mask(static_cast<int>(p.mask - p.first)) {}
    __device__ __forceinline__ bool contains(int y) const { return y == x || y == x_0 || y == mask; }
    // Whether one of them lies in [y, y + width).
    template <int width>
    __device__ __forceinline__ bool meets(int y) const {
        const auto in = [y](int entry) { return static_cast<unsigned>(entry - y) < static_cast<unsigned>(width); };
        return in(x) || in(x_0) || in(mask);
    }
};

template <class T>
__device__ __forceinline__ const T* slice_of(const MeanPredictionParams& p, int64_t row) {
    return static_cast<const T*>(p.logits) + row * p.stride;
}

// A vector π of the slice.
template <Family P, class Real>
__device__ __forceinline__ const Real* slice_stationary(const MeanPredictionParams& p) {
    return P == Family::rank_one ? static_cast<const Real*>(p.stationary) + p.first : nullptr;
}

// Calls whole(y, values) for the vectors of the lane and one(y, value) for its other entries, with the logits of
// special entries replaced by -inf.
template <class T, class Whole, class One>
__device__ __forceinline__ void visit_others(const T* row, int dim, int segment, const Special& special, Whole whole,
                                             One one) {
    using Real = RealOf<T>;
    constexpr int width = Vector<T>::kWidth;
    const Real nothing = -bit_cast<float>(0x7f800000u);
    visit(
        row, dim, segment, -1,
        [&](int y, Real(&l)[width]) {
            if (special.meets<width>(y)) {
#pragma unroll
                for (int j = 0; j < width; ++j) l[j] = special.contains(y + j) ? nothing : l[j];
            }
            whole(y, l);
        },
        [&](int y, Real l) { one(y, special.contains(y) ? nothing : l); });
}

template <Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    others_kernel(MeanPredictionParams p, RowSplit split, Normaliser<T>* normalisers) {
    using Real = RealOf<T>;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments || !is_live<P, Real>(p, place.row)) return;
    Normaliser<T> sum = Normaliser<T>::none();
    visit_others(
        slice_of<T>(p, place.row), static_cast<int>(p.width), place.segment, Special(p, place.row),
        [&](int, Real(&l)[Vector<T>::kWidth]) { sum.add(l); }, [&](int, Real l) { sum.add(l); });
    sum = warp_normaliser(sum);
    if (lane_of() == 0) normalisers[place.row * split.segments + place.segment] = sum;
}

// Writes the loss of a row, and what the backward pass needs.
template <Family P, class Real>
__device__ __forceinline__ void finish_row(const MeanPredictionParams& p, int64_t row, const MeanPredictionRow& numbers,
                                           const MeanPredictionSums& sums) {
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const int64_t x = p.x_t[row], x_0 = p.x_0[row];
    const bool has_mask = p.mask >= 0 && p.mask != x && p.mask != x_0;
    MeanPredictionGradient gradient;
    const double loss = mean_prediction_value(numbers, sums, stationary_at(P, stationary, p.dim, x),
                                              stationary_at(P, stationary, p.dim, x_0),
                                              has_mask ? stationary_at(P, stationary, p.dim, p.mask) : 0.0, gradient);
    static_cast<Real*>(p.out)[row] = static_cast<Real>(loss);
    if (p.numbers != nullptr) p.numbers[row] = gradient;
}

// One warp per row. `segments` is 0 in a stage that reads the logits of the row.
template <Family P, class T>
__global__ void __launch_bounds__(kRowThreads)
    row_kernel(MeanPredictionParams p, int segments, const Normaliser<T>* normalisers, MeanPredictionRow* rows) {
    using Real = RealOf<T>;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kWarp;
    if (row >= p.rows) return;
    if (!is_live<P, Real>(p, row)) {
        const bool fault = mean_prediction_fault(p, row) != Fault::none;
        if (lane_of() == 0) {
            static_cast<Real*>(p.out)[row] = fault ? not_a_number<Real>() : Real(0);
            if (p.numbers != nullptr) p.numbers[row] = {};
        }
        return;
    }
    const Normaliser<double> others = row_normaliser(normalisers + row * segments, segments);
    if (lane_of() != 0) return;
    const T* l = slice_of<T>(p, row);
    const Special special(p, row);
    const auto logit = [&](int y) {
        const bool has = y != special.mask && y >= 0 && y < p.width;
        return has ? static_cast<double>(Vector<T>::read(l + y)) : -INFINITY;
    };
    MeanPredictionLogits logits;
    if (p.stage == Stage::whole || p.stage == Stage::logits) {
        logits = {logit(special.x), special.x == special.x_0 ? -INFINITY : logit(special.x_0), others.log_total(),
                  others.top};
    } else {
        logits = p.row_logits[row];
    }
    if (p.stage == Stage::logits) {
        p.row_logits[row] = logits;
        return;
    }
    const double pi_x = stationary_at(P, static_cast<const Real*>(p.stationary), p.dim, p.x_t[row]);
    const MeanPredictionRow numbers = mean_prediction_row(
        logits, p.sigma[row], p.sigma_s != nullptr ? p.sigma_s[row] : -1.0, pi_x, special.x == special.x_0);
    if constexpr (P == Family::absorbing) {
        finish_row<P, Real>(p, row, numbers, mean_prediction_absorbing_sums(numbers));
    } else {
        rows[row] = numbers;
    }
}

// The numbers of a row in the compute type. For a uniform π, excess, keep and rate include it.
template <Family P, class T, class Real = RealOf<T>>
struct LaneNumbers {
    Real top, a, excess, keep, rate;
    Shifted<T> normalised;  // of l - top: exp(l - top - log_total)

    template <class Numbers>
    __device__ __forceinline__ LaneNumbers(const Numbers& n, double row_rate, int64_t dim)
        : normalised(static_cast<Real>(n.log_total)) {
        const double pi = P == Family::uniform ? 1.0 / static_cast<double>(dim) : 1.0;
        top = static_cast<Real>(n.top);
        a = static_cast<Real>(n.a);
        excess = static_cast<Real>(n.excess * pi);
        keep = static_cast<Real>(n.keep * pi);
        rate = static_cast<Real>(row_rate * pi);
    }
    __device__ __forceinline__ Real mean(Real l) const { return normalised(l - top); }
};

// h(r) = r - log(1 + r), given u = 1 + r: near 0 as r²/2 - r³ p(r), with the coefficients of Cephes' logf.
__device__ __forceinline__ float excess_of(float r, float u) {
    float p = 7.0376836292e-2f;
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    return r > -0.29f && r < 0.41f ? r * r * (0.5f - r * p) : r - logf(u);
}
__device__ __forceinline__ double excess_of(double r, double u) { return excess_over_log(r, log(u)); }

template <class Real>
__device__ __forceinline__ Real at_least(Real value, float least) {
    return value < static_cast<Real>(least) ? static_cast<Real>(least) : value;
}

template <class Real>
struct SegmentSums {
    Real entropy, pi_ratio, mu_ratio;
};

// Three blocks of a multiprocessor, two for float64. Without the number, nvcc spills registers of an RTX 50.
template <bool kGradient, Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp, sizeof(RealOf<T>) == 8 ? 2 : 3)
    sums_kernel(MeanPredictionParams p, RowSplit split, const MeanPredictionRow* rows, SegmentSums<RealOf<T>>* sums) {
    using Real = RealOf<T>;
    constexpr int width = Vector<T>::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments || !is_live<P, Real>(p, place.row)) return;
    const Real* stationary = slice_stationary<P, Real>(p);
    const Special special(p, place.row);
    const LaneNumbers<P, T> n(rows[place.row], rows[place.row].rate, p.dim);
    SegmentSums<Real> sum{0, 0, 0};
    // Replaces the logit by the entropy of the entry.
    const auto add = [&](int y, Real l, Real& entropy, Real& pi_ratio, Real& mu_ratio) {
        Real pi = P == Family::rank_one ? stationary[y] : Real(1);
        if (special.contains(y)) pi = 0;
        const Real mu = n.mean(l), moved = mu * n.a, t = pi * n.keep + moved, e = pi * n.excess + moved,
                   q = pi * n.rate;
        const Real inverse = Real(1) / at_least(q, kLeast);
        const Real h = excess_of(e * inverse, at_least(t * inverse, kLeastNormal));
        entropy = q > static_cast<Real>(kLeast) ? q * h : e;
        if constexpr (kGradient) {
            const Real ratio = e / at_least(t, kLeastNormal);
            pi_ratio = pi * ratio;
            mu_ratio = mu * ratio;
        }
    };
    visit_others(
        slice_of<T>(p, place.row), static_cast<int>(p.width), place.segment, special,
        [&](int y, Real(&l)[width]) {
            Real entropy[width], pi_ratio[width], mu_ratio[width];
#pragma unroll
            for (int j = 0; j < width; ++j) add(y + j, l[j], entropy[j], pi_ratio[j], mu_ratio[j]);
            sum.entropy += sum_of(entropy);
            if constexpr (kGradient) {
                sum.pi_ratio += sum_of(pi_ratio);
                sum.mu_ratio += sum_of(mu_ratio);
            }
        },
        [&](int y, Real l) {
            Real entropy, pi_ratio = 0, mu_ratio = 0;
            add(y, l, entropy, pi_ratio, mu_ratio);
            sum.entropy += entropy;
            sum.pi_ratio += pi_ratio;
            sum.mu_ratio += mu_ratio;
        });
    sum.entropy = warp_sum(sum.entropy);
    if constexpr (kGradient) {
        sum.pi_ratio = warp_sum(sum.pi_ratio);
        sum.mu_ratio = warp_sum(sum.mu_ratio);
    }
    if (lane_of() == 0) sums[place.row * split.segments + place.segment] = sum;
}

// One warp per row. `segments` is 0 in the stage that reads the sums of the row.
template <Family P, class T>
__global__ void __launch_bounds__(kRowThreads)
    loss_kernel(MeanPredictionParams p, int segments, const MeanPredictionRow* rows,
                const SegmentSums<RealOf<T>>* sums) {
    using Real = RealOf<T>;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kWarp;
    if (row >= p.rows || !is_live<P, Real>(p, row)) return;
    MeanPredictionSums sum;
    for (int s = lane_of(); s < segments; s += kWarp) {
        const SegmentSums<Real> part = sums[row * segments + s];
        sum.entropy += static_cast<double>(part.entropy);
        sum.pi_ratio += static_cast<double>(part.pi_ratio);
        sum.mu_ratio += static_cast<double>(part.mu_ratio);
    }
    sum.entropy = warp_sum(sum.entropy);
    sum.pi_ratio = warp_sum(sum.pi_ratio);
    sum.mu_ratio = warp_sum(sum.mu_ratio);
    if (lane_of() != 0) return;
    if constexpr (P == Family::uniform) sum.pi_ratio /= static_cast<double>(p.dim);
    if (p.stage == Stage::sums) {
        p.row_sums[row] = sum;
    } else {
        if (p.stage == Stage::loss) sum = p.row_sums[row];
        finish_row<P, Real>(p, row, rows[row], sum);
    }
}

template <Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp) gradient_kernel(MeanPredictionParams p, RowSplit split) {
    using Real = RealOf<T>;
    using V = Vector<T>;
    constexpr int width = V::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments) return;
    const int count = static_cast<int>(p.width);
    T* out = static_cast<T*>(p.out) + place.row * p.stride;
    if (!is_live<P, Real>(p, place.row)) {
        const bool fault = mean_prediction_fault(p, place.row) != Fault::none;
        write_segment(out, count, place.segment, [fault](int) { return fault ? not_a_number<Real>() : Real(0); });
        return;
    }
    const Special special(p, place.row);
    const MeanPredictionGradient g = p.numbers[place.row];
    const double upstream = static_cast<double>(static_cast<const Real*>(p.grad_loss)[place.row]);
    const LaneNumbers<P, T> n(g, 0.0, p.dim);
    const Real base = static_cast<Real>(g.base), at_x = static_cast<Real>(upstream * g.at_x),
               at_x_0 = static_cast<Real>(upstream * g.at_x_0),
               scale = static_cast<Real>(upstream * g.scale * (P == Family::absorbing ? g.a - g.base : 1.0));
    const Real* stationary = slice_stationary<P, Real>(p);
    const auto gradient = [&](int y, Real l) {
        const Real mu = n.mean(l);
        if constexpr (P == Family::absorbing) return scale * mu;
        const Real pi = P == Family::rank_one ? stationary[y] : Real(1), moved = mu * n.a;
        const Real ratio = (pi * n.excess + moved) / at_least(pi * n.keep + moved, kLeastNormal);
        return mu * (scale * (n.a * ratio - base));
    };
    const auto exact = [&](int y, Real value) {
        return y == special.mask ? Real(0) : y == special.x ? at_x : y == special.x_0 ? at_x_0 : value;
    };
    visit(
        slice_of<T>(p, place.row), count, place.segment, -1,
        [&](int y, Real(&l)[width]) {
#pragma unroll
            for (int j = 0; j < width; ++j) l[j] = gradient(y + j, l[j]);
            if (special.meets<width>(y)) {
#pragma unroll
                for (int j = 0; j < width; ++j) l[j] = exact(y + j, l[j]);
            }
            write_vector(out + y, l);
        },
        [&](int y, Real l) { V::write(out + y, exact(y, gradient(y, l))); });
}

// ---- launchers ----

template <Family P, class T>
const char* launch_forward(const MeanPredictionParams& p, const CudaLaunch& launch) {
    using Real = RealOf<T>;
    const RowSplit split = split_rows(p.width, p.dtype);
    const int64_t blocks = split_blocks(split, p.rows), partials = p.rows * split.segments;
    if (const char* why = too_large(p.rows * kWarp, p.dim, blocks)) return why;
    const bool reads_logits = p.stage == Stage::whole || p.stage == Stage::logits;
    auto* rows = static_cast<MeanPredictionRow*>(launch.workspace);
    auto* normalisers = reinterpret_cast<Normaliser<T>*>(rows + p.rows);
    auto* sums = reinterpret_cast<SegmentSums<Real>*>(normalisers + partials);
    const unsigned row_blocks = blocks_for(p.rows * kWarp, kRowThreads);
    if (reads_logits) {
        SEDD_LAUNCH((others_kernel<P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split,
                    normalisers);
    }
    SEDD_LAUNCH((row_kernel<P, T>), row_blocks, kRowThreads, 0, stream_of(launch), p, reads_logits ? split.segments : 0,
                normalisers, rows);
    if constexpr (P != Family::absorbing) {
        if (p.stage == Stage::logits) return launch_error();
        if (p.stage == Stage::loss) {
            // its sums are those of all processes
        } else if (p.numbers != nullptr) {
            SEDD_LAUNCH((sums_kernel<true, P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p,
                        split, rows, sums);
        } else {
            SEDD_LAUNCH((sums_kernel<false, P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p,
                        split, rows, sums);
        }
        SEDD_LAUNCH((loss_kernel<P, T>), row_blocks, kRowThreads, 0, stream_of(launch), p,
                    p.stage == Stage::loss ? 0 : split.segments, rows, sums);
    }
    return launch_error();
}

template <Family P, class T>
const char* launch_backward(const MeanPredictionParams& p, const CudaLaunch& launch) {
    const RowSplit split = split_rows(p.width, p.dtype);
    const int64_t blocks = split_blocks(split, p.rows);
    if (const char* why = too_large(p.rows, p.dim, blocks)) return why;
    SEDD_LAUNCH((gradient_kernel<P, T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split);
    return launch_error();
}

}  // namespace

const char* mean_prediction_cuda(const MeanPredictionParams& p, const CudaLaunch& launch) {
    return on_device(p, launch, [&](auto family, auto* type) {
        return launch_forward<family.value, std::remove_pointer_t<decltype(type)>>(p, launch);
    });
}

const char* mean_prediction_backward_cuda(const MeanPredictionParams& p, const CudaLaunch& launch) {
    return on_device(p, launch, [&](auto family, auto* type) {
        return launch_backward<family.value, std::remove_pointer_t<decltype(type)>>(p, launch);
    });
}

int64_t mean_prediction_workspace(int64_t rows, int64_t width, DType dtype) {
    const int64_t per_segment = 5 * real_bytes(dtype);  // Normaliser and SegmentSums
    return rows * (static_cast<int64_t>(sizeof(MeanPredictionRow)) + num_segments(width, dtype) * per_segment);
}

}  // namespace sedd

// Loss of generalised masked diffusion (GenMD4). Forward: sums_kernel reads a masked row once and computes, for each
// segment, the normaliser of the softmax and the mean of the powers w; loss_kernel combines them. Backward:
// gradient_kernel reads an element, computes its gradient and writes it; the result may overwrite the logits. The
// gradient in w adds up columns: column_kernel has one thread per column and takes the rows in their order.
//
// Bytes per element: the forward pass reads 4 (float32) or 2; the backward pass reads and writes 8 or 4; the gradient
// in w reads 4 or 2. The powers are read from the L2 cache, 4 bytes per element.
//
// Configuration: one warp per segment and eight warps per block, without shared memory or barriers (see segments.cuh).
// Rows that are not masked are not read. Their loss is 0; that of a bad row is NaN.
#include "generalized_masked.h"

#include "cuda/softmax.cuh"

namespace sedd {
namespace {

constexpr int kRowThreads = 128;  // per block, in the kernels with one warp per row or one thread per column

__device__ __forceinline__ bool is_bad(const GeneralizedMaskedParams& p, int64_t row) {
    return generalized_masked_fault(p, row) != Fault::none;
}
__device__ __forceinline__ bool is_masked(const GeneralizedMaskedParams& p, int64_t row) {
    return !is_bad(p, row) && p.x_t[row] == p.dim - 1;
}

// Σ e^{l_k} = total · e^top and Σ w_k e^{l_k} = dot · e^top over the entries of a segment other than v and MASK.
template <class Real>
struct Sums {
    Normaliser<Real> mass;
    Real dot;

    static __device__ __forceinline__ Sums none() { return {Normaliser<Real>::none(), Real(0)}; }

    // Adds entries relative to their own largest logit.
    template <int kWidth>
    __device__ __forceinline__ void add(const Real (&l)[kWidth], const Real (&w)[kWidth]) {
        Real top = mass.top, terms[kWidth], weighted[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) top = l[j] > top ? l[j] : top;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            terms[j] = Normaliser<Real>::relative(l[j], top);
            weighted[j] = terms[j] * w[j];
        }
        rescale(top);
        mass.total += sum_of(terms);
        dot += sum_of(weighted);
    }
    __device__ __forceinline__ void add(Real l, Real w) {
        const Real top = l > mass.top ? l : mass.top, term = Normaliser<Real>::relative(l, top);
        rescale(top);
        mass.total += term;
        dot += term * w;
    }
    __device__ __forceinline__ void rescale(Real top) {
        const Real scale = Normaliser<Real>::relative(mass.top, top);
        mass.total *= scale;
        dot *= scale;
        mass.top = top;
    }
};

// The sums of all lanes, the same on every lane. Called by a whole warp.
template <class Real>
__device__ __forceinline__ Sums<Real> warp_sums(Sums<Real> sums) {
    Real top = sums.mass.top;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const Real other = __shfl_xor_sync(kAll, top, offset);
        top = other > top ? other : top;
    }
    sums.rescale(top);
    sums.mass.total = warp_sum(sums.mass.total);
    sums.dot = warp_sum(sums.dot);
    return sums;
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    sums_kernel(GeneralizedMaskedParams p, RowSplit split, Sums<RealOf<T>>* sums) {
    using Real = RealOf<T>;
    constexpr int width = Vector<T>::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments || !is_masked(p, place.row)) return;
    const T* row = static_cast<const T*>(p.logits) + place.row * p.dim;
    const Real* power = static_cast<const Real*>(p.power);
    const int mask = static_cast<int>(p.dim - 1), v = static_cast<int>(p.x_0[place.row]);
    Sums<Real> sum = Sums<Real>::none();
    visit(
        row, mask, place.segment, v,  // the row without MASK
        [&](int y, Real(&l)[width]) {
            Real w[width];
#pragma unroll
            for (int j = 0; j < width; ++j) w[j] = power[y + j];
            sum.add(l, w);
        },
        [&](int y, Real l) { sum.add(l, power[y]); });
    sum = warp_sums(sum);
    if (lane_of() == 0) sums[place.row * split.segments + place.segment] = sum;
}

// One warp per row.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    loss_kernel(GeneralizedMaskedParams p, int segments, const Sums<RealOf<T>>* sums) {
    using Real = RealOf<T>;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kWarp;
    if (row >= p.rows) return;
    Real* loss = static_cast<Real*>(p.out) + row;
    if (!is_masked(p, row)) {
        if (lane_of() == 0) {
            *loss = is_bad(p, row) ? not_a_number<Real>() : Real(0);
            p.numbers[row] = {};
        }
        return;
    }
    Sums<double> all = Sums<double>::none();
    for (int s = lane_of(); s < segments; s += kWarp) {
        const Sums<Real> part = sums[row * segments + s];
        const double top = static_cast<double>(part.mass.top);
        if (top > all.mass.top) all.rescale(top);
        const double scale = Normaliser<double>::relative(top, all.mass.top);
        all.mass.total += scale * static_cast<double>(part.mass.total);
        all.dot += scale * static_cast<double>(part.dot);
    }
    all = warp_sums(all);
    if (lane_of() != 0) return;
    const int64_t v = p.x_0[row];
    const double logit = Vector<T>::read(static_cast<const T*>(p.logits) + row * p.dim + v);
    const GeneralizedMaskedRow numbers = generalized_masked_row(all.mass.top, all.mass.total, all.dot, logit);
    p.numbers[row] = numbers;
    *loss = static_cast<Real>(
        generalized_masked_value(numbers, static_cast<double>(static_cast<const Real*>(p.power)[v]), p.t[row]));
}

template <class Real>
__device__ __forceinline__ GeneralizedMaskedGradient gradient_of(const GeneralizedMaskedParams& p, int64_t row) {
    const double power_v = static_cast<double>(static_cast<const Real*>(p.power)[p.x_0[row]]);
    return generalized_masked_gradient(p.numbers[row], power_v, p.t[row],
                                       static_cast<double>(static_cast<const Real*>(p.grad_loss)[row]));
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) gradient_kernel(GeneralizedMaskedParams p, RowSplit split) {
    using Real = RealOf<T>;
    using V = Vector<T>;
    constexpr int width = V::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments) return;
    const int64_t offset = place.row * p.dim;
    const int dim = static_cast<int>(p.dim), mask = dim - 1;
    const T* row = static_cast<const T*>(p.logits) + offset;
    T* out = static_cast<T*>(p.out) + offset;
    if (!is_masked(p, place.row)) {
        const Real rest = is_bad(p, place.row) ? not_a_number<Real>() : Real(0);
        write_segment(out, dim, place.segment, [rest](int) { return rest; });
        return;
    }
    const Real* power = static_cast<const Real*>(p.power);
    const GeneralizedMaskedGradient g = gradient_of<Real>(p, place.row);
    const Real top = static_cast<Real>(p.numbers[place.row].top), factor = static_cast<Real>(g.factor),
               lift = static_cast<Real>(g.lift), at_v = static_cast<Real>(g.at_v);
    const int v = static_cast<int>(p.x_0[place.row]);
    const auto gradient = [&](int y, Real l) {
        if (y == mask) return Real(0);
        return y == v ? at_v : factor * exponential(l - top) * (power[y] + lift);
    };
    visit(
        row, dim, place.segment, -1,
        [&](int y, Real(&l)[width]) {
#pragma unroll
            for (int j = 0; j < width; ++j) l[j] = gradient(y + j, l[j]);
            write_vector(out + y, l);
        },
        [&](int y, Real l) { V::write(out + y, gradient(y, l)); });
}

// One thread per column.
template <class T>
__global__ void __launch_bounds__(kRowThreads) column_kernel(GeneralizedMaskedParams p) {
    using Real = RealOf<T>;
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (column >= p.dim) return;
    double sum = 0.0;
    if (column < p.dim - 1) {
        for (int64_t row = 0; row < p.rows; ++row) {
            if (is_bad(p, row)) sum = not_a_number<double>();
            if (!is_masked(p, row)) continue;
            const GeneralizedMaskedGradient g = gradient_of<Real>(p, row);
            const Real l = Vector<T>::read(static_cast<const T*>(p.logits) + row * p.dim + column);
            const Real top = static_cast<Real>(p.numbers[row].top);
            sum += column == p.x_0[row] ? g.power_at_v
                                        : static_cast<double>(static_cast<Real>(g.factor) * exponential(l - top));
        }
    }
    static_cast<double*>(p.out)[column] = sum;
}

// ---- launchers ----

template <class F>
const char* with_logits(const GeneralizedMaskedParams& p, const CudaLaunch& launch, F f) {
    if (p.rows == 0) return nullptr;
    if (const char* why = use_device(launch.device)) return why;
    return with_type(p.dtype, f);
}

}  // namespace

const char* generalized_masked_cuda(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    return with_logits(p, launch, [&](auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        const RowSplit split = split_rows(p.dim, p.dtype);
        const int64_t blocks = split_blocks(split, p.rows);
        if (const char* why = too_large(p.rows * kWarp, p.dim, blocks)) return why;
        auto* sums = static_cast<Sums<RealOf<T>>*>(launch.workspace);
        SEDD_LAUNCH((sums_kernel<T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split, sums);
        SEDD_LAUNCH((loss_kernel<T>), blocks_for(p.rows * kWarp, kRowThreads), kRowThreads, 0, stream_of(launch), p,
                    split.segments, sums);
        return launch_error();
    });
}

const char* generalized_masked_backward_cuda(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    return with_logits(p, launch, [&](auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        const RowSplit split = split_rows(p.dim, p.dtype);
        const int64_t blocks = split_blocks(split, p.rows);
        if (const char* why = too_large(p.rows, p.dim, blocks)) return why;
        SEDD_LAUNCH((gradient_kernel<T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split);
        return launch_error();
    });
}

const char* generalized_masked_power_cuda(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    if (const char* why = use_device(launch.device)) return why;
    return with_type(p.dtype, [&](auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        if (const char* why = too_large(p.rows, p.dim, p.dim)) return why;
        SEDD_LAUNCH((column_kernel<T>), blocks_for(p.dim, kRowThreads), kRowThreads, 0, stream_of(launch), p);
        return launch_error();
    });
}

int64_t generalized_masked_workspace(int64_t rows, int64_t dim, DType dtype) {
    return 3 * rows * num_segments(dim, dtype) * real_bytes(dtype);
}
int64_t generalized_masked_backward_workspace(int64_t, int64_t, DType) { return 0; }
int64_t generalized_masked_power_workspace(int64_t, int64_t, DType) { return 0; }

}  // namespace sedd

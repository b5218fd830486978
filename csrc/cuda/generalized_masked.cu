// Generalised masked diffusion. Forward: sums_kernel reads a masked row once and computes, for each segment, the
// largest logit and the sums of exp and of w exp relative to it. loss_kernel combines the segments of a row, computes
// the formula and writes the numbers that the backward kernels need. Backward: numbers_kernel computes the factors of a
// row; gradient_kernel reads an element, computes exp, two products and a sum, and writes the result, to the same
// memory if wanted. Power: columns_kernel has one column per thread and kColumnRows rows per block, of which it writes
// the sums; power_kernel adds those of a column, in the order of the rows.
//
// Bytes per element: the forward pass reads 4 (float32) or 2; the backward pass reads and writes 8 or 4; the gradient
// of w reads 4 or 2 once more, and a 64th of the elements as sums, twice. w is read from the L2 cache, 4 bytes per
// element.
//
// If the vocabulary is split over processes, a launch of the forward pass writes the sums of its slice of each row, and
// another one computes the loss from those of the whole row.
//
// Configuration: one warp per segment and eight warps per block, without shared memory or barriers (see segments.cuh).
// Rows that are not masked are not read. Their loss is 0; that of a bad row is NaN.
#include "generalized_masked.h"

#include "cuda/softmax.cuh"

namespace sedd {
namespace {

constexpr int kRowThreads = 128;     // per block, in the kernels with one thread or one warp per row
constexpr int kColumnThreads = 128;  // per block, in the kernels with one thread per column
constexpr int kColumnRows = 64;      // of a block of columns_kernel

__device__ __forceinline__ bool is_masked(const GeneralizedMaskedParams& p, int64_t row) {
    return p.x_t[row] == p.dim - 1;
}

template <class T>
__device__ __forceinline__ const T* row_logits(const GeneralizedMaskedParams& p, int64_t row) {
    return static_cast<const T*>(p.logits) + row * p.stride;
}

// w of the slice.
template <class Real>
__device__ __forceinline__ const Real* slice_power(const GeneralizedMaskedParams& p) {
    return static_cast<const Real*>(p.power) + p.first;
}

// The sums of entries that have been added: Σ e^{l_k} = total · e^top and Σ w_k e^{l_k} = dot · e^top.
template <class T>
struct WeightedSums {
    using Real = RealOf<T>;
    Real top, total, dot;

    static __device__ __forceinline__ WeightedSums none() { return {Normaliser<T>::none().top, Real(0), Real(0)}; }

    __device__ __forceinline__ void raise(Real higher) {
        const Real scale = Normaliser<T>::relative(top, higher);
        total *= scale;
        dot *= scale;
        top = higher;
    }

    template <int kWidth>
    __device__ __forceinline__ void add(const Real (&l)[kWidth], const Real* power) {
        Real higher = top, terms[kWidth], weighted[kWidth];
#pragma unroll
        for (int j = 0; j < kWidth; ++j) higher = l[j] > higher ? l[j] : higher;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) {
            terms[j] = Normaliser<T>::relative(l[j], higher);
            weighted[j] = terms[j] * power[j];
        }
        raise(higher);
        total += sum_of(terms);
        dot += sum_of(weighted);
    }

    __device__ __forceinline__ void add(Real l, Real power) {
        raise(l > top ? l : top);
        const Real term = Normaliser<T>::relative(l, top);
        total += term;
        dot += term * power;
    }

    __device__ __forceinline__ void add(const WeightedSums& other) {
        raise(other.top > top ? other.top : top);
        const Real scale = Normaliser<T>::relative(other.top, top);
        total += other.total * scale;
        dot += other.dot * scale;
    }
};

// The sums of all lanes, the same on every lane. Called by a whole warp.
template <class T, class Real = RealOf<T>>
__device__ __forceinline__ WeightedSums<T> warp_sums(WeightedSums<T> sums) {
    Real top = sums.top;
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const Real other = __shfl_xor_sync(kAll, top, offset);
        top = other > top ? other : top;
    }
    sums.raise(top);
    return {top, warp_sum(sums.total), warp_sum(sums.dot)};
}

// segments[row, segment] = the sums over the segment, without v and MASK.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    sums_kernel(GeneralizedMaskedParams p, RowSplit split, WeightedSums<T>* segments) {
    using Real = RealOf<T>;
    constexpr int width = Vector<T>::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments || !is_masked(p, place.row)) return;
    if (!valid_token(p.x_0[place.row], p.dim)) return;
    const Real* power = slice_power<Real>(p);
    WeightedSums<T> sums = WeightedSums<T>::none();
    visit(
        row_logits<T>(p, place.row), static_cast<int>(generalized_masked_tokens(p)), place.segment,
        static_cast<int>(p.x_0[place.row] - p.first), [&](int y, Real(&l)[width]) { sums.add(l, power + y); },
        [&](int y, Real l) { sums.add(l, power[y]); });
    sums = warp_sums(sums);
    if (lane_of() == 0) segments[place.row * split.segments + place.segment] = sums;
}

// Computes the numbers and the loss of a row from the sums of its segments: one warp per row. `count` is 0 in the stage
// that reads the sums of the row.
template <class T>
__global__ void __launch_bounds__(kRowThreads)
    loss_kernel(GeneralizedMaskedParams p, int count, const WeightedSums<T>* segments) {
    using Real = RealOf<T>;
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x) / kWarp;
    if (row >= p.rows) return;
    Real* loss = static_cast<Real*>(p.out) + row;
    const bool fault = generalized_masked_fault(p, row) != Fault::none;
    if (fault || !is_masked(p, row)) {
        if (lane_of() != 0) return;
        p.numbers[row] = {};
        *loss = fault ? not_a_number<Real>() : Real(0);
        return;
    }
    WeightedSums<double> sums = WeightedSums<double>::none();
    for (int s = lane_of(); s < count; s += kWarp) {
        const WeightedSums<T> segment = segments[row * count + s];
        sums.add(WeightedSums<double>{static_cast<double>(segment.top), static_cast<double>(segment.total),
                                      static_cast<double>(segment.dot)});
    }
    sums = warp_sums(sums);
    if (lane_of() != 0) return;
    GeneralizedMaskedSums all;
    if (p.stage == Stage::loss) {
        all = p.row_sums[row];
    } else {
        const int64_t v = p.x_0[row] - p.first;
        const bool has_v = v >= 0 && v < p.width;
        all = {sums.top, sums.total, sums.dot,
               has_v ? static_cast<double>(Vector<T>::read(row_logits<T>(p, row) + v)) : -INFINITY};
    }
    if (p.stage == Stage::logits) {
        p.row_sums[row] = all;
        return;
    }
    const GeneralizedMaskedRow numbers = generalized_masked_row(all);
    p.numbers[row] = numbers;
    const double power_v = static_cast<double>(static_cast<const Real*>(p.power)[p.x_0[row]]);
    *loss = static_cast<Real>(generalized_masked_value(numbers, power_v, p.t[row]));
}

// The factors of a row in the compute type, and the index of v in the slice, or kElsewhere. Rows that are not masked
// have v = kUnmasked; bad ones have no v, but NaN for all numbers.
template <class Real>
struct GradientNumbers {
    Real top, factor, lift, at_v, power_at_v;
    int v;
};
constexpr int kUnmasked = -1, kBad = -2, kElsewhere = 0x7fffffff;

template <class T>
__global__ void __launch_bounds__(kRowThreads)
    numbers_kernel(GeneralizedMaskedParams p, GradientNumbers<RealOf<T>>* numbers) {
    using Real = RealOf<T>;
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (row >= p.rows) return;
    if (generalized_masked_fault(p, row) != Fault::none) {
        const Real nan = not_a_number<Real>();
        numbers[row] = {nan, nan, nan, nan, nan, kBad};
        return;
    }
    if (!is_masked(p, row)) {
        numbers[row] = {Real(0), Real(0), Real(0), Real(0), Real(0), kUnmasked};
        return;
    }
    const int64_t v = p.x_0[row] - p.first;
    const double power_v = static_cast<double>(static_cast<const Real*>(p.power)[p.x_0[row]]);
    const GeneralizedMaskedGradient g = generalized_masked_gradient(
        p.numbers[row], power_v, p.t[row], static_cast<double>(static_cast<const Real*>(p.grad_loss)[row]));
    numbers[row] = {static_cast<Real>(p.numbers[row].top),
                    static_cast<Real>(g.factor),
                    static_cast<Real>(g.lift),
                    static_cast<Real>(g.at_v),
                    static_cast<Real>(g.power_at_v),
                    v >= 0 && v < p.width ? static_cast<int>(v) : kElsewhere};
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp)
    gradient_kernel(GeneralizedMaskedParams p, RowSplit split, const GradientNumbers<RealOf<T>>* numbers) {
    using Real = RealOf<T>;
    using V = Vector<T>;
    constexpr int width = V::kWidth;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments) return;
    const int count = static_cast<int>(generalized_masked_tokens(p)), all = static_cast<int>(p.width);
    T* out = static_cast<T*>(p.out) + place.row * p.stride;
    const GradientNumbers<Real> n = numbers[place.row];
    if (n.v < 0) {
        const Real rest = n.v == kUnmasked ? Real(0) : not_a_number<Real>();
        write_segment(out, all, place.segment, [rest](int) { return rest; });
        return;
    }
    const Real* power = slice_power<Real>(p);
    const auto gradient = [&](int y, Real l) { return n.factor * exponential_of<T>(l - n.top) * (power[y] + n.lift); };
    const auto special = [&](int y, Real g) { return y == n.v ? n.at_v : g; };
    // MASK's entry is not visited, so that any warp may write it
    if (count < all && place.segment == 0 && lane_of() == 0) V::write(out + count, Real(0));
    visit(
        row_logits<T>(p, place.row), count, place.segment, -1,
        [&](int y, Real(&l)[width]) {
#pragma unroll
            for (int j = 0; j < width; ++j) l[j] = gradient(y + j, l[j]);
            if (static_cast<unsigned>(n.v - y) < static_cast<unsigned>(width)) {
#pragma unroll
                for (int j = 0; j < width; ++j) l[j] = special(y + j, l[j]);
            }
            write_vector(out + y, l);
        },
        [&](int y, Real l) { V::write(out + y, special(y, gradient(y, l))); });
}

// sums[chunk, column] = the contributions of the chunk's rows to the column, added in their order. That of MASK, if the
// slice has it, is not used.
template <class T>
__global__ void __launch_bounds__(kColumnThreads)
    columns_kernel(GeneralizedMaskedParams p, unsigned pieces, const GradientNumbers<RealOf<T>>* numbers,
                   RealOf<T>* sums) {
    using Real = RealOf<T>;
    const int64_t chunk = blockIdx.x / pieces;
    const int64_t column = static_cast<int64_t>(blockIdx.x % pieces) * kColumnThreads + threadIdx.x;
    if (column >= p.width) return;
    const int64_t begin = chunk * kColumnRows, end = begin + kColumnRows < p.rows ? begin + kColumnRows : p.rows;
    Real sum = 0;
#pragma unroll 4
    for (int64_t row = begin; row < end; ++row) {
        const GradientNumbers<Real> n = numbers[row];
        if (n.v == kUnmasked) continue;
        if (n.v < 0 || n.v == column) {
            sum += n.power_at_v;
        } else {
            const Real l = Vector<T>::read(row_logits<T>(p, row) + column);
            sum += n.factor * exponential_of<T>(l - n.top);
        }
    }
    sums[chunk * p.width + column] = sum;
}

template <class Real>
__global__ void __launch_bounds__(kColumnThreads)
    power_kernel(GeneralizedMaskedParams p, int64_t chunks, const Real* sums) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x;
    if (column >= p.width) return;
    double sum = 0.0;
    if (column < generalized_masked_tokens(p)) {
        for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += static_cast<double>(sums[chunk * p.width + column]);
    }
    static_cast<double*>(p.out)[column] = sum;
}

// ---- launchers ----

int64_t column_chunks(int64_t rows) { return (rows + kColumnRows - 1) / kColumnRows; }

// Bytes of GradientNumbers for all rows, up to a boundary of 8 bytes.
int64_t number_bytes(int64_t rows, DType dtype) {
    const int64_t size = dtype == DType::float64 ? sizeof(GradientNumbers<double>) : sizeof(GradientNumbers<float>);
    return (rows * size + 7) / 8 * 8;
}

template <class T>
const char* launch_numbers(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    SEDD_LAUNCH((numbers_kernel<T>), blocks_for(p.rows, kRowThreads), kRowThreads, 0, stream_of(launch), p,
                static_cast<GradientNumbers<RealOf<T>>*>(launch.workspace));
    return nullptr;
}

template <class T>
const char* launch_forward(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    const RowSplit split = split_rows(p.width, p.dtype);
    const int64_t blocks = split_blocks(split, p.rows);
    if (const char* why = too_large(p.rows * kWarp, p.dim, blocks)) return why;
    auto* segments = static_cast<WeightedSums<T>*>(launch.workspace);
    if (p.stage != Stage::loss) {
        SEDD_LAUNCH((sums_kernel<T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split, segments);
    }
    SEDD_LAUNCH((loss_kernel<T>), blocks_for(p.rows * kWarp, kRowThreads), kRowThreads, 0, stream_of(launch), p,
                p.stage == Stage::loss ? 0 : split.segments, segments);
    return launch_error();
}

template <class T>
const char* launch_backward(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    const RowSplit split = split_rows(p.width, p.dtype);
    const int64_t blocks = split_blocks(split, p.rows);
    if (const char* why = too_large(p.rows, p.dim, blocks)) return why;
    launch_numbers<T>(p, launch);
    SEDD_LAUNCH((gradient_kernel<T>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split,
                static_cast<const GradientNumbers<RealOf<T>>*>(launch.workspace));
    return launch_error();
}

template <class T>
const char* launch_power(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    using Real = RealOf<T>;
    const int64_t chunks = column_chunks(p.rows);
    const unsigned pieces = blocks_for(p.width, kColumnThreads);
    if (const char* why = too_large(p.rows, p.dim, chunks * pieces)) return why;
    auto* sums = reinterpret_cast<Real*>(static_cast<char*>(launch.workspace) + number_bytes(p.rows, p.dtype));
    if (p.rows > 0) {
        launch_numbers<T>(p, launch);
        SEDD_LAUNCH((columns_kernel<T>), blocks_for(chunks * pieces, 1), kColumnThreads, 0, stream_of(launch), p,
                    pieces, static_cast<const GradientNumbers<Real>*>(launch.workspace), sums);
    }
    SEDD_LAUNCH((power_kernel<Real>), pieces, kColumnThreads, 0, stream_of(launch), p, chunks,
                static_cast<const Real*>(sums));
    return launch_error();
}

// Calls f(type) on the device of the launch.
template <class F>
const char* with_device(const GeneralizedMaskedParams& p, const CudaLaunch& launch, F f) {
    if (const char* why = use_device(launch.device)) return why;
    return with_type(p.dtype, f);
}

}  // namespace

const char* generalized_masked_cuda(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    if (p.rows == 0) return nullptr;
    return with_device(p, launch,
                       [&](auto* type) { return launch_forward<std::remove_pointer_t<decltype(type)>>(p, launch); });
}

const char* generalized_masked_backward_cuda(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    if (p.rows == 0) return nullptr;
    return with_device(p, launch,
                       [&](auto* type) { return launch_backward<std::remove_pointer_t<decltype(type)>>(p, launch); });
}

const char* generalized_masked_power_cuda(const GeneralizedMaskedParams& p, const CudaLaunch& launch) {
    if (p.width == 0) return nullptr;
    return with_device(p, launch,
                       [&](auto* type) { return launch_power<std::remove_pointer_t<decltype(type)>>(p, launch); });
}

int64_t generalized_masked_workspace(int64_t rows, int64_t width, DType dtype) {
    return 3 * rows * num_segments(width, dtype) * real_bytes(dtype);
}

int64_t generalized_masked_backward_workspace(int64_t rows, int64_t, DType dtype) { return number_bytes(rows, dtype); }

int64_t generalized_masked_power_workspace(int64_t rows, int64_t width, DType dtype) {
    return number_bytes(rows, dtype) + column_chunks(rows) * width * real_bytes(dtype);
}

}  // namespace sedd

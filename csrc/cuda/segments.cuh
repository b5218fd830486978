// A row of the vocabulary axis over warps.
//
// A row of N elements starts wherever N puts it (at 50,257 bfloat16 on a 2-byte boundary), and 16-byte accesses only
// work on 16-byte boundaries. So a row is cut into vectors at these boundaries, the first and the last being partial,
// and 128 vectors, 2 KiB, are a segment: the work of one warp, four vectors a lane, all four loads under way at once.
// Lane l has vectors l, l + 32, l + 64 and l + 96: each load of a warp is 512 contiguous bytes. Whole vectors take the
// fast path, the few elements of partial ones are read one by one.
//
// The cut depends on N and the address alone, never on the number of rows or of multiprocessors: 128 rows of 50,258
// float32 are 12,672 warps, 96 for each of an H100's 132 multiprocessors; a row of 27 is one warp, eight rows a block.
// A warp adds up by shuffles in a fixed order and writes one number a segment; a second kernel adds those up, again in
// a fixed order. No atomics, no barriers, the same bits from run to run.
#pragma once

#include <type_traits>

#include "common/rank_one.h"
#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace sedd {

constexpr int kWarp = 32;
constexpr int kWarpVectors = 4;  // a lane's vectors in flight
constexpr int kSegmentVectors = kWarp * kWarpVectors;
constexpr int kWarpBits = 3;
constexpr int kWarps = 1 << kWarpBits;  // a block's, where warps work alone
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kMaxDim = int64_t{1} << 30;  // places in a row are 32-bit numbers; rows are counted in 64 bits

static inline int64_t element_bytes(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Of the compute type.
static inline int64_t real_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Wherever the row starts: with up to one vector less one element before it.
static inline int64_t num_segments(int64_t dim, DType dtype) {
    const int64_t width = 16 / element_bytes(dtype);
    return ((width - 1 + dim + width - 1) / width + kSegmentVectors - 1) / kSegmentVectors;
}

// Segments over blocks of kWarps warps: several blocks a row, or several rows a block.
struct Tiling {
    int segments;  // of a row
    int pieces;    // blocks of a row
    int row_bits;  // 2^row_bits warps of a block work on one row; all of them where pieces > 1

    int block_rows() const { return kWarps >> row_bits; }
};

static inline Tiling tile(int64_t dim, DType dtype) {
    const int64_t segments = num_segments(dim, dtype);
    int bits = 0;
    while ((1 << bits) < kWarps && (1 << bits) < segments) ++bits;
    return {static_cast<int>(segments), static_cast<int>((segments + (1 << bits) - 1) >> bits), bits};
}

static inline int64_t tile_blocks(const Tiling& tiling, int64_t rows) {
    return (rows + tiling.block_rows() - 1) / tiling.block_rows() * tiling.pieces;
}

// null, or why so many rows of such a width cannot be launched.
static inline const char* too_large(int64_t rows, int64_t dim, int64_t blocks) {
    if (dim > kMaxDim) return "rows of more than 2^30 entries are beyond the CUDA kernels";
    return rows > 0x7fffffff || blocks > 0x7fffffff ? "more blocks than a CUDA grid can have" : nullptr;
}

// Calls f with a null pointer of the element type, which is how a type can be an argument.
template <class F>
const char* with_type(DType dtype, F f) {
    switch (dtype) {
        case DType::float32:
            return f(static_cast<float*>(nullptr));
        case DType::float64:
            return f(static_cast<double*>(nullptr));
        case DType::bfloat16:
            return f(static_cast<BFloat16*>(nullptr));
        default:
            return f(static_cast<Half*>(nullptr));
    }
}

// Calls f with an object whose type has the process as its value.
template <class F>
const char* with_family(Family family, F f) {
    switch (family) {
        case Family::absorbing:
            return f(std::integral_constant<Family, Family::absorbing>{});
        case Family::uniform:
            return f(std::integral_constant<Family, Family::uniform>{});
        default:
            return f(std::integral_constant<Family, Family::rank_one>{});
    }
}

// Calls f(process, type), as above, on the launch's device, unless there are no rows.
template <class Params, class F>
const char* on_device(const Params& p, const CudaLaunch& launch, F f) {
    if (p.rows == 0) return nullptr;
    if (const char* why = use_device(launch.device)) return why;
    return with_type(p.dtype,
                     [&](auto* type) { return with_family(p.family, [&](auto family) { return f(family, type); }); });
}

namespace {

struct Place {
    int64_t row;
    int segment;
};

// The calling warp's. One division: each takes as long as two elements of a lane.
__device__ __forceinline__ Place place_of(const Tiling& tiling) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, bits = tiling.row_bits;
    const unsigned block_row = blockIdx.x / static_cast<unsigned>(tiling.pieces);
    const int piece = static_cast<int>(blockIdx.x - block_row * static_cast<unsigned>(tiling.pieces));
    return {(static_cast<int64_t>(block_row) << (kWarpBits - bits)) + (warp >> bits),
            (piece << bits) + (warp & ((1 << bits) - 1))};
}

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % kWarp; }

// Can a row at x move at all, π_x > 0? For a valid x.
template <Family P, class Real>
__device__ __forceinline__ bool can_move(const Real* stationary, int64_t dim, int64_t x) {
    if constexpr (P == Family::absorbing) return x == dim - 1;
    if constexpr (P == Family::rank_one) return stationary[x] > Real(0);
    return true;
}

// Where the lane's first vector of a segment starts in the row; the next ones follow at kWarp vectors' distance.
template <class T>
__device__ __forceinline__ int first_entry(const T* row, int segment) {
    constexpr int width = Vector<T>::kWidth;
    const int head = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    return (segment * kSegmentVectors + lane_of()) * width - head;
}

// Calls whole(y, values) for each of the lane's vectors that lies in the row with entry `skip` outside, and one(y,
// value) for the other entries of the lane that lie in the row, but for `skip`.
template <class T, class Whole, class One>
__device__ __forceinline__ void visit(const T* row, int dim, int segment, int skip, Whole whole, One one) {
    using V = Vector<T>;
    constexpr int width = V::kWidth, stride = kWarp * width;
    const int first = first_entry(row, segment);
    const auto is_whole = [&](int y) {
        return y >= 0 && y + width <= dim && static_cast<unsigned>(skip - y) >= static_cast<unsigned>(width);
    };
    uint4 raw[kWarpVectors];
#pragma unroll
    for (int i = 0; i < kWarpVectors; ++i) {
        if (is_whole(first + i * stride)) raw[i] = *reinterpret_cast<const uint4*>(row + first + i * stride);
    }
    bool all = true;
#pragma unroll
    for (int i = 0; i < kWarpVectors; ++i) {
        if (is_whole(first + i * stride)) {
            typename V::Real values[width];
            V::unpack(raw[i], values);
            whole(first + i * stride, values);
        } else {
            all = false;
        }
    }
    if (all) return;
#pragma unroll 1
    for (int i = 0; i < kWarpVectors; ++i) {
        const int begin = first + i * stride;
        if (is_whole(begin)) continue;
#pragma unroll 1
        for (int y = begin < 0 ? 0 : begin; y < begin + width && y < dim; ++y) {
            if (y != skip) one(y, V::read(row + y));
        }
    }
}

// One store of 16 bytes: of an assignment to a uint4 nvcc makes four.
template <class T>
__device__ __forceinline__ void store(T* out, uint4 raw) {
    __stcs(reinterpret_cast<uint4*>(out), raw);
}

// Writes a lane's vector to out, where the boundaries allow it as one.
template <class T, class Real>
__device__ __forceinline__ void write_vector(T* out, const Real (&values)[Vector<T>::kWidth]) {
    if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
        store(out, Vector<T>::pack(values));
    } else {
#pragma unroll
        for (int j = 0; j < Vector<T>::kWidth; ++j) Vector<T>::write(out + j, values[j]);
    }
}

// Writes value(y) to all entries of a segment of a row that starts at out.
template <class T, class Value>
__device__ __forceinline__ void write_segment(T* out, int dim, int segment, Value value) {
    using V = Vector<T>;
    constexpr int width = V::kWidth;
#pragma unroll
    for (int i = 0; i < kWarpVectors; ++i) {
        const int begin = first_entry(out, segment) + i * kWarp * width;
        if (begin >= 0 && begin + width <= dim) {
            typename V::Real values[width];
#pragma unroll
            for (int j = 0; j < width; ++j) values[j] = value(begin + j);
            store(out + begin, V::pack(values));
        } else {
            for (int y = begin < 0 ? 0 : begin; y < begin + width && y < dim; ++y) V::write(out + y, value(y));
        }
    }
}

// Over the warp, the same number on every lane.
template <class Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
    return value;
}

// Sums of neighbours first, so that the additions of a vector do not wait for one another.
template <class Real, int kWidth>
__device__ __forceinline__ Real sum_of(const Real (&v)[kWidth]) {
    if constexpr (kWidth == 2) {
        return v[0] + v[1];
    } else if constexpr (kWidth == 4) {
        return (v[0] + v[1]) + (v[2] + v[3]);
    } else {
        return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
    }
}

// Σ s_y over a segment without y = skip: the same number on every lane.
template <class T, class Real = RealOf<T>>
__device__ __forceinline__ Real segment_scores(const T* row, int dim, int segment, int skip, Real shift) {
    Real sum = 0;
    visit(
        row, dim, segment, skip,
        [&](int, Real(&l)[Vector<T>::kWidth]) {
#pragma unroll
            for (Real& value : l) value = exponential(value - shift);
            sum += sum_of(l);
        },
        [&](int, Real l) { sum += exponential(l - shift); });
    return warp_sum(sum);
}

// Σ values over a row's segments, in float64, by the lanes of a warp: the same number on every lane.
template <class Real>
__device__ __forceinline__ double sum_segments(const Real* values, int segments) {
    double sum = 0.0;
    for (int s = lane_of(); s < segments; s += kWarp) sum += static_cast<double>(values[s]);
    return warp_sum(sum);
}

}  // namespace
}  // namespace sedd

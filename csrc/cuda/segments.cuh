// Divides rows of the vocabulary axis among warps.
//
// An access of 16 bytes must be aligned to 16 bytes, but a row of N elements may start at any element: rows of 50,257
// bfloat16 start on boundaries of 2 bytes. So a row is divided at 16-byte boundaries into vectors, of which the first
// and the last may be partial. A segment is 128 vectors, 2 KiB, and the work of one warp: four vectors per lane, with
// all four loads in flight at once. Lane l has vectors l, l + 32, l + 64 and l + 96, so that each load of a warp is 512
// contiguous bytes. Whole vectors take the fast path. The few elements of partial vectors are read one by one.
//
// The division depends only on N and the address, never on the number of rows or multiprocessors. 128 rows of 50,258
// float32 make 12,672 warps, 96 for each of the 132 multiprocessors of an H100. A row of 27 makes one warp, and a block
// has eight such rows. A warp adds up its segment with shuffles in a fixed order and writes one number. A second kernel
// adds up these numbers, also in a fixed order. There are no atomics and no barriers, and every run gives the same
// bits.
#pragma once

#include <type_traits>

#include "common/rank_one.h"
#include "cuda/launch.cuh"
#include "cuda/vectors.cuh"

namespace sedd {

constexpr int kWarp = 32;
constexpr int kWarpVectors = 4;  // per lane, all in flight
constexpr int kSegmentVectors = kWarp * kWarpVectors;
constexpr int kWarpBits = 3;
constexpr int kWarps = 1 << kWarpBits;  // per block, in kernels whose warps work independently
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kMaxDim = int64_t{1} << 30;  // an index in a row has 32 bits, the index of a row 64

static inline int64_t element_bytes(DType dtype) {
    return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// Bytes of an element of the compute type.
static inline int64_t real_bytes(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// The number of vectors of a row at any address. Up to one vector less one element may precede the row in its first
// vector.
static inline int64_t num_vectors(int64_t dim, DType dtype) {
    const int64_t width = 16 / element_bytes(dtype);
    return (width - 1 + dim + width - 1) / width;
}

static inline int64_t num_segments(int64_t dim, DType dtype) {
    return (num_vectors(dim, dtype) + kSegmentVectors - 1) / kSegmentVectors;
}

// The division of the segments of rows among blocks of kWarps warps: several blocks per row, or several rows per block.
struct RowSplit {
    int segments;  // of a row
    int pieces;    // blocks of a row
    int row_bits;  // 2^row_bits warps of a block work on one row; all of them if pieces > 1

    int block_rows() const { return kWarps >> row_bits; }
};

static inline RowSplit split_rows(int64_t dim, DType dtype) {
    const int64_t segments = num_segments(dim, dtype);
    int bits = 0;
    while ((1 << bits) < kWarps && (1 << bits) < segments) ++bits;
    return {static_cast<int>(segments), static_cast<int>((segments + (1 << bits) - 1) >> bits), bits};
}

static inline int64_t split_blocks(const RowSplit& split, int64_t rows) {
    return (rows + split.block_rows() - 1) / split.block_rows() * split.pieces;
}

// null, or the reason why so many rows of this width cannot be launched.
static inline const char* too_large(int64_t rows, int64_t dim, int64_t blocks) {
    if (dim > kMaxDim) return "rows of more than 2^30 entries are beyond the CUDA kernels";
    return rows > 0x7fffffff || blocks > 0x7fffffff ? "more blocks than a CUDA grid can have" : nullptr;
}

// Calls f with a null pointer to the element type, which passes the type as an argument.
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

// Calls f with an integral_constant of the family.
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

// Calls f(family, type), as above, on the device of the launch, unless there are no rows.
template <class Params, class F>
const char* on_device(const Params& p, const CudaLaunch& launch, F f) {
    if (p.rows == 0) return nullptr;
    if (const char* why = use_device(launch.device)) return why;
    return with_type(p.dtype,
                     [&](auto* type) { return with_family(p.family, [&](auto family) { return f(family, type); }); });
}

namespace {

// A segment of a row.
struct Place {
    int64_t row;
    int segment;
};

// The segment of the calling warp. Uses one division, because each takes as long as two elements of a lane.
__device__ __forceinline__ Place place_of(const RowSplit& split) {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, bits = split.row_bits;
    const unsigned block_row = blockIdx.x / static_cast<unsigned>(split.pieces);
    const int piece = static_cast<int>(blockIdx.x - block_row * static_cast<unsigned>(split.pieces));
    return {(static_cast<int64_t>(block_row) << (kWarpBits - bits)) + (warp >> bits),
            (piece << bits) + (warp & ((1 << bits) - 1))};
}

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x) % kWarp; }

// Whether a row at x can move: π_x > 0. Requires a valid x.
template <Family P, class Real>
__device__ __forceinline__ bool can_move(const Real* stationary, int64_t dim, int64_t x) {
    if constexpr (P == Family::absorbing) return x == dim - 1;
    if constexpr (P == Family::rank_one) return stationary[x] > Real(0);
    return true;
}

// The index in the row at which the lane's first vector of a segment starts; negative if the vector starts before the
// row. The next vectors of the lane follow at distances of kWarp vectors.
template <class T>
__device__ __forceinline__ int first_entry(const T* row, int segment) {
    constexpr int width = Vector<T>::kWidth;
    const int head = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    return (segment * kSegmentVectors + lane_of()) * width - head;
}

// Calls whole(y, values) for every vector of the lane that lies in the row and does not contain entry `skip`, and
// one(y, value) for the other entries of the lane in the row, except `skip`. kClear is for a call after a loop with
// such calls: without it, nvcc keeps the vectors of the loop, 16 registers, in case this call loads none.
template <bool kClear = false, class T, class Whole, class One>
__device__ __forceinline__ void visit(const T* row, int dim, int segment, int skip, Whole whole, One one) {
    using V = Vector<T>;
    constexpr int width = V::kWidth, stride = kWarp * width;
    const int first = first_entry(row, segment);
    const auto is_whole = [&](int y) {
        return y >= 0 && y + width <= dim && static_cast<unsigned>(skip - y) >= static_cast<unsigned>(width);
    };
    uint4 raw[kWarpVectors];
    if constexpr (kClear) {
#pragma unroll
        for (uint4& vector : raw) vector = make_uint4(0, 0, 0, 0);
    }
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

// One store of 16 bytes. For an assignment to a uint4, nvcc emits four stores.
template <class T>
__device__ __forceinline__ void store(T* out, uint4 raw) {
    __stcs(reinterpret_cast<uint4*>(out), raw);
}

// Writes a vector of the lane to out, with one store if out is aligned to 16 bytes.
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

// The sum over the warp; the same number on every lane.
template <class Real>
__device__ __forceinline__ Real warp_sum(Real value) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAll, value, offset);
    return value;
}

// Adds neighbours first, so that the additions of a vector do not wait for one another.
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

// Σ s_y over a segment, without y = skip; the same number on every lane.
template <class T, class Real = RealOf<T>>
__device__ __forceinline__ Real segment_scores(const T* row, int dim, int segment, int skip, const Shifted<T>& score) {
    Real sum = 0;
    visit(
        row, dim, segment, skip,
        [&](int, Real(&l)[Vector<T>::kWidth]) {
#pragma unroll
            for (Real& value : l) value = score(value);
            sum += sum_of(l);
        },
        [&](int, Real l) { sum += score(l); });
    return warp_sum(sum);
}

// Σ values over the segments of a row, in float64; the same number on every lane. Called by a whole warp.
template <class Real>
__device__ __forceinline__ double sum_segments(const Real* values, int segments) {
    double sum = 0.0;
    for (int s = lane_of(); s < segments; s += kWarp) sum += static_cast<double>(values[s]);
    return warp_sum(sum);
}

}  // namespace
}  // namespace sedd

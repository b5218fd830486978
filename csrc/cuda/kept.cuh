// Keeps a row in shared memory, for kernels whose blocks read it several times.
//
// A lane copies the vectors that the same lane later reads through `visit`, by cp.async: the copies of all segments of
// a warp are in flight at once and take no registers. The lane waits for its own copies, without a barrier, and for one
// segment at a time, so that the first pass begins before the last segment has arrived. The copy of a row starts at the
// same distance from a boundary of 16 bytes as the row, so that `visit` divides both alike.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/segments.cuh"

namespace sedd {

// Bytes of shared memory for a row at any address.
static inline int64_t kept_bytes(int64_t dim, DType dtype) { return 16 * num_vectors(dim, dtype); }

namespace {

// Groups of copies of a warp, at least. A row in 227 KiB has six segments for one of 20 warps; one with more segments
// first waits for several.
constexpr int kCopies = 6;

// Where the copy of a row starts.
template <class T>
__device__ __forceinline__ T* place_to_keep(unsigned char* memory, const T* row) {
    return reinterpret_cast<T*>(memory + reinterpret_cast<uintptr_t>(row) % 16);
}

// Begins to copy a segment. The partial vectors of a row are copied at once.
template <class T>
__device__ __forceinline__ void keep_segment(T* kept, const T* row, int dim, int segment) {
    constexpr int width = Vector<T>::kWidth, stride = kWarp * width;
    const int first = first_entry(row, segment);
    const auto copy = [&](int begin) { __pipeline_memcpy_async(kept + begin, row + begin, 16); };
    if (first >= 0 && first + (kWarpVectors - 1) * stride + width <= dim) {
#pragma unroll
        for (int i = 0; i < kWarpVectors; ++i) copy(first + i * stride);
        return;
    }
#pragma unroll
    for (int i = 0; i < kWarpVectors; ++i) {
        const int begin = first + i * stride;
        if (begin >= 0 && begin + width <= dim) {
            copy(begin);
        } else {
#pragma unroll 1
            for (int y = begin < 0 ? 0 : begin; y < begin + width && y < dim; ++y) kept[y] = row[y];
        }
    }
}

// Begins to copy the segments that a warp takes in turn: a group of copies each, and empty groups up to kCopies.
template <class T>
__device__ __forceinline__ void keep_segments(T* kept, const T* row, int dim, int first_segment, int segments,
                                              int row_warps) {
    int groups = 0;
    for (int s = first_segment; s < segments; s += row_warps) {
        keep_segment(kept, row, dim, s);
        __pipeline_commit();
        ++groups;
    }
    for (; groups < kCopies; ++groups) __pipeline_commit();
}

// Waits for the copy of the next segment. An empty group takes its place, so that the number of groups is a constant.
__device__ __forceinline__ void wait_for_segment() {
    __pipeline_wait_prior(kCopies - 1);
    __pipeline_commit();
}

}  // namespace
}  // namespace sedd

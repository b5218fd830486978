// Kernels that are wrong: each case fails with the emulation's report, once it has seen that the next launch works.
// test_cuda_on_cpu.py knows what the reports must say; it finds their lines by the comments "waits".
#include <cuda_pipeline.h>

#include "selftest.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void right_kernel(int* out) {
    __shfl_xor_sync(kAll, 1, 1);
    out[threadIdx.x] = __syncthreads_count(1);
}

[[noreturn]] void report(cudaError_t expected = cudaErrorLaunchFailure) {
    const cudaError_t error = cudaGetLastError();
    const std::string text = cudaGetErrorString(error);
    CHECK(error == expected);
    std::vector<int> out(256);
    RUN(right_kernel, 1, 256, 0, nullptr, out.data());
    for (const int value : out) CHECK(value == 256);
    throw std::runtime_error(text);
}

// Who exits comes before, between or after those who wait.
__global__ void exits_before_barrier(unsigned exits) {
    if (threadIdx.x == exits) return;
    __syncthreads();  // waits: exits_before_barrier
}
CASE(thread_0_exits_before_a_barrier) {
    SEDD_LAUNCH(exits_before_barrier, 1, 64, 0, nullptr, 0);
    report();
}
CASE(thread_40_exits_before_a_barrier) {
    SEDD_LAUNCH(exits_before_barrier, 1, 64, 0, nullptr, 40);
    report();
}
CASE(thread_63_exits_before_a_barrier) {
    SEDD_LAUNCH(exits_before_barrier, 1, 64, 0, nullptr, 63);
    report();
}

__global__ void two_barriers() {
    if (threadIdx.x < 32) {
        __syncthreads();  // waits: two_barriers
    } else {
        __syncthreads();  // waits: two_barriers
    }
}
CASE(two_barriers_meet) {
    SEDD_LAUNCH(two_barriers, 1, 64, 0, nullptr);
    report();
}

// clang-format off
__global__ void two_kinds(int* out) {
    *out = threadIdx.x < 7 ? __syncthreads_or(1) : __syncthreads_count(1);  // waits: two_kinds
}
// clang-format on
CASE(two_kinds_of_barriers_meet) {
    int out;
    SEDD_LAUNCH(two_kinds, 1, 32, 0, nullptr, &out);
    report();
}

__global__ void exited_lane(int* out, unsigned exits) {
    if (threadIdx.x == exits) return;
    if (threadIdx.x >= 32) *out = __shfl_sync(kAll, 1, 7);  // waits: exited_lane
}
CASE(lane_0_has_exited) {
    int out;
    SEDD_LAUNCH(exited_lane, dim3(2, 3), 64, 0, nullptr, &out, 32);
    report();
}
CASE(lane_3_has_exited) {
    int out;
    SEDD_LAUNCH(exited_lane, dim3(2, 3), 64, 0, nullptr, &out, 35);
    report();
}
CASE(lane_31_has_exited) {
    int out;
    SEDD_LAUNCH(exited_lane, dim3(2, 3), 64, 0, nullptr, &out, 63);
    report();
}

__global__ void lane_at_barrier(int* out) {
    if (threadIdx.x == 3) {
        __syncthreads();  // waits: lane_at_barrier
    } else {
        *out = __any_sync(kAll, 1);  // waits: lane_at_barrier
    }
}
CASE(a_lane_of_the_mask_is_at_a_barrier) {
    int out;
    SEDD_LAUNCH(lane_at_barrier, 1, 32, 0, nullptr, &out);
    report();
}

__global__ void foreign_mask() {
    __syncwarp(0x0000ffff);  // waits: foreign_mask
}
CASE(a_lane_is_not_in_its_mask) {
    SEDD_LAUNCH(foreign_mask, 1, 32, 0, nullptr);
    report();
}

__global__ void inactive_source(int* out) {
    if (threadIdx.x < 16) *out = __shfl_down_sync(0x0000ffff, 1, 16);  // waits: inactive_source
}
CASE(a_shuffle_reads_from_outside_of_its_mask) {
    int out;
    SEDD_LAUNCH(inactive_source, 1, 32, 0, nullptr, &out);
    report();
}

__global__ void short_warp() {
    __syncwarp();  // waits: short_warp
}
CASE(a_mask_names_lanes_that_the_block_lacks) {
    SEDD_LAUNCH(short_warp, 1, dim3(5, 8), 0, nullptr);
    report();
}

__global__ void two_collectives(int* out) {
    if (threadIdx.x < 16) {
        *out = __shfl_xor_sync(kAll, 1, 1);  // waits: two_collectives
    } else {
        *out = __all_sync(kAll, 1);  // waits: two_collectives
    }
}
CASE(two_collectives_meet) {
    int out;
    SEDD_LAUNCH(two_collectives, 1, 32, 0, nullptr, &out);
    report();
}

__global__ void two_masks(int* out) {
    const unsigned mask = threadIdx.x == 0 ? 0x00000003u : kAll;
    *out = static_cast<int>(__ballot_sync(mask, 1));  // waits: two_masks
}
CASE(two_masks_meet) {
    int out;
    SEDD_LAUNCH(two_masks, 1, 32, 0, nullptr, &out);
    report();
}

__global__ void circle() {
    const unsigned next = (threadIdx.x + 1) % 3;
    if (threadIdx.x < 3) __syncwarp(1u << threadIdx.x | 1u << next);  // waits: circle
}
CASE(a_circle_of_lanes_that_wait) {
    SEDD_LAUNCH(circle, 1, 32, 0, nullptr);
    report();
}

template <int kWidth>
__global__ void odd_width(int* out) {
    *out = __shfl_up_sync(kAll, 1, 1, kWidth);  // waits: odd_width
}
CASE(a_width_of_seven) {
    int out;
    SEDD_LAUNCH((odd_width<7>), 1, 32, 0, nullptr, &out);
    report();
}

__global__ void misaligned(const float* in, float* out) {
    out[threadIdx.x] = reinterpret_cast<const float4*>(in + threadIdx.x)->x;  // waits: misaligned
}
__global__ void misaligned_copy(const char* in) {
    SEDD_DYNAMIC_SHARED(char, shared);
    __pipeline_memcpy_async(shared, in, 16);  // waits: misaligned_copy
}
CASE(a_misaligned_copy) {
    alignas(16) char in[32] = {};
    SEDD_LAUNCH(misaligned_copy, 1, 32, 16, nullptr, in + 8);
    report(cudaErrorMisalignedAddress);
}

__global__ void copy_beyond(const char* in) {
    SEDD_DYNAMIC_SHARED(char, shared);
    __pipeline_memcpy_async(shared + 16, in, 16);  // waits: copy_beyond
}
CASE(a_copy_beyond_shared_memory) {
    alignas(16) char in[32] = {};
    SEDD_LAUNCH(copy_beyond, 1, 32, 16, nullptr, in);
    report();
}

CASE(a_misaligned_vector) {
    std::vector<float> in(64), out(32);
    SEDD_LAUNCH(misaligned, 1, 32, 0, nullptr, in.data(), out.data());
    report(cudaErrorMisalignedAddress);
}

}  // namespace

// For the sanitizers: what each must report, and beside it what it must not. test_cuda_on_cpu.py finds the lines by the
// comments "here".
#include "selftest.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- ThreadSanitizer ----

enum class Between { barrier, nothing, shuffle, warp, half_warps };

// Each thread reads what another one wrote: `by` apart, so from its own warp or from another.
template <Between kBetween>
__global__ void exchange(int* out, unsigned by) {
    SEDD_DYNAMIC_SHARED(int, values);
    const unsigned i = threadIdx.x;
    values[i] = static_cast<int>(i);  // here: exchange
    if (kBetween == Between::barrier) __syncthreads();
    if (kBetween == Between::shuffle) __shfl_xor_sync(kAll, 1, 1);
    if (kBetween == Between::warp) __syncwarp();
    if (kBetween == Between::half_warps) __syncwarp(i % 32 < 16 ? 0x0000ffffu : 0xffff0000u);
    out[i] = values[i ^ by];  // here: exchange
}

template <Between kBetween>
void check_exchange(unsigned by) {
    std::vector<int> out(64);
    RUN((exchange<kBetween>), 3, 64, 64 * sizeof(int), nullptr, out.data(), by);
}

CASE(race_with_nothing_between) { check_exchange<Between::nothing>(1); }
CASE(race_with_a_shuffle_between) { check_exchange<Between::shuffle>(1); }
CASE(race_across_warps) { check_exchange<Between::warp>(32); }
CASE(race_across_half_warps) { check_exchange<Between::half_warps>(16); }
CASE(order_by_a_barrier) { check_exchange<Between::barrier>(63); }
CASE(order_by_a_warp_barrier) { check_exchange<Between::warp>(31); }
CASE(order_by_half_a_warp_barrier) { check_exchange<Between::half_warps>(15); }

// A barrier is missing at a loop's end: some write the next values while others still read the last ones.
__global__ void loop(int* out) {
    __shared__ int value;
    for (int i = 0; i < 2; ++i) {
        if (threadIdx.x == 0) value = i;  // here: loop
        __syncthreads();
        out[threadIdx.x] += value;  // here: loop
    }
}
CASE(race_of_a_loop_with_itself) {
    std::vector<int> out(64);
    RUN(loop, 1, 64, 0, nullptr, out.data());
}

__global__ void add(int* sum, bool atomic) {
    if (atomic) {
        atomicAdd(sum, 1);
    } else {
        *sum += 1;  // here: add
    }
}
CASE(race_of_sums) {
    int sum = 0;
    RUN(add, 1, 64, 0, nullptr, &sum, false);
}
CASE(order_by_atomics) {
    int sum = 0;
    RUN(add, 1, 64, 0, nullptr, &sum, true);
}

// An atomic operation is no race itself, but orders nothing else.
__global__ void hand_on(int* values, int* out, int* count) {
    values[threadIdx.x] = 1;                                                          // here: hand_on
    if (atomicAdd(count, 1) > 0) out[threadIdx.x] = values[(threadIdx.x + 63) % 64];  // here: hand_on
}
CASE(race_of_values_beside_an_atomic) {
    std::vector<int> values(64), out(64);
    int count = 0;
    RUN(hand_on, 1, 64, 0, nullptr, values.data(), out.data(), &count);
}

// A launch that fails abandons its threads; what they did is no race with the next launch.
__global__ void fails(int* out) {
    *out = static_cast<int>(threadIdx.x);
    if (threadIdx.x == 0) __syncwarp(0);
}
CASE(order_after_a_failure) {
    int out = 0;
    for (int i = 0; i < 3; ++i) {
        SEDD_LAUNCH(fails, 1, 1, 0, nullptr, &out);
        CHECK(cudaGetLastError() == cudaErrorLaunchFailure);
        out = 7;
        check_exchange<Between::barrier>(63);
    }
}

// ---- AddressSanitizer, UndefinedBehaviorSanitizer ----

__global__ void overrun(int* global, int i, int what) {
    SEDD_DYNAMIC_SHARED(int, dynamic);
    __shared__ int fixed[32];
    int local[32] = {};
    int* const arrays[] = {global, dynamic, fixed, local};
    volatile int* array = arrays[what];
    array[threadIdx.x + static_cast<unsigned>(i)] += 1;  // here: overrun
}

void check_overrun(int i, int what) {
    std::vector<int> global(32);
    RUN(overrun, 1, 32, 32 * sizeof(int), nullptr, global.data(), i, what);
}

CASE(overrun_of_global_memory) { check_overrun(1, 0); }
CASE(overrun_of_dynamic_shared_memory) { check_overrun(1, 1); }
CASE(overrun_of_static_shared_memory) { check_overrun(1, 2); }
CASE(overrun_of_the_stack) { check_overrun(1, 3); }
CASE(within_bounds) {
    for (int what = 0; what < 4; ++what) check_overrun(0, what);
}

__global__ void load(const unsigned char* in, unsigned* out) {
    out[threadIdx.x] = reinterpret_cast<const uint4*>(in)[threadIdx.x].w;  // here: load
}
void check_load(size_t at) {
    alignas(16) unsigned char in[17 * 16] = {};
    unsigned out[16];
    RUN(load, 1, 16, 0, nullptr, in + at, out);
}
CASE(misaligned_load) { check_load(4); }
CASE(aligned_load) { check_load(16); }

}  // namespace

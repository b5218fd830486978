// What tells the schedules apart.
#include "selftest.h"

namespace {

__global__ void order_kernel(int* order, int* count) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    order[atomicAdd(count, 1)] = i;
    __shfl_xor_sync(0xffffffffu, i, 1);
    order[atomicAdd(count, 1)] = i;
    __syncthreads();
    order[atomicAdd(count, 1)] = i;
}

// A tree reduction; without the barrier, the second warp's sums may not be there when the first one reads them.
template <bool kBarrier>
__global__ void tree_kernel(const int* in, int* out) {
    SEDD_DYNAMIC_SHARED(int, sums);
    const unsigned i = threadIdx.x;
    int sum = in[i];
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, by);
    if (i % 32 == 0) sums[i / 32] = sum;
    __syncwarp();
    if (kBarrier) __syncthreads();
    if (i == 0) *out = sums[0] + sums[1];
}

}  // namespace

// Which thread came when, three times each: at first, after a shuffle, after a barrier.
extern "C" __attribute__((visibility("default"))) int order_of_threads(int blocks, int threads, int* order) {
    int count = 0;
    SEDD_LAUNCH(order_kernel, blocks, threads, 0, nullptr, order, &count);
    return cudaGetLastError() == cudaSuccess ? count : -1;
}

extern "C" __attribute__((visibility("default"))) int sum_of_a_tree(bool barrier) {
    std::vector<int> in(64, 1);
    int out = 0;
    if (barrier) SEDD_LAUNCH(tree_kernel<true>, 1, 64, 8, nullptr, in.data(), &out);
    if (!barrier) SEDD_LAUNCH(tree_kernel<false>, 1, 64, 8, nullptr, in.data(), &out);
    return cudaGetLastError() == cudaSuccess ? out : -1;
}

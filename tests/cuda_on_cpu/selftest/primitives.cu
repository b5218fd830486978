// Every primitive against its definition. All of it must pass under any schedule, and clean under any sanitizer.
#include "selftest.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>

#include <cuda_pipeline.h>

#include "cuda/draw.cuh"

namespace {

constexpr unsigned kAll = 0xffffffffu;
constexpr int kBlocks[] = {32, 64, 256, 1024};

// ---- Shuffles ----

template <class T>
__host__ __device__ T value_of(int thread) {
    if constexpr (std::is_floating_point_v<T>) return static_cast<T>(thread) * T(1.25) - T(100);
    return static_cast<T>(0x9E3779B97F4A7C15u * (static_cast<unsigned>(thread) + 1));
}

template <class T>
__global__ void shuffle_kernel(T* out, int by, int width) {
    const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    const T value = value_of<T>(i);
    out[i] = __shfl_sync(kAll, value, by, width);
    out[n + i] = __shfl_up_sync(kAll, value, static_cast<unsigned>(by), width);
    out[2 * n + i] = __shfl_down_sync(kAll, value, static_cast<unsigned>(by), width);
    out[3 * n + i] = __shfl_xor_sync(kAll, value, by, width);
}

template <class T>
void check_shuffles() {
    constexpr int n = 96;
    std::vector<T> out(4 * n);
    for (const int width : {1, 2, 4, 8, 16, 32}) {
        for (const int by : {0, 1, 2, 3, 5, 8, 15, 16, 21, 31}) {
            RUN(shuffle_kernel<T>, 1, n, 0, nullptr, out.data(), by, width);
            for (int i = 0; i < n; ++i) {
                const int begin = i / width * width, end = begin + width, mirrored = i / 32 * 32 + ((i % 32) ^ by);
                CHECK(out[i] == value_of<T>(begin + by % width));
                CHECK(out[n + i] == value_of<T>(i - by >= begin ? i - by : i));
                CHECK(out[2 * n + i] == value_of<T>(i + by < end ? i + by : i));
                CHECK(out[3 * n + i] == value_of<T>(mirrored < end ? mirrored : i));
            }
        }
    }
}

CASE(shuffles) {
    check_shuffles<int>();
    check_shuffles<unsigned>();
    check_shuffles<long long>();
    check_shuffles<unsigned long long>();
    check_shuffles<float>();
    check_shuffles<double>();
}

// Lanes with the same remainder work in a group of their own, each group at its own pace and with its own collectives.
__global__ void groups_kernel(int* out, int groups) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = lane % groups;
    unsigned mask = 0;
    for (int i = group; i < 32; i += groups) mask |= 1u << i;
    int sum = 0;
    for (int round = 0; round <= group; ++round) {
        for (int i = group; i < 32; i += groups) sum += __shfl_sync(mask, lane * 100 + round, i);
        if (group % 2 == 0) __syncwarp(mask);
        if (__ballot_sync(mask, lane >= 16) != (mask & 0xffff0000u)) sum = -1000000;
    }
    __syncwarp();
    out[threadIdx.x] = sum;
}

CASE(shuffles_in_groups) {
    for (const int groups : {1, 2, 3, 5, 8, 32}) {
        std::vector<int> out(64);
        RUN(groups_kernel, 1, 64, 0, nullptr, out.data(), groups);
        for (int i = 0; i < 64; ++i) {
            const int group = i % 32 % groups;
            int sum = 0;
            for (int round = 0; round <= group; ++round) {
                for (int lane = group; lane < 32; lane += groups) sum += lane * 100 + round;
            }
            CHECK(out[i] == sum);
        }
    }
}

// Lane 1 meets lane 0 and then lane 2, who has been waiting with another mask in the meantime.
__global__ void chain_kernel(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane == 0) out[0] = __shfl_sync(0x3, 10, 1);
    if (lane == 1) {
        out[1] = __shfl_sync(0x3, 11, 0);
        out[2] = __shfl_sync(0x6, 12, 2);
    }
    if (lane == 2) out[3] = __shfl_sync(0x6, 13, 1);
}

CASE(shuffles_in_a_chain) {
    std::vector<int> out(4);
    RUN(chain_kernel, 1, 32, 0, nullptr, out.data());
    CHECK(out == std::vector<int>{11, 10, 13, 12});
}

__global__ void leavers_kernel(int* out) {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane >= 20) return;
    int value = lane;
    for (int i = 0; i < 10; ++i) value = __shfl_xor_sync(0xfffff, value, 1) + 1;
    out[lane] = value;
}

CASE(shuffles_after_others_have_left) {
    std::vector<int> out(20);
    RUN(leavers_kernel, 1, 32, 0, nullptr, out.data());
    for (int i = 0; i < 20; ++i) CHECK(out[i] == i + 10);
}

// ---- Votes ----

__global__ void votes_kernel(unsigned* out, const unsigned* votes, unsigned mask) {
    const unsigned lane = threadIdx.x % 32, vote = votes[threadIdx.x / 32] >> lane & 1;
    if ((mask >> lane & 1) == 0) return;
    out[3 * threadIdx.x] = __ballot_sync(mask, vote != 0 ? -7 : 0);
    out[3 * threadIdx.x + 1] = __any_sync(mask, static_cast<int>(vote)) != 0;
    out[3 * threadIdx.x + 2] = __all_sync(mask, static_cast<int>(vote)) != 0;
}

CASE(votes) {
    const std::vector<unsigned> votes{0, kAll, 1, 0x80000000u, 0x0ff0f00fu, 0x7fffffffu, 0xfffffffeu, 0x00ffff00u};
    for (const unsigned mask : {kAll, 1u, 0x80000000u, 0x0000ffffu, 0x10204081u, 0x00ffff00u}) {
        std::vector<unsigned> out(3 * 256);
        RUN(votes_kernel, 1, 256, 0, nullptr, out.data(), votes.data(), mask);
        for (unsigned i = 0; i < 256; ++i) {
            if ((mask >> (i % 32) & 1) == 0) continue;
            const unsigned expected = votes[i / 32] & mask;
            CHECK(out[3 * i] == expected);
            CHECK(out[3 * i + 1] == (expected != 0));
            CHECK(out[3 * i + 2] == (expected == mask));
        }
    }
}

// ---- Barriers ----

// Passes values along through shared memory: right only if nobody is ever a step ahead or behind.
__global__ void ring_kernel(int* out, int steps) {
    SEDD_DYNAMIC_SHARED(int, ring);
    const unsigned i = threadIdx.x, n = blockDim.x;
    ring[i] = static_cast<int>(i);
    for (int step = 0; step < steps; ++step) {
        __syncthreads();
        const int value = ring[(i + 1) % n];
        __syncthreads();
        ring[i] = value + 1;
    }
    out[blockIdx.x * n + i] = ring[i];
}

CASE(barriers) {
    for (const unsigned n : {1u, 2u, 31u, 32u, 33u, 100u, 256u, 1000u, 1024u}) {
        std::vector<int> out(3 * n);
        RUN(ring_kernel, 3, n, n * sizeof(int), nullptr, out.data(), 5);
        for (unsigned i = 0; i < 3 * n; ++i) CHECK(out[i] == static_cast<int>((i % n + 5) % n) + 5);
    }
}

__global__ void block_votes_kernel(int* out, int bound) {
    const int i = static_cast<int>(threadIdx.x), n = static_cast<int>(blockDim.x);
    for (int round = 0; round < 2; ++round) {  // a barrier may not hand on what an earlier one counted
        const int bit = i < bound ? 4 : 0;
        out[i] = __syncthreads_count(bit);
        out[n + i] = __syncthreads_or(bit) != 0;
        out[2 * n + i] = __syncthreads_and(bit) != 0;
        __syncthreads();
    }
}

CASE(barriers_that_vote) {
    for (const int n : kBlocks) {
        for (const int bound : {0, 1, n / 2 + 3, n - 1, n}) {
            std::vector<int> out(3 * n);
            RUN(block_votes_kernel, 1, n, 0, nullptr, out.data(), bound);
            for (int i = 0; i < n; ++i) {
                CHECK(out[i] == bound);
                CHECK(out[n + i] == (bound > 0));
                CHECK(out[2 * n + i] == (bound == n));
            }
        }
    }
}

// The halves of each warp hand values on within themselves.
__global__ void warp_barrier_kernel(int* out) {
    SEDD_DYNAMIC_SHARED(int, values);
    const unsigned i = threadIdx.x, mask = i % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    values[i] = static_cast<int>(i);
    for (unsigned by = 1; by < 16; by *= 2) {
        __syncwarp(mask);
        const int other = values[i ^ by];
        __syncwarp(mask);
        values[i] += other;
    }
    out[i] = values[i];
}

CASE(warp_barriers) {
    std::vector<int> out(128);
    RUN(warp_barrier_kernel, 1, 128, 128 * sizeof(int), nullptr, out.data());
    for (int i = 0; i < 128; ++i) CHECK(out[i] == 16 * (i / 16 * 16) + 120);
}

// Sums of blocks as they are usually made: shuffles, one number a warp, shuffles again.
__global__ void block_sum_kernel(const double* in, double* out, int64_t n) {
    __shared__ double sums[32];
    double sum = 0.0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += in[blockIdx.x * n + i];
    for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(kAll, sum, static_cast<unsigned>(by));
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    sum = threadIdx.x < blockDim.x / 32 ? sums[threadIdx.x] : 0.0;
    for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(kAll, sum, by);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

CASE(block_sums) {
    constexpr int64_t n = 3000;
    std::vector<double> in(7 * n), out(7);
    for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<double>(i);
    for (const int block : kBlocks) {
        RUN(block_sum_kernel, 7, block, 0, nullptr, in.data(), out.data(), n);
        for (int64_t row = 0; row < 7; ++row) {
            CHECK(out[row] == static_cast<double>(n * (row * n) + n * (n - 1) / 2));
        }
    }
}

// ---- Shared memory ----

__global__ void undefined_kernel(unsigned char* out, size_t bytes) {
    SEDD_DYNAMIC_SHARED(unsigned char, dynamic);
    __shared__ unsigned fixed[64];
    if (threadIdx.x == 0) std::memcpy(out + blockIdx.x * (bytes + sizeof fixed), dynamic, bytes);
    if (threadIdx.x == 0) std::memcpy(out + blockIdx.x * (bytes + sizeof fixed) + bytes, fixed, sizeof fixed);
    __syncthreads();
    for (size_t i = threadIdx.x; i < bytes; i += blockDim.x) dynamic[i] = 0;
    fixed[threadIdx.x] = 0;
}

CASE(shared_memory_is_undefined_at_first) {
    for (const size_t bytes : {size_t{0}, size_t{1}, size_t{100}, size_t{48} << 10}) {
        std::vector<unsigned char> out(3 * (bytes + 64 * sizeof(unsigned)));
        RUN(undefined_kernel, 3, 64, bytes, nullptr, out.data(), bytes);
        for (const unsigned char byte : out) CHECK(byte == 0xFF);
    }
}

// ---- Atomics ----

template <class T>
__global__ void atomics_kernel(T* cells, T* old, int n) {
    const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    old[i] = atomicAdd(&cells[0], T(1));
    if constexpr (!std::is_same_v<T, double>) old[n + i] = atomicExch(&cells[1], static_cast<T>(i + 1));
    if constexpr (std::is_integral_v<T>) {
        atomicMax(&cells[2], static_cast<T>((i * 37) % n));
        atomicMin(&cells[3], static_cast<T>((i * 37) % n));
        T seen = 0, expected;
        do {
            expected = seen;
            seen = atomicCAS(&cells[4], expected, static_cast<T>(expected + 3));
        } while (seen != expected);
    }
}

template <class T>
void check_atomics() {
    constexpr int n = 4 * 96;
    std::vector<T> cells{0, 0, 0, n, 0}, old(2 * n);
    RUN(atomics_kernel<T>, 4, 96, 0, nullptr, cells.data(), old.data(), n);
    CHECK(cells[0] == T(n));
    old.push_back(cells[1]);  // what was exchanged comes out once, and so does the initial 0
    std::sort(old.begin(), old.begin() + n);
    std::sort(old.begin() + n, old.end());
    for (int i = 0; i < n; ++i) CHECK(old[i] == T(i));
    for (int i = 0; i < n; ++i) CHECK((std::is_same_v<T, double> || old[n + i] == T(i)));
    if (std::is_integral_v<T>) CHECK(cells[2] == T(n - 1) && cells[3] == T(0) && cells[4] == T(3 * n));
}

CASE(atomics) {
    check_atomics<int>();
    check_atomics<unsigned>();
    check_atomics<unsigned long long>();
    check_atomics<float>();
    check_atomics<double>();
}

__global__ void signed_extremes_kernel(int* cells) {
    atomicMax(&cells[0], -5);
    atomicMin(&cells[1], -5);
}

CASE(atomics_know_signs) {
    std::vector<int> cells{-9, 3};
    RUN(signed_extremes_kernel, 1, 1, 0, nullptr, cells.data());
    CHECK(cells[0] == -5 && cells[1] == -5);
}

// ---- Indices, arguments, stacks ----

__global__ void index_kernel(int* count, unsigned* lanes) {
    const uint64_t block = (uint64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const uint64_t thread = (uint64_t{threadIdx.z} * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const uint64_t i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
    atomicAdd(&count[i], 1);
    lanes[i] = __shfl_sync(kAll, static_cast<unsigned>(thread), 5);  // warps are cut from threads in this order
}

CASE(indices_in_three_dimensions) {
    const dim3 grid(3, 4, 5), block(8, 4, 6);
    constexpr unsigned threads = 8 * 4 * 6, n = 3 * 4 * 5 * threads;
    std::vector<int> count(n);
    std::vector<unsigned> lanes(n);
    RUN(index_kernel, grid, block, 0, nullptr, count.data(), lanes.data());
    for (unsigned i = 0; i < n; ++i) CHECK(count[i] == 1 && lanes[i] == i % threads / 32 * 32 + 5);
}

struct Arguments {
    int values[20];
    const int* pointer;
};

__global__ void arguments_kernel(Arguments arguments, int* out) {
    for (int& value : arguments.values) value += static_cast<int>(threadIdx.x);  // a copy of this thread's
    __syncthreads();
    out[threadIdx.x] = arguments.values[7] + *arguments.pointer;
}

CASE(arguments_are_each_threads_own) {
    const int base = 1000;
    Arguments arguments{};
    arguments.values[7] = 3;
    arguments.pointer = &base;
    std::vector<int> out(64);
    RUN(arguments_kernel, 1, 64, 0, nullptr, arguments, out.data());
    for (int i = 0; i < 64; ++i) CHECK(out[i] == 1003 + i);
    CHECK(arguments.values[7] == 3);
}

__device__ __attribute__((noinline)) int deep(int depth, int lane) {
    volatile int room[100];
    for (int i = 0; i < 100; ++i) room[i] = lane;
    const int below = depth > 0 ? deep(depth - 1, lane) : __shfl_xor_sync(kAll, lane, 1);
    return below + room[depth] - room[99];
}

__global__ void deep_kernel(int* out) { out[threadIdx.x] = deep(40, static_cast<int>(threadIdx.x)); }

CASE(waits_deep_in_the_stack) {
    std::vector<int> out(1024);
    RUN(deep_kernel, 1, 1024, 0, nullptr, out.data());
    for (int i = 0; i < 1024; ++i) CHECK(out[i] == (i ^ 1));
}

// ---- Asynchronous copies ----

// Three groups of a copy each, and what is seen of them after waiting for one and for all; then of the first one
// before, which is undefined on a GPU.
__global__ void copy_kernel(const uint4* in, unsigned* out) {
    SEDD_DYNAMIC_SHARED(uint4, shared);
    const unsigned i = threadIdx.x, n = blockDim.x;
    for (unsigned k = 0; k < 4; ++k) shared[k * n + i] = make_uint4(7, 7, 7, 7);
    for (unsigned k = 0; k < 3; ++k) {
        __pipeline_memcpy_async(shared + k * n + i, in + k * n + i, 16);
        __pipeline_commit();
    }
    __pipeline_memcpy_async(shared + 3 * n + i, in + i, 8);  // in no group: no wait is for it
    out[3 * n + i] = shared[i].x;
    __pipeline_wait_prior(2);
    out[i] = shared[i].y;
    out[4 * n + i] = shared[n + i].y;
    __pipeline_wait_prior(0);
    out[n + i] = shared[n + i].z;
    out[2 * n + i] = shared[2 * n + i].w;
    out[5 * n + i] = shared[3 * n + i].x;
}

CASE(copies_in_groups) {
    constexpr unsigned n = 64;
    std::vector<uint4> in(3 * n);
    for (unsigned i = 0; i < 3 * n; ++i) in[i] = make_uint4(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3);
    std::vector<unsigned> out(6 * n);
    for (int repeat = 0; repeat < 2; ++repeat) {  // nothing is left over from the blocks before
        RUN(copy_kernel, 2, n, 4 * n * sizeof(uint4), nullptr, in.data(), out.data());
        for (unsigned i = 0; i < n; ++i) {
            CHECK(out[i] == 4 * i + 1 && out[n + i] == 4 * (n + i) + 2 && out[2 * n + i] == 4 * (2 * n + i) + 3);
#if !defined(__CUDACC__)
            CHECK(out[3 * n + i] == kAll && out[4 * n + i] == kAll && out[5 * n + i] == kAll);
#endif
        }
    }
}

__global__ void many_copies_kernel(const int* in, int* out) {
    SEDD_DYNAMIC_SHARED(int, shared);
    for (int k = 0; k < 12; ++k) {
        __pipeline_memcpy_async(shared + k, in + k, 4);
        __pipeline_commit();
    }
    __pipeline_wait_prior(11);  // a GPU counts to eight
    for (int k = 0; k < 4; ++k) out[k] = shared[k];
}

CASE(no_more_than_eight_groups_are_left) {
    int in[12], out[4];
    for (int k = 0; k < 12; ++k) in[k] = k * k;
    RUN(many_copies_kernel, 1, 1, sizeof in, nullptr, in, out);
    CHECK(out[0] == 0 && out[1] == 1 && out[2] == 4 && out[3] == 9);
}

// ---- Numbers and vectors ----

// In a kernel, since some of these are functions of the device.
__global__ void numbers_kernel(bool* right) {
    right[0] = __popc(0) == 0 && __popc(kAll) == 32 && __popc(0x10204081u) == 5;
    right[1] = __ffs(0) == 0 && __ffs(1) == 1 && __ffs(static_cast<int>(0x80000000u)) == 32 && __ffs(0x50) == 5;
    right[2] = __clz(0) == 32 && __clz(1) == 31 && __clz(-1) == 0;
    right[3] = __umulhi(kAll, kAll) == 0xfffffffeu && __umulhi(0x10000u, 0x10000u) == 1 && __umulhi(5, 7) == 0;
    right[4] = __float_as_uint(-1.0f) == 0xbf800000u && __float_as_int(1.0f) == 0x3f800000;
    right[5] = __uint_as_float(0x40490fdbu) == 3.14159274f && __int_as_float(0x3f800000) == 1.0f;
    right[6] = min(-1, 1) == -1 && max(1u, 0x80000000u) == 0x80000000u && min(3ll, -3ll) == -3 && max(2.0, 3.0) == 3.0;
    right[7] = max(1.0f, __int_as_float(-1)) == 1.0f && min(__int_as_float(-1), 1.0f) == 1.0f;  // of NaN, the other
    right[8] = std::is_same_v<decltype(exp(1.0f)), float> && fabs(__expf(1.0f) - 2.7182818f) < 1e-6f;
    uint4 cell = make_uint4(1, 2, 3, 4);
    __stcs(&cell, make_uint4(5, 6, 7, 8));
    right[9] = cell.y == 6 && __ldcs(&cell).w == 8;
}

CASE(numbers) {
    bool right[10] = {};
    RUN(numbers_kernel, 1, 1, 0, nullptr, right);
    for (const bool is : right) CHECK(is);
}

__global__ void exp2_kernel(const float* x, float* result) { result[threadIdx.x] = sedd::exponential2(x[threadIdx.x]); }

CASE(powers_of_two) {
    constexpr int n = 1024;
    const float infinity = HUGE_VALF, tiny = 0x1p-126f;
    std::vector<float> x = {NAN,        infinity, -infinity, 0.0f,    -0.0f, 0x1p-140f,
                            -0x1p-140f, 128.0f,   3e38f,     -127.0f, -3e38f};
    const std::vector<float> special = {NAN, infinity, 0.0f, 1.0f, 1.0f, 1.0f, 1.0f, infinity, infinity, 0.0f, 0.0f};
    while (x.size() < n) x.push_back(-125.9f + 253.8f * static_cast<float>(x.size()) / n);
    std::vector<float> result(n);
    RUN(exp2_kernel, 1, n, 0, nullptr, x.data(), result.data());
    for (size_t i = 0; i < special.size(); ++i) {
        CHECK(std::isnan(special[i]) ? std::isnan(result[i]) : result[i] == special[i]);
    }
    double largest = 0.0;
    for (size_t i = special.size(); i < n; ++i) {
        const double exact = std::exp2(static_cast<double>(x[i]));
        CHECK(result[i] >= tiny && result[i] < infinity);
        largest = std::max(largest, std::fabs(result[i] - exact) / std::exp2(std::floor(x[i]) - 23.0));
    }
    CHECK(largest > 0.0 && largest <= 2.5);  // units in the last place
#if !defined(__CUDACC__)
    CHECK(largest > 1.5);  // the emulation errs as much as the hardware may
#endif
}

// The entry at a share of the weights of a segment; the values are the weights.
__global__ void pick_kernel(const float* row, int dim, int segment, int x, double share, int* entry) {
    const auto weight = [](int, float value) { return value; };
    const int picked = sedd::pick_entry(row, dim, segment, x, weight, share);
    if (threadIdx.x == 0) *entry = picked;
}

CASE(entries_of_a_segment) {
    constexpr int dim = 1000, segment = 1, x = 700;
    alignas(16) float row[dim + 1];
    for (int i = 0; i <= dim; ++i) row[i] = i % 3 == 0 || i > 982 ? 0.0f : static_cast<float>(1 + i % 7);
    for (const int head : {0, 1}) {
        // a segment is 512 floats from a boundary of 16 bytes; the last entries of the row weigh nothing
        const float* const from = row + head;
        const int first = 512 - head;
        double total = 0.0, sum = 0.0;
        for (int y = first; y < dim; ++y) total += y == x ? 0.0 : from[y];
        int entry = -7, last = -1;
        for (int y = first; y < dim; ++y) {
            if (y == x || from[y] == 0.0f) continue;
            RUN(pick_kernel, 1, 32, 0, nullptr, from, dim, segment, x, (sum + 0.5) / total, &entry);
            CHECK(entry == y);
            sum += from[y];
            last = y;
        }
        for (const double share : {1.0, 1.0 + 1e-15}) {  // rounding may lead behind the last entry
            RUN(pick_kernel, 1, 32, 0, nullptr, from, dim, segment, x, share, &entry);
            CHECK(entry == last);
        }
    }
    const std::vector<float> nothing(1024, 0.0f);
    int entry = -7;
    RUN(pick_kernel, 1, 32, 0, nullptr, nothing.data(), 1000, 0, x, 0.5, &entry);
    CHECK(entry == -1);
}

CASE(vectors) {
    CHECK(sizeof(float4) == 16 && alignof(float4) == 16 && alignof(uint4) == 16 && alignof(int4) == 16);
    CHECK(sizeof(double2) == 16 && alignof(double2) == 16 && alignof(float2) == 8 && alignof(uint2) == 8);
    CHECK(sizeof(uint3) == 12 && alignof(uint3) == 4 && sizeof(__half2) == 4 && alignof(__half2) == 4);
    const float4 f = make_float4(1, 2, 3, 4);
    const uint2 u = make_uint2(5, kAll);
    CHECK(f.x == 1 && f.y == 2 && f.z == 3 && f.w == 4 && u.x == 5 && u.y == kAll);
    const dim3 d(7);
    CHECK(d.x == 7 && d.y == 1 && d.z == 1);
}

// ---- The host's side ----

__global__ void nothing_kernel(int* count) { atomicAdd(count, 1); }

CASE(impossible_launches) {
    int count = 0;
    const auto fails = [&count](dim3 grid, dim3 block, size_t shared, cudaError_t error, const char* name) {
        SEDD_LAUNCH(nothing_kernel, grid, block, shared, nullptr, &count);
        CHECK(count == 0 && cudaPeekAtLastError() == error && cudaGetLastError() == error);
        CHECK(cudaGetLastError() == cudaSuccess && std::string(cudaGetErrorName(error)) == name);
        CHECK(std::string(cudaGetErrorString(error)).find("kernel nothing_kernel: ") == 0);
        RUN(nothing_kernel, 2, 3, 0, nullptr, &count);
        CHECK(count == 6);
        count = 0;
    };
    for (const dim3 block : {dim3(1025), dim3(32, 33), dim3(1, 1, 65), dim3(0), dim3(1u << 31, 2, 1)}) {
        fails(1, block, 0, cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration");
    }
    for (const dim3 grid : {dim3(0), dim3(1, 65536), dim3(1, 1, 65536), dim3(1u << 31), dim3(1, 0, 1)}) {
        fails(grid, 1, 0, cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration");
    }
    fails(1, 1, (48 << 10) + 1, cudaErrorInvalidValue, "cudaErrorInvalidValue");
    RUN(nothing_kernel, dim3(1, 65535), 1, 0, nullptr, &count);
    RUN(nothing_kernel, 1, 1, 48 << 10, nullptr, &count);
    RUN(nothing_kernel, 1, dim3(16, 1, 64), 0, nullptr, &count);
    CHECK(count == 65535 + 1 + 1024);
}

__global__ void large_kernel(int* out) {
    SEDD_DYNAMIC_SHARED(int, large);
    large[20000 + threadIdx.x] = static_cast<int>(threadIdx.x);
    out[threadIdx.x] = large[20000 + threadIdx.x];
}

CASE(more_shared_memory_on_demand) {
    std::vector<int> out(32);
    constexpr int bytes = (20000 + 32) * 4;
    SEDD_LAUNCH(large_kernel, 1, 32, bytes, nullptr, out.data());
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    int most = 0;
    CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess && most >= bytes);
    constexpr auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
    CHECK(cudaFuncSetAttribute(large_kernel, attribute, most + 1) == cudaErrorInvalidValue);
    CHECK(cudaGetLastError() == cudaErrorInvalidValue);
    CHECK(cudaFuncSetAttribute(large_kernel, attribute, bytes) == cudaSuccess);
    RUN(large_kernel, 1, 32, bytes, nullptr, out.data());
    CHECK(out[31] == 31);
    CHECK(cudaFuncSetAttribute(large_kernel, attribute, 0) == cudaSuccess);  // as it was, for the next schedule
}

CASE(the_runtime) {
    int device = 7, multiprocessors = 0;
    CHECK(cudaGetDevice(&device) == cudaSuccess && device == 0);
    CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);
    CHECK(cudaSetDevice(1) == cudaSuccess && (cuda_on_cpu_contexts() & 2) != 0);
    int out = 7;
    SEDD_LAUNCH(nothing_kernel, 1, 1, 0, nullptr, &out);
    CHECK(cudaGetDevice(&device) == cudaSuccess && device == 1 && cuda_on_cpu_launch_device() == 1);
    CHECK(cudaSetDevice(0) == cudaSuccess && cuda_on_cpu_launch_device() == 1);
    CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess);
    CHECK(multiprocessors > 0);
    unsigned char from[8], to[8] = {};
    CHECK(cudaMemsetAsync(from, 0xAB, sizeof from, nullptr) == cudaSuccess);
    CHECK(cudaMemcpyAsync(to, from, sizeof to, cudaMemcpyDeviceToDevice, nullptr) == cudaSuccess && to[7] == 0xAB);
    CHECK(std::string(cudaGetErrorName(cudaSuccess)) == "cudaSuccess");
    CHECK(std::string(cudaGetErrorString(cudaErrorInvalidDevice)) == "invalid device ordinal");
}

CASE(errors_belong_to_a_host_thread) {
    SEDD_LAUNCH(nothing_kernel, 0, 1, 0, nullptr, nullptr);
    cudaError_t others = cudaErrorInvalidDevice;
    std::thread([&others] { others = cudaGetLastError(); }).join();
    CHECK(others == cudaSuccess && cudaGetLastError() == cudaErrorInvalidConfiguration);
}

CASE(launches_of_several_host_threads) {
    std::vector<std::thread> threads;
    std::vector<int> right(4);
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([t, &count = right[t]] {
            const unsigned n = 100 + static_cast<unsigned>(t) * 50;
            std::vector<int> out(n);
            for (int repeat = 0; repeat < 20; ++repeat) {
                SEDD_LAUNCH(ring_kernel, 1, n, n * sizeof(int), nullptr, out.data(), 3);
                bool all = cudaGetLastError() == cudaSuccess;
                for (unsigned i = 0; i < n; ++i) all = all && out[i] == static_cast<int>((i + 3) % n) + 3;
                count += all;
            }
        });
    }
    for (auto& thread : threads) thread.join();
    for (const int count : right) CHECK(count == 20);
}

}  // namespace

// ---- For Python: conversions one by one and in pairs, which must agree ----

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

template <class Narrow, class Pair>
bool widen(const uint16_t* from, float* to, int64_t n, float (*one)(Narrow), float2 (*two)(Pair)) {
    for (int64_t i = 0; i < n; ++i) {
        to[i] = one(selftest::bits_of<Narrow>(from[i]));
        const float2 pair = two(selftest::bits_of<Pair>(uint32_t{from[i]} << 16 | from[n - 1 - i]));
        if (std::memcmp(&pair.y, &to[i], 4) != 0) return false;
        const float low = one(selftest::bits_of<Narrow>(from[n - 1 - i]));
        if (std::memcmp(&pair.x, &low, 4) != 0) return false;
    }
    return true;
}

template <class Narrow, class Pair>
bool narrow(const float* from, uint16_t* to, int64_t n, Narrow (*one)(float), Pair (*two)(float, float)) {
    for (int64_t i = 0; i < n; ++i) {
        to[i] = selftest::bits_of<uint16_t>(one(from[i]));
        const auto low = selftest::bits_of<uint16_t>(one(from[n - 1 - i]));
        const auto pair = selftest::bits_of<uint32_t>(two(from[n - 1 - i], from[i]));
        if (pair != (uint32_t{to[i]} << 16 | low)) return false;
    }
    return true;
}

}  // namespace

EXPORTED bool widen_half(const uint16_t* from, float* to, int64_t n) {
    return widen(from, to, n, __half2float, __half22float2);
}
EXPORTED bool widen_bfloat16(const uint16_t* from, float* to, int64_t n) {
    return widen(from, to, n, __bfloat162float, __bfloat1622float2);
}
EXPORTED bool narrow_half(const float* from, uint16_t* to, int64_t n) {
    return narrow(from, to, n, __float2half_rn, __floats2half2_rn);
}
EXPORTED bool narrow_bfloat16(const float* from, uint16_t* to, int64_t n) {
    return narrow(from, to, n, __float2bfloat16_rn, __floats2bfloat162_rn);
}

// CUDA on the CPU: what this project's kernels use of CUDA, for an ordinary C++17 compiler. A launch runs at once, each
// CUDA thread as a fiber that leaves the processor only where it waits for others, in an order that can be chosen
// (cuda_on_cpu_set_schedule). It fails, with a report as the error's text, where on a GPU the result would be undefined
// or the kernel hang: lanes missing from a warp's collective, barriers that not all threads reach, deadlocks,
// misaligned addresses. AddressSanitizer finds what lies outside of an array, ThreadSanitizer what no barrier
// separates.
//
// It is stricter than a GPU: a thread that has exited is missed at a barrier and in a mask, and so are the lanes that a
// block of fewer threads does not have; a barrier is one line of the source; for ThreadSanitizer only __syncthreads and
// __syncwarp order memory within a block, fences do not.
//
// It cannot show: memory that becomes visible late or in another order, as threads run on one processor in turn; races
// between blocks, which follow each other; a thread that waits for another in a loop, which here never ends; the
// rounding of the fast hardware functions (__expf is expf; SEDD_EXP2 errs as much as the hardware may, but not where);
// and speed.
#pragma once

#include <math.h>  // exp(float) and the like in the global namespace, as in CUDA

#include <type_traits>

#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __shared__ static __attribute__((abi_tag("cuda_shared")))  // in the symbol's name, by which shared.ld knows it

#define threadIdx cuda_on_cpu::thread_index
#define blockIdx cuda_on_cpu::block_index
#define blockDim cuda_on_cpu::block_size
#define gridDim cuda_on_cpu::grid_size
constexpr int warpSize = cuda_on_cpu::kWarpSize;

#define SEDD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    cuda_on_cpu::launch(#kernel, kernel, grid, block, shared_bytes, stream, ##__VA_ARGS__)
#define SEDD_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(cuda_on_cpu::Device::shared())

#define SEDD_EXP2(result, x) ((result) = cuda_on_cpu::ex2_approx_ftz(x))

#pragma GCC visibility push(hidden)
namespace cuda_on_cpu {

template <class To, class From>
To bits_of(From from) {
    To to{};
    std::memcpy(&to, &from, sizeof from < sizeof to ? sizeof from : sizeof to);
    return to;
}

CUDA_ON_CPU_INLINED inline unsigned vote(At at, unsigned mask, bool value, Site site) {
    return static_cast<unsigned>(Device::meet(at, mask, value, Device::lane(), site));
}

// A lane that would read from outside of its segment of `width` lanes gets its own value; __shfl_xor_sync may read from
// segments before it. Lanes and distances count modulo 32, as in PTX.
template <class T>
CUDA_ON_CPU_INLINED inline T shuffle(At at, unsigned mask, T value, unsigned by, int width, Site site) {
    static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        char what[256];
        std::snprintf(what, sizeof what, "%s over %d lanes, no power of two up to 32, %s:%d",
                      kNames[static_cast<int>(at)], width, site.file, site.line);
        Device::fail(cudaErrorLaunchFailure, what);
    }
    const unsigned lane = Device::lane(), size = static_cast<unsigned>(width), first = lane & ~(size - 1);
    unsigned source = lane;
    by %= 32;
    if (at == At::shfl) source = first + by % size;
    if (at == At::up && lane >= first + by) source = lane - by;
    if (at == At::down && lane + by < first + size) source = lane + by;
    if (at == At::xor_ && (lane ^ by) < first + size) source = lane ^ by;
    return bits_of<T>(Device::meet(at, mask, bits_of<uint64_t>(value), source, site));
}

// Replaces *address by next(*address), relaxed as CUDA's atomics are; returns what it was.
template <class T, class Next>
T update(T* address, Next next) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    T old, value;
    __atomic_load(address, &old, __ATOMIC_RELAXED);
    do {
        value = next(old);
    } while (!__atomic_compare_exchange(address, &old, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return old;
}

// PTX's ex2.approx.ftz.f32: subnormal arguments and results count as 0, 2^0 is 1, and all other results have an error
// of up to two units in the last place, here one that depends on the bits of x.
inline float ex2_approx_ftz(float x) {
    if (std::isnan(x)) return bits_of<float>(0x7FFFFFFFu);
    if (std::fabs(x) < 0x1p-126f) return 1.0f;
    if (x >= 128.0f) return HUGE_VALF;
    if (x < -126.0f) return 0.0f;
    const unsigned exact = bits_of<unsigned>(static_cast<float>(std::exp2(static_cast<double>(x))));
    const unsigned error = bits_of<unsigned>(x) * 2654435769u >> 30;
    const unsigned result = exact + error - (error < 2 ? 2 : 1);  // -2, -1, +1 or +2 units
    return result < 0x00800000u ? 0.0f : bits_of<float>(result > 0x7F800000u ? 0x7F800000u : result);
}

// T, but never deduced: arguments are converted to it.
template <class T>
using Given = std::common_type_t<T>;

}  // namespace cuda_on_cpu
#pragma GCC visibility pop

// ---- Barriers, votes, shuffles ----

#define CUDA_ON_CPU_SITE cuda_on_cpu::Site site = cuda_on_cpu::Site::here()

CUDA_ON_CPU_INLINED inline void __syncthreads(CUDA_ON_CPU_SITE) {
    cuda_on_cpu::Device::meet_block(cuda_on_cpu::At::block, false, site);
}
CUDA_ON_CPU_INLINED inline int __syncthreads_or(int predicate, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::Device::meet_block(cuda_on_cpu::At::block_or, predicate != 0, site) != 0;
}
CUDA_ON_CPU_INLINED inline int __syncthreads_and(int predicate, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::Device::meet_block(cuda_on_cpu::At::block_and, predicate == 0, site) == 0;
}
CUDA_ON_CPU_INLINED inline int __syncthreads_count(int predicate, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::Device::meet_block(cuda_on_cpu::At::block_count, predicate != 0, site);
}
CUDA_ON_CPU_INLINED inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_SITE) {
    cuda_on_cpu::vote(cuda_on_cpu::At::warp, mask, false, site);
}
CUDA_ON_CPU_INLINED inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::vote(cuda_on_cpu::At::ballot, mask, predicate != 0, site);
}
CUDA_ON_CPU_INLINED inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::vote(cuda_on_cpu::At::any, mask, predicate != 0, site) != 0;
}
CUDA_ON_CPU_INLINED inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::vote(cuda_on_cpu::At::all, mask, predicate == 0, site) == 0;
}
template <class T>
CUDA_ON_CPU_INLINED inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::At::shfl, mask, value, static_cast<unsigned>(lane), width, site);
}
template <class T>
CUDA_ON_CPU_INLINED inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::At::up, mask, value, by, width, site);
}
template <class T>
CUDA_ON_CPU_INLINED inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::At::down, mask, value, by, width, site);
}
template <class T>
CUDA_ON_CPU_INLINED inline T __shfl_xor_sync(unsigned mask, T value, int by, int width = 32, CUDA_ON_CPU_SITE) {
    return cuda_on_cpu::shuffle(cuda_on_cpu::At::xor_, mask, value, static_cast<unsigned>(by), width, site);
}
#undef CUDA_ON_CPU_SITE

// ---- Memory ----

template <class T>
T atomicAdd(T* address, cuda_on_cpu::Given<T> value) {
    return cuda_on_cpu::update(address, [value](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMin(T* address, cuda_on_cpu::Given<T> value) {
    static_assert(std::is_integral_v<T>);
    return cuda_on_cpu::update(address, [value](T old) { return value < old ? value : old; });
}
template <class T>
T atomicMax(T* address, cuda_on_cpu::Given<T> value) {
    static_assert(std::is_integral_v<T>);
    return cuda_on_cpu::update(address, [value](T old) { return old < value ? value : old; });
}
template <class T>
T atomicExch(T* address, cuda_on_cpu::Given<T> value) {
    static_assert(!std::is_same_v<T, double>, "CUDA has none");
    return cuda_on_cpu::update(address, [value](T) { return value; });
}
template <class T>
T atomicCAS(T* address, cuda_on_cpu::Given<T> expected, cuda_on_cpu::Given<T> value) {
    static_assert(std::is_integral_v<T>);
    __atomic_compare_exchange(address, &expected, &value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }

template <class T>
T __ldg(const T* address) {
    return *address;
}
template <class T>
T __ldcs(const T* address) {
    return *address;
}
template <class T>
void __stcs(T* address, cuda_on_cpu::Given<T> value) {
    *address = value;
}

// ---- Numbers ----

inline int __float_as_int(float x) { return cuda_on_cpu::bits_of<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits_of<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_cpu::bits_of<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits_of<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
inline float __expf(float x) { return expf(x); }

#define CUDA_ON_CPU_MIN_MAX(T, least, greatest) \
    inline T min(T x, T y) { return least; }    \
    inline T max(T x, T y) { return greatest; }
CUDA_ON_CPU_MIN_MAX(int, y < x ? y : x, x < y ? y : x)
CUDA_ON_CPU_MIN_MAX(unsigned, y < x ? y : x, x < y ? y : x)
CUDA_ON_CPU_MIN_MAX(long, y < x ? y : x, x < y ? y : x)
CUDA_ON_CPU_MIN_MAX(long long, y < x ? y : x, x < y ? y : x)
CUDA_ON_CPU_MIN_MAX(float, fminf(x, y), fmaxf(x, y))
CUDA_ON_CPU_MIN_MAX(double, fmin(x, y), fmax(x, y))
#undef CUDA_ON_CPU_MIN_MAX

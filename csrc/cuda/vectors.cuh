// Converts between elements in memory, in vectors of 16 bytes, and the compute type: float64 for float64, float32 for
// all other types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>

#include "common/types.h"

namespace sedd {
namespace {

template <class To, class From>
__device__ __forceinline__ To bit_cast(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(static_cast<void*>(&to), static_cast<const void*>(&from), sizeof(to));
    return to;
}

// Vector<T>: kWidth elements in a uint4. read and write access one element.
template <class T>
struct Vector;

template <>
struct Vector<float> {
    using Real = float;
    static constexpr int kWidth = 4;
    static __device__ __forceinline__ void unpack(uint4 raw, float (&v)[kWidth]) {
        v[0] = bit_cast<float>(raw.x);
        v[1] = bit_cast<float>(raw.y);
        v[2] = bit_cast<float>(raw.z);
        v[3] = bit_cast<float>(raw.w);
    }
    static __device__ __forceinline__ uint4 pack(const float (&v)[kWidth]) {
        return make_uint4(bit_cast<uint32_t>(v[0]), bit_cast<uint32_t>(v[1]), bit_cast<uint32_t>(v[2]),
                          bit_cast<uint32_t>(v[3]));
    }
    static __device__ __forceinline__ float read(const float* p) { return *p; }
    static __device__ __forceinline__ void write(float* p, float v) { *p = v; }
};

template <>
struct Vector<double> {
    using Real = double;
    static constexpr int kWidth = 2;
    static __device__ __forceinline__ void unpack(uint4 raw, double (&v)[kWidth]) {
        v[0] = bit_cast<double>(make_uint2(raw.x, raw.y));
        v[1] = bit_cast<double>(make_uint2(raw.z, raw.w));
    }
    static __device__ __forceinline__ uint4 pack(const double (&v)[kWidth]) {
        const uint2 low = bit_cast<uint2>(v[0]), high = bit_cast<uint2>(v[1]);
        return make_uint4(low.x, low.y, high.x, high.y);
    }
    static __device__ __forceinline__ double read(const double* p) { return *p; }
    static __device__ __forceinline__ void write(double* p, double v) { *p = v; }
};

template <>
struct Vector<BFloat16> {
    using Real = float;
    static constexpr int kWidth = 8;
    // bfloat16 is the upper half of a float32.
    static __device__ __forceinline__ void unpack(uint4 raw, float (&v)[kWidth]) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            v[2 * i] = bit_cast<float>(words[i] << 16);
            v[2 * i + 1] = bit_cast<float>(words[i] & 0xffff0000u);
        }
    }
    static __device__ __forceinline__ uint32_t pair(float low, float high) {
        return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
    }
    static __device__ __forceinline__ uint4 pack(const float (&v)[kWidth]) {
        return make_uint4(pair(v[0], v[1]), pair(v[2], v[3]), pair(v[4], v[5]), pair(v[6], v[7]));
    }
    static __device__ __forceinline__ float read(const BFloat16* p) {
        return bit_cast<float>(static_cast<uint32_t>(p->bits) << 16);
    }
    static __device__ __forceinline__ void write(BFloat16* p, float v) {
        p->bits = bit_cast<uint16_t>(__float2bfloat16_rn(v));
    }
};

template <>
struct Vector<Half> {
    using Real = float;
    static constexpr int kWidth = 8;
    static __device__ __forceinline__ void unpack(uint4 raw, float (&v)[kWidth]) {
        const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __half22float2(bit_cast<__half2>(words[i]));
            v[2 * i] = pair.x;
            v[2 * i + 1] = pair.y;
        }
    }
    static __device__ __forceinline__ uint32_t pair(float low, float high) {
        return bit_cast<uint32_t>(__floats2half2_rn(low, high));
    }
    static __device__ __forceinline__ uint4 pack(const float (&v)[kWidth]) {
        return make_uint4(pair(v[0], v[1]), pair(v[2], v[3]), pair(v[4], v[5]), pair(v[6], v[7]));
    }
    static __device__ __forceinline__ float read(const Half* p) { return __half2float(bit_cast<__half>(p->bits)); }
    static __device__ __forceinline__ void write(Half* p, float v) { p->bits = bit_cast<uint16_t>(__float2half_rn(v)); }
};

template <class T>
using RealOf = typename Vector<T>::Real;

// 2^x by MUFU.EX2 alone, to two units in the last place. Results below 2^-126 are 0. The emulation in tests/cuda_on_cpu
// defines it itself.
#if !defined(SEDD_EXP2)
#define SEDD_EXP2(result, x) asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x))
#endif
__device__ __forceinline__ float exponential2(float x) {
    float result;
    SEDD_EXP2(result, x);
    return result;
}

constexpr float kLog2e = 0x1.715476p0f;

// expf takes eight instructions with one MUFU and is accurate to one unit in the last place for any argument.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
// Not inlined, because several inlined copies need more registers than a thread can have.
[[maybe_unused]] __device__ __attribute__((noinline)) double exponential(double x) { return exp(x); }

// exp(x · by) for values of type T. For 16-bit types it is 2^(x · by log2 e), two instructions. Its relative error is
// that of the exponent: |x| · 7.3e-8 of the product's rounding (6.0e-8) and of kLog2e (1.3e-8), and 2.4e-7 of MUFU.EX2.
// It is largest at the ends of float32, 7e-6 for |x| = 88, where neighbours of x in float16 are 6e-2 apart and those in
// bfloat16 0.5, and so differ by factors of 1.06 and 1.6. Results below 1.2e-38 are 0 (expf: below 1e-45).
template <class T>
__device__ __forceinline__ RealOf<T> exponential_of(RealOf<T> x, RealOf<T> by = RealOf<T>(1)) {
    if constexpr (sizeof(T) == 2) return exponential2(x * (by * kLog2e));
    if constexpr (sizeof(T) != 2) return exponential(x * by);
}

// exp(l - shift) for values of type T. For 16-bit types the difference and the product are one FMA, so that there are
// two instructions, with errors as above for x = l and x = shift instead of their difference: that of the shift is as
// if the shift were rounded to float32 once more. Not for a shift like the largest logit of a row, which has any size.
template <class T>
struct Shifted {
    using Real = RealOf<T>;
    Real shift;  // for 16-bit types, -shift log2 e

    __device__ __forceinline__ explicit Shifted(Real value) : shift(sizeof(T) == 2 ? -value * Real(kLog2e) : value) {}
    __device__ __forceinline__ Real operator()(Real l) const {
        if constexpr (sizeof(T) == 2) return exponential2(fmaf(l, kLog2e, shift));
        if constexpr (sizeof(T) != 2) return exponential(l - shift);
    }
};

template <class Real>
__device__ __forceinline__ Real not_a_number() {
    return static_cast<Real>(bit_cast<float>(0x7fc00000u));
}

}  // namespace
}  // namespace sedd

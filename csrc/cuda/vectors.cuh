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

// expf takes eight instructions with one MUFU and is accurate to one unit in the last place for any argument. __expf
// computes ex2.approx of a rounded product, which loses a digit at log-scores of 10.
__device__ __forceinline__ float exponential(float x) { return expf(x); }
// Not inlined, because several inlined copies need more registers than a thread can have.
[[maybe_unused]] __device__ __attribute__((noinline)) double exponential(double x) { return exp(x); }

template <class Real>
__device__ __forceinline__ Real not_a_number() {
    return static_cast<Real>(bit_cast<float>(0x7fc00000u));
}

}  // namespace
}  // namespace sedd

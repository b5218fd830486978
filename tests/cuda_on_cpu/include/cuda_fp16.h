// IEEE half precision: storage and conversions, all rounding to the nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __half {
    unsigned short bits;
};
struct alignas(4) __half2 {
    __half x, y;
};
using half = __half;
using half2 = __half2;

inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half h) {
    const unsigned sign = (h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7FFFu;
    // The magnitude moved into float32's place is the number by 2^-112, subnormals included.
    if (magnitude < 0x7C00u)
        return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude << 13) * 0x1p112f));
    return __uint_as_float(sign | 0x7F800000u | magnitude << 13);
}

inline __half __float2half_rn(float x) {
    const unsigned word = __float_as_uint(x), sign = word >> 16 & 0x8000u, magnitude = word & 0x7FFFFFFFu;
    unsigned result;
    if (magnitude > 0x7F800000u) {
        result = 0x7FFFu;  // the one NaN that the hardware makes
        return {static_cast<unsigned short>(result)};
    }
    if (magnitude >= 0x47800000u) {  // 2^16 and more; what lies between 65504 and it rounds right below
        result = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 leaves multiples of 2^-24 in the low bits
        result = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - __float_as_uint(0.5f);
    } else {
        result = (magnitude - (112u << 23) + 0xFFFu + (magnitude >> 13 & 1)) >> 13;
    }
    return {static_cast<unsigned short>(sign | result)};
}

inline __half __float2half(float x) { return __float2half_rn(x); }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }

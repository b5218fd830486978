// bfloat16: storage and conversions, all rounding to the nearest, ties to even.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 b) { return b.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }

inline float __bfloat162float(__nv_bfloat16 b) { return __uint_as_float(static_cast<unsigned>(b.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned word = __float_as_uint(x);
    if ((word & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};  // the one NaN that the hardware makes
    return {static_cast<unsigned short>((word + 0x7FFFu + (word >> 16 & 1)) >> 16)};
}

inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 b) { return {__bfloat162float(b.x), __bfloat162float(b.y)}; }

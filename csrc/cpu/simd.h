// Vectors for the kernels in csrc/cpu. Compiled once per instruction set, each time into a namespace of its own.
//
// Arithmetic uses the vector extension of GCC and Clang, which x86 and ARM share. Intrinsics appear only behind the
// guards below. This file, and every file that is compiled per instruction set, must not use templates or inline
// functions of the standard library that the compiler might leave as calls. The linker keeps one copy of such a
// function, and if this is the AVX-512 copy, it also runs on machines without AVX-512.
#pragma once

#include <math.h>
#include <string.h>

#include "common/types.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#if !defined(SEDD_ISA)
#error "compile with -DSEDD_ISA=<namespace>"
#endif

namespace sedd::SEDD_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float VecF __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecU __attribute__((vector_size(4 * kWidth)));
typedef uint16_t VecH __attribute__((vector_size(2 * kWidth)));

// Vectors that a loop processes together. One exp is a chain of about fifteen dependent operations, whose latency is
// hidden only if the operations of several vectors are interleaved. The compiler keeps the order of the source, so the
// source interleaves them.
constexpr int kUnroll = 4;

#if defined(__clang__)
#define SEDD_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SEDD_UNROLL _Pragma("GCC unroll 8")
#endif

// Lanes<Real>: the vector of a compute type. float64 is for checks, not for speed, and has one lane.
template <class Real>
struct Lanes;
template <>
struct Lanes<float> {
    using Vec = VecF;
    static constexpr int width = kWidth;
};
template <>
struct Lanes<double> {
    using Vec = double;
    static constexpr int width = 1;
};

// Compute<T>: the type of the arithmetic with elements of type T.
template <class T>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// A type and a family as function arguments.
template <class T>
struct Element {
    using Type = T;
};
template <Family P>
struct FamilyTag {
    static constexpr Family value = P;
};

// Calls f(Element<T>, FamilyTag<P>) for the element type T of dtype and the family P.
template <class F>
auto dispatch(DType dtype, Family family, F f) {
    const auto with_family = [&](auto element) {
        switch (family) {
            case Family::absorbing:
                return f(element, FamilyTag<Family::absorbing>{});
            case Family::uniform:
                return f(element, FamilyTag<Family::uniform>{});
            default:
                return f(element, FamilyTag<Family::rank_one>{});
        }
    };
    switch (dtype) {
        case DType::float32:
            return with_family(Element<float>{});
        case DType::float64:
            return with_family(Element<double>{});
        case DType::bfloat16:
            return with_family(Element<BFloat16>{});
        default:
            return with_family(Element<Half>{});
    }
}

inline VecF broadcast(float x) { return x - VecF{}; }
inline double broadcast(double x) { return x; }

template <class To, class From>
inline To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

// a > b ? a : b in every lane; b if either is NaN.
inline VecF max_or_second(VecF a, VecF b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}
inline double max_or_second(double a, double b) { return a > b ? a : b; }

inline VecF min_or_second(VecF a, VecF b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}
inline double min_or_second(double a, double b) { return a < b ? a : b; }

// a if π is not zero, else 0. A token that the process never reaches contributes nothing, whatever its log-score.
inline VecF where_nonzero(VecF pi, VecF a) { return pi != 0.0f ? a : VecF{}; }
inline double where_nonzero(double pi, double a) { return pi != 0.0 ? a : 0.0; }

// a with -inf in the given lane, or a if there is no such lane.
inline VecF without(VecF a, int64_t lane) {
    VecI lanes;
    for (int i = 0; i < kWidth; ++i) lanes[i] = i;
    return lanes == static_cast<int32_t>(lane) ? broadcast(-__builtin_inff()) : a;
}
inline double without(double a, int64_t lane) { return lane == 0 ? -__builtin_inf() : a; }

// ---- loads and stores: float16 and bfloat16 are converted to float32 ----

inline VecF load(const float* p) {
    VecF v;
    memcpy(&v, p, sizeof(v));
    return v;
}

inline VecF load(const BFloat16* p) {
    VecH h;
    memcpy(&h, p, sizeof(h));
    return bit_cast<VecF>(__builtin_convertvector(h, VecU) << 16);
}

inline VecF load(const Half* p) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    VecH h;
    memcpy(&h, p, sizeof(h));
    const VecU bits = __builtin_convertvector(h, VecU);
    const VecU magnitude = bits & 0x7fffu;
    // Multiplication by 2^112 changes the exponent bias from 15 to 127, also for subnormals. Infinities and NaN keep an
    // exponent of all ones.
    const VecF finite = bit_cast<VecF>(magnitude << 13) * 0x1p112f;
    const VecF special = bit_cast<VecF>((magnitude << 13) | 0x7f800000u);
    const VecF value = magnitude >= 0x7c00u ? special : finite;
    return bit_cast<VecF>(bit_cast<VecU>(value) | ((bits & 0x8000u) << 16));
#endif
}

inline double load(const double* p) { return *p; }

inline void store(float* p, VecF v) { memcpy(p, &v, sizeof(v)); }

// Rounds to bfloat16 in the upper halves: to nearest, ties to even. A NaN remains NaN unless its lowest 15 bits are all
// set, which does not occur in a NaN from bfloat16 or from arithmetic.
inline VecU round_to_upper(VecF v) {
    const VecU bits = bit_cast<VecU>(v);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
}

inline void store(BFloat16* p, VecF v) {
    const VecH h = __builtin_convertvector(round_to_upper(v) >> 16, VecH);
    memcpy(p, &h, sizeof(h));
}

inline void store(Half* p, VecF v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    const VecU bits = bit_cast<VecU>(v);
    const VecU magnitude = bits & 0x7fffffffu;
    // The last place of a subnormal is 2^-24, the same as that of float32 numbers in [0.5, 1), so that the addition of
    // 0.5 rounds it to nearest even. The last place of a normal number is 13 bits above that of float32.
    const VecU subnormal = bit_cast<VecU>(bit_cast<VecF>(magnitude) + 0.5f) - 0x3f000000u;
    const VecU normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    VecU half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? (VecU{} + 0x7c00u) : half;
    half = magnitude > 0x7f800000u ? (VecU{} + 0x7e00u) : half;
    const VecH h = __builtin_convertvector(half | ((bits >> 16) & 0x8000u), VecH);
    memcpy(p, &h, sizeof(h));
#endif
}

inline void store(double* p, double v) { *p = v; }

// load_partial loads the first n < width elements and sets the other lanes to `fill`. store_partial stores the first n
// lanes.
#if defined(__AVX512F__)
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline VecF load_partial(const float* p, int64_t n, float fill) {
    return _mm512_mask_loadu_ps(broadcast(fill), first_lanes(n), p);
}
inline VecF load_partial(const BFloat16* p, int64_t n, float fill) {
    const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    const __m512i bits = _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
    return _mm512_mask_mov_ps(broadcast(fill), first_lanes(n), _mm512_castsi512_ps(bits));
}
inline VecF load_partial(const Half* p, int64_t n, float fill) {
    const __m256i h = _mm256_maskz_loadu_epi16(first_lanes(n), p);
    return _mm512_mask_cvtph_ps(broadcast(fill), first_lanes(n), h);
}
inline void store_partial(float* p, VecF v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
template <class T>
inline void store_partial(T* p, VecF v, int64_t n) {
    uint16_t buffer[kWidth];
    store(reinterpret_cast<T*>(buffer), v);
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
}
#else
template <class T>
inline VecF load_partial(const T* p, int64_t n, float fill) {
    T buffer[kWidth] = {};
    for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
    VecF v = load(buffer);
    for (int64_t i = n; i < kWidth; ++i) v[i] = fill;
    return v;
}
template <class T>
inline void store_partial(T* p, VecF v, int64_t n) {
    T buffer[kWidth];
    store(buffer, v);
    for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#endif
// A vector of one lane is never partial. Templates for both compute types need these overloads to compile.
inline double load_partial(const double*, int64_t, float fill) { return fill; }
inline void store_partial(double*, double, int64_t) {}

// Prefetches the memory two kilobytes ahead of kCount vectors at p, because the prefetchers of the processor stop at
// every 4 KiB page.
template <int kCount, class T>
inline void prefetch(const T* p) {
    constexpr int bytes = kCount * Lanes<Compute<T>>::width * static_cast<int>(sizeof(T));
    SEDD_UNROLL for (int i = 0; i < bytes; i += 64) {
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(p) + 2048 + i));
    }
}

// Loads kCount vectors from p. Unless kOrdered, the first vector of each pair of bfloat16 vectors gets the even
// elements and the second one the odd elements. This takes one operation per vector instead of three. store_vectors
// restores the order.
template <bool kOrdered, int kCount, class T, class Vec>
inline void load_vectors(const T* p, Vec (&v)[kCount]) {
    for (int k = 0; k < kCount; ++k) v[k] = load(p + k * Lanes<Compute<T>>::width);
}

template <bool kOrdered, int kCount, class T, class Vec>
inline void store_vectors(T* p, const Vec (&v)[kCount]) {
    for (int k = 0; k < kCount; ++k) store(p + k * Lanes<Compute<T>>::width, v[k]);
}

template <bool kOrdered, int kCount>
inline void load_vectors(const BFloat16* p, VecF (&v)[kCount]) {
    if constexpr (kOrdered || kCount % 2 != 0) {
        load_vectors<kOrdered, kCount, BFloat16, VecF>(p, v);
    } else {
        for (int k = 0; k < kCount; k += 2) {
            VecU pairs;
            memcpy(&pairs, p + k * kWidth, sizeof(pairs));
            v[k] = bit_cast<VecF>(pairs << 16);
            v[k + 1] = bit_cast<VecF>(pairs & 0xffff0000u);
        }
    }
}

template <bool kOrdered, int kCount>
inline void store_vectors(BFloat16* p, const VecF (&v)[kCount]) {
    if constexpr (kOrdered || kCount % 2 != 0) {
        store_vectors<kOrdered, kCount, BFloat16, VecF>(p, v);
    } else {
        for (int k = 0; k < kCount; k += 2) {
            const VecU pairs = (round_to_upper(v[k]) >> 16) | (round_to_upper(v[k + 1]) & 0xffff0000u);
            memcpy(p + k * kWidth, &pairs, sizeof(pairs));
        }
    }
}

template <class T>
inline double read_one(const T* p) {
    if constexpr (Lanes<Compute<T>>::width == 1) {
        return *p;
    } else {
        return load_partial(p, 1, 0.0f)[0];
    }
}

template <class T>
inline void write_one(T* p, double value) {
    if constexpr (Lanes<Compute<T>>::width == 1) {
        *p = value;
    } else {
        store_partial(p, broadcast(static_cast<float>(value)), 1);
    }
}

// ---- sums and exponentials ----

// The sum of the lanes in float64, in a fixed order.
inline double sum_lanes(VecF v) {
    float lane[kWidth];
    memcpy(lane, &v, sizeof(v));
    double sum[4] = {lane[0], lane[1], lane[2], lane[3]};
    for (int i = 4; i < kWidth; i += 4) {
        for (int j = 0; j < 4; ++j) sum[j] += static_cast<double>(lane[i + j]);
    }
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
inline double sum_lanes(double v) { return v; }

// exp to about one unit in the last place. NaN remains NaN, overflow gives inf, and underflow gives subnormal numbers,
// then 0.
//
// exp(x) = 2^n exp(r) with |r| ≤ ln2/2, and exp(r) = 1 + r + r² q(r) with q of degree 4 (relative error of the fit
// 3e-9).
template <int kCount>
inline void exp_lanes(VecF (&x)[kCount]) {
    constexpr float log2e = 0x1.715476p0f, ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
    [[maybe_unused]] constexpr float magic = 0x1.8p23f + 254.0f;  // adding it rounds to an integer
    VecF n[kCount], p[kCount];
    [[maybe_unused]] VecU bits[kCount];  // of magic + n; the lowest nine are those of the integer n + 254
    // Beyond these bounds the result is 0 or inf. x is the second argument, so that NaN is kept.
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) x[k] = min_or_second(broadcast(89.0f), x[k]);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) x[k] = max_or_second(broadcast(-104.0f), x[k]);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
#if defined(__AVX512F__)
        n[k] = _mm512_roundscale_ps(x[k] * log2e, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
        bits[k] = bit_cast<VecU>(x[k] * log2e + magic);
        n[k] = bit_cast<VecF>(bits[k]) - magic;
#endif
    }
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) x[k] = x[k] - n[k] * ln2_high;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) x[k] = x[k] - n[k] * ln2_low;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = x[k] * 0x1.6a23d0p-10f + 0x1.123a20p-7f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + 0x1.5558f2p-5f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + 0x1.555492p-3f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + 0x1.fffffcp-2f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + 1.0f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) p[k] = p[k] * x[k] + 1.0f;
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
#if defined(__AVX512F__)
        x[k] = _mm512_scalef_ps(p[k], n[k]);
#else
        // two factors, because a float cannot hold 2^128 or 2^-150; their exponents add up to n + 254
        const VecU first = bits[k] >> 1 << 23, second = (bits[k] << 23) - first;
        x[k] = p[k] * bit_cast<VecF>(first) * bit_cast<VecF>(second);
#endif
    }
}
template <int kCount>
inline void exp_lanes(double (&x)[kCount]) {
    for (int k = 0; k < kCount; ++k) x[k] = exp(x[k]);
}

template <class Vec>
inline Vec exp_lanes(Vec x) {
    Vec one[1] = {x};
    exp_lanes(one);
    return one[0];
}

}  // namespace
}  // namespace sedd::SEDD_ISA

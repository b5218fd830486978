// Errors, vectors with CUDA's alignment, and dim3.
#pragma once

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInvalidDevice = 101,
    cudaErrorMisalignedAddress = 716,
    cudaErrorLaunchFailure = 719,
};

#define CUDA_ON_CPU_VECTORS(Base, Name, align2, align4)                            \
    struct alignas(align2) Name##2 { Base x, y; };                                 \
    struct Name##3 { Base x, y, z; };                                              \
    struct alignas(align4) Name##4 { Base x, y, z, w; };                           \
    constexpr Name##2 make_##Name##2(Base x, Base y) { return {x, y}; }            \
    constexpr Name##3 make_##Name##3(Base x, Base y, Base z) { return {x, y, z}; } \
    constexpr Name##4 make_##Name##4(Base x, Base y, Base z, Base w) { return {x, y, z, w}; }

CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
#undef CUDA_ON_CPU_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

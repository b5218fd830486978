// How a kernel is launched: on the caller's device and stream, without waiting for it, and with the runtime's word on
// whether it could start.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

// The emulation in tests/cuda_on_cpu has its own two. Kernels are given as function pointers.
#if !defined(SEDD_LAUNCH)
#define SEDD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
// Untyped below, since kernels of several types share the one symbol.
#define SEDD_DYNAMIC_SHARED(type, name)                        \
    extern __shared__ __align__(16) unsigned char name##_16[]; \
    type* const name = reinterpret_cast<type*>(name##_16)
#endif

namespace sedd {

// The launch's device while it lives, the caller's again afterwards.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        error_ = cudaGetDevice(&before_);
        if (error_ == cudaSuccess && before_ != device) {
            error_ = cudaSetDevice(device);
            changed_ = error_ == cudaSuccess;
        }
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    // null, or why it is not: nothing may be launched then.
    const char* error() const { return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

  private:
    cudaError_t error_;
    int before_ = 0;
    bool changed_ = false;
};

// null, or what the runtime says of the launches since it was last asked.
static inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

static inline cudaStream_t stream_of(const CudaLaunch& launch) { return static_cast<cudaStream_t>(launch.stream); }

static inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace sedd

// How a kernel is launched: on its tensors' device and the caller's stream, without waiting for it, and with the
// runtime's word on whether it could start.
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

// Makes the launch's device the calling thread's, if it is another: null, or why that failed. It is not put back here:
// cudaSetDevice would make a context on a GPU that the caller may never have used, which takes its memory.
// sedd_ext/_dispatch.py lets torch put the caller's device back, which knows where there is a context.
static inline const char* use_device(int device) {
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // or the next launch would report it
    return cudaGetErrorString(error);
}

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

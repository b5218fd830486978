// Launches kernels on the device of their tensors and the caller's stream, without waiting for them, and reports errors
// of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>

#include "common/types.h"

// The emulation in tests/cuda_on_cpu defines these two itself. `kernel` is a function pointer.
#if !defined(SEDD_LAUNCH)
#define SEDD_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    (kernel)<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)
// The symbol is untyped, because kernels of several types share it.
#define SEDD_DYNAMIC_SHARED(type, name)                        \
    extern __shared__ __align__(16) unsigned char name##_16[]; \
    type* const name = reinterpret_cast<type*>(name##_16)
#endif

namespace sedd {

// Selects the device of the launch for the calling thread. Returns null, or the error. Does not restore the previous
// device: cudaSetDevice would create a context on a GPU that the caller may never have used, which takes memory there.
// sedd_ext/_dispatch.py restores it through torch, which knows which devices have a context.
static inline const char* use_device(int device) {
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && current != device) error = cudaSetDevice(device);
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // clears the error, which the next launch would report
    return cudaGetErrorString(error);
}

// null, or the error of the launches since the last call.
static inline const char* launch_error() {
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether a block may have so much dynamic shared memory. If so, allows the kernel, which has no other, all that the
// device gives to a block: always the same number, because host threads may launch the kernel at the same time.
template <class Kernel>
bool takes_shared(Kernel* kernel, int64_t bytes, int device) {
    int most = 0;
    return cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) == cudaSuccess &&
           bytes <= most &&
           cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most) == cudaSuccess;
}

static inline cudaStream_t stream_of(const CudaLaunch& launch) { return static_cast<cudaStream_t>(launch.stream); }

static inline unsigned blocks_for(int64_t items, int64_t per_block) {
    return static_cast<unsigned>((items + per_block - 1) / per_block);
}

}  // namespace sedd

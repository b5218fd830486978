// Types of all kernels: element types, families of processes, and how a kernel reports bad input.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define SEDD_HD static __host__ __device__ __forceinline__
#else
#define SEDD_HD static inline  // internal linkage: csrc/cpu is compiled once per instruction set
#endif

namespace sedd {

// Element type of the log-scores.
enum class DType : int32_t { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };

// Shape of the stationary distribution π; kernels are specialised on it.
enum class Family : int32_t {
    absorbing = 0,  // π = e_M, M = dim - 1
    uniform = 1,    // π = 1/dim
    rank_one = 2,   // π is a vector
};

enum class Fault : int32_t {
    none = 0,
    x_t = 1,      // token outside [0, dim)
    x_0 = 2,      // token outside [0, dim)
    sigma = 3,    // not a finite number above zero
    total = 4,    // the probabilities of a row have no finite positive sum
    sigma_s = 5,  // not in [0, sigma)
    noise = 6,    // the noise of a reverse step from a mean prediction: out of its range
};

// What a launch computes of a row's loss. Where the vocabulary is split over processes, each process has a slice of
// every row, and they exchange numbers between the stages.
enum class Stage : int32_t {
    whole = 0,   // all of it, from the whole row
    logits = 1,  // the numbers of the softmax, from the slice
    sums = 2,    // the sums that need the whole softmax, from the slice
    loss = 3,    // the loss, from the numbers of all slices
};

// The first bad row of a launch. The output of a launch with a bad row is undefined.
struct Status {
    Fault fault = Fault::none;
    int64_t row = -1;
};

// Where a CUDA launcher runs: scratch memory allocated by torch, the caller's stream (a cudaStream_t) and device.
struct CudaLaunch {
    void* workspace;
    void* stream;
    int device;
};

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

}  // namespace sedd

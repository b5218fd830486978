// Launches, and what the host asks of the runtime.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>

#include "cuda_on_cpu/device.h"

using cudaStream_t = struct CUstream_st*;
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

#pragma GCC visibility push(hidden)
namespace cuda_on_cpu {

constexpr int kDevices = 2;  // alike, and with the same memory
constexpr int kMultiProcessors = 4;
constexpr int kSharedBytes = 48 << 10, kMaxSharedBytes = 227 << 10;  // of a block: unasked, and on demand (sm_90's)

constexpr struct {
    cudaError_t error;
    const char *name, *text;
} kErrors[] = {
    {cudaSuccess, "cudaSuccess", "no error"},
    {cudaErrorInvalidValue, "cudaErrorInvalidValue", "invalid argument"},
    {cudaErrorInvalidConfiguration, "cudaErrorInvalidConfiguration", "invalid configuration argument"},
    {cudaErrorInvalidDevice, "cudaErrorInvalidDevice", "invalid device ordinal"},
    {cudaErrorMisalignedAddress, "cudaErrorMisalignedAddress", "misaligned address"},
    {cudaErrorLaunchFailure, "cudaErrorLaunchFailure", "unspecified launch failure"},
};

inline thread_local cudaError_t last_error, last_reported;
inline thread_local std::string last_report;
inline thread_local int current_device = 0;
inline thread_local int launch_device = -1;  // of this host thread's last launch
inline std::atomic<unsigned> contexts{0};    // a bit for each device that has one
inline std::mutex launching;                 // launches of several host threads run one after the other
inline std::map<const void*, size_t> shared_limits;
inline std::atomic<int> max_shared_bytes{kMaxSharedBytes};  // on demand
inline thread_local size_t launch_shared_bytes = 0;         // of this host thread's last launch

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Arguments&&... arguments) {
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
        static void run(const void* call) {
            std::apply(static_cast<const Call*>(call)->kernel, static_cast<const Call*>(call)->arguments);
        }
    };
    const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
    const std::lock_guard<std::mutex> lock(launching);
    launch_device = current_device;
    launch_shared_bytes = shared_bytes;
    contexts |= 1u << current_device;
    const auto limit = shared_limits.find(reinterpret_cast<const void*>(kernel));
    const size_t most = limit == shared_limits.end() ? static_cast<size_t>(kSharedBytes) : limit->second;
    const cudaError_t error = Device::run({name, Call::run, &call, grid, block, shared_bytes, most});
    if (error == cudaSuccess) return;
    last_error = last_reported = error;
    last_report = Device::report();
}

}  // namespace cuda_on_cpu
#pragma GCC visibility pop

#if defined(CUDA_ON_CPU_ALIGNMENT)
// With -fsanitize=alignment the compiler calls this before an access to an address that the type does not allow, where
// CUDA reports cudaErrorMisalignedAddress. The arguments are those of UBSan's library, which then is not linked.
struct __ubsan_mismatch {
    const char* file;
    uint32_t line, column;
    const struct {
        uint16_t kind, info;
        char name[1];
    }* type;
    unsigned char log_alignment, access;
};
extern "C" __attribute__((used, visibility("hidden"))) inline void __ubsan_handle_type_mismatch_v1(
    const __ubsan_mismatch* mismatch, uintptr_t address) {
    char what[256];
    std::snprintf(what, sizeof what, "misaligned address %#zx for %s, %s:%u", size_t{address}, mismatch->type->name,
                  mismatch->file, mismatch->line);
    cuda_on_cpu::Device::fail(cudaErrorMisalignedAddress, what);
}
#endif

inline constexpr const char* cuda_on_cpu_schedules[] = {"forward", "reverse", "greedy", "random"};

// "forward" and "reverse" go round the block, each thread to its next wait; under "greedy" a thread or at least its
// warp goes on as long as it can; "random" draws a thread at each wait, from the seed, anew for each launch. 0, or -1
// for another name.
extern "C" __attribute__((used, visibility("default"))) inline int cuda_on_cpu_set_schedule(const char* name,
                                                                                            unsigned long long seed) {
    for (int i = 0; i < 4; ++i) {
        if (std::strcmp(name, cuda_on_cpu_schedules[i]) != 0) continue;
        const std::lock_guard<std::mutex> lock(cuda_on_cpu::launching);
        cuda_on_cpu::Device::set_schedule(static_cast<cuda_on_cpu::Schedule>(i), seed);
        return 0;
    }
    return -1;
}

// The schedule that the next launch obeys.
extern "C" __attribute__((used, visibility("default"))) inline const char* cuda_on_cpu_schedule() {
    return cuda_on_cpu_schedules[static_cast<int>(cuda_on_cpu::Device::schedule())];
}

// Where this host thread's last launch ran (-1: none yet), and a bit for each device that has a context.
extern "C" __attribute__((used, visibility("default"))) inline int cuda_on_cpu_launch_device() {
    return cuda_on_cpu::launch_device;
}
extern "C" __attribute__((used, visibility("default"))) inline unsigned cuda_on_cpu_contexts() {
    return cuda_on_cpu::contexts;
}

// How much dynamic shared memory a block may have on demand, and how much it had in this host thread's last launch.
// What kernels were allowed before is forgotten. A negative number stands for the usual one.
extern "C" __attribute__((used, visibility("default"))) inline void cuda_on_cpu_set_max_shared(int bytes) {
    const std::lock_guard<std::mutex> lock(cuda_on_cpu::launching);
    cuda_on_cpu::shared_limits.clear();
    cuda_on_cpu::max_shared_bytes = bytes < 0 ? cuda_on_cpu::kMaxSharedBytes : bytes;
}
extern "C" __attribute__((used, visibility("default"))) inline size_t cuda_on_cpu_launch_shared_bytes() {
    return cuda_on_cpu::launch_shared_bytes;
}

inline const char* cudaGetErrorName(cudaError_t error) {
    for (const auto& known : cuda_on_cpu::kErrors) {
        if (known.error == error) return known.name;
    }
    return "unrecognized error code";
}

// The report on the last launch of this host thread that failed, if it failed with this error.
inline const char* cudaGetErrorString(cudaError_t error) {
    if (error != cudaSuccess && error == cuda_on_cpu::last_reported) return cuda_on_cpu::last_report.c_str();
    for (const auto& known : cuda_on_cpu::kErrors) {
        if (known.error == error) return known.text;
    }
    return "unrecognized error code";
}

inline cudaError_t cudaPeekAtLastError() { return cuda_on_cpu::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
// Makes no context, unlike cudaSetDevice.
inline cudaError_t cudaGetDevice(int* device) { return *device = cuda_on_cpu::current_device, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= cuda_on_cpu::kDevices) return cuda_on_cpu::last_error = cudaErrorInvalidDevice;
    cuda_on_cpu::contexts |= 1u << device;
    cuda_on_cpu::current_device = device;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    if (device < 0 || device >= cuda_on_cpu::kDevices) return cudaErrorInvalidDevice;
    *value = attribute == cudaDevAttrMultiProcessorCount ? cuda_on_cpu::kMultiProcessors
                                                         : cuda_on_cpu::max_shared_bytes.load();
    return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
    const bool is_known = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (!is_known || value < 0 || value > cuda_on_cpu::max_shared_bytes) {
        return cuda_on_cpu::last_error = cudaErrorInvalidValue;
    }
    const std::lock_guard<std::mutex> lock(cuda_on_cpu::launching);
    cuda_on_cpu::shared_limits[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
    return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t = nullptr) {
    return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}

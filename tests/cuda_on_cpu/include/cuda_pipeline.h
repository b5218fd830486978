// Asynchronous copies to shared memory. Until the thread waits for a copy, its destination is undefined; the copy takes
// place in the wait, which is the latest that a GPU may take.
#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes,
                                    cuda_on_cpu::Site site = cuda_on_cpu::Site::here()) {
    cuda_on_cpu::Device::begin_copy({to, from, bytes}, site);
    std::memset(to, 0xFF, bytes);
}

inline void __pipeline_commit() { cuda_on_cpu::Device::copies().commit(); }

// Waits for all groups of copies but the last `prior`, of which the hardware counts no more than eight.
inline void __pipeline_wait_prior(size_t prior) {
    for (const cuda_on_cpu::Copy& copy : cuda_on_cpu::Device::copies().take(prior < 8 ? prior : 8)) {
        std::memcpy(copy.to, copy.from, copy.bytes);
    }
}

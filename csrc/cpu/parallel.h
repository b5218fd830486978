// Divides rows among threads of OpenMP. The library links no OpenMP runtime but uses the one that torch has loaded (see
// CMakeLists.txt), so these are torch's threads. `threads` is torch.get_num_threads().
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "cpu/kernels.h"

namespace sedd {

// Calls work(begin, end, scratch, status) for pieces of [0, rows); a row has about `cost` elements, and every thread
// has `scratch_bytes` of its own. The result of a row must not depend on the pieces. Returns the first fault.
//
// A thread takes the next piece when it has finished one, so that the other threads do the work if another process
// holds a core. The team has one thread or all of `threads`, as in torch: for a smaller team than before, libgomp ends
// threads of its pool, and torch's next operator has to start them again.
template <class Work>
Status parallel_rows(int64_t rows, int64_t cost, int64_t scratch_bytes, int threads, const Work& work) {
    constexpr int64_t piece_elements = 1 << 15;  // about 10 µs, much longer than taking a piece
    const int64_t piece = std::max<int64_t>(1, piece_elements / std::max<int64_t>(1, cost));
    const int64_t pieces = (rows + piece - 1) / piece;
    Status first;
    std::mutex mutex;
    std::exception_ptr error;
    std::atomic<int64_t> next{0};
    const auto run = [&]() noexcept {
        int64_t i = next++;
        if (i >= pieces) return;
        Status status;
        try {
            // 64 bytes more to start on a cache line
            const std::unique_ptr<char[]> memory(scratch_bytes > 0 ? new char[scratch_bytes + 64] : nullptr);
            char* scratch = memory.get();
            if (scratch != nullptr) scratch += (64 - reinterpret_cast<uintptr_t>(scratch) % 64) % 64;
            for (; i < pieces; i = next++) {
                work(i * piece, std::min(rows, (i + 1) * piece), scratch, status);
            }
        } catch (...) {  // out of memory; an exception must not leave a parallel region
            const std::lock_guard<std::mutex> lock(mutex);
            error = std::current_exception();
        }
        if (status.fault != Fault::none) {
            const std::lock_guard<std::mutex> lock(mutex);
            report(first, status.fault, status.row);
        }
    };
    if (threads <= 1 || pieces <= 1) {
        run();
    } else {
#if defined(_OPENMP)
#pragma omp parallel num_threads(threads)
#endif
        run();
    }
    if (error) std::rethrow_exception(error);
    return first;
}

}  // namespace sedd

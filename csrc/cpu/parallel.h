// Rows over threads. The threads are OpenMP's, and with them torch's: the library links no OpenMP runtime of its own
// but finds the one that torch has loaded (see CMakeLists.txt), and torch.get_num_threads() comes in as `threads`.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>

#include "cpu/kernels.h"

namespace sedd {

// Calls work(begin, end, scratch, status) on pieces of [0, rows), each piece about `cost` elements a row; every thread
// has `scratch_bytes` of its own. What is computed for a row must not depend on the pieces. Returns the first fault.
// A thread takes a piece whenever it has finished one: where another process holds a core, the other threads do the
// work. The team is one thread or all of `threads`, as in torch: given a smaller team than the last, libgomp ends
// threads of its pool, and torch's next operator has to start them again.
template <class Work>
Status parallel_rows(int64_t rows, int64_t cost, int64_t scratch_bytes, int threads, const Work& work) {
    constexpr int64_t piece_elements = 1 << 15;  // some 10 µs: enough to hide what taking a piece costs
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
        } catch (...) {  // out of memory: nothing may leave a parallel region
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

// Draws an entry of a row from the sums of its blocks.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace sedd::SEDD_ISA {
namespace {

// Visits [begin, end): visit(y) for whole vectors, then rest(y, n) for the n < width elements that remain.
template <int width, class Visit, class Rest>
inline void sweep(int64_t begin, int64_t end, Visit visit, Rest rest) {
    int64_t y = begin;
    for (; y + width <= end; y += width) visit(y);
    if (y < end) rest(y, end - y);
}

template <int n>
struct Count {
    static constexpr int value = n;
};

// The entry of weights[0, n), n ≤ kReverseBlock, at which their running sum exceeds `share` times their total. Adds up
// the lanes of each vector first, because 512 dependent additions take longer than the exps of the block.
template <class Real>
int64_t entry_at(const Real* weights, int64_t n, double share) {
    constexpr int width = Lanes<Real>::width;
    double sums[kReverseBlock / width];
    double total = 0.0;
    int64_t groups = 0;
    const auto group = [&](auto w) { total += sums[groups++] = sum_lanes(w); };
    sweep<width>(
        0, n, [&](int64_t y) { group(load(weights + y)); },
        [&](int64_t y, int64_t count) { group(load_partial(weights + y, count, 0.0f)); });
    // If rounding moves the target beyond the end: the last entry with a weight above 0.
    double target = share * total;
    const auto walk = [&target](const auto* values, int64_t count) {
        int64_t last = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (!(values[i] > 0)) continue;
            last = i;
            if (target < values[i]) break;
            target -= values[i];
        }
        return last;
    };
    const int64_t first = walk(sums, groups) * width;
    return first + walk(weights + first, n - first < width ? n - first : width);
}

// The block whose part of the running sum contains the target. Makes the target relative to the block. If rounding
// moves the target beyond the end, this is the end of the last block with a sum above 0.
inline int64_t pick_block(const double* blocks, int64_t count, double& target) {
    int64_t last = 0;
    for (int64_t k = 0; k < count; ++k) {
        if (blocks[k] > 0.0) last = k;
        if (target < blocks[k]) return k;
        target -= blocks[k];
    }
    target = blocks[last];
    return last;
}

}  // namespace
}  // namespace sedd::SEDD_ISA

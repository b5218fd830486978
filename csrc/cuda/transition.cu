// Columns, rows and samples of exp(σQ). Columns and rows write 4 (float32) or 8 bytes per element and take two to four
// instructions. All entries have the same value, except for x and MASK; in a column with a vector π, this value is
// multiplied by π_y, read from the L2 cache. Samples read and write 24 bytes per position and compute one Philox block,
// about 60 integer instructions. They need no tensor of rows × N.
//
// Configuration: one warp per segment (see segments.cuh). A separate kernel with one thread per row computes the
// exponentials once per row. A bad row gets probabilities of NaN, or token -1.
#include "transition.h"

#include "cuda/segments.cuh"

namespace sedd {
namespace {

constexpr int kRowThreads = 128;

template <class Real>
struct RowNumbers {
    Real vector, constant, at_x, at_mask;
};

template <bool kColumn, class Real>
__global__ void __launch_bounds__(kRowThreads) numbers_kernel(TransitionParams p, RowNumbers<Real>* numbers) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (row >= p.rows) return;
    if (transition_fault(p, row) != Fault::none) {
        const Real nan = not_a_number<Real>();
        numbers[row] = {nan, nan, nan, nan};
        return;
    }
    const double pi_x = stationary_at(p.family, static_cast<const Real*>(p.stationary), p.dim, p.x[row]);
    const TransitionRow n = transition_row(kColumn, p.family, p.sigma[row], pi_x);
    numbers[row] = {static_cast<Real>(n.vector), static_cast<Real>(n.constant), static_cast<Real>(n.at_x),
                    static_cast<Real>(n.at_mask)};
}

template <bool kVector, class Real>
__global__ void __launch_bounds__(kWarps* kWarp)
    entries_kernel(TransitionParams p, RowSplit split, bool has_mask, const RowNumbers<Real>* numbers) {
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments) return;
    const int dim = static_cast<int>(p.dim);
    const RowNumbers<Real> n = numbers[place.row];
    const int x = valid_token(p.x[place.row], p.dim) ? static_cast<int>(p.x[place.row]) : -1;
    const int mask = has_mask ? dim - 1 : -1;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    write_segment(static_cast<Real*>(p.out) + place.row * p.dim, dim, place.segment, [&](int y) {
        const Real usual = kVector ? n.vector * stationary[y] : n.constant;
        return y == x ? n.at_x : y == mask ? n.at_mask : usual;
    });
}

__global__ void __launch_bounds__(kRowThreads) sample_kernel(TransitionParams p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (row >= p.rows) return;
    const bool fault = transition_fault(p, row) != Fault::none;
    static_cast<int64_t*>(p.out)[row] = fault ? -1 : draw_transition(p, row, decay(p.sigma[row]).b);
}

template <bool kColumn, class Real>
const char* launch_typed(const TransitionParams& p, const CudaLaunch& launch) {
    const RowSplit split = split_rows(p.dim, p.dtype);
    const int64_t blocks = split_blocks(split, p.rows);
    if (const char* why = too_large(p.rows, p.dim, blocks)) return why;
    if (const char* why = use_device(launch.device)) return why;
    auto* numbers = static_cast<RowNumbers<Real>*>(launch.workspace);
    SEDD_LAUNCH((numbers_kernel<kColumn, Real>), blocks_for(p.rows, kRowThreads), kRowThreads, 0, stream_of(launch), p,
                numbers);
    const bool has_mask = kColumn && p.family == Family::absorbing;
    if (kColumn && p.family == Family::rank_one) {
        SEDD_LAUNCH((entries_kernel<true, Real>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p, split,
                    has_mask, numbers);
    } else {
        SEDD_LAUNCH((entries_kernel<false, Real>), blocks_for(blocks, 1), kWarps * kWarp, 0, stream_of(launch), p,
                    split, has_mask, numbers);
    }
    return launch_error();
}

template <bool kColumn>
const char* launch_entries(const TransitionParams& p, const CudaLaunch& launch) {
    if (p.rows == 0) return nullptr;
    return p.dtype == DType::float64 ? launch_typed<kColumn, double>(p, launch)
                                     : launch_typed<kColumn, float>(p, launch);
}

}  // namespace

const char* transition_column_cuda(const TransitionParams& p, const CudaLaunch& launch) {
    return launch_entries<true>(p, launch);
}

const char* transition_row_cuda(const TransitionParams& p, const CudaLaunch& launch) {
    return launch_entries<false>(p, launch);
}

const char* sample_transition_cuda(const TransitionParams& p, const CudaLaunch& launch) {
    if (p.rows == 0) return nullptr;
    if (const char* why = too_large(p.rows, 1, 1)) return why;
    if (const char* why = use_device(launch.device)) return why;
    SEDD_LAUNCH(sample_kernel, blocks_for(p.rows, kRowThreads), kRowThreads, 0, stream_of(launch), p);
    return launch_error();
}

int64_t transition_workspace(int64_t rows, int64_t, DType dtype) { return 4 * rows * real_bytes(dtype); }

}  // namespace sedd

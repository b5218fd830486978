// Reverse steps from a mean prediction. The warps of a block read a row once and keep, for each segment, the sum of
// exp(l - top) and the largest logit `top`. The first warp combines them, and computes the masses of staying, of μ and
// of π in closed form. A sample takes one random number to select among the three and one to select an entry: of μ by
// the sums of segments, so that only one segment is read again, and of π by its cumulative sums. Nothing is rejected.
//
// Bytes per element: a sample reads 4 (float32) or 2 once, and 2 KiB of a row again where the token comes from μ.
// Probabilities take a second pass over the row, which shared memory keeps as in reverse.cu, and write once.
// Instructions per element: as in reverse.cu, and one more expf per vector where the largest logit may change.
//
// Configuration: as in reverse.cu, without its separate first pass for few rows. Beside the row, shared memory holds
// three numbers of the compute type and one of float64 per segment.
//
// Rows with π_x = 0 are not read. A bad row gets probabilities of NaN, or token -1.
#include "reverse_mean.h"

#include "cuda/draw.cuh"
#include "cuda/kept.cuh"
#include "cuda/softmax.cuh"

namespace sedd {
namespace {

constexpr int kMaxWarps = 20;  // per block, for 96 registers per thread; 24 warps leave 80, and threads spill
constexpr int64_t kSharedBytes = 48 << 10;

// exp(l - top) [v_y] of an entry; MASK has none.
template <bool kPower, class T, class Real = RealOf<T>>
struct Term {
    const Real* power;
    Real log_ratio, top;
    int mask;

    // v_y = 1 - (s/t)^{w_y}
    __device__ __forceinline__ Real factor(int y) const {
        const Real w = power[y];
        return w > Real(0) ? -expm1(w * log_ratio) : not_a_number<Real>();
    }
    __device__ __forceinline__ Real operator()(int y, Real l) const {
        if (y == mask) return Real(0);
        const Real e = Normaliser<T>::relative(l, top);
        if constexpr (kPower) return e * factor(y);
        return e;
    }
};

// The sums of a segment over the entries y ≠ x without MASK.
template <class Real>
struct SegmentSums {
    Real top, exps, weighted;  // Σ exp(l_y - top), Σ exp(l_y - top) v_y
};

template <bool kPower, class T, class Real = RealOf<T>>
__device__ __forceinline__ SegmentSums<Real> segment_sums(const T* row, int dim, int segment, int x,
                                                          const Term<kPower, T>& term) {
    constexpr int width = Vector<T>::kWidth;
    const Real none = Normaliser<T>::none().top;
    SegmentSums<Real> sums{none, Real(0), Real(0)};
    const auto raise = [&](Real higher) {
        const Real scale = Normaliser<T>::relative(sums.top, higher);
        sums.exps *= scale;
        if constexpr (kPower) sums.weighted *= scale;
        sums.top = higher;
    };
    visit(
        row, dim, segment, term.mask,
        [&](int y, Real(&l)[width]) {
            Real higher = sums.top;
#pragma unroll
            for (int j = 0; j < width; ++j) {
                l[j] = y + j == x ? none : l[j];
                higher = l[j] > higher ? l[j] : higher;
            }
            raise(higher);
#pragma unroll
            for (int j = 0; j < width; ++j) l[j] = Normaliser<T>::relative(l[j], higher);
            sums.exps += sum_of(l);
            if constexpr (kPower) {
#pragma unroll
                for (int j = 0; j < width; ++j) sums.weighted += l[j] * term.factor(y + j);
            }
        },
        [&](int y, Real l) {
            if (y == x) return;
            raise(l > sums.top ? l : sums.top);
            const Real e = Normaliser<T>::relative(l, sums.top);
            sums.exps += e;
            if constexpr (kPower) sums.weighted += e * term.factor(y);
        });
    const Normaliser<T> all = warp_normaliser(Normaliser<T>{sums.top, sums.exps});
    const Real scale = Normaliser<T>::relative(sums.top, all.top);
    return {all.top, all.total, kPower ? warp_sum(sums.weighted * scale) : Real(0)};
}

// Combines the sums of segments, and makes picks[s], the sums that draws use, relative to the largest logit of the row.
// Called by a whole warp; the result is the same on every lane. In a draw, a lane reads only those picks that it wrote.
template <bool kPower, class Real>
__device__ __forceinline__ SegmentSums<double> row_sums(const SegmentSums<Real>* sums, int segments, double* picks) {
    double top = Normaliser<double>::none().top;
    for (int s = lane_of(); s < segments; s += kWarp) {
        const double other = static_cast<double>(sums[s].top);
        top = other > top ? other : top;
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        const double other = __shfl_xor_sync(kAll, top, offset);
        top = other > top ? other : top;
    }
    double exps = 0.0, weighted = 0.0;
    for (int s = lane_of(); s < segments; s += kWarp) {
        const double scale = Normaliser<double>::relative(static_cast<double>(sums[s].top), top);
        exps += static_cast<double>(sums[s].exps) * scale;
        weighted += static_cast<double>(sums[s].weighted) * scale;
        picks[s] = static_cast<double>(kPower ? sums[s].weighted : sums[s].exps) * scale;
    }
    return {top, warp_sum(exps), warp_sum(weighted)};
}

// The work of a warp: `row_warps` warps of a block share a row and take its segments in turn.
template <class T>
struct Task {
    using Real = RealOf<T>;
    int slot, first_segment, dim, x;  // dim and x in the entries of this process
    int64_t row, token;
    bool exists, fault;
    double pi_x;  // 0 if there is nothing to do
    const T* logits;

    __device__ __forceinline__ Task(const ReverseMeanParams& p, int row_warps) {
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        slot = warp / row_warps;
        first_segment = warp % row_warps;
        row = static_cast<int64_t>(blockIdx.x) * (static_cast<int>(blockDim.x) / (kWarp * row_warps)) + slot;
        exists = row < p.rows;
        fault = exists && reverse_mean_fault(p, row) != Fault::none;
        dim = static_cast<int>(p.width);
        token = exists && !fault ? p.x_t[row] : -1;
        x = static_cast<int>(token - p.first);
        pi_x = token >= 0 ? stationary_at(p.family, static_cast<const Real*>(p.stationary), p.dim, token) : 0.0;
        logits = static_cast<const T*>(p.logits) + (pi_x > 0.0 ? row * p.stride : 0);
    }
    __device__ __forceinline__ bool moves() const { return pi_x > 0.0; }
    __device__ __forceinline__ bool leads() const { return first_segment == 0; }
    // The token of a row that does not move, or -1 if the row is bad.
    __device__ __forceinline__ int64_t stays_at(const ReverseMeanParams& p) const {
        return exists && !fault && token != p.forbidden ? token : -1;
    }
    template <bool kPower>
    __device__ __forceinline__ Term<kPower, T> term(const ReverseMeanParams& p) const {
        return {kPower ? static_cast<const Real*>(p.power) + p.first : nullptr,
                kPower && token >= 0 ? static_cast<Real>(p.noise[row]) : Real(0), Real(0),
                static_cast<int>(p.mask - p.first)};
    }
    // The masses of the row from the sums of its segments. Called by a whole warp.
    __device__ __forceinline__ MeanMasses masses(const ReverseMeanParams& p, const SegmentSums<double>& sums) const {
        const MeanRow numbers = reverse_mean_row(p.step, p.noise[row], p.sigma != nullptr ? p.sigma[row] : 0.0, pi_x);
        return mean_masses(p, numbers, token, sums.exps, sums.weighted, sums.top,
                           static_cast<double>(Vector<T>::read(logits + x)));
    }
};

// Shared memory of a block: for each of its rows, the sums that draws use and those of the segments.
template <class Real>
struct Shared {
    double* picks;
    SegmentSums<Real>* sums;

    __device__ __forceinline__ Shared(double* memory, int slot, int block_rows, int segments)
        : picks(memory + slot * segments),
          sums(reinterpret_cast<SegmentSums<Real>*>(memory + block_rows * segments) + slot * segments) {}
    static int64_t bytes(int block_rows, int64_t segments) {
        return block_rows * segments * static_cast<int64_t>(sizeof(double) + sizeof(SegmentSums<Real>));
    }
};

struct MeanState {
    MeanMasses masses;
    double top;
};

// Shared memory of a block: its rows if they are kept, then their states, then the sums.
template <Family P, class T, bool kPower, bool kKeep>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    mean_probs_kernel(ReverseMeanParams p, int segments, int row_warps, int row_bytes) {
    using Real = RealOf<T>;
    SEDD_DYNAMIC_SHARED(unsigned char, memory);
    // Every warp reaches every barrier, whether its row exists and moves or not.
    const Task<T> task(p, row_warps);
    const int block_rows = static_cast<int>(blockDim.x) / (kWarp * row_warps);
    MeanState* const states = reinterpret_cast<MeanState*>(memory + block_rows * row_bytes);
    const Shared<Real> shared(reinterpret_cast<double*>(states + block_rows), task.slot, block_rows, segments);
    MeanState& state = states[task.slot];
    T* const kept = place_to_keep(memory + task.slot * row_bytes, task.logits);
    const T* const logits = kKeep ? kept : task.logits;
    Term<kPower, T> term = task.template term<kPower>(p);
    const int dim = task.dim, x = task.x;
    if (task.moves()) {
        if constexpr (kKeep) keep_segments(kept, task.logits, dim, task.first_segment, segments, row_warps);
        for (int s = task.first_segment; s < segments; s += row_warps) {
            if constexpr (kKeep) wait_for_segment();
            const SegmentSums<Real> sums = segment_sums(logits, dim, s, x, term);
            if (lane_of() == 0) shared.sums[s] = sums;
        }
    }
    __syncthreads();  // wait for the sums of the segments
    if (task.moves() && task.leads()) {
        const SegmentSums<double> sums = row_sums<kPower>(shared.sums, segments, shared.picks);
        const MeanMasses masses = task.masses(p, sums);
        if (lane_of() == 0) state = {masses, sums.top};
    }
    __syncthreads();  // wait for the masses
    if (!task.exists) return;
    Real* out = static_cast<Real*>(p.out) + task.row * p.dim;
    if (!task.moves() || !valid_masses(state.masses)) {
        const int64_t token = task.moves() ? -1 : task.stays_at(p);
        const Real rest = token >= 0 ? Real(0) : not_a_number<Real>();
        for (int s = task.first_segment; s * kSegmentVectors < dim / Vector<Real>::kWidth + 2; s += row_warps) {
            write_segment(out, dim, s, [&](int y) { return y == token ? Real(1) : rest; });
        }
        return;
    }
    const MeanMasses m = state.masses;
    const Real* stationary = static_cast<const Real*>(p.stationary);
    const Real unit = static_cast<Real>(m.unit / m.total), self = static_cast<Real>(m.stay / m.total);
    const Real pi = static_cast<Real>(m.pi / m.total * (P == Family::uniform ? 1.0 / static_cast<double>(p.dim) : 1.0));
    const int forbidden = static_cast<int>(p.forbidden);
    term.top = static_cast<Real>(state.top);
    const auto prob = [&](int y, Real l) {
        if (y == x) return self;
        if (y == forbidden) return Real(0);
        const Real w = unit * term(y, l);
        return P == Family::absorbing ? w : w + pi * (P == Family::rank_one ? stationary[y] : Real(1));
    };
    constexpr int width = Vector<T>::kWidth, out_width = Vector<Real>::kWidth;
    for (int s = task.first_segment; s < segments; s += row_warps) {
        visit(
            logits, dim, s, -1,
            [&](int y, Real(&l)[width]) {
#pragma unroll
                for (int k = 0; k < width; k += out_width) {
                    Real part[out_width];
#pragma unroll
                    for (int j = 0; j < out_width; ++j) part[j] = prob(y + k + j, l[k + j]);
                    write_vector(out + y + k, part);
                }
            },
            [&](int y, Real l) { out[y] = prob(y, l); });
    }
}

template <Family P, class T, bool kPower>
__global__ void __launch_bounds__(kWarps* kWarp, 3)
    mean_sample_kernel(ReverseMeanParams p, int segments, int row_warps) {
    using Real = RealOf<T>;
    SEDD_DYNAMIC_SHARED(double, memory);
    // Every warp reaches the barrier, whether its row exists and moves or not.
    const Task<T> task(p, row_warps);
    const Shared<Real> shared(memory, task.slot, static_cast<int>(blockDim.x) / (kWarp * row_warps), segments);
    Term<kPower, T> term = task.template term<kPower>(p);
    if (task.moves()) {
        for (int s = task.first_segment; s < segments; s += row_warps) {
            const SegmentSums<Real> sums = segment_sums(task.logits, task.dim, s, task.x, term);
            if (lane_of() == 0) shared.sums[s] = sums;
        }
    }
    __syncthreads();  // wait for the sums of the segments
    if (!task.exists || !task.leads()) return;
    int64_t token = p.targets != nullptr ? 0 : task.stays_at(p);
    if (task.moves()) {
        const SegmentSums<double> sums = row_sums<kPower>(shared.sums, segments, shared.picks);
        if (p.sums != nullptr) {
            const bool is_here = 0 <= task.x && task.x < task.dim;
            const double logit_x = is_here ? static_cast<double>(Vector<T>::read(task.logits + task.x)) : 0.0;
            if (lane_of() == 0) p.sums[task.row] = {sums.top, sums.exps, sums.weighted, logit_x};
            return;
        }
        double point = -1.0;  // in [0, 1] of the running sum of μ, if the token comes from there
        if (p.targets != nullptr) {
            point = p.targets[task.row];
        } else {
            const MeanMasses masses = task.masses(p, sums);
            token = -1;
            if (valid_masses(masses)) {
                const Uniforms u = mean_uniforms(p, task.row);
                const MeanPart part = mean_part(masses, u.first);
                if (part == MeanPart::x) token = task.token;
                if (part == MeanPart::pi) token = draw_stationary_without(p, excluded_tokens(p, task.token), u.second);
                if (part == MeanPart::mu) point = u.second;
            }
        }
        if (point >= 0.0) {
            const double all = sum_segments(shared.picks, segments);
            const Pick pick = pick_segment(shared.picks, segments, point * all);
            term.top = shared.sums[pick.segment].top;
            token = p.first + pick_entry(task.logits, task.dim, pick.segment, task.x, term, pick.share);
        }
    }
    if (lane_of() == 0) static_cast<int64_t*>(p.out)[task.row] = token;
}

// Where the token of each row comes from. One thread per row.
template <class Real>
__global__ void __launch_bounds__(kWarps* kWarp) mean_choose_kernel(ReverseMeanParams p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kWarps * kWarp) + static_cast<int>(threadIdx.x);
    if (row < p.rows) static_cast<int64_t*>(p.out)[row] = choose_mean<Real>(p, row);
}

// ---- launchers ----

template <bool kSample, Family P, class T, bool kPower>
const char* launch_typed(const ReverseMeanParams& p, const CudaLaunch& launch) {
    if (const char* why = too_large(p.rows, p.dim, p.rows)) return why;
    const int segments = static_cast<int>(num_segments(p.width, p.dtype));
    constexpr int wanted = kSample ? kWarps : kMaxWarps;
    int row_warps = 1;
    while (row_warps < wanted && row_warps < segments) row_warps *= 2;
    row_warps = row_warps < wanted ? row_warps : wanted;
    const int block_rows = row_warps < kWarps ? kWarps / row_warps : 1;
    const int64_t state_bytes = kSample ? 0 : sizeof(MeanState);
    const int64_t shared_bytes = block_rows * state_bytes + Shared<RealOf<T>>::bytes(block_rows, segments);
    if (shared_bytes > kSharedBytes) return "rows too wide for the CUDA kernels of the reverse steps";
    const unsigned blocks = blocks_for(p.rows, block_rows);
    const int threads = block_rows * row_warps * kWarp;
    if constexpr (kSample) {
        SEDD_LAUNCH((mean_sample_kernel<P, T, kPower>), blocks, threads, static_cast<size_t>(shared_bytes),
                    stream_of(launch), p, segments, row_warps);
    } else {
        const int64_t row_bytes = kept_bytes(p.width, p.dtype), all_bytes = block_rows * row_bytes + shared_bytes;
        if (takes_shared(mean_probs_kernel<P, T, kPower, true>, all_bytes, launch.device)) {
            SEDD_LAUNCH((mean_probs_kernel<P, T, kPower, true>), blocks, threads, static_cast<size_t>(all_bytes),
                        stream_of(launch), p, segments, row_warps, static_cast<int>(row_bytes));
        } else {
            SEDD_LAUNCH((mean_probs_kernel<P, T, kPower, false>), blocks, threads, static_cast<size_t>(shared_bytes),
                        stream_of(launch), p, segments, row_warps, 0);
        }
    }
    return launch_error();
}

template <bool kSample>
const char* launch_all(const ReverseMeanParams& p, const CudaLaunch& launch) {
    return on_device(p, launch, [&](auto family, auto* type) -> const char* {
        using T = std::remove_pointer_t<decltype(type)>;
        if constexpr (family.value == Family::absorbing) {
            if (p.power != nullptr) return launch_typed<kSample, family.value, T, true>(p, launch);
        }
        return launch_typed<kSample, family.value, T, false>(p, launch);
    });
}

}  // namespace

const char* reverse_mean_probs_cuda(const ReverseMeanParams& p, const CudaLaunch& launch) {
    return launch_all<false>(p, launch);
}

const char* reverse_mean_sample_cuda(const ReverseMeanParams& p, const CudaLaunch& launch) {
    return launch_all<true>(p, launch);
}

const char* reverse_mean_choose_cuda(const ReverseMeanParams& p, const CudaLaunch& launch) {
    if (p.rows == 0) return nullptr;
    if (const char* why = use_device(launch.device)) return why;
    if (const char* why = too_large(p.rows, p.width, p.rows)) return why;
    const unsigned blocks = blocks_for(p.rows, kWarps * kWarp);
    if (p.dtype == DType::float64) {
        SEDD_LAUNCH((mean_choose_kernel<double>), blocks, kWarps * kWarp, 0, stream_of(launch), p);
    } else {
        SEDD_LAUNCH((mean_choose_kernel<float>), blocks, kWarps * kWarp, 0, stream_of(launch), p);
    }
    return launch_error();
}

}  // namespace sedd

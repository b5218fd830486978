// Reverse steps. A kernel adds up the scores of each segment and computes the numbers of the row. Then it draws a token
// or writes all probabilities. To draw a token, one random number selects a segment, and only this segment is read
// again. No kernel writes intermediate probabilities, clamped scores, cumulative sums or Gumbel noise of size rows × N.
//
// Bytes per element: a sample reads 4 (float32) or 2 once, and 2 KiB of each row again. Where the clamp max(0, ·) needs
// the total first (Tweedie with a π that is spread out; Euler that must not return MASK), the few rows whose entry is
// rejected are read once more. Probabilities need a second pass over every row, and a third one if they are clamped.
// The first pass copies the row to shared memory (kept.cuh), from which the others read it, and memory is read once. A
// row too large for that (50,258 float32 on sm_80 and sm_120, 262,144 on all) is read again by the same block
// immediately, and should then come from the L2 cache. Instructions per element: 11 to 13 in a pass (8 of them for
// expf, with one MUFU.EX2), 5 for 16-bit types, 4 to 6 more for the clamp, and 2 or 1 to copy.
//
// Configuration: one block per row, because the total of a row combines the sums of its segments. The warps of a block
// take segments in turn and store the sums in shared memory. After a barrier, the first warp draws the token, or
// computes the totals for the next pass of all warps. For samples, a block has 8 warps. Three or four blocks then share
// a multiprocessor, and one adds up while another draws. For probabilities, a block has 24 warps. A multiprocessor has
// registers for one such block, so that its row may take all of the shared memory. Rows of up to four segments share a
// block of 8 warps. If there are few rows that are not kept, a separate kernel with one warp per segment divides the
// first pass, which reads from memory, among all multiprocessors. The sum of a segment, and the order of the sums, are
// the same in all configurations.
//
// Rows with π_x = 0 (unmasked tokens of absorbing diffusion) are not read. A bad row gets probabilities of NaN, or
// token -1.
#include "reverse.h"

#include "cuda/draw.cuh"
#include "cuda/kept.cuh"

namespace sedd {
namespace {

constexpr int kMaxWarps = 24;       // per block, for 80 registers per thread; 32 warps leave 64, and threads spill
constexpr int64_t kFewRows = 1024;  // this many blocks of 8 warps fill 132 multiprocessors
constexpr int64_t kSharedBytes = 48 << 10;

// π_x of a row. Requires a valid x.
template <class Real, class Params>
__device__ __forceinline__ double row_pi(const Params& p, int64_t row) {
    return stationary_at(p.family, static_cast<const Real*>(p.stationary), p.dim, p.x_t[row]);
}

template <class Real, class Params>
__device__ __forceinline__ Real row_shift(const Params& p, int64_t row) {
    return p.shift != nullptr ? static_cast<Real>(p.shift[row]) : Real(0);
}

// The work of a warp: `row_warps` warps of a block share a row and take its segments in turn.
template <class Real>
struct Task {
    int slot, first_segment;  // index of the row in its block, and of the warp in its row
    int64_t row;
    bool exists, fault;
    double pi_x;  // 0 if there is nothing to do
    Real shift;

    template <class Params>
    __device__ __forceinline__ Task(const Params& p, int row_warps) {
        const int warp = static_cast<int>(threadIdx.x) / kWarp;
        slot = warp / row_warps;
        first_segment = warp % row_warps;
        row = static_cast<int64_t>(blockIdx.x) * (static_cast<int>(blockDim.x) / (kWarp * row_warps)) + slot;
        exists = row < p.rows;
        fault = exists && reverse_fault(p, row) != Fault::none;
        pi_x = exists && !fault ? row_pi<Real>(p, row) : 0.0;
        shift = moves() ? row_shift<Real>(p, row) : Real(0);
    }
    __device__ __forceinline__ bool moves() const { return pi_x > 0.0; }
    __device__ __forceinline__ bool leads() const { return first_segment == 0; }
    // The token of a row that does not move, or -1 if the row is bad.
    template <class Params>
    __device__ __forceinline__ int64_t stays_at(const Params& p) const {
        return exists && !fault && p.x_t[row] != p.forbidden ? p.x_t[row] : -1;
    }
};

// The first pass as a kernel of its own, for few rows.
template <class T>
__global__ void __launch_bounds__(kWarps* kWarp) sums_kernel(ReverseParams p, RowSplit split, RealOf<T>* sums) {
    using Real = RealOf<T>;
    const Place place = place_of(split);
    if (place.row >= p.rows || place.segment >= split.segments) return;
    if (reverse_fault(p, place.row) != Fault::none || row_pi<Real>(p, place.row) == 0.0) return;
    const T* row = static_cast<const T*>(p.log_score) + place.row * p.dim;
    const Real sum = segment_scores(row, static_cast<int>(p.dim), place.segment, static_cast<int>(p.x_t[place.row]),
                                    Shifted<T>(row_shift<Real>(p, place.row)));
    if (lane_of() == 0) sums[place.row * split.segments + place.segment] = sum;
}

// w_y of one row for y ≠ x. The drain is 0 if the weights are the scores.
template <Family P, class T, class Real = RealOf<T>>
struct Weights {
    const Real* stationary;
    Shifted<T> score;
    Drain<Real> drain;
    int forbidden;

    __device__ __forceinline__ Real operator()(int y, Real l) const {
        const Real s = score(l);
        if constexpr (P == Family::absorbing) return s;
        const Real w = drained(s, drain, P == Family::rank_one ? stationary[y] : Real(1));
        return w > Real(0) && y != forbidden ? w : Real(0);
    }
};

// Σ w_y over a segment, without y = x; the same number on every lane.
template <Family P, class T, class Real = RealOf<T>>
__device__ __forceinline__ Real segment_weights(const T* row, int dim, int segment, int x,
                                                const Weights<P, T>& weights) {
    Real sum = 0;
    visit(
        row, dim, segment, x,
        [&](int y, Real(&l)[Vector<T>::kWidth]) {
#pragma unroll
            for (int j = 0; j < Vector<T>::kWidth; ++j) l[j] = weights(y + j, l[j]);
            sum += sum_of(l);
        },
        [&](int y, Real l) { sum += weights(y, l); });
    return warp_sum(sum);
}

// A factor with the precision of the compute type and the range of float64: the total of a row may overflow float32.
template <class Real>
struct Scale {
    Real first, second;

    __device__ __forceinline__ explicit Scale(double factor)
        : second(static_cast<Real>(factor < 0x1p-64  ? 0x1p-64
                                   : factor > 0x1p64 ? 0x1p64
                                                     : 1.0)) {
        first = static_cast<Real>(factor / static_cast<double>(second));
    }
    __device__ __forceinline__ Real operator()(Real value) const { return value * first * second; }
};

// Writes the probabilities of a segment.
template <Family P, class T, class Real = RealOf<T>>
__device__ __forceinline__ void write_probs(Real* out, const T* row, int dim, int segment, int x, Real self,
                                            const Weights<P, T>& weights, const Scale<Real>& scale) {
    constexpr int width = Vector<T>::kWidth, out_width = Vector<Real>::kWidth;
    const auto prob = [&](int y, Real l) { return scale(weights(y, l)); };
    visit(
        row, dim, segment, -1,
        [&](int y, Real(&l)[width]) {
#pragma unroll
            for (int k = 0; k < width; k += out_width) {
                Real part[out_width];
#pragma unroll
                for (int j = 0; j < out_width; ++j) part[j] = prob(y + k + j, l[k + j]);
                if (static_cast<unsigned>(x - y - k) < static_cast<unsigned>(out_width)) {
#pragma unroll
                    for (int j = 0; j < out_width; ++j) part[j] = x == y + k + j ? self : part[j];
                }
                write_vector(out + y + k, part);
            }
        },
        [&](int y, Real l) { out[y] = y == x ? self : prob(y, l); });
}

// The state of a row that the warps of a block share.
struct RowState {
    ReverseRow numbers;
    double others;  // Σ_{y≠x} s_y
    double self;    // w(x)
    double total;   // Σ_y w_y; NaN if the row has no distribution

    __device__ __forceinline__ void add_up(double sum) {
        total = valid_total(1.0 + others) && valid_total(self + sum) ? self + sum : not_a_number<double>();
    }
};

// Shared memory of a block: its rows if they are kept, then their states, then the sums of their segments.
template <Family P, class T, bool kKeep>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 1)
    probs_kernel(ReverseParams p, int segments, int row_warps, bool clamped, int row_bytes, const RealOf<T>* few_sums) {
    using Real = RealOf<T>;
    SEDD_DYNAMIC_SHARED(unsigned char, memory);
    // Every warp reaches every barrier, whether its row exists and moves or not.
    const Task<Real> task(p, row_warps);
    const bool moves = task.moves(), first_lane = lane_of() == 0;
    const int dim = static_cast<int>(p.dim), x = moves ? static_cast<int>(p.x_t[task.row]) : -1;
    const int block_rows = static_cast<int>(blockDim.x) / (kWarp * row_warps);
    RowState* const states = reinterpret_cast<RowState*>(memory + block_rows * row_bytes);
    Real* const sums = reinterpret_cast<Real*>(states + block_rows) + task.slot * segments;
    RowState& state = states[task.slot];
    const T* const in_memory = static_cast<const T*>(p.log_score) + (moves ? task.row * p.dim : 0);
    T* const kept = place_to_keep(memory + task.slot * row_bytes, in_memory);
    const T* const log_score = kKeep ? kept : in_memory;
    Weights<P, T> weights{
        static_cast<const Real*>(p.stationary), Shifted<T>(task.shift), {}, static_cast<int>(p.forbidden)};

    if (moves) {
        if constexpr (kKeep) {
            keep_segments(kept, in_memory, dim, task.first_segment, segments, row_warps);
        }
        if (task.leads() && first_lane) state.numbers = reverse_row(p.step, p.noise[task.row], task.pi_x);
        for (int s = task.first_segment; s < segments; s += row_warps) {
            if constexpr (kKeep) wait_for_segment();
            const Real sum = !kKeep && few_sums != nullptr ? few_sums[task.row * segments + s]
                                                           : segment_scores(log_score, dim, s, x, weights.score);
            if (first_lane) sums[s] = sum;
        }
    }
    __syncthreads();  // wait for the sums of the segments
    if (moves && task.leads()) {
        const double others = sum_segments(sums, segments);
        if (first_lane) {
            state.others = others;
            state.self = reverse_stay(p, state.numbers, others, task.pi_x, x == p.forbidden);
            state.add_up(others);
        }
    }
    if (clamped) {
        __syncthreads();  // wait for the total, and until the sums are read
        if (moves) {
            weights.drain = reverse_drain<Real>(p, state.numbers, state.others);
            for (int s = task.first_segment; s < segments; s += row_warps) {
                const Real sum = segment_weights(log_score, dim, s, x, weights);
                if (first_lane) sums[s] = sum;
            }
        }
        __syncthreads();  // wait for the weights of the segments
        if (moves && task.leads()) {
            const double sum = sum_segments(sums, segments);
            if (first_lane) state.add_up(sum);
        }
    }
    __syncthreads();  // wait for the total
    if (!task.exists) return;
    Real* out = static_cast<Real*>(p.out) + task.row * p.dim;
    if (moves) {
        const double inverse = 1.0 / state.total;
        const Real self = static_cast<Real>(state.self * inverse);
        const Scale<Real> scale(inverse);
        for (int s = task.first_segment; s < segments; s += row_warps) {
            write_probs(out, log_score, dim, s, x, self, weights, scale);
        }
    } else {
        const int64_t token = task.stays_at(p);
        const Real rest = token >= 0 ? Real(0) : not_a_number<Real>();
        for (int s = task.first_segment; s * kSegmentVectors < dim / Vector<Real>::kWidth + 2; s += row_warps) {
            write_segment(out, dim, s, [&](int y) { return y == token ? Real(1) : rest; });
        }
    }
}

struct SampleState {
    ReverseRow numbers;
    double others;
    bool refused;  // whether the entry of the first sweep is rejected
};

template <Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 3)
    sample_kernel(ReverseParams p, int segments, int row_warps, bool clamped, const RealOf<T>* few_sums) {
    using Real = RealOf<T>;
    SEDD_DYNAMIC_SHARED(Real, all_sums);
    __shared__ SampleState states[kWarps];
    // Every warp reaches every barrier, whether its row exists and moves or not.
    const Task<Real> task(p, row_warps);
    const bool first_lane = lane_of() == 0;
    bool moves = task.moves();
    const int dim = static_cast<int>(p.dim), x = moves ? static_cast<int>(p.x_t[task.row]) : -1;
    const T* log_score = static_cast<const T*>(p.log_score) + (moves ? task.row * p.dim : 0);
    const Real* stationary = static_cast<const Real*>(p.stationary);
    Real* sums = all_sums + task.slot * segments;
    SampleState& state = states[task.slot];
    Weights<P, T> weights{stationary, Shifted<T>(task.shift), {}, -1};

    if (moves) {
        if (task.leads() && first_lane) state.numbers = reverse_row(p.step, p.noise[task.row], task.pi_x);
        for (int s = task.first_segment; s < segments; s += row_warps) {
            const Real sum = few_sums != nullptr ? few_sums[task.row * segments + s]
                                                 : segment_scores(log_score, dim, s, x, weights.score);
            if (first_lane) sums[s] = sum;
        }
    }
    // The entry at a point of the running sum, in which x comes first; -1 if the row has no distribution. Called by a
    // whole warp.
    const auto draw = [&](double sum, double others, double point) -> int {
        const double self = reverse_stay(p, state.numbers, others, task.pi_x, x == p.forbidden);
        if (!valid_total(1.0 + others) || !valid_total(self + sum)) return -1;
        const double target = point * (self + sum) - self;
        if (target < 0.0 || sum == 0.0) return x;
        const Pick pick = pick_segment(sums, segments, target);
        return pick_entry(log_score, dim, pick.segment, x, weights, pick.share);
    };
    const auto uniforms = [&](uint64_t sweep) {
        return row_uniforms(static_cast<uint64_t>(*p.seed), static_cast<uint64_t>(task.row), sweep);
    };
    int64_t token = task.stays_at(p);
    __syncthreads();  // wait for the sums of the scores
    if (moves && task.leads()) {
        const double others = sum_segments(sums, segments);
        const Uniforms u = uniforms(0);
        const int y = draw(others, others, u.first);
        token = y;
        if (P != Family::absorbing && clamped) {
            bool refused = false;
            if (y >= 0 && y != x) {
                const double score = static_cast<double>(weights.score(Vector<T>::read(log_score + y)));
                const Drain<double> drain = converted<double>(reverse_drain<Real>(p, state.numbers, others));
                refused =
                    !(u.second * score < reverse_weight(p, score, drain, stationary_at(P, stationary, p.dim, y), y));
            }
            if (first_lane) {
                state.others = others;
                state.refused = refused;
            }
        }
    }
    if (P != Family::absorbing && clamped) {
        __syncthreads();  // wait for `refused`, and until the sums are read
        moves = moves && state.refused;
        if (moves) {
            weights.drain = reverse_drain<Real>(p, state.numbers, state.others);
            weights.forbidden = static_cast<int>(p.forbidden);
            for (int s = task.first_segment; s < segments; s += row_warps) {
                const Real sum = segment_weights(log_score, dim, s, x, weights);
                if (first_lane) sums[s] = sum;
            }
        }
        __syncthreads();  // wait for the sums of the weights
        if (moves && task.leads()) token = draw(sum_segments(sums, segments), state.others, uniforms(1).first);
    }
    if (task.exists && task.leads() && first_lane) static_cast<int64_t*>(p.out)[task.row] = token;
}

// Adds a tile to the state of its rows, and may replace the drawn entry by one of the tile.
template <Family P, class T>
__global__ void __launch_bounds__(kWarps* kWarp, 3) tile_kernel(ReverseTileParams p, int segments, int row_warps) {
    using Real = RealOf<T>;
    SEDD_DYNAMIC_SHARED(Real, all_sums);
    // Every warp reaches the barrier, whether its row exists and moves or not.
    const Task<Real> task(p, row_warps);
    const bool first_lane = lane_of() == 0;
    Real* sums = all_sums + task.slot * segments;
    const int64_t x_here = (task.exists ? p.x_t[task.row] : -1) - p.first;
    const int width = static_cast<int>(p.width), skip = 0 <= x_here && x_here < p.width ? static_cast<int>(x_here) : -1;
    const T* log_score = static_cast<const T*>(p.log_score) + (task.moves() ? task.row * p.stride : 0);
    const Real* stationary = static_cast<const Real*>(p.stationary);
    Weights<P, T> weights{P == Family::rank_one ? stationary + p.first : nullptr,
                          Shifted<T>(task.shift),
                          {},
                          p.sweep != 0 ? static_cast<int>(p.forbidden - p.first) : -1};
    if (task.moves()) {
        if (p.sweep == 0) {
            for (int s = task.first_segment; s < segments; s += row_warps) {
                const Real sum = segment_scores(log_score, width, s, skip, weights.score);
                if (first_lane) sums[s] = sum;
            }
        } else {
            weights.drain = converted<Real>(p.draws[task.row].drain);
            for (int s = task.first_segment; s < segments; s += row_warps) {
                const Real sum = segment_weights(log_score, width, s, skip, weights);
                if (first_lane) sums[s] = sum;
            }
        }
    }
    __syncthreads();  // wait for the sums of the segments, and until the drain is read
    if (!task.exists || !task.leads()) return;
    if (!task.moves()) {
        if (first_lane) p.out[task.row] = task.stays_at(p);
        return;
    }
    const double sum = sum_segments(sums, segments);
    if (p.sums != nullptr) {
        if (first_lane) p.sums[task.row] = sum;
        return;
    }
    ReverseDraw draw = p.draws[task.row];
    const bool at_target = p.targets != nullptr;
    if (!at_target) {
        if (p.first == 0) draw = {draw.others, draw.drain, 0.0, 0.0, -1};
        draw.total += sum;
    }
    const double target = at_target ? p.targets[task.row] : tile_target(p, p.first, task.row, draw.total);
    if (at_target || target < sum) {
        const Pick pick = pick_segment(sums, segments, target);
        const int entry = pick_entry(log_score, width, pick.segment, skip, weights, pick.share);
        if (entry >= 0) {
            draw.token = p.first + entry;
            draw.score = static_cast<double>(weights.score(Vector<T>::read(log_score + entry)));
        }
    }
    __syncwarp();  // wait until every lane has read the state
    if (!first_lane) return;
    if (p.first + p.width == p.dim) {
        const ReverseRow numbers = reverse_row(p.step, p.noise[task.row], task.pi_x);
        const double pi_y = draw.token >= 0 ? stationary_at(P, stationary, p.dim, draw.token) : 0.0;
        p.out[task.row] = finish_draw<Real>(p, task.row, numbers, draw, task.pi_x, pi_y);
    }
    p.draws[task.row] = draw;
}

// Chooses the part of a tile from which each row's entry comes. One thread per row.
__global__ void __launch_bounds__(kWarps* kWarp, 2) choose_kernel(ReverseChoiceParams p) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * (kWarps * kWarp) + static_cast<int>(threadIdx.x);
    if (row < p.rows) choose_part(p, row);
}

// ---- launchers ----

template <Family P, class T>
const char* launch_tile(const ReverseTileParams& p, const CudaLaunch& launch) {
    const int segments = static_cast<int>(num_segments(p.width, p.dtype));
    int row_warps = 1;
    while (row_warps < kWarps && row_warps < segments) row_warps *= 2;
    const int block_rows = kWarps / row_warps;
    const int64_t shared_bytes = static_cast<int64_t>(sizeof(RealOf<T>)) * block_rows * segments;
    if (const char* why = too_large(p.rows, p.width, p.rows)) return why;
    if (shared_bytes > kSharedBytes) return "tiles too wide for the CUDA kernels of the reverse steps";
    SEDD_LAUNCH((tile_kernel<P, T>), blocks_for(p.rows, block_rows), kWarps * kWarp, static_cast<size_t>(shared_bytes),
                stream_of(launch), p, segments, row_warps);
    return launch_error();
}

// Whether the first pass has a kernel of its own.
bool splits(int64_t rows, int64_t segments) { return rows <= kFewRows && segments > kWarps; }

template <bool kSample, Family P, class T>
const char* launch_typed(const ReverseParams& p, const CudaLaunch& launch) {
    using Real = RealOf<T>;
    if (const char* why = too_large(p.rows, p.dim, p.rows)) return why;
    const RowSplit split = split_rows(p.dim, p.dtype);
    const bool clamped = P != Family::absorbing && (p.step == Step::tweedie || p.forbidden >= 0);
    constexpr int wanted = kSample ? kWarps : kMaxWarps;
    int row_warps = 1;
    while (row_warps < wanted && row_warps < split.segments) row_warps *= 2;
    row_warps = row_warps < wanted ? row_warps : wanted;
    const int block_rows = row_warps < kWarps ? kWarps / row_warps : 1;
    const int64_t state_bytes = kSample ? 0 : sizeof(RowState);
    const int64_t shared_bytes = block_rows * (state_bytes + static_cast<int64_t>(sizeof(Real)) * split.segments);
    if (shared_bytes > kSharedBytes) return "rows too wide for the CUDA kernels of the reverse steps";
    const unsigned blocks = blocks_for(p.rows, block_rows);
    const int threads = block_rows * row_warps * kWarp;
    if constexpr (!kSample) {
        const int64_t row_bytes = kept_bytes(p.dim, p.dtype), all_bytes = block_rows * row_bytes + shared_bytes;
        if (takes_shared(probs_kernel<P, T, true>, all_bytes, launch.device)) {
            SEDD_LAUNCH((probs_kernel<P, T, true>), blocks, threads, static_cast<size_t>(all_bytes), stream_of(launch),
                        p, split.segments, row_warps, clamped, static_cast<int>(row_bytes), nullptr);
            return launch_error();
        }
    }
    Real* few_sums = nullptr;
    if (splits(p.rows, split.segments)) {
        few_sums = static_cast<Real*>(launch.workspace);
        SEDD_LAUNCH((sums_kernel<T>), blocks_for(split_blocks(split, p.rows), 1), kWarps * kWarp, 0, stream_of(launch),
                    p, split, few_sums);
    }
    if constexpr (kSample) {
        SEDD_LAUNCH((sample_kernel<P, T>), blocks, threads, static_cast<size_t>(shared_bytes), stream_of(launch), p,
                    split.segments, row_warps, clamped, few_sums);
    } else {
        SEDD_LAUNCH((probs_kernel<P, T, false>), blocks, threads, static_cast<size_t>(shared_bytes), stream_of(launch),
                    p, split.segments, row_warps, clamped, 0, few_sums);
    }
    return launch_error();
}

template <bool kSample>
const char* launch_all(const ReverseParams& p, const CudaLaunch& launch) {
    return on_device(p, launch, [&](auto family, auto* type) {
        return launch_typed<kSample, family.value, std::remove_pointer_t<decltype(type)>>(p, launch);
    });
}

}  // namespace

const char* reverse_probs_cuda(const ReverseParams& p, const CudaLaunch& launch) {
    return launch_all<false>(p, launch);
}

const char* reverse_sample_cuda(const ReverseParams& p, const CudaLaunch& launch) {
    return launch_all<true>(p, launch);
}

const char* reverse_tile_cuda(const ReverseTileParams& p, const CudaLaunch& launch) {
    return on_device(p, launch, [&](auto family, auto* type) {
        return launch_tile<family.value, std::remove_pointer_t<decltype(type)>>(p, launch);
    });
}

const char* reverse_choose_cuda(const ReverseChoiceParams& p, const CudaLaunch& launch) {
    if (p.rows == 0) return nullptr;
    if (const char* why = use_device(launch.device)) return why;
    if (const char* why = too_large(p.rows, p.width, p.rows)) return why;
    SEDD_LAUNCH(choose_kernel, blocks_for(p.rows, kWarps * kWarp), kWarps * kWarp, 0, stream_of(launch), p);
    return launch_error();
}

int64_t reverse_workspace(int64_t rows, int64_t dim, DType dtype) {
    const int64_t segments = num_segments(dim, dtype);
    return splits(rows, segments) ? rows * segments * real_bytes(dtype) : 0;
}

}  // namespace sedd

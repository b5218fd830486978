// Selects the best kernels that this machine supports, once, and runs them over the rows.
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace sedd {
namespace {

#define SEDD_TABLE(isa)                                                                                       \
    KernelTable {                                                                                             \
        #isa, isa::score_entropy, isa::score_entropy_backward, isa::score_entropy_tile, isa::mean_prediction, \
            isa::mean_prediction_backward, isa::reverse_probs, isa::reverse_sample, isa::reverse_tile,        \
            isa::reverse_mean_probs, isa::reverse_mean_sample, isa::unmask, isa::generalized_masked,          \
            isa::generalized_masked_backward, isa::generalized_masked_power                                   \
    }

bool runs_here(const char* isa) {
#if defined(SEDD_X86)
    __builtin_cpu_init();
    if (std::strcmp(isa, "avx512") == 0) {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    }
    if (std::strcmp(isa, "avx2") == 0) {
        // every processor with AVX2 has F16C, which older compilers cannot test here
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
#endif
    return std::strcmp(isa, "baseline") == 0;
}

const KernelTable tables[] = {
#if defined(SEDD_X86)
    SEDD_TABLE(avx512),
    SEDD_TABLE(avx2),
#endif
    SEDD_TABLE(baseline),
};

const KernelTable* best() {
    const KernelTable* table = tables;
    while (!runs_here(table->isa)) ++table;
    return table;
}

std::atomic<const KernelTable*>& current() {
    static std::atomic<const KernelTable*> table{best()};
    return table;
}

template <class Params>
Status launch(RowKernel<Params> kernel, const Params& p, int64_t width, int64_t scratch_bytes, int threads) {
    return parallel_rows(
        p.rows, width, scratch_bytes, threads,
        [&](int64_t begin, int64_t end, void* scratch, Status& status) { kernel(p, begin, end, scratch, status); });
}

}  // namespace

const KernelTable& kernels() { return *current().load(); }

int available_isas(const char** names, int capacity) {
    int count = 0;
    for (const KernelTable& table : tables) {
        if (runs_here(table.isa) && count < capacity) names[count++] = table.isa;
    }
    return count;
}

bool select_isa(const char* name) {
    for (const KernelTable& table : tables) {
        if (std::strcmp(table.isa, name) == 0 && runs_here(name)) {
            current() = &table;
            return true;
        }
    }
    return false;
}

Status score_entropy_cpu(const ScoreEntropyParams& p, int threads) {
    return launch(kernels().score_entropy(p.dtype, p.family), p, p.dim, 0, threads);
}

Status score_entropy_backward_cpu(const ScoreEntropyParams& p, int threads) {
    return launch(kernels().score_entropy_backward(p.dtype, p.family), p, p.dim, 0, threads);
}

Status score_entropy_tile_cpu(const ScoreEntropyTileParams& p, int threads) {
    return launch(kernels().score_entropy_tile(p.dtype, p.family), p, p.width, 0, threads);
}

Status mean_prediction_cpu(const MeanPredictionParams& p, int threads) {
    return launch(kernels().mean_prediction(p.dtype, p.family), p, p.width, 0, threads);
}

Status mean_prediction_backward_cpu(const MeanPredictionParams& p, int threads) {
    return launch(kernels().mean_prediction_backward(p.dtype, p.family), p, p.width, 0, threads);
}

Status reverse_probs_cpu(const ReverseParams& p, int threads) {
    return launch(kernels().reverse_probs(p.dtype, p.family), p, p.dim, 0, threads);
}

Status reverse_sample_cpu(const ReverseParams& p, int threads) {
    return launch(kernels().reverse_sample(p.dtype, p.family), p, p.dim, reverse_scratch(p.dim), threads);
}

Status reverse_tile_cpu(const ReverseTileParams& p, int threads) {
    return launch(kernels().reverse_tile(p.dtype, p.family), p, p.width, reverse_scratch(p.width), threads);
}

Status reverse_choose_cpu(const ReverseChoiceParams& p, int threads) {
    // a random number, of each tile, takes as long as some ten entries
    return parallel_rows(p.rows, 64 * (p.parts + 1), 0, threads, [&](int64_t begin, int64_t end, void*, Status&) {
        for (int64_t row = begin; row < end; ++row) choose_part(p, row);
    });
}

Status reverse_mean_probs_cpu(const ReverseMeanParams& p, int threads) {
    return launch(kernels().reverse_mean_probs(p.dtype, p.family, p.power != nullptr), p, p.dim,
                  reverse_mean_scratch(p.dim), threads);
}

Status reverse_mean_sample_cpu(const ReverseMeanParams& p, int threads) {
    return launch(kernels().reverse_mean_sample(p.dtype, p.family, p.power != nullptr), p, p.width,
                  reverse_mean_scratch(p.width), threads);
}

Status reverse_mean_choose_cpu(const ReverseMeanParams& p, int threads) {
    return parallel_rows(p.rows, 64, 0, threads, [&](int64_t begin, int64_t end, void*, Status& status) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t token = p.dtype == DType::float64 ? choose_mean<double>(p, row) : choose_mean<float>(p, row);
            static_cast<int64_t*>(p.out)[row] = token;
            if (token < 0) report(status, Fault::total, row);
        }
    });
}

Status unmask_cpu(const UnmaskParams& p, int threads) {
    return launch(kernels().unmask(p.dtype, unmask_sums(p)), p, p.width, reverse_mean_scratch(p.width), threads);
}

Status generalized_masked_cpu(const GeneralizedMaskedParams& p, int threads) {
    return launch(kernels().generalized_masked(p.dtype), p, p.width, 0, threads);
}

Status generalized_masked_backward_cpu(const GeneralizedMaskedParams& p, int threads) {
    return launch(kernels().generalized_masked_backward(p.dtype), p, p.width, 0, threads);
}

Status generalized_masked_power_cpu(const GeneralizedMaskedParams& p, int threads) {
    const RowKernel<GeneralizedMaskedParams> kernel = kernels().generalized_masked_power(p.dtype);
    const int64_t blocks = (p.width + kPowerColumns - 1) / kPowerColumns;
    return parallel_rows(
        blocks, p.rows * kPowerColumns, 0, threads,
        [&](int64_t begin, int64_t end, void* scratch, Status& status) { kernel(p, begin, end, scratch, status); });
}

}  // namespace sedd

// The row kernels, compiled once per instruction set, and the table from which the launchers select at run time.
#pragma once

#include "generalized_masked.h"
#include "mean_prediction.h"
#include "reverse.h"
#include "reverse_mean.h"
#include "score_entropy.h"
#include "unmask.h"

namespace sedd {

// Works on rows [begin, end). `scratch` is memory of the calling thread.
template <class Params>
using RowKernel = void (*)(const Params& params, int64_t begin, int64_t end, void* scratch, Status& status);

struct KernelTable {
    const char* isa;
    RowKernel<ScoreEntropyParams> (*score_entropy)(DType, Family);
    RowKernel<ScoreEntropyParams> (*score_entropy_backward)(DType, Family);
    RowKernel<ScoreEntropyTileParams> (*score_entropy_tile)(DType, Family);
    RowKernel<MeanPredictionParams> (*mean_prediction)(DType, Family);
    RowKernel<MeanPredictionParams> (*mean_prediction_backward)(DType, Family);
    RowKernel<ReverseParams> (*reverse_probs)(DType, Family);
    RowKernel<ReverseParams> (*reverse_sample)(DType, Family);
    RowKernel<ReverseTileParams> (*reverse_tile)(DType, Family);
    RowKernel<ReverseMeanParams> (*reverse_mean_probs)(DType, Family, bool has_power);
    RowKernel<ReverseMeanParams> (*reverse_mean_sample)(DType, Family, bool has_power);
    RowKernel<UnmaskParams> (*unmask)(DType, UnmaskSums);
    RowKernel<GeneralizedMaskedParams> (*generalized_masked)(DType);
    RowKernel<GeneralizedMaskedParams> (*generalized_masked_backward)(DType);
    RowKernel<GeneralizedMaskedParams> (*generalized_masked_power)(DType);  // takes blocks of columns
};

#define SEDD_DECLARE_KERNELS(isa)                                            \
    namespace isa {                                                          \
    RowKernel<ScoreEntropyParams> score_entropy(DType, Family);              \
    RowKernel<ScoreEntropyParams> score_entropy_backward(DType, Family);     \
    RowKernel<ScoreEntropyTileParams> score_entropy_tile(DType, Family);     \
    RowKernel<MeanPredictionParams> mean_prediction(DType, Family);          \
    RowKernel<MeanPredictionParams> mean_prediction_backward(DType, Family); \
    RowKernel<ReverseParams> reverse_probs(DType, Family);                   \
    RowKernel<ReverseParams> reverse_sample(DType, Family);                  \
    RowKernel<ReverseTileParams> reverse_tile(DType, Family);                \
    RowKernel<ReverseMeanParams> reverse_mean_probs(DType, Family, bool);    \
    RowKernel<ReverseMeanParams> reverse_mean_sample(DType, Family, bool);   \
    RowKernel<UnmaskParams> unmask(DType, UnmaskSums);                       \
    RowKernel<GeneralizedMaskedParams> generalized_masked(DType);            \
    RowKernel<GeneralizedMaskedParams> generalized_masked_backward(DType);   \
    RowKernel<GeneralizedMaskedParams> generalized_masked_power(DType);      \
    }

SEDD_DECLARE_KERNELS(baseline)
SEDD_DECLARE_KERNELS(avx2)
SEDD_DECLARE_KERNELS(avx512)

// The table in use: the best one that this machine supports, or that of select_isa.
const KernelTable& kernels();
// The number of tables that this machine supports, and their names, best first.
int available_isas(const char** names, int capacity);
// Uses the named table from now on. Returns false if it was not built or this machine does not support it.
bool select_isa(const char* name);

// Entries of a block. A sampler keeps the sums of blocks and reads only one block a second time.
constexpr int64_t kReverseBlock = 512;
static inline int64_t reverse_blocks(int64_t dim) { return (dim + kReverseBlock - 1) / kReverseBlock; }
// Bytes for the sums, and for the entries of one block.
static inline int64_t reverse_scratch(int64_t dim) { return 8 * (reverse_blocks(dim) + kReverseBlock); }
// With the largest logits of blocks too.
static inline int64_t reverse_mean_scratch(int64_t dim) { return reverse_scratch(dim) + 8 * reverse_blocks(dim); }

// Columns of a block of generalized_masked_power.
constexpr int64_t kPowerColumns = 1024;

// Keeps the fault with the smallest row, whichever thread finds it.
static inline void report(Status& status, Fault fault, int64_t row) {
    if (status.fault == Fault::none || row < status.row) status = {fault, row};
}

}  // namespace sedd

// What the bindings of the CPU's and of the CUDA kernels share: raw addresses, sizes and codes become parameters. No
// Torch header: any torch's tensors fit. Where a launcher works (its threads; its workspace, stream and device) comes
// last.
#pragma once

#include <pybind11/pybind11.h>

#include "reverse.h"
#include "score_entropy.h"
#include "transition.h"

namespace sedd {

template <class T = void>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

template <class Run, class... Where>
auto bind_score_entropy(uintptr_t log_score, uintptr_t x_t, uintptr_t x_0, uintptr_t sigma, uintptr_t shift,
                        uintptr_t stationary, uintptr_t grad_loss, uintptr_t out, double neg_entropy, int64_t rows,
                        int64_t dim, int dtype, int family, Where... where) {
    return Run()(
        ScoreEntropyParams{pointer(log_score), pointer<int64_t>(x_t), pointer<int64_t>(x_0), pointer<double>(sigma),
                           pointer<double>(shift), pointer(stationary), pointer(grad_loss), pointer(out), neg_entropy,
                           rows, dim, static_cast<DType>(dtype), static_cast<Family>(family)},
        where...);
}

template <class Run, class... Where>
auto bind_score_entropy_tile(uintptr_t log_score, uintptr_t x_t, uintptr_t x_0, uintptr_t sigma, uintptr_t shift,
                             uintptr_t stationary, uintptr_t grad_loss, uintptr_t sweeps, uintptr_t out,
                             double neg_entropy, int64_t rows, int64_t width, int64_t first, int64_t dim, int dtype,
                             int family, Where... where) {
    return Run()(
        ScoreEntropyTileParams{pointer(log_score), pointer<int64_t>(x_t), pointer<int64_t>(x_0), pointer<double>(sigma),
                               pointer<double>(shift), pointer(stationary), pointer<double>(grad_loss),
                               pointer<ScoreEntropySweep>(sweeps), pointer(out), neg_entropy, rows, width, first, dim,
                               static_cast<DType>(dtype), static_cast<Family>(family)},
        where...);
}

template <class Run, class... Where>
auto bind_reverse_tile(uintptr_t log_score, uintptr_t x_t, uintptr_t step, uintptr_t shift, uintptr_t stationary,
                       uintptr_t draws, uintptr_t out, uintptr_t seed, uintptr_t places, int64_t rows, int64_t width,
                       int64_t first, int64_t dim, int64_t forbidden, int dtype, int family, int kind, int sweep,
                       Where... where) {
    return Run()(
        ReverseTileParams{pointer(log_score), pointer<int64_t>(x_t), pointer<double>(step), pointer<double>(shift),
                          pointer(stationary), pointer<ReverseDraw>(draws), pointer<int64_t>(out),
                          pointer<int64_t>(seed), pointer<int64_t>(places), rows, width, first, dim, forbidden,
                          static_cast<DType>(dtype), static_cast<Family>(family), static_cast<Step>(kind), sweep},
        where...);
}

template <class Run, class... Where>
auto bind_transition(uintptr_t x, uintptr_t sigma, uintptr_t stationary, uintptr_t cumulative, uintptr_t out,
                     uintptr_t seed, int64_t rows, int64_t dim, int dtype, int family, Where... where) {
    return Run()(TransitionParams{pointer<int64_t>(x), pointer<double>(sigma), pointer(stationary),
                                  pointer<double>(cumulative), pointer(out), pointer<int64_t>(seed), rows, dim,
                                  static_cast<DType>(dtype), static_cast<Family>(family)},
                 where...);
}

template <class Run, class... Where>
auto bind_reverse(uintptr_t log_score, uintptr_t x_t, uintptr_t step, uintptr_t shift, uintptr_t stationary,
                  uintptr_t out, uintptr_t seed, int64_t rows, int64_t dim, int64_t forbidden, int dtype, int family,
                  int kind, Where... where) {
    return Run()(ReverseParams{pointer(log_score), pointer<int64_t>(x_t), pointer<double>(step), pointer<double>(shift),
                               pointer(stationary), pointer(out), pointer<int64_t>(seed), rows, dim, forbidden,
                               static_cast<DType>(dtype), static_cast<Family>(family), static_cast<Step>(kind)},
                 where...);
}

// csrc/cuda/bindings.cpp: name_cuda(..., workspace, stream, device) for every kernel, and name_workspace(rows, dim,
// dtype).
void bind_cuda(pybind11::module_& m);

}  // namespace sedd

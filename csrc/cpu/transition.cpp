// Columns, rows and samples of exp(σQ) on the CPU. Columns and rows are bound by writing the result, and samples need
// only one or two random numbers per row, so one build for all instruction sets is enough.
#include "transition.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace sedd {
namespace {

bool check_row(const TransitionParams& p, int64_t row, Status& status) {
    const Fault fault = transition_fault(p, row);
    if (fault != Fault::none) report(status, fault, row);
    return fault == Fault::none;
}

template <bool kColumn, class Real>
Status fill(const TransitionParams& p, int threads) {
    return parallel_rows(p.rows, p.dim, 0, threads, [&p](int64_t begin, int64_t end, void*, Status& status) {
        const Real* stationary = static_cast<const Real*>(p.stationary);
        // The positions of a sequence share σ, and often π_x: compute their exponential once.
        double sigma = -1.0, pi_x = -1.0;
        TransitionRow numbers{};
        for (int64_t row = begin; row < end; ++row) {
            if (!check_row(p, row, status)) continue;
            const int64_t x = p.x[row];
            const double pi = stationary_at(p.family, stationary, p.dim, x);
            if (p.sigma[row] != sigma || pi != pi_x) {
                numbers = transition_row(kColumn, p.family, sigma = p.sigma[row], pi_x = pi);
            }
            Real* out = static_cast<Real*>(p.out) + row * p.dim;
            if (kColumn && p.family == Family::rank_one) {
                const Real vector = static_cast<Real>(numbers.vector);
                for (int64_t y = 0; y < p.dim; ++y) out[y] = vector * stationary[y];
            } else {
                std::fill(out, out + p.dim, static_cast<Real>(numbers.constant));
                if (kColumn && p.family == Family::absorbing) out[p.dim - 1] = static_cast<Real>(numbers.at_mask);
            }
            out[x] = static_cast<Real>(numbers.at_x);
        }
    });
}

}  // namespace

Status transition_column_cpu(const TransitionParams& p, int threads) {
    return p.dtype == DType::float64 ? fill<true, double>(p, threads) : fill<true, float>(p, threads);
}

Status transition_row_cpu(const TransitionParams& p, int threads) {
    return p.dtype == DType::float64 ? fill<false, double>(p, threads) : fill<false, float>(p, threads);
}

Status sample_transition_cpu(const TransitionParams& p, int threads) {
    return parallel_rows(p.rows, 64, 0, threads, [&p](int64_t begin, int64_t end, void*, Status& status) {
        int64_t* out = static_cast<int64_t*>(p.out);
        double sigma = -1.0, b = 0.0;
        for (int64_t row = begin; row < end; ++row) {
            if (!check_row(p, row, status)) continue;
            if (p.sigma[row] != sigma) b = decay(sigma = p.sigma[row]).b;
            out[row] = draw_transition(p, row, b);
        }
    });
}

}  // namespace sedd

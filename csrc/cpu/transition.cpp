// Columns, rows and samples of exp(σQ) on the CPU. Bound by the write of the result (columns, rows) or by nothing at
// all (samples: one to two random numbers a row), so one build for all instruction sets is enough.
#include "transition.h"

#include <algorithm>

#include "cpu/parallel.h"

namespace sedd {
namespace {

bool enter(const TransitionParams& p, int64_t row, Status& status) {
    const Fault fault = !valid_token(p.x[row], p.dim) ? Fault::x_0
                        : !valid_sigma(p.sigma[row])  ? Fault::sigma
                                                      : Fault::none;
    if (fault != Fault::none) report(status, fault, row);
    return fault == Fault::none;
}

// The positions of a sequence share σ: its exponential is taken once.
class LastDecay {
  public:
    Decay operator()(double sigma) {
        if (sigma != sigma_) decay_ = decay(sigma_ = sigma);
        return decay_;
    }

  private:
    double sigma_ = -1.0;
    Decay decay_{};
};

// kColumn: a [y = x] + b π_y over y, what x becomes. Else: a [y = x] + b π_x, what becomes x.
template <bool kColumn, class Real>
Status fill(const TransitionParams& p, int threads) {
    return parallel_rows(p.rows, p.dim, 0, threads, [&p](int64_t begin, int64_t end, void*, Status& status) {
        const Real* stationary = static_cast<const Real*>(p.stationary);
        LastDecay decays;
        for (int64_t row = begin; row < end; ++row) {
            if (!enter(p, row, status)) continue;
            const Decay d = decays(p.sigma[row]);
            const int64_t x = p.x[row];
            Real* out = static_cast<Real*>(p.out) + row * p.dim;
            const double pi_x = stationary_at(p.process, stationary, p.dim, x);
            if (kColumn && p.process == Process::rank_one) {
                const Real b = static_cast<Real>(d.b);
                for (int64_t y = 0; y < p.dim; ++y) out[y] = b * stationary[y];
            } else {
                const bool nothing = kColumn && p.process == Process::absorbing;
                std::fill(out, out + p.dim, nothing ? Real(0) : static_cast<Real>(d.b * pi_x));
                if (nothing) out[p.dim - 1] = static_cast<Real>(d.b);
            }
            const bool both = kColumn && p.process == Process::absorbing && x == p.dim - 1;
            out[x] = both ? Real(1) : static_cast<Real>(d.a + d.b * pi_x);
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
        LastDecay decays;
        for (int64_t row = begin; row < end; ++row) {
            if (enter(p, row, status)) out[row] = draw_transition(p, row, decays(p.sigma[row]).b);
        }
    });
}

}  // namespace sedd

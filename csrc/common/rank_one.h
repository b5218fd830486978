// The forward process Q = π 1ᵀ - I and its exponential, exp(σQ) = a I + (1 - a) π 1ᵀ with a = e^{-σ}.
#pragma once

#include <cmath>

#include "common/types.h"

namespace sedd {

// One row's noise: the probability that a token is kept (a) or redrawn from π (b = 1 - a), both to full precision.
struct Decay {
    double a;
    double b;
};

SEDD_HD Decay decay(double sigma) { return {exp(-sigma), -expm1(-sigma)}; }

// NaN, infinite, zero and negative noise is bad input: no formula is defined for it. So is noise below kLeastNoise:
// a/b = 1/σ, divided by π_x ≥ 1e-38 or multiplied by a log-score, would overflow and give NaN.
constexpr double kLeastNoise = 1e-250;
SEDD_HD bool valid_sigma(double sigma) { return sigma >= kLeastNoise && sigma <= 1.7976931348623157e308; }

SEDD_HD bool valid_token(int64_t token, int64_t dim) { return token >= 0 && token < dim; }

// π_y. `stationary` is read for a vector π only.
template <class Real>
SEDD_HD double stationary_at(Family family, const Real* stationary, int64_t dim, int64_t y) {
    switch (family) {
        case Family::absorbing:
            return y == dim - 1 ? 1.0 : 0.0;
        case Family::uniform:
            return 1.0 / static_cast<double>(dim);
        default:
            return static_cast<double>(stationary[y]);
    }
}

// x log x, 0 at 0.
SEDD_HD double x_log_x(double x) { return x > 0.0 ? x * log(x) : 0.0; }

}  // namespace sedd

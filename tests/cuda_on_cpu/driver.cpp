// Runs every CUDA launcher over shapes, element types, alignments and schedules, and compares with the formulas of the
// SEDD paper, written out term by term in float64: for the sanitizers and for mutants.py, so without Python and torch.
//
// All memory is on the heap and no larger than it must be, so that AddressSanitizer sees what goes beyond it. Outputs
// and workspace are full of garbage beforehand, so that what was not written shows.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <sys/mman.h>

#include "generalized_masked.h"
#include "mean_prediction.h"
#include "reverse.h"
#include "reverse_mean.h"
#include "score_entropy.h"
#include "transition.h"
#include "unmask.h"

extern "C" int cuda_on_cpu_set_schedule(const char* name, unsigned long long seed);
extern "C" int cuda_on_cpu_launch_device();
extern "C" unsigned cuda_on_cpu_contexts();
extern "C" void cuda_on_cpu_set_max_shared(int bytes);
extern "C" size_t cuda_on_cpu_launch_shared_bytes();

namespace {

using sedd::DType;
using sedd::Family;
using sedd::Step;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN(), kInfinity = std::numeric_limits<double>::infinity();
constexpr const char* kSchedules[] = {"forward", "reverse", "greedy", "random"};
constexpr const char* kDTypes[] = {"float32", "float64", "bfloat16", "float16"};
constexpr const char* kFamilies[] = {"absorbing", "uniform", "rank_one"};
constexpr int kMostDifferences = 10;  // that are printed before the driver gives up

// ---- Memory ----

size_t bytes_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

DType compute_type(DType dtype) { return dtype == DType::float64 ? DType::float64 : DType::float32; }

// By how much a value may change when it is rounded to the type.
double rounding(DType dtype, double value) {
    switch (dtype) {
        case DType::float32:
            return std::abs(value) * 0x1p-24;
        case DType::float64:
            return std::abs(value) * 0x1p-53;
        case DType::bfloat16:
            return std::abs(value) * 0x1p-8;
        default:
            return std::max(std::abs(value) * 0x1p-11, 0x1p-25);  // half of the smallest subnormal number
    }
}

template <class T>
T read(const char* at) {
    T value;
    std::memcpy(static_cast<void*>(&value), at, sizeof value);
    return value;
}

template <class T>
void write(char* at, T value) {
    std::memcpy(at, static_cast<const void*>(&value), sizeof value);
}

// Neither the emulation's conversions, which are part of what is tested, nor its headers: mutants.py links one driver
// with kernels of every kind.
double from_bits(DType dtype, uint16_t bits) {
    const int digits = dtype == DType::bfloat16 ? 7 : 10, bias = dtype == DType::bfloat16 ? 127 : 15;
    const int exponent = (bits & 0x7fff) >> digits, fraction = bits & ((1 << digits) - 1);
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == 2 * bias + 1) return fraction != 0 ? kNan : sign * kInfinity;
    return exponent == 0 ? sign * std::ldexp(fraction, 1 - bias - digits)
                         : sign * std::ldexp((1 << digits) + fraction, exponent - bias - digits);
}

// Of -∞, or a number that the type has room for.
uint16_t to_bits(DType dtype, double value) {
    const int digits = dtype == DType::bfloat16 ? 7 : 10, bias = dtype == DType::bfloat16 ? 127 : 15;
    const int sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isinf(value)) return static_cast<uint16_t>(sign | (2 * bias + 1) << digits);
    const int exponent = value == 0.0 ? 1 - bias : std::max(std::ilogb(value), 1 - bias);
    // counted in units of the last digit: where rounding fills them up, the next exponent follows by itself
    const auto units = static_cast<int>(std::nearbyint(std::ldexp(std::abs(value), digits - exponent)));
    return static_cast<uint16_t>(sign | (((exponent + bias - 1) << digits) + units));
}

// Elements in memory of their own, `before` of them before the first one.
class Array {
  public:
    Array(DType dtype, int64_t count, int64_t before = 0)
        : dtype_(dtype),
          bytes_(static_cast<size_t>(count + before) * bytes_of(dtype)),
          memory_(static_cast<char*>(std::malloc(bytes_)), std::free),
          data_(memory_.get() + static_cast<size_t>(before) * bytes_of(dtype)) {
        fill(0xFF);
    }

    void fill(int byte) { std::memset(memory_.get(), byte, bytes_); }
    void* data() const { return data_; }

    double operator[](int64_t i) const {
        const char* at = data_ + i * static_cast<int64_t>(bytes_of(dtype_));
        switch (dtype_) {
            case DType::float32:
                return static_cast<double>(read<float>(at));
            case DType::float64:
                return read<double>(at);
            default:
                return from_bits(dtype_, read<uint16_t>(at));
        }
    }

    void set(int64_t i, double value) {
        char* at = data_ + i * static_cast<int64_t>(bytes_of(dtype_));
        switch (dtype_) {
            case DType::float32:
                return write(at, static_cast<float>(value));
            case DType::float64:
                return write(at, value);
            default:
                return write(at, to_bits(dtype_, value));
        }
    }

  private:
    DType dtype_;
    size_t bytes_;
    std::unique_ptr<char, void (*)(void*)> memory_;
    char* data_;
};

// ---- Problems ----

struct Shape {
    DType dtype;
    Family family;
    int64_t rows, dim;
    bool behind;      // the log-scores start one element behind a 16-byte boundary
    bool out_behind;  // the results do
    bool shifted;     // log-scores come with shifts
};

struct Problem {
    explicit Problem(const Shape& s)
        : shape(s),
          log_score(s.dtype, s.rows * s.dim, s.behind),
          pi(compute_type(s.dtype), s.dim),
          grad_loss(compute_type(s.dtype), s.rows),
          cumulative(static_cast<size_t>(s.dim)),
          sigma(static_cast<size_t>(s.rows)),
          shift(static_cast<size_t>(s.rows)),
          euler_step(static_cast<size_t>(s.rows)),
          x_t(static_cast<size_t>(s.rows)),
          x_0(static_cast<size_t>(s.rows)),
          row_ids(static_cast<size_t>(s.rows)),
          random(static_cast<uint64_t>(s.rows * 1000003 + s.dim * 101 + s.behind)) {
        seed = {static_cast<int64_t>(random() >> 1)};
        make_stationary();
        for (int64_t row = 0; row < s.rows; ++row) make_row(row, static_cast<size_t>(row));
        forbidden = s.family == Family::absorbing ? s.dim - 1 : x_t[0];
    }

    double score(int64_t row, int64_t y) const {
        return std::exp(log_score[row * shape.dim + y] - shift[static_cast<size_t>(row)]);
    }
    // The token whose logit a mean prediction ignores.
    int64_t mask() const { return shape.family == Family::uniform || shape.dim == 1 ? -1 : shape.dim - 1; }
    bool is_token(int64_t token) const { return 0 <= token && token < shape.dim; }
    const void* stationary() const { return shape.family == Family::rank_one ? pi.data() : nullptr; }
    const double* shifts() const { return shape.shifted ? shift.data() : nullptr; }

    Shape shape;
    Array log_score, pi, grad_loss;
    std::vector<double> cumulative, sigma, shift, euler_step;
    std::vector<int64_t> x_t, x_0, row_ids, seed;
    double neg_entropy = 0.0;
    int64_t forbidden;

  private:
    double uniform() { return static_cast<double>(random() >> 11) * 0x1p-53; }
    int64_t token() { return static_cast<int64_t>(uniform() * static_cast<double>(shape.dim)); }
    int64_t token_of_pi() { return sedd::draw_stationary(shape.family, cumulative.data(), shape.dim, uniform()); }

    // A vector π is like the frequencies of words, with every third token missing.
    void make_stationary() {
        const int64_t dim = shape.dim;
        std::vector<double> weights(static_cast<size_t>(dim));
        double total = 0.0;
        for (int64_t y = 0; y < dim; ++y) {
            double& weight = weights[static_cast<size_t>(y)];
            switch (shape.family) {
                case Family::absorbing:
                    weight = y == dim - 1;
                    break;
                case Family::uniform:
                    weight = 1.0;
                    break;
                default:
                    weight = y % 3 == 0 && y < dim - 1 ? 0.0 : 1.0 / static_cast<double>(1 + y * 7919 % dim);
            }
            total += weight;
        }
        double sum = 0.0;
        for (int64_t y = 0; y < dim; ++y) {
            pi.set(y, weights[static_cast<size_t>(y)] / total);
            sum += pi[y];
            cumulative[static_cast<size_t>(y)] = sum;
            neg_entropy += pi[y] > 0.0 ? pi[y] * std::log(pi[y]) : 0.0;
        }
    }

    void make_row(int64_t row, size_t i) {
        const int64_t dim = shape.dim;
        x_0[i] = token();
        x_t[i] = i % 3 == 0 ? token_of_pi() : i % 3 == 1 ? x_0[i] : token();
        row_ids[i] = 5 * row + 3;
        sigma[i] = std::exp(-6.0 + 7.0 * uniform());
        shift[i] = shape.shifted ? std::log(static_cast<double>(dim)) + uniform() : 0.0;
        grad_loss.set(row, 0.5 + uniform());
        double others = 0.0;
        for (int64_t y = 0; y < dim; ++y) {
            // a model may rule out what its π does not have: the logarithm of such a score enters no sum
            const bool ruled_out = y % 7 == 3 && pi[y] == 0.0 && y != x_0[i];
            log_score.set(row * dim + y, ruled_out ? -kInfinity : -3.0 + 6.0 * uniform());
            if (y != x_t[i]) others += score(row, y);
        }
        const double rate = pi[x_t[i]] * others;
        euler_step[i] = rate > 0.0 ? (0.3 + 1.2 * uniform()) / rate : 0.5;  // more than 1: nothing is left for x
        if (shape.rows > 8) spoil(i);
    }

    // Not the first and the last row: what goes beyond memory may do so for the sake of a good row only.
    void spoil(size_t i) {
        switch (i % 9) {
            case 1:
                sigma[i] = euler_step[i] = 0.0;
                break;
            case 2:
                x_t[i] = -1;
                x_0[i] = shape.dim;
                break;
            case 3:
                x_t[i] = shape.dim;
                break;
            case 5:
                x_0[i] = int64_t{1} << 40;
                break;
            case 6:
                x_t[i] = int64_t{1} << 40;
                x_0[i] = -1;
                break;
            case 7:
                sigma[i] = euler_step[i] = kNan;
                break;
        }
    }

    std::mt19937_64 random;
};

// Where tiles of a row begin, and where the last one ends: three tiles, from one boundary to another that is none of 16
// bytes, or fewer where the row is too short; a single one where there are three rows.
std::vector<int64_t> cuts(const Shape& s) {
    std::vector<int64_t> result = {0};
    for (const int64_t width : {s.dim / 5 | 1, s.dim / 2 | 1}) {
        if (s.rows != 3 && result.back() + width < s.dim) result.push_back(result.back() + width);
    }
    result.push_back(s.dim);
    return result;
}

// Entries [first, first + width) of every row, in memory of their own, with NaN between the rows.
class Tile {
  public:
    Tile(const Problem& p, int64_t begin, int64_t end)
        : first(begin),
          width(end - begin),
          stride(width + 3),
          entries(p.shape.dtype, std::max<int64_t>(0, p.shape.rows * stride - 3), p.shape.behind),
          shape_(p.shape) {
        for_rows(p.log_score.data(), [](char* tile, char* all, size_t bytes) { std::memcpy(tile, all, bytes); });
    }

    void write_to(void* matrix) const {
        for_rows(matrix, [](char* tile, char* all, size_t bytes) { std::memcpy(all, tile, bytes); });
    }

    int64_t first, width, stride;
    Array entries;

  private:
    template <class Copy>
    void for_rows(void* matrix, Copy copy) const {
        const auto size = static_cast<int64_t>(bytes_of(shape_.dtype));
        for (int64_t row = 0; row < shape_.rows; ++row) {
            copy(static_cast<char*>(entries.data()) + row * stride * size,
                 static_cast<char*>(matrix) + (row * shape_.dim + first) * size, static_cast<size_t>(width * size));
        }
    }

    Shape shape_;
};

// ---- What is right ----

// Numbers, NaN where NaN is right, and by how much results may differ from them.
struct Expected {
    std::vector<double> value, slack;
    explicit Expected(int64_t count) : value(static_cast<size_t>(count), kNan), slack(static_cast<size_t>(count)) {}
    void set(int64_t i, double v, double s) {
        value[static_cast<size_t>(i)] = v;
        slack[static_cast<size_t>(i)] = s;
    }
};

// Of the terms that a result is summed from.
double tolerance(DType dtype) { return dtype == DType::float64 ? 1e-12 : 4e-6; }

// p(y | x), which is exp(σQ)[y, x].
double transition(const Problem& p, double sigma, int64_t x, int64_t y) {
    return (y == x ? std::exp(-sigma) : 0.0) - std::expm1(-sigma) * p.pi[y];
}

bool is_noise(double sigma) { return sigma > 0.0 && sigma < kInfinity; }

// loss = Σ_{y≠x} π_x (s - r log s + r (log r - 1)), r = p(y | x_0) / p(x | x_0), and gradient = π_x (s - r).
void score_entropy(const Problem& p, Expected& loss, Expected& gradient) {
    const double part = tolerance(p.shape.dtype);
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const auto i = static_cast<size_t>(row);
        const int64_t x = p.x_t[i], x_0 = p.x_0[i];
        if (!p.is_token(x) || !p.is_token(x_0) || !is_noise(p.sigma[i])) continue;
        const double weight = p.pi[x], here = transition(p, p.sigma[i], x_0, x);
        double value = 0.0, scale = 0.0;
        for (int64_t y = 0; y < p.shape.dim; ++y) {
            const int64_t at = row * p.shape.dim + y;
            gradient.set(at, 0.0, 0.0);
            if (y == x || weight == 0.0) continue;
            const double s = p.score(row, y), r = transition(p, p.sigma[i], x_0, y) / here;
            const double logs = r > 0.0 ? r * std::log(s) : 0.0, k = r > 0.0 ? r * (std::log(r) - 1.0) : 0.0;
            value += weight * (s - logs + k);
            scale += weight * (s + std::abs(logs) + std::abs(k));
            const double slope = p.grad_loss[row] * weight * (s - r);
            const double size = p.grad_loss[row] * weight * (s + r);
            gradient.set(at, slope, part * size + 1.01 * rounding(p.shape.dtype, slope));
        }
        loss.set(row, value, part * scale);
    }
}

// softmax(logits) of a row without MASK.
std::vector<double> mean_prediction_of(const Problem& p, int64_t row) {
    std::vector<double> mu(static_cast<size_t>(p.shape.dim));
    double total = 0.0;
    for (int64_t y = 0; y < p.shape.dim; ++y) {
        if (y != p.mask()) total += mu[static_cast<size_t>(y)] = std::exp(p.log_score[row * p.shape.dim + y]);
    }
    for (double& value : mu) value /= total;
    return mu;
}

// The loss of score_entropy at s_y = Σ_k μ_k p(y | k) / p(x | k), and its gradient through that sum and the softmax.
void mean_prediction(const Problem& p, Expected& loss, Expected& gradient) {
    const double part = 2.0 * tolerance(p.shape.dtype);
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const auto i = static_cast<size_t>(row);
        const int64_t x = p.x_t[i], x_0 = p.x_0[i], dim = p.shape.dim;
        if (!p.is_token(x) || !p.is_token(x_0) || !is_noise(p.sigma[i])) continue;
        const double sigma = p.sigma[i], a = std::exp(-sigma), b = -std::expm1(-sigma), weight = p.pi[x];
        for (int64_t y = 0; y < dim; ++y) gradient.set(row * dim + y, 0.0, 0.0);
        loss.set(row, 0.0, 0.0);
        if (weight == 0.0) continue;
        const std::vector<double> mu = mean_prediction_of(p, row);
        const auto from = [&](int64_t k) { return transition(p, sigma, k, x); };  // p(x | k)
        double over = 0.0, value = 0.0, scale = 0.0, slope = 0.0, slope_size = 0.0;
        for (int64_t k = 0; k < dim; ++k) over += mu[static_cast<size_t>(k)] / from(k);
        std::vector<double> by_score(mu.size()), by_size(mu.size());
        for (int64_t y = 0; y < dim; ++y) {
            const auto at = static_cast<size_t>(y);
            const double s = a * mu[at] / from(y) + b * p.pi[y] * over, r = transition(p, sigma, x_0, y) / from(x_0);
            if (y == x || s == 0.0) continue;
            const double logs = r > 0.0 ? r * std::log(s) : 0.0, k = r > 0.0 ? r * (std::log(r) - 1.0) : 0.0;
            value += weight * (s - logs + k);
            scale += weight * (s + std::abs(logs) + std::abs(k));
            by_score[at] = weight * (1.0 - r / s);
            by_size[at] = weight * (1.0 + r / s);
            slope += p.pi[y] * by_score[at];
            slope_size += p.pi[y] * by_size[at];
        }
        double mean = 0.0, mean_size = 0.0;
        const auto by_mean = [&](int64_t k, const std::vector<double>& v, double all) {
            return (a * v[static_cast<size_t>(k)] + b * all) / from(k);
        };
        for (int64_t k = 0; k < dim; ++k) {
            mean += mu[static_cast<size_t>(k)] * by_mean(k, by_score, slope);
            mean_size += mu[static_cast<size_t>(k)] * by_mean(k, by_size, slope_size);
        }
        for (int64_t k = 0; k < dim; ++k) {
            const double factor = p.grad_loss[row] * mu[static_cast<size_t>(k)];
            const double right = factor * (by_mean(k, by_score, slope) - mean);
            const double size = factor * (by_mean(k, by_size, slope_size) + mean_size);
            gradient.set(row * dim + k, right, part * size + 1.01 * rounding(p.shape.dtype, right));
        }
        loss.set(row, value, part * scale);
    }
}

// D_KL(q(x_s | x_t, x_0) ‖ Σ_k μ_k q(x_s | x_t, k)) for half of the noise.
Expected mean_prediction_step(const Problem& p) {
    Expected loss(p.shape.rows);
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const auto i = static_cast<size_t>(row);
        const int64_t x = p.x_t[i], x_0 = p.x_0[i];
        if (!p.is_token(x) || !p.is_token(x_0) || !is_noise(p.sigma[i])) continue;
        loss.set(row, 0.0, 0.0);
        if (p.pi[x] == 0.0) continue;
        const double half = 0.5 * p.sigma[i], a = std::exp(-half), b = -std::expm1(-half);
        const std::vector<double> mu = mean_prediction_of(p, row);
        double over = 0.0, value = 0.0;
        for (int64_t k = 0; k < p.shape.dim; ++k) over += mu[static_cast<size_t>(k)] / transition(p, p.sigma[i], k, x);
        for (int64_t y = 0; y < p.shape.dim; ++y) {
            const double weight = mu[static_cast<size_t>(y)] / transition(p, p.sigma[i], y, x);
            const double theirs = transition(p, half, y, x) * (a * weight + b * p.pi[y] * over);
            const double right =
                transition(p, half, y, x) * transition(p, half, x_0, y) / transition(p, p.sigma[i], x_0, x);
            if (right > 0.0) value += right * std::log(right / theirs);
        }
        loss.set(row, value, 4.0 * tolerance(p.shape.dtype) * (1.0 + value));
    }
    return loss;
}

// Rows of masked diffusion: two of three are masked. Bad ones stay bad, or are replaced by ones that are not masked if
// there are any tokens. Powers lie in [0.1, 3].
struct MaskedRows {
    MaskedRows(const Problem& p, bool with_bad)
        : power(compute_type(p.shape.dtype), p.shape.dim), x_t(p.x_t), x_0(p.x_0), t(p.sigma) {
        const int64_t mask = p.shape.dim - 1;
        for (int64_t y = 0; y <= mask; ++y)
            power.set(y, y < mask ? 0.1 + static_cast<double>(y * 37 % 30) / 10.0 : kNan);
        for (size_t i = 0; i < x_t.size(); ++i) {
            if (x_0[i] == mask) x_0[i] = 0;  // bad where there is no other token
            if (p.is_token(x_t[i])) x_t[i] = i % 3 != 1 || i == 7 ? mask : x_0[i];
            if (is_noise(t[i])) t[i] /= 1.0 + t[i];
        }
        if (x_t.size() > 8) t[4] = 1.5;
        for (size_t i = 0; i < x_t.size(); ++i) {
            if (with_bad || mask == 0 || !is_bad(i, p.shape.dim)) continue;
            x_t[i] = x_0[i] = 0;
            t[i] = 0.5;
        }
    }

    bool is_bad(size_t i, int64_t dim) const {
        const bool tokens = 0 <= x_t[i] && x_t[i] < dim && 0 <= x_0[i] && x_0[i] < dim;
        return !tokens || !(t[i] > 0.0 && t[i] <= 1.0) || (x_t[i] == dim - 1 && x_0[i] == dim - 1);
    }

    Array power;
    std::vector<int64_t> x_t, x_0;
    std::vector<double> t;
};

// loss = (Σ_k w_k μ_k - w_v - w_v log μ_v) / t, its gradient in the logits, and the one in w, with μ_MASK = 0.
void generalized_masked(const Problem& p, const MaskedRows& rows, Expected& loss, Expected& gradient,
                        Expected& in_power) {
    const int64_t dim = p.shape.dim, mask = dim - 1;
    const double part = tolerance(p.shape.dtype);
    std::vector<double> power(static_cast<size_t>(dim)), power_scale(static_cast<size_t>(dim));
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const auto i = static_cast<size_t>(row);
        if (rows.is_bad(i, dim)) {
            std::fill(power.begin(), power.end() - 1, kNan);
            continue;
        }
        const int64_t v = rows.x_0[i];
        const bool masked = rows.x_t[i] == mask;
        const auto e = [&](int64_t y) { return std::exp(p.log_score[row * dim + y]); };
        double total = 0.0, mean = 0.0;
        for (int64_t y = 0; y < mask; ++y) total += e(y);
        for (int64_t y = 0; y < mask; ++y) mean += rows.power[y] * e(y) / total;
        const double c = masked ? 1.0 / rows.t[i] : 0.0, w = masked ? rows.power[v] : 0.0;
        const double cost = masked ? std::log(total) - p.log_score[row * dim + v] : 0.0;
        loss.set(row, masked ? c * (mean - w + w * cost) : 0.0, masked ? part * c * (mean + w + w * cost) : 0.0);
        for (int64_t y = 0; y < dim; ++y) {
            const int64_t at = row * dim + y;
            gradient.set(at, 0.0, 0.0);
            if (y == mask || !masked) continue;
            const double mu = e(y) / total, handed = c * p.grad_loss[row], here = y == v ? 1.0 : 0.0;
            const double slope = handed * (mu * (rows.power[y] - mean) - w * (here - mu));
            gradient.set(
                at, slope,
                part * handed * (mu * (rows.power[y] + mean + w) + w * here) + 1.01 * rounding(p.shape.dtype, slope));
            power[static_cast<size_t>(y)] += handed * (mu - here * (1.0 - cost));
            power_scale[static_cast<size_t>(y)] += handed * (mu + here * (1.0 + cost));
        }
    }
    for (int64_t y = 0; y < dim; ++y) {
        in_power.set(y, power[static_cast<size_t>(y)], part * power_scale[static_cast<size_t>(y)]);
    }
}

Expected transition_entries(const Problem& p, bool column) {
    Expected expected(p.shape.rows * p.shape.dim);
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const auto i = static_cast<size_t>(row);
        const int64_t x = p.x_0[i];
        if (!p.is_token(x) || !is_noise(p.sigma[i])) continue;
        for (int64_t y = 0; y < p.shape.dim; ++y) {
            const double value = column ? transition(p, p.sigma[i], x, y) : transition(p, p.sigma[i], y, x);
            expected.set(row * p.shape.dim + y, value, 4.0 * rounding(p.shape.dtype, value));
        }
    }
    return expected;
}

// The unnormalised probabilities of a reverse step, none in a row that is bad or has no distribution.
struct Weights {
    std::vector<double> value;  // below 0 stands for 0
    std::vector<double> slack;
    double total = 0.0, total_slack = 0.0;
};

Weights reverse_weights(const Problem& p, Step kind, int64_t row, double step, int64_t forbidden) {
    const int64_t x = p.x_t[static_cast<size_t>(row)], dim = p.shape.dim;
    Weights w;
    if (!p.is_token(x) || !is_noise(step)) return w;
    w.value.resize(static_cast<size_t>(dim));
    w.slack.resize(static_cast<size_t>(dim));
    const auto s = [&](int64_t y) { return y == x ? 1.0 : p.score(row, y); };
    double all = 0.0;
    for (int64_t y = 0; y < dim; ++y) all += s(y);
    for (int64_t y = 0; y < dim; ++y) {
        double gain, loss, factor;
        if (kind == Step::euler) {
            gain = y == x ? 1.0 : step * p.pi[x] * s(y);
            loss = y == x ? step * p.pi[x] * (all - 1.0) : 0.0;
            factor = 1.0;
        } else {
            gain = std::exp(step) * s(y);
            loss = std::expm1(step) * p.pi[y] * all;
            factor = transition(p, step, y, x);
        }
        if (y == forbidden) gain = loss = 0.0;
        const auto i = static_cast<size_t>(y);
        w.value[i] = factor * (gain - loss);
        w.slack[i] = tolerance(p.shape.dtype) * factor * (gain + loss);
        w.total += std::max(w.value[i], 0.0);
        w.total_slack += w.slack[i];
    }
    if (!(w.total > 0.0)) w.value.clear();
    return w;
}

Expected reverse_probs(const Problem& p, const std::vector<Weights>& weights) {
    Expected expected(p.shape.rows * p.shape.dim);
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const Weights& w = weights[static_cast<size_t>(row)];
        for (size_t y = 0; y < w.value.size(); ++y) {
            const double prob = std::max(w.value[y], 0.0) / w.total;
            expected.set(row * p.shape.dim + static_cast<int64_t>(y), prob,
                         (w.slack[y] + prob * w.total_slack) / w.total);
        }
    }
    return expected;
}

// The scores of the entries but x, in the weights' unit, which samples are drawn from first.
struct Scores {
    std::vector<double> value;
    double total = 0.0, slack = 0.0;

    Scores(const Problem& p, Step kind, const Weights& w, int64_t row, double step)
        : value(static_cast<size_t>(p.shape.dim)) {
        const int64_t x = p.x_t[static_cast<size_t>(row)];
        const double rate = (kind == Step::euler ? step : std::expm1(step)) * p.pi[x];
        for (int64_t y = 0; y < p.shape.dim; ++y) {
            if (y != x) total += value[static_cast<size_t>(y)] = rate * p.score(row, y);
        }
        slack = 2.0 * (w.total_slack + tolerance(p.shape.dtype) * total);
    }
};

// Of an entry that was drawn from the scores: is it taken, is it refused? Both where rounding decides.
std::pair<bool, bool> taken_or_refused(const Problem& p, const Weights& w, const Scores& scores, size_t y,
                                       double uniform) {
    const double over = uniform * scores.value[y] - w.value[y];
    const double slack = w.slack[y] + tolerance(p.shape.dtype) * scores.value[y];
    return {over<slack, over> - slack};
}

// What the row's random numbers make of it: a token or -1; several where rounding decides.
std::set<int64_t> row_tokens(const Problem& p, Step kind, const Weights& w, int64_t row, double step) {
    if (w.value.empty()) return {-1};
    const Scores scores(p, kind, w, row, step);
    const auto x = static_cast<size_t>(p.x_t[static_cast<size_t>(row)]);
    // On the axis of the scores, or of the weights, that of x first and then the others in order, a point lies on one.
    const auto at_point = [&](double point, bool weighted) {
        const auto value = [&](size_t y) { return weighted ? std::max(w.value[y], 0.0) : scores.value[y]; };
        const double self = std::max(w.value[x], 0.0);
        const double target = point * (weighted ? w.total : self + scores.total);
        std::set<int64_t> found;
        if (w.value[x] + w.slack[x] > 0.0 && target <= self + scores.slack) found.insert(static_cast<int64_t>(x));
        double at = self;
        for (size_t y = 0; y < w.value.size(); ++y) {
            if (y == x) continue;
            const double from = at, most = weighted ? w.value[y] + w.slack[y] : scores.value[y];
            at += value(y);
            if (most > 0.0 && from - scores.slack <= target && target <= at + scores.slack) {
                found.insert(static_cast<int64_t>(y));
            }
        }
        return found;
    };
    const auto uniforms = [&](uint64_t sweep) {
        return sedd::row_uniforms(static_cast<uint64_t>(p.seed[0]), static_cast<uint64_t>(row), sweep);
    };
    std::set<int64_t> result, again;
    for (const int64_t token : at_point(uniforms(0).first, false)) {
        const auto y = static_cast<size_t>(token);
        const auto [taken, refused] =
            y == x ? std::pair(true, false) : taken_or_refused(p, w, scores, y, uniforms(0).second);
        if (taken) result.insert(token);
        if (refused) again = at_point(uniforms(1).first, true);
    }
    result.insert(again.begin(), again.end());
    return result;
}

// What they make of it in a sweep over its tiles: a token, -1 or kSweepAgain.
std::set<int64_t> tile_tokens(const Problem& p, Step kind, const Weights& w, int64_t row, double step,
                              const std::vector<int64_t>& tiles, uint64_t sweep) {
    const auto i = static_cast<size_t>(row);
    const int64_t x = p.x_t[i];
    if (!p.is_token(x) || !is_noise(step)) return {-1};
    const Scores scores(p, kind, w, row, step);
    // the first sweep draws from the scores, even where no entry has any weight
    if (w.value.empty()) return {sweep == 0 && scores.total > 0.0 ? sedd::kSweepAgain : -1};
    const double slack = scores.slack;
    const auto weight = [&](size_t y) {
        return sweep == 0 ? scores.value[y] : y == static_cast<size_t>(x) ? 0.0 : std::max(w.value[y], 0.0);
    };
    const auto is_possible = [&](size_t y) {
        return y != static_cast<size_t>(x) && (sweep == 0 ? scores.value[y] : w.value[y] + w.slack[y]) > 0.0;
    };
    const auto uniforms = [&](uint64_t draw) {
        return sedd::row_uniforms(static_cast<uint64_t>(p.seed[0]), static_cast<uint64_t>(p.row_ids[i]),
                                  draw + (sweep << 32));
    };
    std::set<int64_t> drawn;
    double total = 0.0;
    for (size_t tile = 0; tile + 1 < tiles.size(); ++tile) {
        const auto begin = static_cast<size_t>(tiles[tile]), end = static_cast<size_t>(tiles[tile + 1]);
        double sum = 0.0, at = 0.0;
        for (size_t y = begin; y < end; ++y) sum += weight(y);
        total += sum;
        const double target = uniforms(begin).first * total;
        if (target < sum - slack) drawn.clear();
        for (size_t y = begin; y < end; ++y) {
            const double from = at;
            at += weight(y);
            if (is_possible(y) && from - slack <= target && target <= at + slack) drawn.insert(static_cast<int64_t>(y));
        }
    }
    std::set<int64_t> result;
    const sedd::Uniforms u = uniforms(uint64_t{2} << 32);
    const double self = w.value[static_cast<size_t>(x)], at = u.first * (std::max(self, 0.0) + total);
    if (self + w.slack[static_cast<size_t>(x)] > 0.0 && at <= self + slack) result.insert(x);
    if (at < self - slack) return result;
    for (const int64_t token : drawn) {
        const auto [taken, refused] = taken_or_refused(p, w, scores, static_cast<size_t>(token), u.second);
        if (sweep == 1 || taken) result.insert(token);
        if (sweep == 0 && refused) result.insert(sedd::kSweepAgain);
    }
    return result;
}

// ---- Reverse steps from a mean prediction ----

// The probabilities of a row by the formulas, term by term; empty if it is bad.
struct MeanLaw {
    std::vector<double> mu, probs;  // the part of each probability that comes from μ, and the whole
    double stay = 0.0;
};

// w of generalized masked diffusion: exact in float32.
double power_of(int64_t y) { return 0.25 + static_cast<double>(y % 5) * 0.5; }

MeanLaw mean_law(const Problem& p, sedd::MeanStep kind, int64_t row, double step, int64_t mask, int64_t forbidden) {
    const auto i = static_cast<size_t>(row);
    const int64_t x = p.x_t[i], dim = p.shape.dim;
    const bool generalized = kind == sedd::MeanStep::generalized_masked;
    if (!p.is_token(x) || (generalized ? !(step < 0.0) : !is_noise(p.sigma[i]) || !is_noise(step))) return {};
    MeanLaw law;
    law.mu.resize(static_cast<size_t>(dim)), law.probs.resize(static_cast<size_t>(dim));
    if (!(p.pi[x] > 0.0)) {
        law.stay = law.probs[static_cast<size_t>(x)] = 1.0;
        return x == forbidden ? MeanLaw{} : law;
    }
    const auto logit = [&](int64_t y) { return y == mask ? -kInfinity : p.log_score[row * dim + y]; };
    double all = 0.0;
    for (int64_t y = 0; y < dim; ++y) all += std::exp(logit(y));
    if (!(all > 0.0)) return {};
    const double a = std::exp(-p.sigma[i]), b = -std::expm1(-p.sigma[i]), here = a + b * p.pi[x];
    const double mu_x = std::exp(logit(x)) / all, alpha = 1.0 - mu_x * a / here;
    const double before = std::max(0.0, p.sigma[i] - step), a_s = std::exp(-before), b_s = -std::expm1(-before);
    double others = 0.0, total = 0.0;
    for (int64_t y = 0; y < dim; ++y) {
        if (y == x) continue;
        const double mu = std::exp(logit(y)) / all;
        double of_mu = 0.0, of_pi = 0.0;
        if (generalized) {
            of_mu = -mu * std::expm1(power_of(y) * step);
        } else if (kind == sedd::MeanStep::euler) {
            of_mu = step * a / b * mu, of_pi = step * alpha * p.pi[y];
        } else {
            const double ratio = std::expm1(-step) / std::expm1(-p.sigma[i]);
            of_mu = ratio * a_s * mu, of_pi = ratio * b_s * alpha * p.pi[y];
        }
        others += of_mu + of_pi;
        if (y == forbidden) of_pi = 0.0;
        law.mu[static_cast<size_t>(y)] = of_mu;
        total += law.probs[static_cast<size_t>(y)] = of_mu + of_pi;
    }
    if (x != forbidden) {
        law.stay = std::max(0.0, 1.0 - others);
        if (kind == sedd::MeanStep::tweedie) {
            law.stay = (std::exp(-step) - std::expm1(-step) * p.pi[x]) * (a_s * mu_x / here + b_s * alpha / b);
        }
    }
    total += law.probs[static_cast<size_t>(x)] = law.stay;
    if (!(total > 0.0)) return {};
    for (double& value : law.mu) value /= total;
    for (double& value : law.probs) value /= total;
    law.stay /= total;
    return law;
}

Expected mean_probs(const Problem& p, const std::vector<MeanLaw>& laws) {
    Expected expected(p.shape.rows * p.shape.dim);
    for (int64_t row = 0; row < p.shape.rows; ++row) {
        const MeanLaw& law = laws[static_cast<size_t>(row)];
        for (size_t y = 0; y < law.probs.size(); ++y) {
            const double scale = static_cast<int64_t>(y) == p.x_t[static_cast<size_t>(row)] ? 1.0 : law.probs[y];
            expected.set(row * p.shape.dim + static_cast<int64_t>(y), law.probs[y],
                         4.0 * tolerance(p.shape.dtype) * scale);
        }
    }
    return expected;
}

// What the row's random numbers make of it: a token or -1; several where rounding decides.
std::set<int64_t> mean_tokens(const Problem& p, const MeanLaw& law, int64_t row) {
    if (law.probs.empty()) return {-1};
    const sedd::Uniforms u = sedd::row_uniforms(static_cast<uint64_t>(p.seed[0]),
                                                static_cast<uint64_t>(p.row_ids[static_cast<size_t>(row)]));
    const double slack = 8.0 * tolerance(p.shape.dtype);
    std::set<int64_t> result;
    const auto x = static_cast<size_t>(p.x_t[static_cast<size_t>(row)]);
    if (law.stay > 0.0 && u.first <= law.stay + slack) result.insert(static_cast<int64_t>(x));
    double mu_total = 0.0, pi_total = 0.0;
    const auto of_pi = [&](size_t y) { return y == x ? 0.0 : law.probs[y] - law.mu[y]; };
    for (size_t y = 0; y < law.mu.size(); ++y) mu_total += law.mu[y], pi_total += of_pi(y);
    // the second number selects an entry of one of the two parts
    const auto add = [&](auto part, double total) {
        double at = 0.0;
        for (size_t y = 0; y < law.mu.size(); ++y) {
            const double from = at, value = part(y) / total;
            at += value;
            if (value > 0.0 && from - slack <= u.second && u.second <= at + slack) {
                result.insert(static_cast<int64_t>(y));
            }
        }
    };
    if (mu_total > 0.0 && law.stay - slack <= u.first && u.first <= law.stay + mu_total + slack) {
        add([&](size_t y) { return law.mu[y]; }, mu_total);
    }
    if (pi_total > 1e-9 && law.stay + mu_total - slack <= u.first) add(of_pi, pi_total);
    return result;
}

// ---- Differences ----

class Driver {
  public:
    // Runs each case under all schedules, or under one of them, in turn.
    Driver(std::vector<std::string> schedules, bool in_turn, std::string only)
        : schedules_(std::move(schedules)), in_turn_(in_turn), only_(std::move(only)) {}

    int cases() const { return cases_; }
    int differences() const { return differences_; }

    void run(const Shape& shape) {
        const Problem p(shape);
        if (wants("score_entropy")) run_score_entropy(p);
        const bool has_transitions = compute_type(shape.dtype) == shape.dtype;
        if (has_transitions && wants("transition")) run_transition(p);
        if (wants("mean_prediction")) run_mean_prediction(p);
        if (wants("reverse")) run_reverse(p);
        if (wants("reverse_mean")) run_reverse_mean(p);
        if (shape.family == Family::absorbing && wants("unmask")) run_unmask(p);
        if (shape.family == Family::absorbing && wants("generalized_masked")) {
            run_generalized_masked(p, MaskedRows(p, true), "generalized_masked");
            run_generalized_masked(p, MaskedRows(p, false), "generalized_masked of good rows");
        }
    }

  private:
    bool wants(const char* family) const { return only_.empty() || only_ == family; }

    // `launch(out, where)` fills `count` elements of the type, which must be as expected, whatever the schedule.
    template <class Launch>
    void check(const Problem& p, const char* operation, DType dtype, const Expected& expected, int64_t workspace_bytes,
               Launch launch) {
        const auto count = static_cast<int64_t>(expected.value.size());
        Array out(dtype, count, p.shape.out_behind);
        const int64_t width = count / p.shape.rows;
        under_schedules(p, operation, workspace_bytes, out, launch, [&] {
            for (int64_t i = 0; i < count; ++i) {
                const double right = expected.value[static_cast<size_t>(i)], value = out[i];
                const bool same = std::isnan(right) ? std::isnan(value)
                                                    : std::abs(value - right) <= expected.slack[static_cast<size_t>(i)];
                if (same) continue;
                char what[160];
                std::snprintf(what, sizeof what, "row %lld, entry %lld: %.9g, not %.9g",
                              static_cast<long long>(i / width), static_cast<long long>(i % width), value, right);
                return std::string(what);
            }
            return std::string();
        });
    }

    // The same for probabilities: of rows that shared memory keeps, and on a device that has no room for them.
    template <class Launch>
    void check_probs(const Problem& p, const std::string& operation, const Expected& expected, int64_t workspace_bytes,
                     Launch launch) {
        check(p, operation.c_str(), compute_type(p.shape.dtype), expected, workspace_bytes, launch);
        cuda_on_cpu_set_max_shared(0);
        check(p, (operation + " of rows read again").c_str(), compute_type(p.shape.dtype), expected, workspace_bytes,
              launch);
        cuda_on_cpu_set_max_shared(-1);
    }

    // The same for tokens, or for one row of them after another; `why_not(row, token)` says what is wrong with one.
    template <class Launch, class WhyNot>
    void check_tokens(const Problem& p, const char* operation, int64_t workspace_bytes, Launch launch, WhyNot why_not,
                      int64_t times = 1) {
        Array out(DType::float64, times * p.shape.rows);  // eight bytes each
        const auto* tokens = static_cast<const int64_t*>(out.data());
        under_schedules(p, operation, workspace_bytes, out, launch, [&] {
            for (int64_t row = 0; row < times * p.shape.rows; ++row) {
                const std::string why = why_not(row, tokens[row]);
                if (why.empty()) continue;
                return "row " + std::to_string(row) + ": token " + std::to_string(tokens[row]) + ", " + why;
            }
            return std::string();
        });
    }

    template <class Launch, class Compare>
    void under_schedules(const Problem& p, const char* operation, int64_t workspace_bytes, Array& out, Launch launch,
                         Compare compare) {
        const size_t turn = turns_++ % schedules_.size();
        for (const std::string& schedule : schedules_) {
            if (in_turn_ && schedule != schedules_[turn]) continue;
            if (differences_ >= kMostDifferences) return;
            cuda_on_cpu_set_schedule(schedule.c_str(), static_cast<unsigned long long>(++cases_));
            const Array workspace = garbage(workspace_bytes);
            out.fill(0x5A);
            const char* error = launch(out.data(), sedd::CudaLaunch{workspace.data(), nullptr, 0});
            const std::string what = error != nullptr ? error : compare();
            if (what.empty()) continue;
            ++differences_;
            const Shape& s = p.shape;
            std::printf("%s, %s, %s, %lld rows, N = %lld%s%s%s, %s: %s\n", operation,
                        kFamilies[static_cast<int>(s.family)], kDTypes[static_cast<int>(s.dtype)],
                        static_cast<long long>(s.rows), static_cast<long long>(s.dim),
                        s.behind ? ", behind a boundary" : "", s.out_behind ? " into one behind" : "",
                        s.shifted ? ", shifted" : "", schedule.c_str(), what.c_str());
        }
    }

    // NaN, which comparisons may swallow, or large numbers, which do not pass for the NaN of a bad row.
    Array garbage(int64_t bytes) const {
        Array result(DType::bfloat16, bytes / 2);
        result.fill(cases_ % 2 == 0 ? 0xFF : 0x5A);
        return result;
    }

    void run_score_entropy(const Problem& p) {
        const Shape& s = p.shape;
        Expected loss(s.rows), gradient(s.rows * s.dim);
        score_entropy(p, loss, gradient);
        sedd::ScoreEntropyParams params{p.log_score.data(),
                                        p.x_t.data(),
                                        p.x_0.data(),
                                        p.sigma.data(),
                                        p.shifts(),
                                        p.stationary(),
                                        p.grad_loss.data(),
                                        nullptr,
                                        nullptr,
                                        p.neg_entropy,
                                        s.rows,
                                        s.dim,
                                        s.dtype,
                                        s.family};
        check(p, "score_entropy", compute_type(s.dtype), loss, sedd::score_entropy_workspace(s.rows, s.dim, s.dtype),
              [&](void* out, const sedd::CudaLaunch& where) {
                  params.out = out;
                  return sedd::score_entropy_cuda(params, where);
              });
        check(p, "score_entropy_backward", s.dtype, gradient,
              sedd::score_entropy_backward_workspace(s.rows, s.dim, s.dtype),
              [&](void* out, const sedd::CudaLaunch& where) {
                  params.out = out;
                  return sedd::score_entropy_backward_cuda(params, where);
              });
        Array factor(DType::float64, 1);
        factor.set(0, 2.0);  // not 1: the gradient is computed
        params.unless_one = static_cast<const double*>(factor.data());
        check(p, "score_entropy_backward, for another factor", s.dtype, gradient,
              sedd::score_entropy_backward_workspace(s.rows, s.dim, s.dtype),
              [&](void* out, const sedd::CudaLaunch& where) {
                  params.out = out;
                  return sedd::score_entropy_backward_cuda(params, where);
              });
        factor.set(0, 1.0);
        check(p, "score_entropy in one sweep, gradient", s.dtype, gradient,
              sedd::score_entropy_backward_workspace(s.rows, s.dim, s.dtype),
              [&](void* out, const sedd::CudaLaunch& where) {
                  const char* error = score_entropy_sweep(p, out, where);
                  params.out = out;  // keeps what is there
                  return error != nullptr ? error : sedd::score_entropy_backward_cuda(params, where);
              });
        Array other_loss(compute_type(s.dtype), s.rows), other_gradient(s.dtype, s.rows * s.dim);
        check(p, "score_entropy of tiles", compute_type(s.dtype), loss, 0,
              [&](void* out, const sedd::CudaLaunch& where) { return score_entropy_tiles(p, out, nullptr, where); });
        check(p, "score_entropy of tiles, beside the gradient", compute_type(s.dtype), loss, 0,
              [&](void* out, const sedd::CudaLaunch& where) {
                  return score_entropy_tiles(p, out, other_gradient.data(), where);
              });
        check(p, "score_entropy of tiles, gradient", s.dtype, gradient, 0,
              [&](void* out, const sedd::CudaLaunch& where) {
                  return score_entropy_tiles(p, other_loss.data(), out, where);
              });
    }

    // Whole rows at once. Writes the gradient beside the log-scores.
    const char* score_entropy_sweep(const Problem& p, void* gradient, const sedd::CudaLaunch& where) const {
        const Shape& s = p.shape;
        const Array sweeps = garbage(s.rows * static_cast<int64_t>(sizeof(sedd::ScoreEntropySweep)));
        const Array workspace = garbage(sedd::score_entropy_tile_workspace(s.rows, s.dim, s.dtype));
        Array grad_loss(DType::float64, s.rows), loss(compute_type(s.dtype), s.rows);
        for (int64_t row = 0; row < s.rows; ++row) grad_loss.set(row, p.grad_loss[row]);
        return sedd::score_entropy_tile_cuda(
            {p.log_score.data(), p.x_t.data(), p.x_0.data(), p.sigma.data(), p.shifts(), p.stationary(),
             static_cast<double*>(grad_loss.data()), gradient, static_cast<sedd::ScoreEntropySweep*>(sweeps.data()),
             loss.data(), p.neg_entropy, s.rows, s.dim, s.dim, 0, 0, s.dim, s.dtype, s.family},
            {workspace.data(), where.stream, where.device});
    }

    // With the gradient if there is memory for it.
    const char* score_entropy_tiles(const Problem& p, void* loss, void* gradient, const sedd::CudaLaunch& where) const {
        const Shape& s = p.shape;
        const Array sweeps = garbage(s.rows * static_cast<int64_t>(sizeof(sedd::ScoreEntropySweep)));
        Array grad_loss(DType::float64, s.rows);
        for (int64_t row = 0; row < s.rows; ++row) grad_loss.set(row, p.grad_loss[row]);
        const std::vector<int64_t> at = cuts(s);
        for (size_t i = 0; i + 1 < at.size(); ++i) {
            const Tile tile(p, at[i], at[i + 1]);
            const Array workspace = garbage(sedd::score_entropy_tile_workspace(s.rows, tile.width, s.dtype));
            const char* error = sedd::score_entropy_tile_cuda(
                {tile.entries.data(), p.x_t.data(), p.x_0.data(), p.sigma.data(), p.shifts(), p.stationary(),
                 static_cast<double*>(grad_loss.data()), gradient != nullptr ? tile.entries.data() : nullptr,
                 static_cast<sedd::ScoreEntropySweep*>(sweeps.data()), loss, p.neg_entropy, s.rows, tile.width,
                 tile.stride, tile.first, 0, s.dim, s.dtype, s.family},
                {workspace.data(), where.stream, where.device});
            if (error != nullptr) return error;
            if (gradient != nullptr) tile.write_to(gradient);
        }
        return nullptr;
    }

    void run_mean_prediction(const Problem& p) {
        const Shape& s = p.shape;
        Expected loss(s.rows), gradient(s.rows * s.dim);
        mean_prediction(p, loss, gradient);
        const Array numbers = garbage(s.rows * static_cast<int64_t>(sizeof(sedd::MeanPredictionGradient)));
        sedd::MeanPredictionParams params{p.log_score.data(),
                                          p.x_t.data(),
                                          p.x_0.data(),
                                          p.sigma.data(),
                                          nullptr,
                                          p.stationary(),
                                          p.grad_loss.data(),
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          s.rows,
                                          s.dim,
                                          s.dim,
                                          0,
                                          s.dim,
                                          p.mask(),
                                          s.dtype,
                                          s.family,
                                          sedd::Stage::whole};
        const int64_t workspace = sedd::mean_prediction_workspace(s.rows, s.dim, s.dtype);
        const auto forward = [&](void* out, const sedd::CudaLaunch& where) {
            params.out = out;
            return sedd::mean_prediction_cuda(params, where);
        };
        check(p, "mean_prediction without a gradient", compute_type(s.dtype), loss, workspace, forward);
        params.numbers = static_cast<sedd::MeanPredictionGradient*>(numbers.data());
        check(p, "mean_prediction", compute_type(s.dtype), loss, workspace, forward);
        Array other_loss(compute_type(s.dtype), s.rows);
        for (const bool in_place : {false, true}) {
            check(p, in_place ? "mean_prediction_backward in place" : "mean_prediction_backward", s.dtype, gradient,
                  workspace, [&](void* out, const sedd::CudaLaunch& where) {
                      const char* error = forward(other_loss.data(), where);
                      if (error != nullptr) return error;
                      sedd::MeanPredictionParams backward = params;
                      backward.out = out;
                      if (in_place) {
                          backward.logits = out;
                          std::memcpy(out, p.log_score.data(), static_cast<size_t>(s.rows * s.dim) * bytes_of(s.dtype));
                      }
                      return sedd::mean_prediction_backward_cuda(backward, where);
                  });
        }
        check(p, "mean_prediction of slices", compute_type(s.dtype), loss, 0,
              [&](void* out, const sedd::CudaLaunch& where) {
                  return mean_prediction_slices(p, params, out, nullptr, where);
              });
        check(p, "mean_prediction of slices, gradient", s.dtype, gradient, 0,
              [&](void* out, const sedd::CudaLaunch& where) {
                  return mean_prediction_slices(p, params, other_loss.data(), out, where);
              });
        std::vector<double> half = p.sigma;
        for (double& sigma : half) sigma *= 0.5;
        params.sigma_s = half.data();
        const Expected step = mean_prediction_step(p);
        check(p, "mean_prediction of a step", compute_type(s.dtype), step, workspace, forward);
        check(p, "mean_prediction of a step, of slices", compute_type(s.dtype), step, 0,
              [&](void* out, const sedd::CudaLaunch& where) {
                  return mean_prediction_slices(p, params, out, nullptr, where);
              });
    }

    // As processes that have a slice of the vocabulary each, one after another. With the gradient if there is memory
    // for it.
    const char* mean_prediction_slices(const Problem& p, const sedd::MeanPredictionParams& whole, void* loss,
                                       void* gradient, const sedd::CudaLaunch& where) const {
        const Shape& s = p.shape;
        const std::vector<int64_t> at = cuts(s);
        const auto rows = static_cast<size_t>(s.rows);
        // what bad rows do not write
        const sedd::MeanPredictionLogits nothing{-kInfinity, -kInfinity, -kInfinity, -kInfinity};
        std::vector<sedd::MeanPredictionLogits> all_logits(rows, nothing);
        std::vector<sedd::MeanPredictionSums> all_sums(rows);
        const auto run = [&](const Tile& tile, sedd::Stage stage, sedd::MeanPredictionLogits* logits,
                             sedd::MeanPredictionSums* sums) {
            const Array workspace = garbage(sedd::mean_prediction_workspace(s.rows, tile.width, s.dtype));
            sedd::MeanPredictionParams params = whole;
            params.logits = stage == sedd::Stage::loss ? nullptr : tile.entries.data();
            params.row_logits = logits;
            params.row_sums = sums;
            params.out = loss;
            params.width = tile.width;
            params.stride = tile.stride;
            params.first = tile.first;
            params.stage = stage;
            return sedd::mean_prediction_cuda(params, {workspace.data(), where.stream, where.device});
        };
        for (size_t i = 0; i + 1 < at.size(); ++i) {
            std::vector<sedd::MeanPredictionLogits> logits(rows, nothing);
            if (const char* error = run(Tile(p, at[i], at[i + 1]), sedd::Stage::logits, logits.data(), nullptr)) {
                return error;
            }
            for (size_t row = 0; row < rows; ++row) {
                sedd::MeanPredictionLogits& sum = all_logits[row];
                sum.x = std::max(sum.x, logits[row].x);
                sum.x_0 = std::max(sum.x_0, logits[row].x_0);
                sum.others = std::log(std::exp(sum.others) + std::exp(logits[row].others));
                sum.top = std::max(sum.top, logits[row].top);
            }
        }
        for (size_t i = 0; s.family != Family::absorbing && i + 1 < at.size(); ++i) {
            std::vector<sedd::MeanPredictionSums> sums(rows);
            const Tile tile(p, at[i], at[i + 1]);
            if (const char* error = run(tile, sedd::Stage::sums, all_logits.data(), sums.data())) return error;
            for (size_t row = 0; row < rows; ++row) {
                all_sums[row].entropy += sums[row].entropy;
                all_sums[row].pi_ratio += sums[row].pi_ratio;
                all_sums[row].mu_ratio += sums[row].mu_ratio;
            }
        }
        for (size_t i = 0; i + 1 < at.size(); ++i) {
            const Tile tile(p, at[i], at[i + 1]);
            if (const char* error = run(tile, sedd::Stage::loss, all_logits.data(), all_sums.data())) return error;
            if (gradient == nullptr) continue;
            sedd::MeanPredictionParams params = whole;
            params.logits = params.out = tile.entries.data();
            params.width = tile.width;
            params.stride = tile.stride;
            params.first = tile.first;
            if (const char* error = sedd::mean_prediction_backward_cuda(params, where)) return error;
            tile.write_to(gradient);
        }
        return nullptr;
    }

    void run_generalized_masked(const Problem& p, const MaskedRows& rows, const std::string& name) {
        const Shape& s = p.shape;
        Expected loss(s.rows), gradient(s.rows * s.dim), in_power(s.dim);
        generalized_masked(p, rows, loss, gradient, in_power);
        const Array numbers = garbage(s.rows * static_cast<int64_t>(sizeof(sedd::GeneralizedMaskedRow)));
        sedd::GeneralizedMaskedParams params{p.log_score.data(),
                                             rows.power.data(),
                                             rows.x_t.data(),
                                             rows.x_0.data(),
                                             rows.t.data(),
                                             p.grad_loss.data(),
                                             static_cast<sedd::GeneralizedMaskedRow*>(numbers.data()),
                                             nullptr,
                                             nullptr,
                                             s.rows,
                                             s.dim,
                                             s.dim,
                                             0,
                                             s.dim,
                                             s.dtype,
                                             sedd::Stage::whole};
        check(p, name.c_str(), compute_type(s.dtype), loss, sedd::generalized_masked_workspace(s.rows, s.dim, s.dtype),
              [&](void* out, const sedd::CudaLaunch& where) {
                  params.out = out;
                  return sedd::generalized_masked_cuda(params, where);
              });
        const int64_t workspace = sedd::generalized_masked_backward_workspace(s.rows, s.dim, s.dtype);
        check(p, (name + ", backward").c_str(), s.dtype, gradient, workspace,
              [&](void* out, const sedd::CudaLaunch& where) {
                  params.out = out;
                  return sedd::generalized_masked_backward_cuda(params, where);
              });
        check(p, (name + ", backward in place").c_str(), s.dtype, gradient, workspace,
              [&](void* out, const sedd::CudaLaunch& where) {
                  std::memcpy(out, p.log_score.data(), static_cast<size_t>(s.rows * s.dim) * bytes_of(s.dtype));
                  sedd::GeneralizedMaskedParams in_place = params;
                  in_place.logits = in_place.out = out;
                  return sedd::generalized_masked_backward_cuda(in_place, where);
              });
        check_columns(p, name + ", power", in_power, [&](void* out, const sedd::CudaLaunch& where) {
            params.out = out;
            return sedd::generalized_masked_power_cuda(params, where);
        });
        Array other_loss(compute_type(s.dtype), s.rows);
        check(p, (name + " of slices").c_str(), compute_type(s.dtype), loss, 0,
              [&](void* out, const sedd::CudaLaunch& where) {
                  return generalized_masked_slices(p, params, out, nullptr, nullptr, where);
              });
        check(p, (name + " of slices, backward").c_str(), s.dtype, gradient, 0,
              [&](void* out, const sedd::CudaLaunch& where) {
                  return generalized_masked_slices(p, params, other_loss.data(), out, nullptr, where);
              });
        check_columns(p, name + " of slices, power", in_power, [&](void* out, const sedd::CudaLaunch& where) {
            return generalized_masked_slices(p, params, other_loss.data(), nullptr, static_cast<double*>(out), where);
        });
    }

    // As mean_prediction_slices. With the gradients that there is memory for.
    const char* generalized_masked_slices(const Problem& p, const sedd::GeneralizedMaskedParams& whole, void* loss,
                                          void* gradient, double* in_power, const sedd::CudaLaunch& where) const {
        const Shape& s = p.shape;
        const std::vector<int64_t> at = cuts(s);
        const auto rows = static_cast<size_t>(s.rows);
        const sedd::GeneralizedMaskedSums nothing{-kInfinity, 0.0, 0.0, -kInfinity};
        std::vector<sedd::GeneralizedMaskedSums> all(rows, nothing);
        const auto slice = [&](const Tile& tile) {
            sedd::GeneralizedMaskedParams params = whole;
            params.logits = tile.entries.data();
            params.width = tile.width;
            params.stride = tile.stride;
            params.first = tile.first;
            return params;
        };
        for (size_t i = 0; i + 1 < at.size(); ++i) {
            std::vector<sedd::GeneralizedMaskedSums> sums(rows, nothing);
            const Tile tile(p, at[i], at[i + 1]);
            const Array workspace = garbage(sedd::generalized_masked_workspace(s.rows, tile.width, s.dtype));
            sedd::GeneralizedMaskedParams params = slice(tile);
            params.row_sums = sums.data();
            params.out = loss;
            params.stage = sedd::Stage::logits;
            const char* error = sedd::generalized_masked_cuda(params, {workspace.data(), where.stream, where.device});
            if (error != nullptr) return error;
            for (size_t row = 0; row < rows; ++row) {
                const double unit = sums[row].rest > 0.0 ? std::exp(sums[row].top) : 0.0;
                all[row].top = 0.0;  // no logit is far from it
                all[row].rest += unit * sums[row].rest;
                all[row].dot += unit * sums[row].dot;
                all[row].logit_v = std::max(all[row].logit_v, sums[row].logit_v);
            }
        }
        for (size_t i = 0; i + 1 < at.size(); ++i) {
            const Tile tile(p, at[i], at[i + 1]);
            const Array workspace =
                garbage(std::max({sedd::generalized_masked_workspace(s.rows, tile.width, s.dtype),
                                  sedd::generalized_masked_backward_workspace(s.rows, tile.width, s.dtype),
                                  sedd::generalized_masked_power_workspace(s.rows, tile.width, s.dtype)}));
            const sedd::CudaLaunch here{workspace.data(), where.stream, where.device};
            sedd::GeneralizedMaskedParams params = slice(tile);
            params.row_sums = all.data();
            params.out = loss;
            params.stage = sedd::Stage::loss;
            if (const char* error = sedd::generalized_masked_cuda(params, here)) return error;
            if (in_power != nullptr) {
                params.out = in_power + tile.first;
                if (const char* error = sedd::generalized_masked_power_cuda(params, here)) return error;
            }
            if (gradient == nullptr) continue;
            params.out = tile.entries.data();
            if (const char* error = sedd::generalized_masked_backward_cuda(params, here)) return error;
            tile.write_to(gradient);
        }
        return nullptr;
    }

    // A result with one float64 number a column.
    template <class Launch>
    void check_columns(const Problem& p, const std::string& operation, const Expected& expected, Launch launch) {
        const Shape& s = p.shape;
        Array out(DType::float64, s.dim);
        const int64_t workspace = sedd::generalized_masked_power_workspace(s.rows, s.dim, s.dtype);
        under_schedules(p, operation.c_str(), workspace, out, launch, [&] {
            for (int64_t y = 0; y < s.dim; ++y) {
                const double right = expected.value[static_cast<size_t>(y)], value = out[y];
                if (std::isnan(right) ? std::isnan(value)
                                      : std::abs(value - right) <= expected.slack[static_cast<size_t>(y)]) {
                    continue;
                }
                return "column " + std::to_string(y) + ": " + std::to_string(value) + ", not " + std::to_string(right);
            }
            return std::string();
        });
    }

    void run_transition(const Problem& p) {
        const Shape& s = p.shape;
        sedd::TransitionParams params{p.x_0.data(), p.sigma.data(), p.stationary(), nullptr, nullptr,
                                      nullptr,      s.rows,         s.dim,          s.dtype, s.family};
        const int64_t workspace = sedd::transition_workspace(s.rows, s.dim, s.dtype);
        check(p, "transition_column", s.dtype, transition_entries(p, true), workspace,
              [&](void* out, const sedd::CudaLaunch& where) {
                  params.out = out;
                  return sedd::transition_column_cuda(params, where);
              });
        check(p, "transition_row", s.dtype, transition_entries(p, false), workspace,
              [&](void* out, const sedd::CudaLaunch& where) {
                  params.out = out;
                  return sedd::transition_row_cuda(params, where);
              });
        params.seed = p.seed.data();
        params.first_row = 1000;
        params.cumulative = s.family == Family::rank_one ? p.cumulative.data() : nullptr;
        check_tokens(
            p, "sample_transition", 0,
            [&](void* out, const sedd::CudaLaunch& where) {
                params.out = out;
                return sedd::sample_transition_cuda(params, where);
            },
            [&](int64_t row, int64_t token) -> std::string {
                const auto i = static_cast<size_t>(row);
                const bool good = p.is_token(p.x_0[i]) && is_noise(p.sigma[i]);
                const int64_t right = good ? sedd::draw_transition(params, row, -std::expm1(-p.sigma[i])) : -1;
                return token == right ? "" : "not " + std::to_string(right);
            });
    }

    void run_reverse(const Problem& p) {
        for (const Step kind : {Step::euler, Step::tweedie}) {
            for (const int64_t forbidden : {int64_t{-1}, p.forbidden}) run_reverse(p, kind, forbidden);
        }
    }

    void run_reverse(const Problem& p, Step kind, int64_t forbidden) {
        const Shape& s = p.shape;
        const std::vector<double>& step = kind == Step::euler ? p.euler_step : p.sigma;
        std::vector<Weights> weights;
        for (int64_t row = 0; row < s.rows; ++row) {
            weights.push_back(reverse_weights(p, kind, row, step[static_cast<size_t>(row)], forbidden));
        }
        sedd::ReverseParams params{p.log_score.data(),
                                   p.x_t.data(),
                                   step.data(),
                                   p.shifts(),
                                   p.stationary(),
                                   nullptr,
                                   p.seed.data(),
                                   s.rows,
                                   s.dim,
                                   forbidden,
                                   s.dtype,
                                   s.family,
                                   kind};
        const int64_t workspace = sedd::reverse_workspace(s.rows, s.dim, s.dtype);
        const std::string name = kind == Step::euler ? "euler" : "tweedie";
        const std::string without = forbidden >= 0 ? " without " + std::to_string(forbidden) : "";
        check_probs(p, name + "_probs" + without, reverse_probs(p, weights), workspace,
                    [&](void* out, const sedd::CudaLaunch& where) {
                        params.out = out;
                        return sedd::reverse_probs_cuda(params, where);
                    });
        std::vector<std::set<int64_t>> right;
        for (int64_t row = 0; row < s.rows; ++row) {
            const auto i = static_cast<size_t>(row);
            right.push_back(row_tokens(p, kind, weights[i], row, step[i]));
        }
        const auto why_not = [&right](int64_t at, int64_t token) -> std::string {
            const std::set<int64_t>& may_be = right[static_cast<size_t>(at)];
            if (may_be.count(token) != 0) return "";
            return "not " + (may_be.empty() ? "one" : std::to_string(*may_be.begin()));
        };
        check_tokens(
            p, (name + "_sample" + without).c_str(), workspace,
            [&](void* out, const sedd::CudaLaunch& where) {
                params.out = out;
                return sedd::reverse_sample_cuda(params, where);
            },
            why_not);
        // Two sweeps take long: of most shapes the two kinds of steps that have most to do, and of some all.
        if (s.rows != 3 && (kind == Step::tweedie) != (forbidden >= 0)) return;
        const std::vector<int64_t> tiles = cuts(s);
        // What both sweeps over these tiles draw.
        const auto draw_right = [&](const std::vector<int64_t>& bounds) {
            right.clear();
            for (const uint64_t sweep : {0, 1}) {
                for (int64_t row = 0; row < s.rows; ++row) {
                    const auto i = static_cast<size_t>(row);
                    right.push_back(tile_tokens(p, kind, weights[i], row, step[i], bounds, sweep));
                }
            }
        };
        draw_right(tiles);
        check_tokens(
            p, (name + "_sample of tiles" + without).c_str(), 0,
            [&](void* out, const sedd::CudaLaunch& where) {
                return reverse_tiles(p, params, tiles, static_cast<int64_t*>(out), where);
            },
            why_not, 2);
        const int64_t width = s.dim * 2 / 5 | 1;
        std::vector<int64_t> grid;
        for (int64_t first = 0; first < s.dim; first += width) grid.push_back(first);
        grid.push_back(s.dim);
        draw_right(grid);
        check_tokens(
            p, (name + "_sample of three processes" + without).c_str(), 0,
            [&](void* out, const sedd::CudaLaunch& where) {
                return tiles_of_processes(p, params, width, static_cast<int64_t*>(out), where);
            },
            why_not, 2);
    }

    void run_reverse_mean(const Problem& p) {
        const int64_t mask = p.shape.family == Family::uniform ? -1 : p.shape.dim - 1;
        for (const int64_t forbidden : {int64_t{-1}, mask}) {
            run_reverse_mean(p, sedd::MeanStep::tweedie, mask, forbidden);
            run_reverse_mean(p, sedd::MeanStep::euler, mask, forbidden);
            if (p.shape.family == Family::absorbing) {
                run_reverse_mean(p, sedd::MeanStep::generalized_masked, mask, forbidden);
            }
        }
    }

    void run_reverse_mean(const Problem& p, sedd::MeanStep kind, int64_t mask, int64_t forbidden) {
        const Shape& s = p.shape;
        const bool generalized = kind == sedd::MeanStep::generalized_masked;
        Array power(compute_type(s.dtype), s.dim);
        for (int64_t y = 0; y < s.dim; ++y) power.set(y, power_of(y));
        std::vector<double> step;
        std::vector<MeanLaw> laws;
        std::vector<std::set<int64_t>> right;
        for (int64_t row = 0; row < s.rows; ++row) {
            const double sigma = p.sigma[static_cast<size_t>(row)];
            step.push_back(generalized ? ((row + s.dim) % 2 == 0 ? -kInfinity : -sigma)
                                       : (row % 4 == 0 ? 1.0 : 0.4) * sigma);
            laws.push_back(mean_law(p, kind, row, step.back(), mask, forbidden));
            right.push_back(mean_tokens(p, laws.back(), row));
        }
        sedd::ReverseMeanParams params{p.log_score.data(),
                                       p.x_t.data(),
                                       step.data(),
                                       generalized ? nullptr : p.sigma.data(),
                                       p.stationary(),
                                       s.family == Family::rank_one ? p.cumulative.data() : nullptr,
                                       generalized ? power.data() : nullptr,
                                       nullptr,
                                       nullptr,
                                       nullptr,
                                       p.seed.data(),
                                       p.row_ids.data(),
                                       s.rows,
                                       s.dim,
                                       s.dim,
                                       0,
                                       s.dim,
                                       s.dim,
                                       mask,
                                       forbidden,
                                       s.dtype,
                                       s.family,
                                       kind};
        constexpr const char* kNames[] = {"euler", "tweedie", "generalized masked"};
        const std::string name = std::string("mean ") + kNames[static_cast<int>(kind)];
        const std::string without = forbidden >= 0 ? " without MASK" : "";
        check_probs(p, name + "_probs" + without, mean_probs(p, laws), 0,
                    [&](void* out, const sedd::CudaLaunch& where) {
                        params.out = out;
                        return sedd::reverse_mean_probs_cuda(params, where);
                    });
        const auto why_not = [&right](int64_t at, int64_t token) -> std::string {
            const std::set<int64_t>& may_be = right[static_cast<size_t>(at)];
            if (may_be.count(token) != 0) return "";
            return "not " + (may_be.empty() ? "one" : std::to_string(*may_be.begin()));
        };
        check_tokens(
            p, (name + "_sample" + without).c_str(), 0,
            [&](void* out, const sedd::CudaLaunch& where) {
                params.out = out;
                return sedd::reverse_mean_sample_cuda(params, where);
            },
            why_not);
        check_tokens(
            p, (name + "_sample of three processes" + without).c_str(), 0,
            [&](void* out, const sedd::CudaLaunch& where) {
                return mean_of_processes(p, params, laws, static_cast<int64_t*>(out), where);
            },
            why_not);
    }

    // Whether each process's part of the sum that draws use is that of its entries.
    static bool are_shares(const Problem& p, const sedd::ReverseMeanParams& params, const std::vector<MeanLaw>& laws,
                           const std::vector<sedd::MeanSums>& sums) {
        const auto rows = static_cast<size_t>(p.shape.rows), most = static_cast<size_t>(params.most);
        for (size_t row = 0; row < rows; ++row) {
            const std::vector<double>& mu = laws[row].mu;
            const double all = std::accumulate(mu.begin(), mu.end(), 0.0);
            if (laws[row].probs.empty() || !(all > 0.0)) continue;
            double top = -kInfinity, total = 0.0;
            for (size_t at = row; at < sums.size(); at += rows) top = std::max(top, sums[at].top);
            std::vector<double> parts;
            for (size_t at = row; at < sums.size(); at += rows) {
                const double sum = params.power != nullptr ? sums[at].weighted : sums[at].exps;
                parts.push_back(sum * std::exp(sums[at].top - top));
                total += parts.back();
            }
            for (size_t r = 0; r < parts.size(); ++r) {
                double right = 0.0;
                for (size_t y = r * most; y < std::min((r + 1) * most, mu.size()); ++y) right += mu[y];
                if (!(std::abs(parts[r] / total - right / all) <= 8.0 * tolerance(p.shape.dtype))) return false;
            }
        }
        return true;
    }

    // Tokens of a vocabulary of which each process has a part.
    const char* mean_of_processes(const Problem& p, sedd::ReverseMeanParams params, const std::vector<MeanLaw>& laws,
                                  int64_t* out, const sedd::CudaLaunch& where) const {
        const Shape& s = p.shape;
        params.most = (s.dim + 2) / 3;
        const int64_t processes = (s.dim + params.most - 1) / params.most;
        std::vector<sedd::MeanSums> sums(static_cast<size_t>(processes * s.rows));
        std::vector<double> targets(sums.size(), kInfinity);
        std::vector<int64_t> drawn(static_cast<size_t>(s.rows));
        const auto sample = [&](int64_t r, bool draws) {
            const Tile tile(p, r * params.most, std::min((r + 1) * params.most, s.dim));
            sedd::ReverseMeanParams part = params;
            part.logits = tile.entries.data();
            part.width = tile.width, part.stride = tile.stride, part.first = tile.first;
            part.targets = draws ? targets.data() + r * s.rows : nullptr;
            part.sums = draws ? nullptr : sums.data() + r * s.rows;
            part.out = drawn.data();
            return sedd::reverse_mean_sample_cuda(part, where);
        };
        for (int64_t r = 0; r < processes; ++r) {
            if (const char* error = sample(r, false)) return error;
        }
        if (!are_shares(p, params, laws, sums)) return "a process has another share of the sum of μ";
        params.sums = sums.data(), params.targets = targets.data(), params.out = out;
        if (const char* error = sedd::reverse_mean_choose_cuda(params, where)) return error;
        for (int64_t r = 0; r < processes; ++r) {
            if (const char* error = sample(r, true)) return error;
            for (int64_t row = 0; row < s.rows; ++row) out[row] += drawn[static_cast<size_t>(row)];
        }
        return nullptr;
    }

    void run_unmask(const Problem& p) {
        constexpr double kDraws[][2] = {{1.0, 1.0}, {0.5, 1.0}, {0.0, 1.0}, {1.5, 0.6}};  // temperature, top_p
        for (const auto& [temperature, top_p] : kDraws) {
            for (const bool numbers : {true, false}) {
                run_unmask(p, temperature, top_p, numbers, {0, p.shape.dim}, "unmask");
                if (top_p == 1.0) run_unmask(p, temperature, top_p, numbers, cuts(p.shape), "unmask of tiles");
            }
        }
    }

    void run_unmask(const Problem& p, double temperature, double top_p, bool has_numbers,
                    const std::vector<int64_t>& at, const char* operation) {
        const Shape& s = p.shape;
        std::vector<int64_t> argmax(static_cast<size_t>(s.rows));
        std::vector<sedd::UnmaskNumbers> numbers(static_cast<size_t>(s.rows));
        const auto launch = [&](void* out, const sedd::CudaLaunch& where) -> const char* {
            const Array states = garbage(s.rows * static_cast<int64_t>(sizeof(sedd::UnmaskState)));
            for (size_t i = 0; i + 1 < at.size(); ++i) {
                const Tile tile(p, at[i], at[i + 1]);
                const char* error = sedd::unmask_cuda(
                    {tile.entries.data(), static_cast<sedd::UnmaskState*>(states.data()), static_cast<int64_t*>(out),
                     argmax.data(), has_numbers ? numbers.data() : nullptr, p.seed.data(), p.row_ids.data(), s.rows,
                     tile.width, tile.stride, tile.first, s.dim, p.mask(), temperature, top_p, s.dtype},
                    where);
                if (error != nullptr) return error;
            }
            return nullptr;
        };
        check_tokens(p, operation, 0, launch, [&](int64_t row, int64_t token) {
            const auto i = static_cast<size_t>(row);
            const std::string why = why_not_drawn(p, row, token, temperature, top_p, at, argmax[i]);
            return why.empty() && has_numbers ? why_not_numbers(p, row, token, numbers[i]) : why;
        });
    }

    static std::vector<double> logits_of(const Problem& p, int64_t row) {
        std::vector<double> logits(static_cast<size_t>(p.shape.dim));
        for (int64_t y = 0; y < p.shape.dim; ++y) {
            logits[static_cast<size_t>(y)] = y == p.mask() ? -kInfinity : p.log_score[row * p.shape.dim + y];
        }
        return logits;
    }

    // What is wrong with a token, by the row's random numbers: the empty string if nothing is.
    static std::string why_not_drawn(const Problem& p, int64_t row, int64_t token, double temperature, double top_p,
                                     const std::vector<int64_t>& at, int64_t argmax) {
        const std::vector<double> logits = logits_of(p, row);
        const auto largest = std::max_element(logits.begin(), logits.end());
        if (argmax != largest - logits.begin()) return "of which the most probable one is " + std::to_string(argmax);
        if (!p.is_token(token)) return "not one";
        if (temperature == 0.0) return token == argmax ? "" : "not the most probable one";
        std::vector<double> weights;
        for (const double l : logits) weights.push_back(std::exp((l - *largest) / temperature));
        const double all = std::accumulate(weights.begin(), weights.end(), 0.0), slack = 8.0 * tolerance(p.shape.dtype);
        if (top_p < 1.0) {
            double above = 0.0;
            for (size_t y = 0; y < logits.size(); ++y) {
                if (logits[y] > logits[static_cast<size_t>(token)]) above += weights[y];
            }
            return above < (top_p + slack) * all ? "" : "not in the nucleus";
        }
        // a later tile may replace the token
        std::set<int64_t> may_be;
        double total = 0.0;
        for (size_t i = 0; i + 1 < at.size(); ++i) {
            double sum = 0.0;
            for (int64_t y = at[i]; y < at[i + 1]; ++y) sum += weights[static_cast<size_t>(y)];
            total += sum;
            const sedd::Uniforms u = sedd::row_uniforms(static_cast<uint64_t>(p.seed[0]),
                                                        static_cast<uint64_t>(p.row_ids[static_cast<size_t>(row)]),
                                                        static_cast<uint64_t>(at[i]));
            const double target = u.first * total;
            if (target > sum + slack * total) continue;
            if (target < sum - slack * total) may_be.clear();
            double end = 0.0;
            for (int64_t y = at[i]; y < at[i + 1]; ++y) {
                const double weight = weights[static_cast<size_t>(y)], begin = end;
                end += weight;
                if (weight > 0.0 && begin - slack * total <= target && target <= end + slack * total) may_be.insert(y);
            }
        }
        return may_be.count(token) != 0 ? "" : "not " + (may_be.empty() ? "one" : std::to_string(*may_be.begin()));
    }

    static std::string why_not_numbers(const Problem& p, int64_t row, int64_t token, const sedd::UnmaskNumbers& found) {
        std::vector<double> logits = logits_of(p, row);
        const double logit = logits[static_cast<size_t>(token)];
        std::sort(logits.begin(), logits.end(), std::greater<double>());
        double exps = 0.0, weighted = 0.0;
        for (const double l : logits) {
            const double e = std::exp(l - logits[0]);
            exps += e;
            if (e > 0.0) weighted += (l - logits[0]) * e;
        }
        const double second = logits.size() > 1 ? std::exp(logits[1] - logits[0]) : 0.0;
        const double right[] = {logit - logits[0] - std::log(exps), 1.0 / exps, (1.0 - second) / exps,
                                std::log(exps) - weighted / exps};
        const double value[] = {found.log_prob, found.max_prob, found.margin, found.entropy};
        for (int i = 0; i < 4; ++i) {
            if (std::abs(value[i] - right[i]) <= 8.0 * tolerance(p.shape.dtype) * std::max(1.0, std::abs(right[i]))) {
                continue;
            }
            char what[120];
            std::snprintf(what, sizeof what, "its number %d is %.9g, not %.9g", i, value[i], right[i]);
            return what;
        }
        return "";
    }

    // Tokens of both sweeps, the second one of all rows.
    const char* reverse_tiles(const Problem& p, const sedd::ReverseParams& whole, const std::vector<int64_t>& at,
                              int64_t* out, const sedd::CudaLaunch& where) const {
        const Shape& s = p.shape;
        const Array draws = garbage(s.rows * static_cast<int64_t>(sizeof(sedd::ReverseDraw)));
        for (const int32_t sweep : {0, 1}) {
            for (size_t i = 0; i + 1 < at.size(); ++i) {
                const Tile tile(p, at[i], at[i + 1]);
                const char* error = sedd::reverse_tile_cuda({tile.entries.data(),
                                                             whole.x_t,
                                                             whole.noise,
                                                             whole.shift,
                                                             whole.stationary,
                                                             static_cast<sedd::ReverseDraw*>(draws.data()),
                                                             nullptr,
                                                             nullptr,
                                                             out + sweep * s.rows,
                                                             whole.seed,
                                                             p.row_ids.data(),
                                                             s.rows,
                                                             tile.width,
                                                             tile.stride,
                                                             tile.first,
                                                             s.dim,
                                                             whole.forbidden,
                                                             s.dtype,
                                                             s.family,
                                                             whole.step,
                                                             sweep},
                                                            where);
                if (error != nullptr) return error;
            }
        }
        return nullptr;
    }

    // The same, of a vocabulary of which each process has a part: tiles have this width, and some have parts of two.
    const char* tiles_of_processes(const Problem& p, const sedd::ReverseParams& whole, int64_t width, int64_t* out,
                                   const sedd::CudaLaunch& where) const {
        const Shape& s = p.shape;
        const Array state = garbage(s.rows * static_cast<int64_t>(sizeof(sedd::ReverseDraw)));
        auto* draws = static_cast<sedd::ReverseDraw*>(state.data());
        const int64_t most = (s.dim + 2) / 3, processes = (s.dim + most - 1) / most, parts = most / width + 2;
        for (const int32_t sweep : {0, 1}) {
            std::vector<double> sums(static_cast<size_t>(processes * parts * s.rows)), targets(p.row_ids.size());
            std::vector<int64_t> chosen(p.row_ids.size());
            sedd::ReverseTileParams params{nullptr,
                                           whole.x_t,
                                           whole.noise,
                                           whole.shift,
                                           whole.stationary,
                                           draws,
                                           nullptr,
                                           nullptr,
                                           out + sweep * s.rows,
                                           whole.seed,
                                           p.row_ids.data(),
                                           s.rows,
                                           0,
                                           0,
                                           s.dim,
                                           s.dim,
                                           whole.forbidden,
                                           s.dtype,
                                           s.family,
                                           whole.step,
                                           sweep};
            // Calls f for each part, with its entries in `params`.
            const auto for_parts = [&](auto f) -> const char* {
                sedd::ReverseTileParams part = params;
                for (int64_t r = 0; r < processes; ++r) {
                    const int64_t begin = r * most, end = std::min(begin + most, s.dim);
                    for (int64_t k = begin / width; k <= (end - 1) / width; ++k) {
                        const Tile tile(p, std::max(k * width, begin), std::min((k + 1) * width, end));
                        part.log_score = tile.entries.data();
                        part.width = tile.width, part.stride = tile.stride, part.first = tile.first;
                        if (const char* error = f(part, r * parts + k - begin / width)) return error;
                    }
                }
                return nullptr;
            };
            const char* error = for_parts([&](sedd::ReverseTileParams& part, int64_t index) {
                part.sums = sums.data() + index * s.rows;
                return sedd::reverse_tile_cuda(part, where);
            });
            if (error != nullptr) return error;
            error = sedd::reverse_choose_cuda({sums.data(), draws, targets.data(), chosen.data(), whole.seed,
                                               p.row_ids.data(), s.rows, parts, width, most, s.dim, sweep},
                                              where);
            if (error != nullptr) return error;
            // every row draws from every part; what it was not to draw is undone
            error = for_parts([&](sedd::ReverseTileParams& part, int64_t index) {
                const std::vector<sedd::ReverseDraw> before(draws, draws + s.rows);
                part.targets = targets.data();
                const char* why = sedd::reverse_tile_cuda(part, where);
                for (int64_t row = 0; row < s.rows; ++row) {
                    if (chosen[static_cast<size_t>(row)] != index) draws[row] = before[static_cast<size_t>(row)];
                }
                return why;
            });
            if (error != nullptr) return error;
            error = sedd::reverse_tile_cuda(params, where);
            if (error != nullptr) return error;
        }
        return nullptr;
    }

    std::vector<std::string> schedules_;
    bool in_turn_;
    std::string only_;
    size_t turns_ = 0;
    int cases_ = 0, differences_ = 0;
};

// Entries of a row, by how its elements lie in segments of 2 KiB.
std::vector<int64_t> widths(DType dtype, bool quick) {
    const auto segment = static_cast<int64_t>(2048 / bytes_of(dtype));
    const int64_t whole = 2 * segment;  // behind a boundary, the row has a third segment
    // More segments than a block of 8 warps; once, than one of 24 or than a warp's lanes.
    const int64_t many = dtype == DType::float64 ? 33 * segment + 53 : 9 * segment + 395;
    if (quick) return {1, 27, whole, many};
    return {1, 2, 27, 300, 1025, whole, many};
}

// The last of so many rows, which starts beyond 2^31 elements: the others are bad, so that they are not read and have
// no memory but the addresses.
std::string run_far_row() {
    constexpr int64_t rows = 2050, dim = int64_t{1} << 20, right = 12345;
    constexpr size_t bytes = 2 * rows * dim;
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return "the system has no addresses for it";
    auto* row = static_cast<uint16_t*>(memory) + (rows - 1) * dim;
    std::fill(row, row + dim, to_bits(DType::bfloat16, -kInfinity));
    row[right] = to_bits(DType::bfloat16, 5.0);
    std::vector<int64_t> x(rows, -1), out(rows), seed = {1};
    x.back() = dim - 1;
    const std::vector<double> step(rows, 1.0);
    const char* error =
        sedd::reverse_sample_cuda({memory, x.data(), step.data(), nullptr, nullptr, out.data(), seed.data(), rows, dim,
                                   -1, DType::bfloat16, Family::absorbing, Step::euler},
                                  {nullptr, nullptr, 0});
    munmap(memory, bytes);
    if (error != nullptr) return error;
    return out.back() == right ? "" : "token " + std::to_string(out.back()) + ", not " + std::to_string(right);
}

// A row of probabilities on devices whose blocks have just the shared memory that keeps it, and one byte less.
std::string run_at_limit(const std::string& family) {
    constexpr int64_t dim = 13001;  // above 48 KiB, which are given unasked
    const std::vector<float> log_score(dim);
    const std::vector<int64_t> x = {1};
    const std::vector<double> noise = {0.5}, sigma = {1.0};
    std::vector<float> out(dim), workspace(dim);
    const sedd::CudaLaunch where{workspace.data(), nullptr, 0};
    std::string wrong;
    // How much shared memory the launch takes, of so much.
    const auto taken = [&](int most) {
        out.assign(dim, -1.0f);
        cuda_on_cpu_set_max_shared(most);
        const char* error =
            family == "reverse"
                ? sedd::reverse_probs_cuda({log_score.data(), x.data(), noise.data(), nullptr, nullptr, out.data(),
                                            nullptr, 1, dim, -1, DType::float32, Family::uniform, Step::tweedie},
                                           where)
                : sedd::reverse_mean_probs_cuda({log_score.data(),
                                                 x.data(),
                                                 noise.data(),
                                                 sigma.data(),
                                                 nullptr,
                                                 nullptr,
                                                 nullptr,
                                                 nullptr,
                                                 nullptr,
                                                 out.data(),
                                                 nullptr,
                                                 nullptr,
                                                 1,
                                                 dim,
                                                 dim,
                                                 0,
                                                 dim,
                                                 dim,
                                                 -1,
                                                 -1,
                                                 DType::float32,
                                                 Family::uniform,
                                                 sedd::MeanStep::tweedie},
                                                where);
        cuda_on_cpu_set_max_shared(-1);
        const double sum = std::accumulate(out.begin(), out.end(), 0.0);
        if (error != nullptr) wrong = error;
        if (wrong.empty() && std::abs(sum - 1.0) > 1e-5) wrong = "probabilities add up to " + std::to_string(sum);
        return static_cast<int>(cuda_on_cpu_launch_shared_bytes());
    };
    const int needed = taken(-1), row_bytes = static_cast<int>(dim * 4);
    if (wrong.empty() && needed == 0) return "";  // the CPU's own kernels
    if (wrong.empty() && needed < row_bytes) wrong = "the row is not kept";
    if (wrong.empty() && taken(needed) != needed) wrong = "the row is not kept where it just fits";
    if (wrong.empty() && taken(needed - 1) >= row_bytes) wrong = "the row is kept where it does not fit";
    return wrong;
}

// A launch of the family's on a device: what went wrong.
std::string run_on(const std::string& family, int device) {
    const std::vector<float> log_score(3);
    const std::vector<int64_t> x = {1}, seed = {1};
    const std::vector<double> noise = {0.5};
    int64_t out = 0;
    float workspace[2];
    const sedd::CudaLaunch where{workspace, nullptr, device};
    const char* error = nullptr;
    if (family == "reverse") {
        error = sedd::reverse_sample_cuda({log_score.data(), x.data(), noise.data(), nullptr, nullptr, &out,
                                           seed.data(), 1, 3, -1, DType::float32, Family::uniform, Step::euler},
                                          where);
    } else if (family == "mean_prediction") {
        double big_workspace[64];
        error = sedd::mean_prediction_cuda({log_score.data(),
                                            x.data(),
                                            x.data(),
                                            noise.data(),
                                            nullptr,
                                            nullptr,
                                            nullptr,
                                            nullptr,
                                            nullptr,
                                            nullptr,
                                            &out,
                                            1,
                                            3,
                                            3,
                                            0,
                                            3,
                                            -1,
                                            DType::float32,
                                            Family::uniform,
                                            sedd::Stage::whole},
                                           {big_workspace, nullptr, device});
    } else if (family == "reverse_mean") {
        error = sedd::reverse_mean_sample_cuda({log_score.data(),
                                                x.data(),
                                                noise.data(),
                                                noise.data(),
                                                nullptr,
                                                nullptr,
                                                nullptr,
                                                nullptr,
                                                nullptr,
                                                &out,
                                                seed.data(),
                                                nullptr,
                                                1,
                                                3,
                                                3,
                                                0,
                                                3,
                                                3,
                                                -1,
                                                -1,
                                                DType::float32,
                                                Family::uniform,
                                                sedd::MeanStep::euler},
                                               where);
    } else if (family == "unmask") {
        double state[8];
        static_assert(sizeof state == sizeof(sedd::UnmaskState), "one row");
        int64_t argmax = 0;
        error = sedd::unmask_cuda({log_score.data(), reinterpret_cast<sedd::UnmaskState*>(state), &out, &argmax,
                                   nullptr, seed.data(), nullptr, 1, 3, 3, 0, 3, -1, 1.0, 1.0, DType::float32},
                                  where);
    } else if (family == "score_entropy") {
        error = sedd::score_entropy_cuda({log_score.data(), x.data(), x.data(), noise.data(), nullptr, nullptr, nullptr,
                                          nullptr, &out, -std::log(3.0), 1, 3, DType::float32, Family::uniform},
                                         where);
    } else if (family == "generalized_masked") {
        double numbers[5];
        static_assert(sizeof numbers == sizeof(sedd::GeneralizedMaskedRow), "one row");
        float sums[3];
        error = sedd::generalized_masked_cuda({log_score.data(), log_score.data(), x.data(), x.data(), noise.data(),
                                               nullptr, reinterpret_cast<sedd::GeneralizedMaskedRow*>(numbers), nullptr,
                                               &out, 1, 3, 3, 0, 3, DType::float32, sedd::Stage::whole},
                                              {sums, nullptr, device});
    } else {
        error = sedd::sample_transition_cuda(
            {x.data(), noise.data(), nullptr, nullptr, &out, seed.data(), 1, 3, DType::float32, Family::uniform},
            where);
    }
    if (error != nullptr) return error;
    const int ran_on = cuda_on_cpu_launch_device();
    return ran_on == device ? "" : "ran on device " + std::to_string(ran_on) + ", not " + std::to_string(device);
}

// From a thread on device 0, which nobody has used yet: launches on device 1, and then on 0. The first make no context
// on device 0.
std::string run_on_both(const std::string& only) {
    for (const int device : {1, 0}) {
        for (const char* family : {"generalized_masked", "mean_prediction", "reverse", "reverse_mean", "score_entropy",
                                   "transition", "unmask"}) {
            const std::string what = only.empty() || only == family ? run_on(family, device) : "";
            if (!what.empty()) return family + (": " + what);
        }
        if (device == 1 && cuda_on_cpu_contexts() != 1u << device) return "a context on a device without tensors";
    }
    return "";
}

}  // namespace

// driver [--quick] [--in-turn] [--only FAMILY] [SCHEDULE]..., with the name of a source in csrc/cuda as FAMILY
int main(int count, char** words) {
    bool quick = false, in_turn = false;
    std::string only;
    std::vector<std::string> schedules;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        if (word == "--quick") {
            quick = true;
        } else if (word == "--in-turn") {
            in_turn = true;
        } else if (word == "--only" && i + 1 < count) {
            only = words[++i];
        } else if (cuda_on_cpu_set_schedule(words[i], 0) == 0) {
            schedules.push_back(word);
        } else {
            std::fprintf(stderr, "driver: %s is no schedule\n", words[i]);
            return 2;
        }
    }
    if (schedules.empty()) schedules.assign(std::begin(kSchedules), std::end(kSchedules));
    const std::string devices = run_on_both(only);  // before anything else
    if (!devices.empty()) std::printf("devices: %s\n", devices.c_str());
    int cases = 1, differences = !devices.empty();
    if (only.empty() || only == "reverse") {
        const std::string what = run_far_row();
        if (!what.empty()) std::printf("reverse_sample of a row beyond 2^31 elements: %s\n", what.c_str());
        cases += 1;
        differences += !what.empty();
    }
    for (const char* family : {"reverse", "reverse_mean"}) {
        if (!only.empty() && only != family) continue;
        const std::string what = run_at_limit(family);
        if (!what.empty()) std::printf("%s at the limit of shared memory: %s\n", family, what.c_str());
        cases += 1;
        differences += !what.empty();
    }
    Driver driver(schedules, in_turn, only);
    for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16}) {
        for (const Family family : {Family::absorbing, Family::uniform, Family::rank_one}) {
            if (quick && (dtype == DType::float16 || (dtype == DType::float64 && family != Family::rank_one))) continue;
            for (const int64_t dim : widths(dtype, quick)) {
                for (const int64_t rows : {1, 3, 9}) {
                    if (quick && rows != 9) continue;
                    for (const bool behind : {false, true}) {
                        const bool even = (rows + dim + behind) % 2 == 0;
                        driver.run({dtype, family, rows, dim, behind, even, even});
                        if (quick && driver.differences() > 0) return 1;
                    }
                }
            }
        }
    }
    cases += driver.cases();
    differences += driver.differences();
    // More rows than have their sums in a pass of their own.
    if (!quick && (only.empty() || only == "reverse")) {
        Driver many(schedules, true, "reverse");
        many.run({DType::float64, Family::rank_one, 1027, 9 * 256 - 7, true, false, false});
        cases += many.cases();
        differences += many.differences();
    }
    std::printf("%d cases, %d differences\n", cases, differences);
    return differences == 0 ? 0 : 1;
}

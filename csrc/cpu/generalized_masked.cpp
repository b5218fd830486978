// Generalised masked diffusion on the CPU. The loss takes one sweep over a masked row, in blocks that are read twice:
// from memory for the largest logit, and from the cache for exp and the two sums. The gradient in the logits takes a
// second sweep that reads and writes once. The gradient in w adds up columns: each thread has blocks of columns, and
// takes the rows in their order.
#include "generalized_masked.h"

#include "cpu/kernels.h"
#include "cpu/softmax.h"

namespace sedd::SEDD_ISA {
namespace {

// Rows whose contributions to a column are added in the compute type; such sums are added in float64.
constexpr int64_t kColumnRows = 64;

// Sums over the entries added so far: Σ e^{l_k} = total · e^top and Σ w_k e^{l_k} = dot · e^top.
struct WeightedSums {
    double top = -__builtin_inf();
    double total = 0.0;
    double dot = 0.0;

    template <class T, class Real = Compute<T>>
    void add(const T* logits, const Real* power, int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; block += kSoftmaxBlock) {
            const int64_t stop = block + kSoftmaxBlock < end ? block + kSoftmaxBlock : end;
            const double largest = largest_logit(logits, block, stop);
            if (largest > top) {
                const double scale = exp(top - largest);
                total *= scale;
                dot *= scale;
                top = largest;
            }
            add_block(logits, power, block, stop, static_cast<Real>(top == -__builtin_inf() ? 0.0 : top));
        }
    }

  private:
    template <int kCount, class T, class Real, class Vec>
    static void add_vectors(Vec* sum, Vec* weighted, const T* logits, const Real* power, int64_t y, Vec tops) {
        Vec l[kCount];
        load_vectors<true>(logits + y, l);
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) l[k] -= tops;
        exp_lanes(l);
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) sum[k] += l[k];
        SEDD_UNROLL for (int k = 0; k < kCount; ++k) { weighted[k] += l[k] * load(power + y + k * Lanes<Real>::width); }
    }

    template <class T, class Real>
    void add_block(const T* logits, const Real* power, int64_t begin, int64_t end, Real largest) {
        using Vec = typename Lanes<Real>::Vec;
        constexpr int width = Lanes<Real>::width;
        const Vec tops = broadcast(largest);
        Vec sum[kUnroll] = {}, weighted[kUnroll] = {};
        int64_t y = begin;
        for (; y + kUnroll * width <= end; y += kUnroll * width) {
            add_vectors<kUnroll>(sum, weighted, logits, power, y, tops);
        }
        for (; y + width <= end; y += width) add_vectors<1>(sum, weighted, logits, power, y, tops);
        if (y < end) {
            const Vec e = exp_lanes(load_partial(logits + y, end - y, -__builtin_inff()) - tops);
            sum[1] += e;
            weighted[1] += e * load_partial(power + y, end - y, 0.0f);
        }
        total += sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3]));
        dot += sum_lanes((weighted[0] + weighted[1]) + (weighted[2] + weighted[3]));
    }
};

// out_k = factor e^{l_k - top} (w_k + lift) over kCount vectors from y on. `out` may be `logits`.
template <int kCount, class T, class Real, class Vec>
inline void write_vectors(T* out, const T* logits, const Real* power, int64_t y, Vec top, Vec factor, Vec lift) {
    Vec l[kCount];
    prefetch<kCount>(logits + y);
    load_vectors<true>(logits + y, l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) l[k] -= top;
    exp_lanes(l);
    SEDD_UNROLL for (int k = 0; k < kCount; ++k) {
        l[k] = factor * l[k] * (load(power + y + k * Lanes<Real>::width) + lift);
    }
    store_vectors<true>(out + y, l);
}

template <class T, class Real = Compute<T>>
void write_gradient(T* out, const T* logits, const Real* power, int64_t begin, int64_t end, Real top, Real factor,
                    Real lift) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    const Vec tops = broadcast(top), factors = broadcast(factor), lifts = broadcast(lift);
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        write_vectors<kUnroll>(out, logits, power, y, tops, factors, lifts);
    }
    for (; y + width <= end; y += width) write_vectors<1>(out, logits, power, y, tops, factors, lifts);
    if (y >= end) return;
    const int64_t n = end - y;
    const Vec e = exp_lanes(load_partial(logits + y, n, -__builtin_inff()) - tops);
    store_partial(out + y, factors * e * (load_partial(power + y, n, 0.0f) + lifts), n);
}

// sum_k += factor e^{l_k - top} over columns [begin, end), where sum[0] belongs to column `first`.
template <class T, class Real = Compute<T>>
void add_columns(Real* sum, const T* logits, int64_t first, int64_t begin, int64_t end, Real top, Real factor) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    const Vec tops = broadcast(top), factors = broadcast(factor);
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        Vec l[kUnroll];
        prefetch<kUnroll>(logits + y);
        load_vectors<true>(logits + y, l);
        SEDD_UNROLL for (int k = 0; k < kUnroll; ++k) l[k] -= tops;
        exp_lanes(l);
        SEDD_UNROLL for (int k = 0; k < kUnroll; ++k) {
            Real* const at = sum + (y - first) + k * width;
            store(at, load(at) + factors * l[k]);
        }
    }
    for (; y + width <= end; y += width) {
        Real* const at = sum + (y - first);
        store(at, load(at) + factors * exp_lanes(load(logits + y) - tops));
    }
    if (y >= end) return;
    Real* const at = sum + (y - first);
    const Vec e = exp_lanes(load_partial(logits + y, end - y, -__builtin_inff()) - tops);
    store_partial(at, load_partial(at, end - y, 0.0f) + factors * e, end - y);
}

// Whether the row is masked. Reports a bad one, which is not.
inline bool is_masked(const GeneralizedMaskedParams& p, int64_t row, Status& status) {
    const Fault fault = generalized_masked_fault(p, row);
    if (fault != Fault::none) report(status, fault, row);
    return fault == Fault::none && p.x_t[row] == p.dim - 1;
}

// w of the slice.
template <class Real>
const Real* slice_power(const GeneralizedMaskedParams& p) {
    return static_cast<const Real*>(p.power) + p.first;
}

template <class T>
GeneralizedMaskedSums slice_sums(const GeneralizedMaskedParams& p, int64_t row) {
    const T* l = static_cast<const T*>(p.logits) + row * p.stride;
    const auto* power = slice_power<Compute<T>>(p);
    const int64_t v = p.x_0[row] - p.first, count = generalized_masked_tokens(p);
    const bool has_v = v >= 0 && v < count;
    WeightedSums sums;
    sums.add(l, power, 0, has_v ? v : count);
    if (has_v) sums.add(l, power, v + 1, count);
    return {sums.top, sums.total, sums.dot, has_v ? read_one(l + v) : -__builtin_inf()};
}

template <class T, class Real = Compute<T>>
GeneralizedMaskedGradient gradient_of(const GeneralizedMaskedParams& p, int64_t row) {
    const double power_v = static_cast<double>(static_cast<const Real*>(p.power)[p.x_0[row]]);
    return generalized_masked_gradient(p.numbers[row], power_v, p.t[row],
                                       static_cast<double>(static_cast<const Real*>(p.grad_loss)[row]));
}

template <class T>
void forward_rows(const GeneralizedMaskedParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    const Real* power = static_cast<const Real*>(p.power);
    Real* loss = static_cast<Real*>(p.out);
    for (int64_t i = begin; i < end; ++i) {
        loss[i] = Real(0);
        p.numbers[i] = {};
        if (!is_masked(p, i, status)) continue;
        const GeneralizedMaskedSums sums = p.stage == Stage::loss ? p.row_sums[i] : slice_sums<T>(p, i);
        if (p.stage == Stage::logits) {
            p.row_sums[i] = sums;
            continue;
        }
        p.numbers[i] = generalized_masked_row(sums);
        const double power_v = static_cast<double>(power[p.x_0[i]]);
        loss[i] = static_cast<Real>(generalized_masked_value(p.numbers[i], power_v, p.t[i]));
    }
}

template <class T>
void backward_rows(const GeneralizedMaskedParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    const int64_t count = generalized_masked_tokens(p);
    for (int64_t i = begin; i < end; ++i) {
        const T* l = static_cast<const T*>(p.logits) + i * p.stride;
        T* out = static_cast<T*>(p.out) + i * p.stride;
        if (!is_masked(p, i, status)) {
            memset(out, 0, sizeof(T) * static_cast<size_t>(p.width));
            continue;
        }
        const int64_t v = p.x_0[i] - p.first;
        const bool has_v = v >= 0 && v < count;
        const GeneralizedMaskedGradient g = gradient_of<T>(p, i);
        const auto write = [&](int64_t from, int64_t to) {
            write_gradient(out, l, slice_power<Real>(p), from, to, static_cast<Real>(p.numbers[i].top),
                           static_cast<Real>(g.factor), static_cast<Real>(g.lift));
        };
        write(0, has_v ? v : count);
        if (has_v) {
            write_one(out + v, g.at_v);
            write(v + 1, count);
        }
        if (count < p.width) write_one(out + count, 0.0);
    }
}

// Works on blocks [begin, end) of kPowerColumns columns.
template <class T>
void power_columns(const GeneralizedMaskedParams& p, int64_t begin, int64_t end, void*, Status& status) {
    using Real = Compute<T>;
    Real sum[kPowerColumns];
    const int64_t count = generalized_masked_tokens(p);
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kPowerColumns;
        const int64_t stop = first + kPowerColumns < p.width ? first + kPowerColumns : p.width;
        const int64_t last = stop < count ? stop : count;  // without MASK
        double* out = static_cast<double*>(p.out) + first;
        memset(out, 0, sizeof(double) * static_cast<size_t>(stop - first));
        for (int64_t rows = 0; rows < p.rows; rows += kColumnRows) {
            memset(sum, 0, sizeof(sum));
            for (int64_t i = rows; i < rows + kColumnRows && i < p.rows; ++i) {
                if (!is_masked(p, i, status)) continue;
                const T* l = static_cast<const T*>(p.logits) + i * p.stride;
                const GeneralizedMaskedGradient g = gradient_of<T>(p, i);
                const Real top = static_cast<Real>(p.numbers[i].top), factor = static_cast<Real>(g.factor);
                const int64_t v = p.x_0[i] - p.first;
                const bool has_v = first <= v && v < last;
                add_columns(sum, l, first, first, has_v ? v : last, top, factor);
                if (!has_v) continue;
                sum[v - first] += static_cast<Real>(g.power_at_v);
                add_columns(sum, l, first, v + 1, last, top, factor);
            }
            for (int64_t y = 0; y < last - first; ++y) out[y] += static_cast<double>(sum[y]);
        }
    }
}

}  // namespace

RowKernel<GeneralizedMaskedParams> generalized_masked(DType dtype) {
    return dispatch(dtype, Family::absorbing, [](auto element, auto) -> RowKernel<GeneralizedMaskedParams> {
        return forward_rows<typename decltype(element)::Type>;
    });
}

RowKernel<GeneralizedMaskedParams> generalized_masked_backward(DType dtype) {
    return dispatch(dtype, Family::absorbing, [](auto element, auto) -> RowKernel<GeneralizedMaskedParams> {
        return backward_rows<typename decltype(element)::Type>;
    });
}

RowKernel<GeneralizedMaskedParams> generalized_masked_power(DType dtype) {
    return dispatch(dtype, Family::absorbing, [](auto element, auto) -> RowKernel<GeneralizedMaskedParams> {
        return power_columns<typename decltype(element)::Type>;
    });
}

}  // namespace sedd::SEDD_ISA

// Tokens and statistics of positions on the CPU. A kernel reads a tile of a row once and keeps, for each block, the sum
// of exp((l - top) / T) and the largest logit so far, `top`. A random number selects a block, and only this block is
// read again to find the token. A rejected draw of a nucleus reads the row again.
#include "unmask.h"

#include "cpu/draw.h"
#include "cpu/softmax.h"

namespace sedd::SEDD_ISA {
namespace {

struct Largest {
    double top = -__builtin_inf(), second = -__builtin_inf();

    void add(double l) {
        const double lower = l > top ? top : l;
        top = l > top ? l : top;
        second = lower > second ? lower : second;
    }
};

// The two largest of [begin, end), which is at most a block.
template <class T, class Real = Compute<T>>
Largest two_largest(const T* logits, int64_t begin, int64_t end) {
    using Vec = typename Lanes<Real>::Vec;
    constexpr int width = Lanes<Real>::width;
    const Vec none = broadcast(static_cast<Real>(-__builtin_inff()));
    Vec top[2] = {none, none}, second[2] = {none, none};
    const auto add = [&](int k, Vec l) {
        second[k] = max_or_second(min_or_second(l, top[k]), second[k]);
        top[k] = max_or_second(l, top[k]);
    };
    int64_t y = begin;
    for (; y + 2 * width <= end; y += 2 * width) {
        Vec l[2];
        prefetch<2>(logits + y);
        load_vectors<false>(logits + y, l);
        add(0, l[0]);
        add(1, l[1]);
    }
    sweep<width>(
        y, end, [&](int64_t z) { add(0, load(logits + z)); },
        [&](int64_t z, int64_t n) { add(1, load_partial(logits + z, n, -__builtin_inff())); });
    Largest result;
    for (int k = 0; k < 2; ++k) {
        Real tops[width], seconds[width];
        memcpy(tops, &top[k], sizeof(tops));
        memcpy(seconds, &second[k], sizeof(seconds));
        for (int i = 0; i < width; ++i) {
            result.add(static_cast<double>(tops[i]));
            result.add(static_cast<double>(seconds[i]));
        }
    }
    return result;
}

// The first of [begin, end) that is equal to `value`, which is there.
template <class T>
int64_t first_equal(const T* logits, int64_t begin, int64_t end, double value) {
    constexpr int64_t few = 64;
    for (; begin + few < end; begin += few) {
        if (largest_logit(logits, begin, begin + few) == value) break;
    }
    while (begin < end - 1 && static_cast<double>(read_one(logits + begin)) != value) ++begin;
    return begin;
}

struct Terms {
    double exps = 0.0, weighted = 0.0, draws = 0.0;
};

// The sums over [begin, end), which is at most a block.
template <UnmaskSums kSums, class T, class Real = Compute<T>>
Terms sum_terms(const T* logits, int64_t begin, int64_t end, Real top, Real factor) {
    constexpr int width = Lanes<Real>::width;
    constexpr bool statistics = kSums != UnmaskSums::draws, draws = kSums != UnmaskSums::statistics;
    using Vec = typename Lanes<Real>::Vec;
    // exp(least) is 0, and 0 · least is not NaN, as 0 · -inf is
    const Vec tops = broadcast(top), factors = broadcast(factor), least = broadcast(Real(-1000));
    Vec exps[kUnroll] = {}, weighted[kUnroll] = {}, drawn[kUnroll] = {};
    const auto add = [&](auto count, auto& l) {
        constexpr int n = count.value;
        Vec e[n];
        SEDD_UNROLL for (int k = 0; k < n; ++k) l[k] -= tops;
        if constexpr (statistics) {
            SEDD_UNROLL for (int k = 0; k < n; ++k) e[k] = l[k];
            exp_lanes(e);
            SEDD_UNROLL for (int k = 0; k < n; ++k) {
                exps[k] += e[k];
                weighted[k] += e[k] * max_or_second(l[k], least);
            }
        }
        if constexpr (draws) {
            SEDD_UNROLL for (int k = 0; k < n; ++k) e[k] = l[k] * factors;
            exp_lanes(e);
            SEDD_UNROLL for (int k = 0; k < n; ++k) drawn[k] += e[k];
        }
    };
    int64_t y = begin;
    for (; y + kUnroll * width <= end; y += kUnroll * width) {
        Vec l[kUnroll];
        load_vectors<false>(logits + y, l);
        add(Count<kUnroll>{}, l);
    }
    sweep<width>(
        y, end,
        [&](int64_t z) {
            Vec l[1] = {load(logits + z)};
            add(Count<1>{}, l);
        },
        [&](int64_t z, int64_t n) {
            Vec l[1] = {load_partial(logits + z, n, -__builtin_inff())};
            add(Count<1>{}, l);
        });
    const auto total = [](const auto& s) { return sum_lanes((s[0] + s[1]) + (s[2] + s[3])); };
    Terms result;
    if constexpr (statistics) result.exps = total(exps), result.weighted = total(weighted);
    result.draws = draws ? total(drawn) : result.exps;
    return result;
}

// Σ exp((l - top) / T) over the entries of [begin, end) with l > low. kKeep stores the terms in terms[begin, end).
template <bool kKeep, class T, class Real = Compute<T>>
double sum_above(const T* logits, int64_t begin, int64_t end, Real top, Real factor, Real low, Real* terms) {
    constexpr int width = Lanes<Real>::width;
    using Vec = typename Lanes<Real>::Vec;
    const Vec tops = broadcast(top), factors = broadcast(factor), lows = broadcast(low), zero{};
    Vec sum{};
    const auto term = [&](Vec l) {
        const Vec e = exp_lanes((l - tops) * factors);
        return l > lows ? e : zero;
    };
    sweep<width>(
        begin, end,
        [&](int64_t y) {
            const Vec e = term(load(logits + y));
            sum += e;
            if constexpr (kKeep) store(terms + y, e);
        },
        [&](int64_t y, int64_t n) {
            const Vec e = term(load_partial(logits + y, n, -__builtin_inff()));
            sum += e;
            if constexpr (kKeep) store_partial(terms + y, e, n);
        });
    return sum_lanes(sum);
}

// A tile of a row, in blocks.
template <class T, UnmaskSums kSums>
struct UnmaskBlocks {
    using Real = Compute<T>;

    const T* logits;
    int64_t width, mask;
    Real factor;
    double* sums;  // [reverse_blocks(width)] of exp((l - tops) / T)
    double* tops;  // [reverse_blocks(width)]
    Real* terms;   // [kReverseBlock]

    int64_t count() const { return reverse_blocks(width); }
    int64_t begin(int64_t block) const { return block * kReverseBlock; }
    int64_t end(int64_t block) const {
        return begin(block) + kReverseBlock < width ? begin(block) + kReverseBlock : width;
    }

    // Calls f for the parts of a block before and after MASK.
    template <class F>
    void parts(int64_t block, F f) const {
        int64_t from = begin(block);
        const int64_t to = end(block);
        if (from <= mask && mask < to) {
            if (from < mask) f(from, mask);
            from = mask + 1;
        }
        if (from < to) f(from, to);
    }

    // Reads the tile.
    UnmaskState read() const {
        UnmaskState s = unmask_start();
        int64_t best = -1;
        for (int64_t k = 0; k < count(); ++k) {
            Largest largest;
            parts(k, [&](int64_t a, int64_t b) {
                if constexpr (kSums == UnmaskSums::draws) {
                    largest.add(largest_logit(logits, a, b));
                } else {
                    const Largest two = two_largest(logits, a, b);
                    largest.add(two.top);
                    largest.add(two.second);
                }
            });
            const double before = s.top;
            if (largest.top > before) {
                unmask_lower(s, before - largest.top, static_cast<double>(factor));
                s.top = largest.top;
                s.second = before > largest.second ? before : largest.second;
                best = k;
            } else if (largest.top > s.second) {
                s.second = largest.top;
            }
            tops[k] = s.top == -__builtin_inf() ? 0.0 : s.top;
            Terms block;
            parts(k, [&](int64_t a, int64_t b) {
                const Terms part = sum_terms<kSums>(logits, a, b, static_cast<Real>(tops[k]), factor);
                block.exps += part.exps, block.weighted += part.weighted, block.draws += part.draws;
            });
            s.exps += block.exps, s.weighted += block.weighted, s.draws += block.draws;
            sums[k] = block.draws;
        }
        if (best >= 0) {
            parts(best, [&](int64_t a, int64_t b) {
                if (s.argmax < 0 && largest_logit(logits, a, b) == s.top) s.argmax = first_equal(logits, a, b, s.top);
            });
        }
        return s;
    }

    // After read(): makes the sums of all blocks relative to `top`. Returns their sum.
    double rescale(double top) const {
        double all = 0.0;
        for (int64_t k = 0; k < count(); ++k) {
            if (tops[k] != top && sums[k] != 0.0) sums[k] *= exp((tops[k] - top) * static_cast<double>(factor));
            tops[k] = top;
            all += sums[k];
        }
        return all;
    }

    // The sums of the entries with l > low, relative to `top`. Returns their sum.
    double select(double top, Real low) const {
        double all = 0.0;
        for (int64_t k = 0; k < count(); ++k) {
            sums[k] = 0.0;
            parts(k, [&](int64_t a, int64_t b) {
                sums[k] += sum_above<false>(logits, a, b, static_cast<Real>(top), factor, low, terms);
            });
            all += sums[k];
        }
        return all;
    }

    // The entry at a point in [0, 1) of the running sum of the entries with l > low, which `sums` holds.
    int64_t pick(double point, double all, double top, Real low) const {
        double target = point * all;
        const int64_t k = pick_block(sums, count(), target);
        Real* const block = terms - begin(k);
        parts(k,
              [&](int64_t a, int64_t b) { sum_above<true>(logits, a, b, static_cast<Real>(top), factor, low, block); });
        if (begin(k) <= mask && mask < end(k)) block[mask] = Real(0);
        return begin(k) + entry_at(terms, end(k) - begin(k), target / sums[k]);
    }

    // Continues a draw whose first token is `y` in the nucleus. The sums are those of the whole row.
    int64_t nucleus(const UnmaskParams& p, int64_t row, const UnmaskState& s, int64_t y) const {
        for (uint64_t draw = 1;; ++draw) {
            const Real low = static_cast<Real>(read_one(logits + y));
            const double above = select(s.top, low);
            if (!(above >= p.top_p * s.draws)) return y;
            y = pick(unmask_uniform(p, row, draw), above, s.top, low);
        }
    }
};

template <UnmaskSums kSums, class T>
void unmask_rows(const UnmaskParams& p, int64_t begin, int64_t end, void* scratch, Status& status) {
    using Real = Compute<T>;
    const int64_t count = reverse_blocks(p.width);
    double* const sums = static_cast<double*>(scratch);
    const bool is_last = p.first + p.width == p.dim;
    for (int64_t i = begin; i < end; ++i) {
        const UnmaskBlocks<T, kSums> blocks{static_cast<const T*>(p.logits) + i * p.stride,
                                            p.width,
                                            p.mask - p.first,
                                            static_cast<Real>(unmask_factor(p)),
                                            sums,
                                            sums + count,
                                            reinterpret_cast<Real*>(sums + 2 * count)};
        UnmaskState s = p.first == 0 ? unmask_start() : p.states[i];
        UnmaskState tile = blocks.read();
        tile.argmax += p.first;
        const double point = unmask_add(p, s, tile, unmask_uniform(p, i, 0));
        if (point >= 0.0) {
            int64_t y = blocks.pick(point, blocks.rescale(tile.top), tile.top, static_cast<Real>(-__builtin_inf()));
            if (p.top_p < 1.0) y = blocks.nucleus(p, i, s, y);
            s.token = p.first + y;
            s.logit = static_cast<double>(read_one(blocks.logits + y));
        }
        p.states[i] = s;
        if (!is_last) continue;
        if (!unmask_valid(p, s)) report(status, Fault::total, i);
        unmask_finish(p, i, s);
    }
}

}  // namespace

RowKernel<UnmaskParams> unmask(DType dtype, UnmaskSums sums) {
    return dispatch(dtype, Family::absorbing, [=](auto element, auto) -> RowKernel<UnmaskParams> {
        using T = typename decltype(element)::Type;
        if (sums == UnmaskSums::draws) return unmask_rows<UnmaskSums::draws, T>;
        if (sums == UnmaskSums::statistics) return unmask_rows<UnmaskSums::statistics, T>;
        return unmask_rows<UnmaskSums::both, T>;
    });
}

}  // namespace sedd::SEDD_ISA

"""What the tests compare with: explicit N×N matrices, term-by-term sums, and rows of input that cover every case."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from scipy import linalg, stats
from torch import Tensor

from sedd_ext import Absorbing, Hybrid, RankOne, Uniform, reference


def _zipf(n: int, zeros: bool) -> RankOne:
    """Unigram-like frequencies in no particular order; with `zeros`, every third token never occurs."""
    weights = 1.0 / (torch.randperm(n, generator=torch.Generator().manual_seed(n)).double() + 1.0)
    if zeros:
        weights[::3] = 0.0
    return RankOne(weights / weights.sum())


# name -> process with the given N
PROCESSES: dict[str, Callable[[int], RankOne]] = {
    "absorbing": lambda n: Absorbing(n - 1),
    "uniform": Uniform,
    "hybrid": lambda n: Hybrid(n - 1, 0.2),
    "vector": lambda n: _zipf(n, zeros=False),
    "vector_with_zeros": lambda n: _zipf(n, zeros=True),
}


class Rows(NamedTuple):
    x_t: Tensor
    x_0: Tensor
    sigma: Tensor  # float64


def random_rows(process: RankOne, count: int, seed: int = 0) -> Rows:
    """Rows of all kinds: x_t = x_0, x_t drawn from π, and any token; σ log-uniform in [1e-4, 10]."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(process.dim, (count,), generator=generator)
    anything = torch.randint(process.dim, (count,), generator=generator)
    kind = torch.arange(count) % 3
    x_t = torch.where(
        kind == 0, process.sample_limit((count,), generator=generator), torch.where(kind == 1, x_0, anything)
    )
    sigma = 10 ** (5 * torch.rand(count, generator=generator, dtype=torch.float64) - 4)
    return Rows(x_t, x_0, sigma)


def random_log_score(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 1, spread: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def generator_matrix(process: RankOne) -> Tensor:
    """Q = π 1ᵀ - I."""
    eye = torch.eye(process.dim, dtype=torch.float64)
    return process.stationary[:, None].expand(process.dim, process.dim) - eye


def transition_matrix(process: RankOne, sigma: float) -> Tensor:
    """exp(σQ) with no closed form behind it; SciPy's, as torch.matrix_exp leaves errors of 1e-10 in small entries."""
    return torch.from_numpy(linalg.expm(sigma * generator_matrix(process).numpy()))


def score_entropy_by_terms(log_score: Tensor, x: int, x_0: int, sigma: float, process: RankOne) -> Tensor:
    """Σ_{y≠x} Q(x, y) (s_y - r_y log s_y + K(r_y)) of one row [N], with r from the matrix exponential."""
    rates, column = generator_matrix(process)[x], transition_matrix(process, sigma)[:, x_0]
    loss = torch.zeros((), dtype=torch.float64)
    for y in range(process.dim):
        if y == x or rates[y] == 0:
            continue
        ratio = column[y] / column[x]
        term = log_score[y].exp()
        if ratio > 0:
            term = term - ratio * log_score[y] + ratio * (ratio.log() - 1)
        loss = loss + rates[y] * term
    return loss


def true_log_score(process: RankOne, p_0: Tensor, x: Tensor, sigma: float) -> Tensor:
    """log p_t(y)/p_t(x) for data with distribution p_0 [N]: what a perfect model returns, [*B, N]."""
    p_t = (transition_matrix(process, sigma) @ p_0).clamp(min=0)
    return p_t.log() - p_t[x].log()[..., None]


class Scales(NamedTuple):
    """How large the terms are that a loss [*B] or its gradient [*B, N] is summed from: what an error is measured by."""

    loss: Tensor
    gradient: Tensor


def term_scales(log_score: Tensor, rows: Rows, process: RankOne) -> Scales:
    pi_x = process.stationary[rows.x_t][..., None]
    column = reference.transition_column(rows.x_0, rows.sigma, process)
    here = torch.arange(process.dim) == rows.x_t[..., None]
    ratio = torch.where(pi_x > 0, column / column.gather(-1, rows.x_t[..., None]), 0.0).masked_fill(here, 0.0)
    log_score = log_score.double().masked_fill(here, -torch.inf)
    score = log_score.exp()
    constant = torch.xlogy(ratio, ratio) - ratio
    logs = (ratio * log_score).masked_fill(ratio == 0, 0.0)
    return Scales((pi_x * (score + logs.abs() + constant.abs())).sum(-1), pi_x * (score + ratio))


def exponent_error(dtype: torch.dtype, largest: float) -> float:
    """What rounding the exponent of 16-bit types may add to the relative error of exp(x), |x| ≤ ``largest``.

    The CUDA kernels compute 2^(x log2 e) in float32. The rounding of x to 16 bits has 3,000 times this effect or more.
    """
    return 7.3e-8 * largest if dtype.itemsize == 2 else 0.0


def largest_error(value: Tensor, exact: Tensor, scale: Tensor) -> float:
    """Largest |value - exact| in units of the scale; where the scale is 0, value must be exact."""
    error = (value.double() - exact.double()).abs()
    return float(torch.where(scale > 0, error / scale, torch.where(error == 0, 0.0, torch.inf)).max())


def bad_rows(result: Tensor) -> list[int]:
    """The rows of losses [rows], probabilities [rows, N] or tokens [rows] that a CUDA kernel has marked as bad."""
    if result.dtype == torch.int64:
        return (result == -1).nonzero()[:, 0].tolist()
    marked = result.isnan().reshape(len(result), -1)
    assert (marked.all(-1) == marked.any(-1)).all()
    return marked[:, 0].nonzero()[:, 0].tolist()


def chi_square(counts: Tensor, probs: Tensor) -> float:
    """p-value of the counts [N] under the probabilities [N]; entries expecting less than 5 are pooled, rarest first."""
    expected = probs.double() / probs.double().sum() * counts.sum()
    assert not counts[expected == 0].any(), "a token of probability 0 was drawn"
    order = expected.argsort()
    bins: list[list[float]] = []
    for count, expects in zip(counts[order].tolist(), expected[order].tolist(), strict=True):
        if not bins or bins[-1][1] >= 5:
            bins.append([0.0, 0.0])
        bins[-1][0] += count
        bins[-1][1] += expects
    assert len(bins) > 1, "a single bin: nothing to compare"
    return float(stats.chisquare(*zip(*bins, strict=True)).pvalue)


RARE = slice(48, 4096)


def rare_tokens() -> Tensor:
    """Weights of 48 tokens of 1e-4, 4,048 of 1.5e-8, and a MASK that mostly stays: float64 [4097]."""
    return torch.cat([torch.full((48,), 1e-4), torch.full((4048,), 1.5e-8), torch.ones(1)]).double()


def rare_or_not(values: Tensor) -> Tensor:
    """The sum of the values [4097] of the rarest tokens, and of the others."""
    rare = values[RARE].sum()
    return torch.stack([rare, values.sum() - rare])

"""The operators of reverse steps from a mean prediction, which the functions of :mod:`sedd_ext.reverse` call.

The network's logits predict the clean token: μ = softmax(logits) over all tokens but MASK. ``csrc/reverse_mean.h`` has
the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C
from ._dispatch import (
    DTYPES,
    FAMILIES,
    MEAN_STEPS,
    Status,
    _index,
    compute_dtype,
    contiguous,
    empty_beside,
    fresh,
    kind_of,
    launch,
    per_row,
    raise_fault,
    row_stride_of,
    stationary_for,
)
from ._operators import define, schema
from .generalized_masked import check_power, check_power_values
from .process import RankOne
from .step import NOISE_NAME, GeneralizedMasked, check_mean_step

__all__: list[str] = []


class Numbers(NamedTuple):
    """The arguments of the operators that describe a step from a mean prediction."""

    x_t: Tensor
    noise: Tensor  # Δ, Δt σ(t) or log(s/t)
    sigma: Tensor | None
    power: Tensor | None
    stationary: Tensor | None
    cumulative: Tensor | None
    family: str
    mean_step: str
    mask: int
    forbidden: int


def mean_numbers(
    x_t: Tensor,
    step: object,
    process: RankOne,
    sigma: object,
    log_score_shift: object,
    denoise: bool,
    dtype: torch.dtype,
) -> Numbers:
    """Checks the options of a step from a mean prediction.

    Args:
        x_t: the current tokens [*B].
        step: the step.
        process: the process.
        sigma: σ̄ at the current time, or None.
        log_score_shift: must be None.
        denoise: whether MASK is forbidden.
        dtype: of the logits.
    """
    chosen = check_mean_step(step)
    if log_score_shift is not None:
        raise ValueError(
            "log_score_shift: expected None with parameterization='mean', since a softmax does not depend on it, "
            f"got {kind_of(log_score_shift)}"
        )
    batch, device, power = x_t.shape, x_t.device, None
    if isinstance(chosen, GeneralizedMasked):
        noise, power = _generalized_masked(chosen, process, sigma, batch, device, dtype)
    else:
        if sigma is None:
            raise ValueError(
                "sigma: expected the total noise at the current time with parameterization='mean', got None"
            )
        sigma = per_row("sigma", sigma, batch, device)
        noise = per_row(NOISE_NAME[chosen.name], chosen.noise, batch, device)
    mask = -1 if process.mask_id is None else process.mask_id
    return Numbers(
        x_t=x_t,
        noise=noise,
        sigma=sigma if isinstance(sigma, Tensor) else None,
        power=power,
        stationary=stationary_for(process, dtype, device),
        cumulative=process._copy("cumulative", torch.float64, device) if process.family == "rank_one" else None,
        family=process.family,
        mean_step=chosen.name,
        mask=mask,
        forbidden=mask if denoise else -1,
    )


def _generalized_masked(
    step: GeneralizedMasked,
    process: RankOne,
    sigma: object,
    batch: torch.Size,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """log(s/t) [*B] and the powers [N] in the compute dtype."""
    if process.family != "absorbing":
        raise ValueError(f"process: expected an absorbing process for GeneralizedMasked, got {process}")
    if sigma is not None:
        raise ValueError(f"sigma: expected None for GeneralizedMasked, which has times, got {kind_of(sigma)}")
    power = check_power(step.power, process.dim, dtype)
    if power.device != device:
        raise ValueError(f"power: expected a tensor on {device}, got one on {power.device}")
    s, t = per_row("s", step.s, batch, device), per_row("t", step.t, batch, device)
    ratio = s / t
    # near 1 the difference is exact, and the ratio is not
    noise = torch.where(ratio < 0.5, ratio.log(), torch.log1p((s - t) / t))
    noise = torch.where((s >= 0) & (t > 0) & t.isfinite(), noise, torch.nan)
    return noise, power.detach().contiguous()


def launch_mean(kernel: str, out: Tensor, log_score: Tensor, numbers: Numbers, **others: Any) -> Status:
    """Runs a kernel over whole rows of logits, or those that a process has of them; see ``csrc/reverse_mean.h``."""
    width = log_score.size(-1)
    whole = {"sums": None, "targets": None, "width": width, "first": 0, "most": width, "dim": width}
    return launch(
        kernel,
        logits=log_score,
        x_t=numbers.x_t.contiguous(),
        noise=numbers.noise.contiguous(),
        sigma=contiguous(numbers.sigma),
        stationary=contiguous(numbers.stationary),
        cumulative=contiguous(numbers.cumulative),
        power=contiguous(numbers.power),
        out=out,
        rows=numbers.x_t.numel(),
        stride=row_stride_of(log_score),
        mask=numbers.mask,
        forbidden=numbers.forbidden,
        dtype=DTYPES[log_score.dtype],
        family=FAMILIES[numbers.family],
        step=MEAN_STEPS[numbers.mean_step],
        **{**whole, **others},
    )


def check_numbers(numbers: Numbers) -> None:
    """Checks the powers on the CPU. CUDA kernels, which nobody waits for, mark the rows."""
    if numbers.power is not None:
        check_power_values(numbers.power)


def raise_mean_fault(status: Status, numbers: Numbers, dim: int, scores: str = "log_score") -> None:
    """Raises a ValueError for a fault of a kernel. The row of the status is an index into the whole batch."""
    code, row = status
    if code == 0:
        return
    noise, sigma = numbers.noise, numbers.sigma
    if code != _C.faults["noise"]:
        raise_fault(status, {"x_t": numbers.x_t}, dim, ("sigma", noise if sigma is None else sigma), scores)
    where = f"at index {_index(row, noise.shape)}" if noise.shape else "as its value"
    value = float(noise.reshape(-1)[row])
    if sigma is None:
        raise ValueError(f"s: expected times 0 <= s < t, got log(s / t) = {value} {where}")
    total = float(sigma.reshape(-1)[row])
    if numbers.mean_step == "tweedie" and total < value < float("inf"):
        raise ValueError(f"dsigma: expected at most sigma = {total}, got {value} {where}; a step ends at time 0")
    raise_fault((_C.faults["sigma"], row), {}, dim, (NOISE_NAME[numbers.mean_step], noise), scores)


def _probs_fake(log_score: Tensor, *_: Any) -> Tensor:
    return empty_beside(log_score, compute_dtype(log_score.dtype))


def _probs(log_score: Tensor, *rest: Any) -> Tensor:
    numbers, out = Numbers(*rest), fresh(_probs_fake(log_score))
    check_numbers(numbers)
    status = launch_mean("reverse_mean_probs", out, log_score.contiguous(), numbers, seed=None, row_ids=None)
    raise_mean_fault(status, numbers, log_score.size(-1))
    return out


def _sample_fake(log_score: Tensor, x_t: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_t, memory_format=torch.contiguous_format)


def _sample(log_score: Tensor, *rest: Any) -> Tensor:
    *given, seed = rest
    numbers = Numbers(*given)
    out = _sample_fake(log_score, numbers.x_t)
    check_numbers(numbers)
    status = launch_mean("reverse_mean_sample", out, log_score.contiguous(), numbers, seed=seed, row_ids=None)
    raise_mean_fault(status, numbers, log_score.size(-1))
    return out


define(f"reverse_mean_probs(Tensor log_score, {schema(Numbers)}) -> Tensor", _probs, _probs_fake)
define(f"reverse_mean_sample(Tensor log_score, {schema(Numbers)}, Tensor seed) -> Tensor", _sample, _sample_fake)


def check_score(parameterization: object, sigma: object) -> None:
    """Checks that the options are those of scores."""
    if parameterization != "score":
        raise ValueError(f"parameterization: expected 'score' or 'mean', got {parameterization!r}")
    if sigma is not None:
        raise ValueError(f"sigma: expected None with parameterization='score', got {kind_of(sigma)}")

"""Whole training steps of the same model: fused head, unfused, and with the released code's loss over the full head."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from cases import MODEL_LENGTH, Case, Race, Run, compiled, memory_cases, model_cases, smaller, training, whole_model
from memory import measure_memory
from peers import released_score_entropy
from torch import Tensor

from sedd.diffusion import sample_times
from sedd_ext import sample_transition

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture


def released(case: Case, model: str) -> Callable[[Tensor, Tensor], Tensor]:
    """σ(t) Σ L from the log-scores of all positions, which the model returns."""
    network, diffusion = whole_model(model, case)
    process, schedule = diffusion.process, diffusion.schedule
    forward = compiled(network, case) if "compiled" in case.contestant else network

    def loss(x_0: Tensor, t: Tensor) -> Tensor:
        sigma, rate = schedule.total(t)[:, None], schedule.rate(t)[:, None]
        x_t = sample_transition(x_0, sigma, process)
        return (rate * released_score_entropy(forward(x_t, sigma[:, 0]), sigma, x_t, x_0, process)).sum()

    return loss


def step(case: Case, model: str, length: int = MODEL_LENGTH) -> Run:
    """A step on times spread over (0, 1), the same for all."""
    _, diffusion = whole_model(model, case)
    batch = max(1, case.rows // length)
    generator = torch.Generator().manual_seed(0)
    x_0 = torch.randint(diffusion.process.dim - 1, (batch, length), generator=generator).to(case.device)
    times = sample_times(batch, generator=generator).to(case.device)
    scale = 1 / x_0.numel()
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=1e-6, fused=True)
    theirs = released(case, model) if "released" in case.contestant else None
    fused = case.contestant.startswith("kernel")

    def run() -> None:
        with torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bfloat16"):
            if theirs is not None:
                loss = scale * theirs(x_0, times)
            else:
                loss = diffusion(x_0, times, scale=scale, fused=fused).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


@pytest.mark.parametrize(("model", "case"), model_cases("kernel", "unfused", "released", "released, compiled"), ids=str)
def test_training(race: Race, model: str, case: Case) -> None:
    race(training(model), case, functools.partial(step, model=model), 8 * case.rows)  # the text


@pytest.mark.parametrize(("model", "case"), memory_cases(), ids=str)
def test_memory(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, model: str, case: Case) -> None:
    case = smaller(case) if request.config.getoption("--smoke") else case
    measure_memory(benchmark, training(model), case, "bench_train", "step", model=model)

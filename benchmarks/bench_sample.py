"""Whole samples of the same model: fused head, unfused, and the released code's sampler over the full head."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from cases import MODEL_LENGTH, Case, Race, Run, compiled, memory_cases, model_cases, sampling, smaller, whole_model
from memory import measure_memory
from peers import released_analytic_step
from torch import Tensor

from sedd.diffusion.reverse_steps import T_END
from sedd.diffusion.samplers import sample

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

STEPS = 4


def released(case: Case, model: str, batch: int, length: int) -> Run:
    """The released sampler: all positions of all sequences in every step, in float32 behind the model."""
    network, diffusion = whole_model(model, case)
    process, forward = diffusion.process, compiled(network, case) if "compiled" in case.contestant else network
    times = torch.linspace(1.0, T_END, STEPS + 1, dtype=torch.float64)
    sigmas = [*diffusion.schedule.total(times).tolist(), 0.0]

    @torch.no_grad()
    def run() -> Tensor:
        x = torch.full((batch, length), process.dim - 1, device=case.device)
        for now, then in itertools.pairwise(sigmas):
            log_score = forward(x, torch.full((batch,), now, device=case.device)).flatten(0, 1)
            dsigma = torch.full((x.numel(),), now - then, device=case.device)
            x = released_analytic_step(log_score, x.flatten(), dsigma, process, denoise=then == 0.0).view_as(x)
        return x

    return run


def whole(case: Case, model: str, length: int = MODEL_LENGTH) -> Run:
    """Some steps from nothing but MASK, and the denoising step."""
    batch = max(1, case.rows // length)
    dtype = torch.bfloat16 if case.dtype == "bfloat16" else None
    if "released" in case.contestant:
        theirs = released(case, model, batch, length)

        def run() -> object:
            with torch.autocast(case.device, torch.bfloat16, enabled=dtype is not None):
                return theirs()

        return run
    fused = case.contestant.startswith("kernel")
    _, diffusion = whole_model(model, case)
    return lambda: sample(
        diffusion,
        batch=batch,
        length=length,
        steps=STEPS,
        fused=fused,
        autocast_dtype=dtype,
    )


@pytest.mark.parametrize(("model", "case"), model_cases("kernel", "unfused", "released", "released, compiled"), ids=str)
def test_sampling(race: Race, model: str, case: Case) -> None:
    race(sampling(model), case, functools.partial(whole, model=model), 8 * case.rows)  # the text


@pytest.mark.parametrize(("model", "case"), memory_cases(), ids=str)
def test_memory(benchmark: BenchmarkFixture, request: pytest.FixtureRequest, model: str, case: Case) -> None:
    case = smaller(case) if request.config.getoption("--smoke") else case
    measure_memory(benchmark, sampling(model), case, "bench_sample", "whole", model=model)

"""CUDA graphs: losses, draws and whole steps of sampling are captured once, and replayed with other inputs.

Without a GPU, the same tests replay by another call, on the path that a GPU takes during a capture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from explicit import PROCESSES
from test_capacity import LOSSES, STEPS, call, inputs, of_processes, sample_inputs
from torch import Tensor
from torch.utils import _pytree as pytree
from waiting import as_on_a_gpu

import sedd_ext
from sedd.diffusion import Diffusion, ScoreEntropy, get_schedule
from sedd.diffusion.walk import Walk
from sedd.network import DiffusionTransformer, ModelConfig
from sedd_ext import Absorbing, Tweedie

pytestmark = pytest.mark.operators

KINDS = ("absorbing", "uniform", "hybrid")
N = 27


def captured(run: Callable[[], Any], device: str) -> tuple[Callable[[], None], Any]:
    """A function that replays the call, and the results, whose memory it writes to."""
    if device == "cpu":

        def run_captured() -> Any:
            with as_on_a_gpu(capturing=True):
                return run()

        results = run_captured()

        def replay() -> None:
            for old, new in zip(pytree.tree_leaves(results), pytree.tree_leaves(run_captured()), strict=True):
                old.copy_(new)

        return replay, results
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


def moved(values: Any, device: str) -> Any:
    return pytree.tree_map_only(Tensor, lambda value: value.to(device, copy=True), values)


@pytest.mark.parametrize("capacity", [None, 13])
@of_processes(LOSSES, "name", KINDS)
def test_a_loss_and_its_gradients(name: str, kind: str, capacity: int | None, backend: Backend) -> None:
    process = PROCESSES[kind](N)
    if capacity is not None and kind != "absorbing":
        capacity = 14
    leaves, options = inputs(name, process)
    leaves, options = moved((leaves, options), backend.device)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    operator = getattr(sedd_ext, LOSSES[name].__name__)

    def run(capacity: int | None = capacity) -> list[Tensor]:
        loss = call(operator, leaves, **options, capacity=capacity)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    replay, found = captured(run, backend.device)
    with torch.no_grad():
        leaves[0].neg_()
    for value in (options["x_t"], options["x_0"]):
        value.copy_(value.flip(0))
    replay()
    for one, other in zip(found, run(None), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("capacity", [None, 200])
@of_processes(STEPS, "step_name", KINDS)
def test_a_draw(step_name: str, kind: str, capacity: int | None, backend: Backend) -> None:
    process, (step, options) = PROCESSES[kind](N), STEPS[step_name]
    leaves, x_t = sample_inputs(process)
    leaves, x_t = moved((leaves, x_t), backend.device)
    if step_name == "generalized":
        step = type(step)(step.s, step.t, step.power.to(backend.device))

    def run(capacity: int | None = capacity) -> Tensor:
        return sedd_ext.linear_reverse_sample(*leaves, x_t, step, process, capacity=capacity, **options)

    replay, found = captured(run, backend.device)
    leaves[0].neg_()
    x_t.copy_(x_t.flip(0))
    torch.manual_seed(7)  # the replay takes the generator as it is then
    replay()
    torch.manual_seed(7)
    assert torch.equal(found, run(None))
    first = found.clone()
    replay()
    assert not torch.equal(found, first)  # the next random numbers


def test_a_sampling_step(backend: Backend) -> None:
    """Of one sequence, at other times than those of the capture."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=32, n_blocks=2, n_heads=2, cond_dim=16, length=64, dropout=0.0)
    network, process = DiffusionTransformer(config, N).to(backend.device), Absorbing(N - 1)
    torch.nn.init.normal_(network.output_layer.linear.weight)
    diffusion = Diffusion(network, process, get_schedule("loglinear"), ScoreEntropy()).eval()
    tokens = torch.full((1, 64), N - 1, device=backend.device)
    t, dsigma = (torch.full((1,), value, dtype=torch.float64, device=backend.device) for value in (0.9, 0.1))

    def run(whole_batch: bool = True) -> Tensor:
        walk = Walk(diffusion, tokens, torch.ones_like(tokens, dtype=torch.bool), whole_batch=whole_batch)
        walk.step(t, Tweedie(dsigma))
        return walk.tokens

    replay, found = captured(run, backend.device)
    tokens[0, ::3] = 5
    t.fill_(0.5)
    dsigma.fill_(0.4)
    torch.manual_seed(7)  # the replay takes the generator as it is then
    replay()
    torch.manual_seed(7)
    wanted = run(whole_batch=False)
    assert not torch.equal(wanted, tokens)
    assert int((found != wanted).sum()) <= 1  # products of fewer rows may be rounded in another way

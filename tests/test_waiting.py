"""Whole steps of training and sampling that never wait for a GPU, and give what the usual ones give."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from waiting import ABSENT, NeverWaits, WaitError, absent_gpu, needs_no_cuda

from sedd.config import ModelOptions, TrainConfig
from sedd.diffusion import Diffusion, get_objective, get_schedule, sample
from sedd.diffusion.samplers import SAMPLERS, find_sampler
from sedd.diffusion.walk import Walk
from sedd.network import DiffusionTransformer, ModelConfig
from sedd.training.parallel import World
from sedd.training.state import TrainState
from sedd_ext import Absorbing, Hybrid, RankOne, Tweedie, Uniform, score_entropy_loss

N, LENGTH, BATCH = 30, 12, 4
PROCESSES: dict[str, RankOne] = {"absorbing": Absorbing(N), "uniform": Uniform(N), "hybrid": Hybrid(N, 0.3)}
OBJECTIVES = {
    "score_entropy": ["absorbing", "uniform", "hybrid"],
    "mean_prediction": ["absorbing", "uniform", "hybrid"],
    "md4": ["absorbing"],
    "genmd4": ["absorbing"],
    "udlm": ["uniform"],
    "gidd": ["hybrid"],
    "d3pm": ["absorbing", "uniform"],
    "autoregressive": ["absorbing"],
}
"""Those whose training step need not wait, with processes. All others are ablations without a fused head."""
TIME_STEPPING = ["tweedie", "tweedie_cosine", "euler", "ancestral", "remask", "predictor_corrector"]
ORDERS = ["first_hitting", "confidence", "margin", "entropy", "greedy"]
needs_mask = {"ancestral", "remask", "confidence", "margin", "entropy", "first_hitting", "entropy_bounded"}
needs_mask |= {"semi_autoregressive"}


def model_of(objective: str, kind: str, **sizes: Any) -> Diffusion:
    """A small model, none of whose weights is zero, as some of a new one are."""
    torch.manual_seed(0)
    process, goal = PROCESSES[kind], get_objective(objective)
    causal = goal.autoregressive
    config = ModelConfig(
        hidden_size=8,
        n_blocks=1,
        n_heads=2,
        cond_dim=8,
        length=LENGTH,
        dropout=0.1,
        causal=causal,
        **{"time_conditioning": not causal, **sizes},
    )
    network = DiffusionTransformer(config, process.dim)
    for parameter in network.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.3)
    schedule = get_schedule("loglinear")
    return Diffusion(network, process, schedule, goal, goal.parameterization(config))


@needs_no_cuda
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("kind", PROCESSES)
def test_a_loss_and_its_gradient_in_one_sweep_never_wait(kind: str, factor: float) -> None:
    """The kernel of the backward pass compares the factor, whatever it is."""
    process = PROCESSES[kind]
    with absent_gpu() as launched, torch.device(ABSENT):
        log_score = torch.zeros(BATCH, process.dim, requires_grad=True)
        x_t, sigma = torch.zeros(BATCH, dtype=torch.int64), torch.ones(BATCH, dtype=torch.float64)
        with NeverWaits(ABSENT):
            loss = score_entropy_loss(log_score, x_t, x_t, sigma, process, loss_weight=sigma, reduction="mean")
            (factor * loss).backward()
        assert log_score.grad is not None
    assert launched == ["score_entropy_tile", "score_entropy_backward"]


# ---- training ----


class Tokens:
    """Training data that is not on the GPU yet."""

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        return torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % N


def trained(diffusion: Diffusion, tmp_path: Path, objective: str, kind: str, **options: Any) -> TrainState:
    config = TrainConfig(
        run_dir=str(tmp_path),
        model=ModelOptions(length=LENGTH),
        process=kind,
        objective=objective,
        batch_size=BATCH,
        precision="fp32",
        device="cpu",
        **options,
    )
    batches: Any = Tokens()
    return TrainState(config, diffusion, batches, World("cpu", config.parallel))


@needs_no_cuda
@pytest.mark.parametrize(("objective", "kind"), [(name, kind) for name, kinds in OBJECTIVES.items() for kind in kinds])
def test_a_training_step_never_waits(objective: str, kind: str, tmp_path: Path) -> None:
    """And computes the head once for each loss, since the upstream gradient is known to be one number."""
    share = 0.9 if kind == "absorbing" and objective != "autoregressive" else 1.0
    pinned = mock.Mock(side_effect=lambda tensor: tensor)
    with (
        absent_gpu() as launched,
        mock.patch.object(torch, "Generator", return_value=None),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: pinned(tensor)),
        mock.patch.object(TrainState, "_seed"),
    ):
        with torch.device(ABSENT):
            diffusion = model_of(objective, kind)
        state = trained(diffusion, tmp_path, objective, kind, head_capacity=share, accumulate=2)
        for _ in range(2):  # the first one makes the optimiser's state
            launched.clear()
            with NeverWaits(ABSENT):
                found = state.train_step()
    assert found.shape == (2,)
    assert pinned.call_count == 4
    heads = [name for name in launched if name in ("score_entropy_tile", "mean_prediction", "generalized_masked")]
    assert len(heads) == 2 * (2 if (objective, kind) == ("d3pm", "uniform") else 1)


@needs_no_cuda
def test_a_training_step_without_a_capacity_waits(tmp_path: Path) -> None:
    with (
        absent_gpu(),
        mock.patch.object(torch, "Generator", return_value=None),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        mock.patch.object(TrainState, "_seed"),
    ):
        with torch.device(ABSENT):
            diffusion = model_of("score_entropy", "absorbing")
        state = trained(diffusion, tmp_path, "score_entropy", "absorbing")
        with NeverWaits(ABSENT), pytest.raises(WaitError, match="nonzero"):
            state.train_step()


@pytest.mark.parametrize(
    ("objective", "kind"),
    [("score_entropy", "absorbing"), ("genmd4", "absorbing"), ("d3pm", "uniform"), ("autoregressive", "absorbing")],
)
def test_a_capacity_does_not_change_a_training_step(objective: str, kind: str, tmp_path: Path) -> None:
    results = []
    for share in (None, 1.0):
        state = trained(model_of(objective, kind), tmp_path, objective, kind, head_capacity=share)
        results.append([state.train_step(), *state.diffusion.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_capacity_is_a_share_of_the_positions(tmp_path: Path) -> None:
    state = trained(model_of("score_entropy", "absorbing"), tmp_path, "score_entropy", "absorbing", head_capacity=0.05)
    with pytest.raises(ValueError, match=r"^capacity: expected at least \d+ for .*, got 3$"):  # ⌈0.05 · 48⌉
        state.train_step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_capacity": 0.0}, r"^head_capacity: expected null or a number in \(0, 1\], got 0\.0$"),
        ({"head_capacity": 1.5}, r"^head_capacity: expected null or a number in \(0, 1\], got 1\.5$"),
        ({"head_capacity": float("nan")}, r"^head_capacity: .*, got nan$"),
        (
            {"head_capacity": 0.5, "fused_head": False},
            r"^head_capacity: expected null without the fused head, got 0\.5$",
        ),
        (
            {"head_capacity": 0.5, "process": "uniform"},
            r"^head_capacity: expected null or 1 for process uniform, .*0\.5$",
        ),
        ({"head_capacity": 0.5, "objective": "autoregressive"}, r"^head_capacity: .* for objective autoregressive, .*"),
    ],
)
def test_wrong_capacities(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
    TrainConfig(head_capacity=0.5)


# ---- sampling ----


def cases(samplers: list[str]) -> list[tuple[str, str, str]]:
    """Samplers with the models that they suit."""
    models = [("score_entropy", kind) for kind in PROCESSES] + [("mean_prediction", kind) for kind in PROCESSES]
    found = [
        (name, *model) for name in samplers for model in models if name not in needs_mask or model[1] == "absorbing"
    ]
    return found + [(name, "genmd4", "absorbing") for name in samplers if name in ("tweedie", "confidence")]


def walk_of(sampler: str, objective: str, kind: str, **options: Any) -> Any:
    """A sampler's steps on the absent GPU."""
    with torch.device(ABSENT):
        diffusion = model_of(objective, kind).eval()
        tokens = torch.randint(N, (BATCH, LENGTH))
    walk = Walk(diffusion, tokens, torch.ones_like(tokens, dtype=torch.bool), **options)
    kept = find_sampler(diffusion, sampler, 4)
    with mock.patch.object(type(kept), "count", return_value=4):  # which may look at the given tokens, once
        yield
        yield from kept(walk)


@needs_no_cuda
@pytest.mark.parametrize("time_conditioning", [True, False])
@pytest.mark.parametrize(("sampler", "objective", "kind"), cases([*TIME_STEPPING, *ORDERS]))
def test_a_sampling_step_never_waits(sampler: str, objective: str, kind: str, time_conditioning: bool) -> None:
    with absent_gpu() as launched:
        steps = walk_of(sampler, objective, kind, whole_batch=True)
        next(steps)
        with NeverWaits(ABSENT):
            taken = list(steps)
    assert len(taken) >= 4
    assert all(tokens.shape == (BATCH, LENGTH) for tokens in taken)
    assert launched


@needs_no_cuda
def test_a_step_at_a_time_of_the_gpu_never_waits() -> None:
    """As in a CUDA graph, which is captured once and replayed at other times."""
    with absent_gpu(capturing=True) as launched, torch.device(ABSENT):
        diffusion = model_of("score_entropy", "absorbing").eval()
        tokens = torch.randint(N, (1, LENGTH))
        walk = Walk(diffusion, tokens, torch.ones_like(tokens, dtype=torch.bool), whole_batch=True)
        t, dsigma = torch.empty(1, dtype=torch.float64), torch.empty(1, dtype=torch.float64)
        with NeverWaits(ABSENT):
            walk.step(t, Tweedie(dsigma))
    assert launched


@needs_no_cuda
@pytest.mark.parametrize("sampler", ["tweedie", "ancestral", "confidence"])
def test_a_usual_step_waits(sampler: str) -> None:
    with absent_gpu():
        steps = walk_of(sampler, "score_entropy", "absorbing")
        next(steps)
        with NeverWaits(ABSENT), pytest.raises(WaitError):
            next(steps)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("time_conditioning", [True, False])
@pytest.mark.parametrize(("sampler", "objective", "kind"), cases([*SAMPLERS][:-1]))
def test_the_same_tokens(sampler: str, objective: str, kind: str, time_conditioning: bool, fused: bool) -> None:
    """Whatever a step writes, and where some tokens are given."""
    diffusion = model_of(objective, kind, time_conditioning=time_conditioning).double()
    given = torch.arange(LENGTH) % N, torch.arange(LENGTH) % 5 == 1
    both = []
    for whole_batch in (False, True):
        generator = torch.Generator().manual_seed(5)
        both.append(
            sample(
                diffusion,
                batch=3,
                length=LENGTH,
                steps=9,
                sampler=sampler,
                fixed=given,
                fused=fused,
                generator=generator,
                whole_batch=whole_batch,
            )
        )
    if sampler == "first_hitting":  # which draws a number for each position that is masked
        assert both[0].shape == both[1].shape
        assert bool((both[1] < N).all())
    else:
        assert torch.equal(*both)


@pytest.mark.parametrize("kind", PROCESSES)
def test_temperature_and_top_p(kind: str) -> None:
    """Other random numbers, and no token that cannot be."""
    diffusion = model_of("score_entropy", kind)
    options: dict[str, Any] = {"batch": 2, "length": LENGTH, "steps": 9, "generator": torch.Generator().manual_seed(5)}
    for tempering in ({"temperature": 0.5}, {"top_p": 0.8}):
        tokens = sample(diffusion, **options, **tempering, whole_batch=True)
        assert bool(((tokens >= 0) & (tokens < N)).all())

"""``torch.ops.sedd_ext`` called directly, as exported programs do: wrong arguments raise, and never reach a kernel."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import to_device
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sedd_ext import (
    _C,
    Hybrid,
    Tweedie,
    _operators,
    reverse_probs,
    sample_transition,
    score_entropy_loss,
    transition_column,
)

pytestmark = pytest.mark.operators

N, D = 37, 4
PROCESS = Hybrid(N - 1, 0.3)
TOKENS, NOISE = torch.tensor([36, 3, 0]), torch.full((3,), 0.5, dtype=torch.float64)
HEAD = {"hidden": torch.ones(3, D), "weight": torch.ones(N, D), "bias": torch.ones(N)}
PI = {"stationary": PROCESS.stationary.float(), "family": "rank_one"}
SHIFT, SEED = {"log_score_shift": NOISE}, {"seed": torch.tensor([3])}
LOSS = {"x_t": TOKENS, "x_0": TOKENS.flip(0), "sigma": NOISE, **SHIFT}
SCORES = {"log_score": torch.zeros(3, N)}
STEP = {"step": "tweedie", "forbidden": N - 1}
COMPUTE = {"dtype": torch.float32, "buffer_bytes": 1 << 20}
CAPACITY = {"capacity": 3}
SPLIT = {"dim": N, "first": 0, "group": ""}
FLAGS = {"grad_hidden": True, "grad_weight": True, "grad_bias": True}
LINEAR = {**HEAD, **LOSS, "loss_weight": NOISE, **PI, "neg_entropy": PROCESS.neg_entropy}
LINEAR |= {**SPLIT, **COMPUTE, **CAPACITY, **FLAGS}
MADE = {f"{name}_gradient": torch.zeros_like(value) for name, value in HEAD.items()}
COLUMN = {"sigma": NOISE, **PI, "dim": N, "dtype": torch.float32}

MEAN = {
    "x_t": TOKENS,
    "noise": NOISE,
    "sigma": NOISE,
    "power": None,
    "stationary": PROCESS.stationary.float(),
    "cumulative": PROCESS.cumulative,
    "family": "rank_one",
    "mean_step": "tweedie",
    "mask": N - 1,
    "forbidden": N - 1,
}

MEAN_LOSS = {
    "logits": torch.zeros(3, N),
    "x_t": TOKENS,
    "x_0": torch.tensor([0, 3, 35]),
    "sigma": NOISE,
    "sigma_s": NOISE / 2,
    **PI,
    "mask": N - 1,
}
LINEAR_MEAN = {**HEAD, **{k: v for k, v in MEAN_LOSS.items() if k not in ("logits", *PI, "mask")}, "loss_weight": NOISE}
LINEAR_MEAN |= {**PI, "mask": N - 1, **SPLIT, **COMPUTE, **CAPACITY, **FLAGS}

POWER = {
    "logits": torch.zeros(3, N),
    "x_t": TOKENS,
    "x_0": torch.tensor([0, 3, 35]),
    "t": NOISE,
    "power": torch.ones(N),
}
BEFORE_POWER = {
    "grad_loss": torch.ones(3),
    "row_numbers": torch.ones(3, _C.generalized_masked_row_numbers, dtype=torch.float64),
}

LINEAR_POWER = {**HEAD, "power": torch.ones(N), "x_t": TOKENS, "x_0": torch.tensor([0, 3, 35]), "t": NOISE}
LINEAR_POWER |= {"loss_weight": NOISE, **SPLIT, **COMPUTE, **CAPACITY, **FLAGS, "grad_power": True}

DRAW = {"row_ids": TOKENS, "mask": N - 1, "temperature": 0.5, "top_p": 0.9, "statistics": True}

# A call of every operator that is right, with its arguments in order
CALLS: dict[str, dict[str, Any]] = {
    "score_entropy": {**SCORES, **LOSS, **PI, "neg_entropy": PROCESS.neg_entropy},
    "score_entropy_backward": {"grad_loss": torch.ones(3), **SCORES, **LOSS, **PI, "neg_entropy": PROCESS.neg_entropy},
    "score_entropy_sweep": {"loss_weight": NOISE, **SCORES, **LOSS, **PI, "neg_entropy": PROCESS.neg_entropy},
    "score_entropy_sweep_backward": {
        "gradient": torch.zeros(3, N),
        "factor": torch.ones(1, dtype=torch.float64),
        "loss_weight": NOISE,
        **SCORES,
        **LOSS,
        **PI,
        "neg_entropy": PROCESS.neg_entropy,
    },
    "mean_prediction": {**MEAN_LOSS, "needs_gradient": True},
    "mean_prediction_backward": {
        "grad_loss": torch.ones(3),
        "numbers": torch.ones(3, _C.mean_prediction_numbers, dtype=torch.float64),
        **MEAN_LOSS,
    },
    "linear_mean_prediction": LINEAR_MEAN,
    "linear_mean_prediction_backward": {"grad_loss": torch.tensor([1.0, 2.0, 3.0]), **MADE, **LINEAR_MEAN},
    "generalized_masked": POWER,
    "generalized_masked_backward": {**BEFORE_POWER, **POWER},
    "generalized_masked_power": {**BEFORE_POWER, **POWER},
    "linear_generalized_masked": LINEAR_POWER,
    "linear_generalized_masked_backward": {
        "grad_loss": torch.tensor([1.0, 2.0, 3.0]),
        **MADE,
        "power_gradient": torch.zeros(N),
        **LINEAR_POWER,
    },
    "reverse_probs": {**SCORES, "x_t": TOKENS, "noise": NOISE, **SHIFT, **PI, **STEP},
    "reverse_sample": {**SCORES, "x_t": TOKENS, "noise": NOISE, **SHIFT, **PI, **STEP, **SEED},
    "transition_column": {"x_0": TOKENS, **COLUMN},
    "transition_row": {"x": TOKENS, **COLUMN},
    "sample_transition": {
        "x_0": TOKENS,
        "sigma": NOISE,
        "cumulative": PROCESS.cumulative,
        "family": "rank_one",
        "dim": N,
        **SEED,
        "first_row": 7,
    },
    "linear_score_entropy": LINEAR,
    "linear_score_entropy_backward": {"grad_loss": torch.tensor([1.0, 2.0, 3.0]), **MADE, **LINEAR},
    "linear_reverse_sample": {
        **HEAD,
        "x_t": TOKENS,
        "noise": NOISE,
        **SHIFT,
        **PI,
        **STEP,
        **SPLIT,
        **COMPUTE,
        **CAPACITY,
        **SEED,
    },
    "reverse_mean_probs": {**SCORES, **MEAN},
    "reverse_mean_sample": {**SCORES, **MEAN, **SEED},
    "linear_reverse_mean_sample": {**HEAD, **MEAN, **SPLIT, **COMPUTE, **CAPACITY, **SEED},
    "unmask": {"logits": torch.zeros(3, N), **DRAW, **SEED},
    "linear_unmask": {**HEAD, **COMPUTE, **SPLIT, **DRAW, **SEED},
}
WRONG = {
    "temperature": [-1.0, math.nan, math.inf],
    "top_p": [0.0, -1.0, 1.5, math.nan],
    "family": ["", "masked", "absorbing"],  # the last one has no vector
    "step": ["", "ancestral"],
    "mean_step": ["", "generalized_masked"],  # the last one has a power
    "power": [torch.ones(N + 1)],
    "forbidden": [-2, N, 2**40, -(2**40)],
    "mask": [-2, N, 2**40, -(2**40)],
    "dim": [0, -1, N + 1, 2**40],
    "dtype": [torch.int64, torch.complex64],
    "buffer_bytes": [0, -1],
    "capacity": [-1, -3, -(2**40)],
    "first_row": [-1],
    "first": [-1, 1],
}


def wrong_values(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    for wrong in WRONG.get(name, []):
        yield str(wrong), wrong
    if isinstance(value, Tensor):
        # no kernel takes the first two; the others, all but a few arguments that come in any dtype of a head
        dtypes = [torch.int32, torch.complex64]
        if name not in ("grad_loss", "log_score", "logits", *HEAD):
            dtypes += [dtype for dtype in (torch.float64, torch.bfloat16) if dtype != value.dtype]
        for dtype in dtypes:
            yield str(dtype), value.to(dtype)
        yield "short", value[:-1]
        yield "long", torch.cat([value, value])
        yield "empty", value[:0]
        yield "0-d", value.new_zeros(()) if value.numel() != 1 else value.new_zeros(2)
        yield "meta", value.to("meta")
        if value.dim() == 2:
            yield "narrow", value[:, :-1]
    if value is not None:
        yield "None", None


ALLOWED = {(name, "None") for name in ("bias", "log_score_shift", "loss_weight", "sigma_s", "needs_gradient")}
ALLOWED |= {("row_ids", "None"), ("statistics", "None"), ("capacity", "None")}
ALLOWED |= {
    *((name, "empty") for name in (*MADE, "power_gradient")),
    *((name, "None") for name in (*FLAGS, "grad_power")),
}


def call(operator: str, arguments: dict[str, Any]) -> Any:
    return getattr(torch.ops.sedd_ext, operator)(*to_device(list(arguments.values())))


@pytest.mark.parametrize("operator", CALLS)
def test_right_calls(operator: str) -> None:
    """Nothing but the argument in question is wrong in the calls below."""
    schema = getattr(torch.ops.sedd_ext, operator).default._schema
    assert [argument.name for argument in schema.arguments] == list(CALLS[operator])
    call(operator, CALLS[operator])


@pytest.mark.parametrize("operator", CALLS)
def test_wrong_calls(operator: str) -> None:
    """Every argument in turn: another dtype, too few numbers, too many, none, 0-d, on no device, None, out of range."""
    right, tried = CALLS[operator], 0
    call(operator, right)  # nothing but the argument in question is wrong below
    for name, value in right.items():
        for kind, wrong in wrong_values(name, value):
            if (name, kind) in ALLOWED:
                continue
            tried += 1
            with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                call(operator, {**right, name: wrong})
            # of two arguments that contradict each other, either is named; torch has its own words for None as a number
            ours = re.match(r"\w+: expected .*, got ", str(caught.value))
            assert ours or (kind == "None" and f"'{name}'" in str(caught.value)), f"{name} {kind}: {caught.value}"
    assert tried > 5 * len(right)


@pytest.mark.operators("cpu", "cuda")
def test_vectors_need_not_be_contiguous() -> None:
    """Every second number of a vector π, and one number for all rows."""
    for operator, arguments in CALLS.items():
        strided = {
            name: torch.stack([value, value.flip(0)], -1)[..., 0] if isinstance(value, Tensor) else value
            for name, value in arguments.items()
            if name != "gradient"  # is written
        }
        strided = {name: strided.get(name, value) for name, value in arguments.items()}
        strided |= {name: NOISE[:1].expand(3) for name, value in arguments.items() if value is NOISE}
        for one, other in zip(
            *(torch.utils._pytree.tree_leaves(call(operator, a)) for a in (arguments, strided)), strict=True
        ):
            torch.testing.assert_close(one, other)


class Noted(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.operators("cpu")
def test_calls_without_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's dispatcher is left out only where it would do nothing: without a mode, a profiler or a transform."""
    plain = sample_transition(TOKENS, NOISE, PROCESS, generator=torch.Generator().manual_seed(0))
    seen = []
    real = _operators._is_plain
    monkeypatch.setattr(_operators, "_is_plain", lambda arguments: seen.append(real(arguments)))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(sample_transition(TOKENS, NOISE, PROCESS, generator=generator), plain)
    assert seen == [True]
    monkeypatch.undo()
    with Noted() as noted:
        sample_transition(TOKENS, NOISE, PROCESS)
    assert "sample_transition.default" in noted.names
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        assert isinstance(sample_transition(fake.from_tensor(TOKENS), 0.5, PROCESS), FakeTensor)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        sample_transition(TOKENS, NOISE, PROCESS)
    assert "sedd_ext::sample_transition" in {event.key for event in profile.key_averages()}
    each = torch.func.vmap(lambda x: transition_column(x, 0.5, PROCESS))(TOKENS)  # torch's loop over a batch
    assert torch.equal(each, transition_column(TOKENS, 0.5, PROCESS))


class Program(nn.Module):
    def forward(self, log_score: Tensor, x_t: Tensor, x_0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        loss = score_entropy_loss(log_score, x_t, x_0, sigma, PROCESS)
        return loss, reverse_probs(log_score, x_t, Tweedie(sigma), PROCESS)


@pytest.mark.operators("cpu")
def test_exported_programs() -> None:
    rows = torch.export.Dim("rows", min=2, max=1000)
    inputs = (torch.randn(3, N), TOKENS, TOKENS.flip(0), NOISE)
    exported = torch.export.export(Program(), inputs, dynamic_shapes=[{0: rows}] * 4)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    program = torch.export.load(file).module()
    more = tuple(torch.cat([value, value]) for value in inputs)
    for given in (inputs, more):
        for one, other in zip(program(*given), Program()(*given), strict=True):
            assert torch.equal(one, other)
    log_score, x_t, x_0, sigma = inputs
    for wrong in (
        (log_score, x_t[:2], x_0, sigma),
        (log_score, x_t.int(), x_0, sigma),
        (log_score, x_t, x_0.float(), sigma),
        (log_score[:, :-1], x_t, x_0, sigma),
        (log_score.double(), x_t, x_0, sigma),
        (log_score, x_t.to("meta"), x_0, sigma),
        (log_score, x_t + 1, x_0, sigma),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError, AssertionError)):
            program(*wrong)

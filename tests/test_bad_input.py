"""Wrong calls of the operators: each raises an error that names the argument, what was given and what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sedd_ext
from sedd_ext import Absorbing, Uniform

SCORES = torch.zeros(3, 7)
TOKENS = torch.tensor([6, 6, 1])
NAN, INF = float("nan"), float("inf")

# A call of every operator that is right
CALLS: dict[str, dict[str, Any]] = {
    "score_entropy_loss": {"log_score": SCORES, "x_t": TOKENS, "x_0": torch.tensor([0, 1, 1]), "sigma": 0.5},
    "transition_column": {"x_0": TOKENS, "sigma": 0.5},
    "transition_row": {"x": TOKENS, "sigma": 0.5},
    "sample_transition": {"x_0": TOKENS, "sigma": 0.5},
    "tweedie_probs": {"log_score": SCORES, "x_t": TOKENS, "dsigma": 0.5},
    "tweedie_sample": {"log_score": SCORES, "x_t": TOKENS, "dsigma": 0.5},
    "euler_probs": {"log_score": SCORES, "x_t": TOKENS, "step": 0.5},
    "euler_sample": {"log_score": SCORES, "x_t": TOKENS, "step": 0.5},
}

# What every operator with such an argument must refuse: the value, the error, and what the message says
WRONG_LOG_SCORE = [
    ([[0.0] * 7] * 3, TypeError, "list"),
    (SCORES.long(), TypeError, r"torch\.int64"),
    (SCORES.to(torch.complex64), TypeError, r"torch\.complex64"),
    (torch.tensor(0.0), ValueError, r"\[\]"),
    (torch.zeros(3, 8), ValueError, r"\[3, 8\]"),
]
WRONG_TOKENS = [
    ([6, 6, 1], TypeError, "list"),
    (TOKENS.float(), TypeError, r"torch\.float32"),
    (TOKENS.int(), TypeError, r"torch\.int32"),
    (torch.tensor([6, 7, 1]), ValueError, r"\b7\b"),
    (torch.tensor([6, -1, 1]), ValueError, "-1"),
    (torch.tensor([6, 2**40, 1]), ValueError, str(2**40)),
]
WRONG_SIGMA = [
    ("0.5", TypeError, "str"),
    (None, TypeError, "NoneType"),
    (torch.tensor([1, 1, 1]), TypeError, r"torch\.int64"),
    (0.0, ValueError, r"\b0"),
    (-0.5, ValueError, r"-0\.5"),
    (NAN, ValueError, "nan"),
    (INF, ValueError, "inf"),
    (torch.tensor([0.5, 0.0, 0.5]), ValueError, r"\b0"),
    (torch.tensor([0.5, 0.5, NAN]), ValueError, "nan"),
    (torch.ones(2), ValueError, r"\[2\]"),
    (torch.ones(5, 3), ValueError, r"\[5, 3\]"),
    (torch.ones(3, requires_grad=True), ValueError, "requires_grad"),
]
WRONG_SHIFT = [
    ("0.5", TypeError, "str"),
    (torch.tensor([1, 1, 1]), TypeError, r"torch\.int64"),
    (torch.ones(2), ValueError, r"\[2\]"),
    (torch.ones(5, 3), ValueError, r"\[5, 3\]"),
    (torch.ones(3, requires_grad=True), ValueError, "requires_grad"),
]
WRONG_GRAPH = [
    ("absorbing", TypeError, "str"),
    (None, TypeError, "NoneType"),
]
WRONG = {
    "log_score": WRONG_LOG_SCORE,
    "x_t": [*WRONG_TOKENS, (TOKENS[:2], ValueError, r"\[3\].*\[2\]"), (TOKENS[None], ValueError, r"\[3\].*\[1, 3\]")],
    "x_0": WRONG_TOKENS,
    "x": WRONG_TOKENS,
    "sigma": WRONG_SIGMA,
    "dsigma": WRONG_SIGMA,
    "step": WRONG_SIGMA,
    "log_score_shift": WRONG_SHIFT,
    "graph": WRONG_GRAPH,
    "generator": [(7, TypeError, "int")],
    "reduction": [("avg", ValueError, "avg"), (None, ValueError, "None")],
}
OPTIONS = {
    "score_entropy_loss": ["log_score_shift", "reduction"],
    "sample_transition": ["generator"],
    "tweedie_probs": ["log_score_shift"],
    "tweedie_sample": ["log_score_shift", "generator"],
    "euler_probs": ["log_score_shift"],
    "euler_sample": ["log_score_shift", "generator"],
}


def table() -> Iterator[Any]:
    for operator, call in CALLS.items():
        for argument in [*call, "graph", *OPTIONS.get(operator, [])]:
            for number, (value, error, given) in enumerate(WRONG[argument]):
                yield pytest.param(operator, argument, value, error, given, id=f"{operator}-{argument}-{number}")


@pytest.mark.parametrize(("operator", "argument", "value", "error", "given"), list(table()))
def test_operators(operator: str, argument: str, value: Any, error: type[Exception], given: str) -> None:
    function: Callable[..., Tensor] = getattr(sedd_ext, operator)
    arguments = {**CALLS[operator], "graph": Absorbing(6)}
    function(**arguments)  # right as it is
    with pytest.raises(error, match=rf"(?s)^{argument}: .*{given}"):
        function(**{**arguments, argument: value})


def test_x_0_of_another_shape_than_x_t() -> None:
    with pytest.raises(ValueError, match=r"^x_0: .*\[3\].*\[2\]"):
        sedd_ext.score_entropy_loss(SCORES, TOKENS, TOKENS[:2], 0.5, Absorbing(6))


def test_the_bad_row_is_named() -> None:
    sigma = torch.ones(5, 100)
    sigma[3, 42] = -1.0
    with pytest.raises(ValueError, match=r"^sigma: .*-1.*\[3, 42\]"):
        sedd_ext.sample_transition(torch.zeros(5, 100, dtype=torch.int64), sigma, Uniform(7))


def test_wrong_calls_leave_the_generator_usable() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="sigma"):
        sedd_ext.sample_transition(TOKENS, NAN, Absorbing(6), generator=generator)
    assert sedd_ext.sample_transition(TOKENS, 0.5, Absorbing(6), generator=generator).shape == (3,)

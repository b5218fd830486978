"""Wrong calls of the operators: each raises an error that names the argument, what was given and what is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import backends
import pytest
import torch
from backends import Backend, sample_transition, score_entropy_loss
from explicit import bad_rows
from torch import Tensor

from sedd_ext import Absorbing, Euler, Hybrid, Tweedie, Uniform

pytestmark = pytest.mark.operators

SCORES = torch.zeros(3, 7)
TOKENS = torch.tensor([6, 6, 1])
NOISE = torch.full((3,), 0.5)
NAN, INF = float("nan"), float("inf")

HEAD = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "bias": torch.zeros(7)}

# A call of every operator that is right
CALLS: dict[str, dict[str, Any]] = {
    "score_entropy_loss": {"log_score": SCORES, "x_t": TOKENS, "x_0": torch.tensor([0, 1, 1]), "sigma": 0.5},
    "transition_column": {"x_0": TOKENS, "sigma": 0.5},
    "transition_row": {"x": TOKENS, "sigma": 0.5},
    "sample_transition": {"x_0": TOKENS, "sigma": 0.5},
    "reverse_probs": {"log_score": SCORES, "x_t": TOKENS, "step": Tweedie(0.5)},
    "reverse_sample": {"log_score": SCORES, "x_t": TOKENS, "step": Tweedie(0.5)},
    "linear_score_entropy_loss": {**HEAD, "x_t": TOKENS, "x_0": torch.tensor([0, 1, 1]), "sigma": 0.5},
    "linear_reverse_sample": {**HEAD, "x_t": TOKENS, "step": Tweedie(0.5)},
}


class BadRows(list[int]):
    """A ValueError where the backend looks at values before it answers; else these rows of the answer are marked."""


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
    (torch.tensor([6, 7, 1]), BadRows([1]), r"\b7\b"),
    (torch.tensor([6, -1, 1]), BadRows([1]), "-1"),
    (torch.tensor([6, 2**40, 1]), BadRows([1]), str(2**40)),
    (torch.tensor([6, -(2**63), 1]), BadRows([1]), str(-(2**63))),
]
WRONG_SIGMA = [
    ("0.5", TypeError, "str"),
    (None, TypeError, "NoneType"),
    (torch.tensor([1, 1, 1]), TypeError, r"torch\.int64"),
    (0.0, BadRows([0, 1, 2]), r"\b0"),
    (-0.5, BadRows([0, 1, 2]), r"-0\.5"),
    (NAN, BadRows([0, 1, 2]), "nan"),
    (INF, BadRows([0, 1, 2]), "inf"),
    (5e-324, BadRows([0, 1, 2]), r"at least 1e-250, got 5e-324"),
    (torch.tensor([0.5, 0.0, 0.5]), BadRows([1]), r"\b0"),
    (torch.tensor([0.5, 0.5, NAN]), BadRows([2]), "nan"),
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
WRONG_PROCESS = [
    ("absorbing", TypeError, "str"),
    (None, TypeError, "NoneType"),
]
WRONG_OPTION = [
    (0, ValueError, r"\b0"),
    (-1.0, ValueError, r"-1\.0"),
    (NAN, ValueError, "nan"),
    (INF, ValueError, "inf"),
]
WRONG = {
    "log_score": WRONG_LOG_SCORE,
    "hidden": [
        ([[0.0] * 4] * 3, TypeError, "list"),
        (torch.zeros(3, 4).long(), TypeError, r"torch\.int64"),
        (torch.zeros(3, 4).double(), TypeError, r"torch\.float64"),
        (torch.zeros(3, 5), ValueError, r"\[3, 5\]"),
        (torch.tensor(0.0), ValueError, r"\[\]"),
    ],
    "weight": [
        (None, TypeError, "NoneType"),
        (torch.zeros(7, 4).int(), TypeError, r"torch\.int32"),
        (torch.zeros(8, 4), ValueError, r"\[8, 4\]"),
        (torch.zeros(7), ValueError, r"\[7\]"),
    ],
    "bias": [
        (0.0, TypeError, "float"),
        (torch.zeros(7).double(), TypeError, r"torch\.float64"),
        (torch.zeros(8), ValueError, r"\[8\]"),
    ],
    "buffer_bytes": [(0, ValueError, r"\b0"), (2.5, ValueError, r"2\.5")],
    "capacity": [
        (-1, ValueError, "-1"),
        (2.0, ValueError, r"2\.0"),
        (True, ValueError, "True"),
        (0, ValueError, r"\b0"),
    ],
    "temperature": WRONG_OPTION,
    "top_p": [*WRONG_OPTION, (1.5, ValueError, r"1\.5")],
    "loss_weight": WRONG_SHIFT,
    "x_t": [*WRONG_TOKENS, (TOKENS[:2], ValueError, r"\[3\].*\[2\]"), (TOKENS[None], ValueError, r"\[3\].*\[1, 3\]")],
    "x_0": WRONG_TOKENS,
    "x": WRONG_TOKENS,
    "sigma": WRONG_SIGMA,
    "step": [
        *((value, TypeError, r"Tweedie\(dsigma\) or Euler\(step\), got ") for value in (0.5, None, NOISE, Tweedie)),
        *((Euler(value), error, given) for value, error, given in WRONG_SIGMA),
    ],
    "dsigma": [(Tweedie(value), error, given) for value, error, given in WRONG_SIGMA],
    "log_score_shift": WRONG_SHIFT,
    "process": WRONG_PROCESS,
    "generator": [(7, TypeError, "int")],
    "reduction": [("avg", ValueError, "avg"), (None, ValueError, "None")],
}
OPTIONS = {
    "score_entropy_loss": ["log_score_shift", "reduction"],
    "sample_transition": ["generator"],
    "reverse_probs": ["dsigma", "log_score_shift"],
    "reverse_sample": ["dsigma", "log_score_shift", "generator", "temperature", "top_p"],
    "linear_score_entropy_loss": ["log_score_shift", "loss_weight", "reduction", "buffer_bytes", "capacity"],
    "linear_reverse_sample": [
        "dsigma",
        "log_score_shift",
        "generator",
        "temperature",
        "top_p",
        "buffer_bytes",
        "capacity",
    ],
}


def table() -> Iterator[Any]:
    for operator, call in CALLS.items():
        for argument in [*call, "process", *OPTIONS.get(operator, [])]:
            for number, (value, error, given) in enumerate(WRONG[argument]):
                yield pytest.param(operator, argument, value, error, given, id=f"{operator}-{argument}-{number}")


@pytest.mark.parametrize(("operator", "argument", "value", "error", "given"), list(table()))
def test_operators(
    backend: Backend, operator: str, argument: str, value: Any, error: type[Exception] | BadRows, given: str
) -> None:
    function: Callable[..., Tensor] = getattr(backends, operator)
    arguments = {**CALLS[operator], "process": Absorbing(6)}
    if isinstance(value, Euler):
        arguments["step"] = Euler(0.5)
    good = function(**arguments)
    assert bad_rows(good) == []
    wrong = {**arguments, "step" if argument == "dsigma" else argument: value}
    if isinstance(error, BadRows):
        if not backend.names_bad_rows:
            result = function(**wrong)
            assert bad_rows(result) == error
            kept = [row for row in range(3) if row not in error]
            if "sample" not in operator and argument != "x_0":  # what it stands in for has other tokens
                assert torch.equal(result[kept], good[kept])
            return
        error = ValueError
    with pytest.raises(error, match=rf"(?s)^{argument}: .*{given}"):
        function(**wrong)


@pytest.mark.parametrize("argument", ["x_t", "x_0", "sigma"])
@pytest.mark.parametrize("n", [7, 2000])
def test_the_gradient_of_a_bad_row(backend: Backend, argument: str, n: int) -> None:
    """As the loss: an error, or NaN in the row and nowhere else."""
    rows = {"x_t": torch.full((3,), n - 1), "x_0": torch.zeros(3).long(), "sigma": torch.full((3,), 0.5)}
    rows[argument][1] = -1
    log_score = torch.zeros(3, n, requires_grad=True)
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match=argument):
            score_entropy_loss(log_score, **rows, process=Absorbing(n - 1))
        return
    score_entropy_loss(log_score, **rows, process=Absorbing(n - 1)).sum().backward()
    assert log_score.grad is not None
    assert bad_rows(log_score.grad) == [1]


def test_x_0_of_another_shape_than_x_t() -> None:
    assert score_entropy_loss(SCORES, TOKENS, TOKENS, 0.5, Absorbing(6)).shape == (3,)
    with pytest.raises(ValueError, match=r"^x_0: .*\[3\].*\[2\]"):
        score_entropy_loss(SCORES, TOKENS, TOKENS[:2], 0.5, Absorbing(6))


def test_the_bad_row_is_named(backend: Backend) -> None:
    sigma = torch.ones(5, 100)
    sigma[3, 42] = -1.0
    x_0 = torch.zeros(5, 100, dtype=torch.int64)
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match=r"^sigma: .*-1.*\[3, 42\]"):
            sample_transition(x_0, sigma, Uniform(7))
    else:
        assert (sample_transition(x_0, sigma, Uniform(7)) == -1).nonzero().tolist() == [[3, 42]]


def test_wrong_calls_leave_the_generator_usable(backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    if backend.names_bad_rows:
        with pytest.raises(ValueError, match="sigma"):
            sample_transition(TOKENS, NAN, Absorbing(6), generator=generator)
    else:
        assert (sample_transition(TOKENS, NAN, Absorbing(6), generator=generator) == -1).all()
    assert sample_transition(TOKENS, 0.5, Absorbing(6), generator=generator).shape == (3,)


@pytest.mark.operators("cpu")
@pytest.mark.parametrize("operator", CALLS)
def test_meta_tensors(operator: str) -> None:
    """Shapes alone give a shape; where some arguments have values and others have not, one is named."""
    function, process = getattr(backends, operator), Hybrid(6, 0.3)
    arguments = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in CALLS[operator].items()}
    options = [{"temperature": 0.5}] if "temperature" in OPTIONS.get(operator, []) else []
    for option in [{}, *options]:
        result, expected = (function(**values, **option, process=process) for values in (arguments, CALLS[operator]))
        assert result.is_meta
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor)]
    for name in tensors if len(tensors) > 1 else []:
        with pytest.raises(ValueError, match=r"^\w+: expected a tensor on (cpu|meta)"):
            function(**{**CALLS[operator], name: arguments[name]}, process=process)
    noise: Any = torch.tensor(0.5, device="meta")
    wrong = {"dsigma": Tweedie(noise), "step": Euler(noise)} if "step" in arguments else {"sigma": noise}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cpu, got one on meta"):
            function(**{**CALLS[operator], "step" if name == "dsigma" else name: value}, process=process)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "first_row: expected at least 0, got -1"),
        (1.0, TypeError, "first_row: expected an int, got float"),
        (True, TypeError, "first_row: expected an int, got bool"),
    ],
)
def test_a_wrong_first_row(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_transition(torch.zeros(2).long(), 1.0, Uniform(10), first_row=value)
    assert sample_transition(torch.zeros(2).long(), 1.0, Uniform(10), first_row=2**40).shape == (2,)

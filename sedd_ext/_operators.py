"""Registers the operators, with checks of everything that determines which memory a kernel accesses.

The public functions check their arguments and raise readable errors. A program exported with ``torch.export`` calls
``torch.ops.sedd_ext`` directly, so the operators check dtypes, sizes, devices and names too.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn, get_type_hints

import torch
from torch import Tensor

from . import _C
from ._dispatch import CUDA, DTYPES, FAMILIES, MEAN_STEPS, STEPS, compute_dtype, kind_of

__all__: list[str] = []

NAMESPACE = __name__.split(".")[0]
"""``sedd_ext``; a copy of the package under another name, as from the kernels hub, registers operators of its own."""
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
OPERATORS = getattr(torch.ops, NAMESPACE)
"""The registered operators, ``torch.ops.sedd_ext``."""

_ANY_FLOAT = "a float32, bfloat16, float16 or float64 tensor"
Rule = tuple[str, type[Exception], str]


def _numbers(dtype: str) -> list[Rule]:
    return [
        (f"{{0}}.dtype is not {dtype}", TypeError, f"a tensor of {dtype}"),
        ("{0}.numel() != rows", ValueError, "{rows} numbers, one a token"),
    ]


def _vector(dtype: str) -> Rule:
    needed = f"{{0}} is None or {{0}}.dtype is not {dtype} or {{0}}.numel() != dim"
    wrong = f"({needed}) if family == 'rank_one' else {{0}} is not None"
    return wrong, ValueError, f"{{dim}} numbers of {{{dtype}}} for a rank_one process, None for any other"


RULES: dict[str, list[Rule]] = {
    **{name: _numbers("int64") for name in ("x_t", "x_0", "x")},
    **{name: _numbers("float64") for name in ("sigma", "sigma_s", "noise", "log_score_shift", "loss_weight", "t")},
    **{
        name: [
            ("exact is None", TypeError, _ANY_FLOAT),
            ("{0}.numel() != rows * dim", ValueError, "shape [*B, N] for {rows} tokens"),
        ]
        for name in ("log_score", "logits")
    },
    "numbers": [
        (
            "{0}.dtype is not float64 or {0}.numel() != rows * MEAN_PREDICTION_NUMBERS",
            ValueError,
            "the second result of mean_prediction with needs_gradient",
        )
    ],
    "row_numbers": [
        ("{0}.dtype is not float64", TypeError, "a tensor of float64"),
        ("{0}.numel() != rows * ROW_NUMBERS", ValueError, "{ROW_NUMBERS} numbers for each of {rows} tokens"),
    ],
    "grad_loss": [
        ("{0}.dtype not in DTYPES", TypeError, _ANY_FLOAT),
        ("{0}.numel() != rows", ValueError, "{rows} numbers, one a token"),
    ],
    "gradient": [
        ("{0}.dtype is not log_score.dtype or {0}.shape != log_score.shape", ValueError, "log_score's dtype and shape"),
        ("not {0}.is_contiguous()", ValueError, "a contiguous tensor"),
    ],
    "factor": [("{0}.dtype is not float64 or {0}.numel() != 1", ValueError, "one number of float64")],
    "weight": [
        ("{0}.dtype not in DTYPES", TypeError, _ANY_FLOAT),
        ("{0}.dim() != 2", ValueError, "shape [N, d]"),
    ],
    "hidden": [
        ("{0}.dtype not in DTYPES", TypeError, _ANY_FLOAT),
        ("{0}.shape != (*batch, weight.shape[-1])", ValueError, "x_t's shape and one more axis, weight's last"),
    ],
    "bias": [
        ("{0}.dtype not in DTYPES", TypeError, _ANY_FLOAT),
        ("{0}.shape != weight.shape[:1]", ValueError, "shape [{weight.shape[0]}]"),
    ],
    **{
        f"{name}_gradient": [
            (
                f"{{0}}.dtype is not {name}.dtype or {{0}}.shape not in ({name}.shape, (0,))",
                ValueError,
                f"{name}'s dtype and shape, or nothing",
            )
        ]
        for name in ("hidden", "weight", "power")
    },
    "bias_gradient": [
        (
            "{0}.dtype is not (weight if bias is None else bias).dtype or {0}.shape not in (weight.shape[:1], (0,))",
            ValueError,
            "bias's dtype and shape, or nothing",
        )
    ],
    "family": [("{0} not in FAMILIES", ValueError, "'absorbing', 'uniform' or 'rank_one'")],
    "step": [("{0} not in STEPS", ValueError, "'tweedie' or 'euler'")],
    "mean_step": [
        ("{0} not in MEAN_STEPS", ValueError, "'tweedie', 'euler' or 'generalized_masked'"),
        ("(sigma is None) != ({0} == 'generalized_masked')", ValueError, "'generalized_masked' if sigma is None"),
        ("(power is None) == ({0} == 'generalized_masked')", ValueError, "'generalized_masked' if there is a power"),
        ("{0} == 'generalized_masked' and family != 'absorbing'", ValueError, "another step if not absorbing"),
    ],
    "power": [("{0}.dtype is not exact or {0}.numel() != dim", ValueError, "{dim} numbers of {exact}")],
    "mask": [("not -1 <= {0} < dim", ValueError, "a token in [0, {dim}), or -1 for none")],
    "dim": [("{0} < 1", ValueError, "a positive number of tokens")],
    "first": [("not 0 <= {0} <= dim - weight.shape[0]", ValueError, "the first of {weight.shape[0]} rows of {dim}")],
    "group": [("not {0} and weight.shape[0] != dim", ValueError, "a group of processes that have {dim} rows together")],
    "dtype": [("{0} not in dtypes", TypeError, "one of {dtypes}")],
    "stationary": [_vector("exact")],
    "cumulative": [_vector("float64")],
    "forbidden": [("not -1 <= {0} < dim", ValueError, "a token in [0, {dim}), or -1 for none")],
    "buffer_bytes": [("{0} < 1", ValueError, "a positive number")],
    "capacity": [("{0} is not None and {0} < 0", ValueError, "at least 0, or None")],
    "row_ids": _numbers("int64"),
    "temperature": [("not 0.0 <= {0} < inf", ValueError, "a finite number of at least 0")],
    "top_p": [("not 0.0 < {0} <= 1.0", ValueError, "a number in (0, 1]")],
    "first_row": [("{0} < 0", ValueError, "at least 0")],
    "seed": [("{0}.dtype is not int64 or {0}.numel() != 1", ValueError, "one number of int64")],
}
"""For each argument of a schema: a Python expression that is true if it is wrong, the error, and what is expected.

The expressions use the arguments and ``rows``, the number of tokens; ``dim``, N; and ``exact``, the dtype of π.
"""

_KNOWN = {
    "DTYPES": DTYPES,
    "FAMILIES": FAMILIES,
    "STEPS": STEPS,
    "MEAN_STEPS": MEAN_STEPS,
    "EXACT": {dtype: compute_dtype(dtype) for dtype in DTYPES},
    "MEAN_PREDICTION_NUMBERS": _C.mean_prediction_numbers,
    "ROW_NUMBERS": _C.generalized_masked_row_numbers,
    "inf": math.inf,
    "int64": torch.int64,
    "float64": torch.float64,
}


def checked(schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a check of its arguments by the rules of the schema.

    The rules are compiled into one Python function, as in dataclasses. It takes about a microsecond, which is the time
    to read the attributes of the tensors; a loop over the rules would take twice as long.
    """
    arguments = dict(reversed(pair) for pair in re.findall(r"(\w+\??)(?:\(a!\))? (\w+)[,)]", schema.split("->")[0]))
    rules = []
    for name in (name for name in RULES if name in arguments):
        optional = arguments[name] == "Tensor?" and name not in ("stationary", "cumulative")
        given = f"{name} is not None and " if optional else ""
        rules += [(name, f"{given}({wrong.format(name)})", error, expected) for wrong, error, expected in RULES[name]]
    tokens = next((name for name in ("x_t", "x_0", "x") if name in arguments), None)
    scores = next((name for name in ("log_score", "logits", "weight") if name in arguments), None)
    dtype = "dtype" if "dtype" in arguments else f"{scores}.dtype"
    if tokens is not None:
        known = [f"batch = {tokens}.shape", f"rows = {tokens}.numel()"]
    else:
        rows = "hidden" if "hidden" in arguments else scores
        known = [f"batch = {rows}.shape[:-1]", f"rows = {rows}.numel() // (({rows}.shape or (1,))[-1] or 1)"]
    if scores is not None:
        known += [f"shape = {scores}.shape"]
        if "dim" not in arguments:
            known += [f"dim = shape[{0 if scores == 'weight' else -1}] if shape else -1"]
        known += [f"exact = EXACT.get({dtype})"]
    elif "stationary" in arguments:
        known += ["exact = dtype"]
    source = f"""
def check({", ".join(arguments)}):
    try:
        {"; ".join(known)}
        wrong = {" or ".join(f"({wrong})" for _, wrong, _, _ in rules)}
    except AttributeError:  # of None
        wrong = True
    if wrong:
        refuse(locals())
    return function({", ".join(arguments)})
"""
    tensors = [(name, f"{name} is None", TypeError, "a tensor") for name in arguments if arguments[name] == "Tensor"]
    # transitions return probabilities
    dtypes = [torch.float32, torch.float64] if scores is None else list(DTYPES)
    space: dict[str, Any] = {
        **_KNOWN,
        "dtypes": dtypes,
        "function": function,
        "refuse": functools.partial(_refuse, [*tensors, *rules], dtypes),
    }
    exec(source, space)
    result: Callable[..., Any] = space["check"]
    return result


def _refuse(rules: list[tuple[str, str, type[Exception], str]], dtypes: Any, values: dict[str, Any]) -> NoReturn:
    """Raises the error of the first broken rule."""
    known = {**_KNOWN, "dtypes": dtypes, **values}
    for name, wrong, error, expected in rules:
        if eval(wrong, known):
            value = values[name]
            got = f"{kind_of(value)} of shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise error(f"{name}: expected {expected.format(**known)}, got {got}")
    raise AssertionError("no rule is broken")


def _same_device(names: list[str], arguments: tuple[Any, ...]) -> None:
    """Checks that all tensors are on one device. Torch itself selects the CPU only if all tensors are there."""
    first, *others = ((n, v) for n, v in zip(names, arguments, strict=True) if isinstance(v, Tensor))
    for name, value in others:
        if value.device != first[1].device:
            raise ValueError(
                f"{name}: expected a tensor on {first[1].device} as {first[0]} is, got one on {value.device}"
            )


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    torch.dtype: "ScalarType",
    int | None: "int?",
    **{kind: kind.__name__ for kind in (str, float, int, bool)},
}


def schema(arguments: type) -> str:
    """The arguments of an operator in the language of schemas, from the annotations of a NamedTuple."""
    return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(arguments).items())


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Registers an operator, ``torch.ops.sedd_ext.NAME``.

    Args:
        schema: in torch's language; the names of the arguments select the checks (:data:`RULES`).
        implementation: for all devices that have kernels.
        fake: computes the shapes and dtypes of the results.

    Returns:
        A function that calls the operator, in eager mode without torch's dispatcher, which takes 4 µs. For operators
        without a gradient.
    """
    name = schema.split("(", 1)[0]
    names = re.findall(r"(\w+)[,)]", schema.split("->")[0])

    def on_any_device(function: Callable[..., Any]) -> Callable[..., Any]:
        behind_rules = checked(schema, function)

        def call(*arguments: Any) -> Any:
            _same_device(names, arguments)
            return behind_rules(*arguments)

        return call

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    on_cpu = checked(schema, implementation)
    LIBRARY.impl(name, on_cpu, "CPU")
    for device in CUDA:
        LIBRARY.impl(name, on_any_device(implementation), device.upper())
    torch.library.register_fake(f"{NAMESPACE}::{name}", on_any_device(fake), lib=LIBRARY)
    operator = getattr(OPERATORS, name)

    def call(*arguments: Any) -> Any:
        return on_cpu(*arguments) if _is_plain(arguments) else operator(*arguments)

    return call


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would do nothing but call the CPU's implementation."""
    return (
        not torch.compiler.is_compiling()
        and all(type(value) is Tensor and value.is_cpu for value in arguments if isinstance(value, Tensor))
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
    )

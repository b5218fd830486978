"""Samplers from words of the command line: ``--sampler NAME --sampler_params.PARAMETER VALUE``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sedd.diffusion.sampler import Sampler
from sedd.diffusion.samplers import SAMPLERS
from sedd.options import check_one_of, checked, prefixed

__all__ = ["choose_sampler", "make_sampler", "parameters"]


def parameters() -> dict[str, str]:
    """Help for the parameters of all samplers, by name of the parameter."""
    found: dict[str, dict[str, list[str]]] = {}  # the samplers that have it, by their default
    for name, kind in SAMPLERS.items():
        for parameter, default in _defaults(kind).items():
            found.setdefault(parameter, {}).setdefault(default, []).append(name)
    return {
        parameter: "Parameter of "
        + "; ".join(f"{', '.join(names)} (default: {default})" for default, names in kinds.items())
        + "."
        for parameter, kinds in found.items()
    }


def choose_sampler(name: str | None, steps: int, params: Mapping[str, str]) -> Sampler | str | None:
    """The sampler with its parameters, or its name if there are none; None for the default of the model.

    Raises:
        ValueError: parameters without a name, or as :func:`make_sampler`.
    """
    if not params:
        return name
    if name is None:
        raise ValueError("sampler: expected the name of the sampler that has these parameters, got none")
    return make_sampler(name, steps, params)


def make_sampler(name: str, steps: int, params: Mapping[str, str]) -> Sampler:
    """Makes the sampler of that name.

    Args:
        name: a key of ``SAMPLERS``.
        steps: number of reverse steps.
        params: other fields of the class, as words. A sampler that uses another one gets its name as ``sampler``, and
            hands it the parameters that are not its own.

    Raises:
        ValueError: an unknown sampler or parameter, or a value that does not suit it.
    """
    check_one_of("sampler", name, SAMPLERS)
    kind, known = SAMPLERS[name], _defaults(SAMPLERS[name])
    own = {key: word for key, word in params.items() if key in known}
    others = {key: word for key, word in params.items() if key not in known}
    inner = {}
    if "sampler" in known:
        with prefixed("sampler_params.", kind):
            inner["sampler"] = make_sampler(own.pop("sampler", known["sampler"]), steps, others)
    elif others:
        has = f"the parameters {', '.join(known)}" if known else "no parameters"
        raise ValueError(f"sampler_params: sampler {name!r} has {has}; got {next(iter(others))!r}")
    values = checked(kind, own, "sampler_params.", words=True)
    with prefixed("sampler_params.", kind):
        return kind(steps, **values, **inner)


def _defaults(kind: type[Sampler]) -> dict[str, str]:
    """The parameters of a sampler other than ``steps``, with their defaults as words."""
    names: dict[type, str] = {type_: name for name, type_ in SAMPLERS.items()}
    found = {}
    for field in dataclasses.fields(kind):
        if field.name != "steps":
            value: Any = field.default_factory() if callable(field.default_factory) else field.default
            found[field.name] = names.get(type(value), str(value).lower())
    return found

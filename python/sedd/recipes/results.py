"""Figures in the files of ``sedd eval --json``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sedd.recipes.order import Figure

__all__ = ["find_figure", "mean_figure"]


def find_figure(command: str, found: Mapping[str, Any], value: str, pick: Mapping[str, Any], scale: float) -> Figure:
    """A figure of the results of an evaluation.

    Args:
        command: the command of ``sedd eval``.
        found: what it wrote.
        value: name of the value.
        pick: which row of the results, as far as there are several.
        scale: factor of the value.

    Raises:
        ValueError: the results do not contain it.
    """
    try:
        number, error = _READERS[command](found, value, pick)
    except (KeyError, StopIteration) as missing:
        wanted = ", ".join([value, *(f"{name} {entry}" for name, entry in pick.items())])
        raise ValueError(f"{command}: expected a result with {wanted}; got none") from missing
    if number is None:  # JSON has no infinity
        return Figure(math.inf, 0.0)
    return Figure(scale * number, None if error is None else scale * error)


Found = tuple["float | None", "float | None"]


def _perplexity(found: Mapping[str, Any], value: str, pick: Mapping[str, Any]) -> Found:
    rows = found["texts"] if "texts" in found else found["data"]  # the latter of images
    row = next(row for row in rows.values() if "standard_error" in row)  # the others are n-gram models
    number, nats, error = row[value], row["nats_per_token"], row["standard_error"]
    if number is None or nats is None or error is None:
        return number, None
    if value == "perplexity_mean_of_exp":
        dominated = number > 2 * row["perplexity"]  # by a few blocks
        return number, None if dominated else row[f"{value}_error"]
    relative = error if value.startswith("perplexity") else error / nats
    return number, number * relative


def _generative(found: Mapping[str, Any], value: str, pick: Mapping[str, Any]) -> Found:
    rows = [*found["rows"], {**(found["real"] or {}), "sampler": "real text"}]
    row = _row(rows, pick)
    if f"{value}_error" in row:
        return row[value], row[f"{value}_error"]
    spread = row.get(f"{value}_std")
    return row[value], None if spread is None else spread / math.sqrt(row.get("num", found["settings"]["num"]))


def _latency(found: Mapping[str, Any], value: str, pick: Mapping[str, Any]) -> Found:
    row = _row(found["rows"], pick)
    spread = (row["slowest"] - row["fastest"]) / 2  # of a few repetitions
    return row[value], spread or None


def _harness(found: Mapping[str, Any], value: str, pick: Mapping[str, Any]) -> Found:
    row = found["results"][pick["task"]]
    return row[value], row.get(value.replace(",", "_stderr,"))


_READERS = {"perplexity": _perplexity, "generative": _generative, "latency": _latency, "harness": _harness}


def _row(rows: Sequence[Mapping[str, Any]], pick: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(row for row in rows if all(row.get(name) == wanted for name, wanted in pick.items()))


def mean_figure(figures: Sequence[Figure]) -> Figure:
    """The mean over seeds. Its error contains the spread of the seeds and the error of an evaluation.

    The runs are evaluated on the same data, whose choice more runs do not make better.
    """
    count = len(figures)
    mean = statistics.fmean(figure.value for figure in figures)
    if count == 1:
        return figures[0]
    if not math.isfinite(mean) or any(figure.error is None for figure in figures):
        return Figure(mean, None)
    of_seeds = statistics.variance(figure.value for figure in figures) / count
    of_evaluations = statistics.fmean((figure.error or 0.0) ** 2 for figure in figures)
    return Figure(mean, math.sqrt(of_seeds + of_evaluations))

"""Recipes: tables and figures of the papers as data, and how to measure their figures with this package.

A file ``NAME.yaml`` describes a table: its columns, and its rows with the figures of the paper. A file in ``settings``
says on which data and at which sizes the runs of several tables are trained, and how they are evaluated, at three
scales: ``full`` (the paper's), ``small`` (two cores in about an hour) and ``smoke`` (seconds).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from sedd.options import build, check_one_of, checked
from sedd.plain import merged, read_plain

__all__ = ["SCALES", "Column", "Recipe", "Row", "Setting", "load_recipe", "load_setting", "recipe_names"]

Scale = Literal["full", "small", "smoke"]
SCALES: tuple[Scale, ...] = ("full", "small", "smoke")
FOLDER = Path(__file__).parent
_BELOW: dict[Scale, tuple[Scale, ...]] = {"full": ("full",), "small": ("small",), "smoke": ("small", "smoke")}
"""The sections of a setting that make up a scale; later ones take precedence."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        evaluation: name of an evaluation of the setting; None if ``missing``.
        value: the value of its results, by the name in the file of ``sedd eval --json``.
        better: which figures are better.
        pick: which rows of the results, for example ``{"steps": 64}``.
        percent: whether the figures of the paper are 100 times the values.
        equal_within: figures of the paper that differ by no more than this have no order.
        missing: why this package cannot measure the column.
    """

    evaluation: str | None = None
    value: str = ""
    better: Literal["lower", "higher"] = "lower"
    pick: dict[str, int | str | None] = field(default_factory=dict)
    percent: bool = False
    equal_within: float = 0.0
    missing: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        run: name of a run of the setting, or one for each scale (``smoke`` may be left out: it is that of ``small``);
            None if ``elsewhere``.
        paper: the figures of the paper, one for each column; None where the text used here has none.
        evaluation: in place of those of the columns: one for all, or one for each.
        value: in place of that of the columns.
        pick: added to that of the columns.
        elsewhere: why this package has no such model.
    """

    run: dict[str, str] | str | None = None
    paper: list[float | None] = field(default_factory=list)
    evaluation: list[str] | str | None = None
    value: str | None = None
    pick: dict[str, int | str | None] = field(default_factory=dict)
    elsewhere: str | None = None

    def run_at(self, scale: Scale) -> str | None:
        """Name of the run at a scale."""
        if not isinstance(self.run, dict):
            return self.run
        return self.run.get(scale) or self.run["small"]


@dataclass(frozen=True)
class Recipe:
    """A table or a figure of a paper.

    Attributes:
        name: the name of its file.
        paper, place, title: where it is, and what it shows.
        setting: name of the setting.
        columns, rows: by name, in the order of the paper.
        order: for each column, chains of rows, best first, which the paper states without figures.
        note: what to know when comparing.
    """

    name: str
    paper: str
    place: str
    title: str
    setting: str
    columns: Mapping[str, Column]
    rows: Mapping[str, Row]
    order: Mapping[str, list[list[str]]]
    note: str

    def cell(self, row: str, column: str) -> tuple[str | None, str, dict[str, int | str | None]]:
        """The evaluation, the value, and which rows of the results a cell shows."""
        of, within = self.rows[row], self.columns[column]
        evaluation: str | None = within.evaluation
        if isinstance(of.evaluation, list):
            evaluation = of.evaluation[list(self.columns).index(column)]
        elif of.evaluation is not None:
            evaluation = of.evaluation
        return evaluation, of.value or within.value, {**within.pick, **of.pick}

    def paper_figure(self, row: str, column: str) -> float | None:
        """The figure of the paper, None if there is none."""
        figures = self.rows[row].paper
        return figures[list(self.columns).index(column)] if figures else None


@dataclass(frozen=True)
class Minutes:
    """How long a training and an evaluation are expected to take."""

    train: float = 0.0
    evaluate: float = 0.0


@dataclass(frozen=True)
class RunSpec:
    """A run of a setting: options of ``sedd train``, or the name of a model that is used as it is."""

    train: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    minutes: float | None = None
    out_of_reach: str | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """An evaluation of a setting: a command of ``sedd eval`` and its options."""

    command: str
    options: dict[str, Any] = field(default_factory=dict)
    minutes: float | None = None
    out_of_reach: str | None = None


@dataclass(frozen=True)
class Setting:
    """Runs and evaluations at one scale.

    Attributes:
        name, scale: which setting.
        about: the data.
        inputs: files that the user gives, by name, with a description; options contain them as ``{data.NAME}``, or
            ``{data.NAME.train}``, ``.valid`` and ``.test`` for parts of 90, 5 and 5 %. ``{run.NAME}`` is the folder of
            a run.
        runs, evaluations: by name.
        hardware: what the scale is made for.
        gpus: how many GPUs it needs.
        minutes: expected times, unless a run or an evaluation has its own.
        out_of_reach: why the scale cannot run.
    """

    name: str
    scale: Scale
    about: str
    inputs: Mapping[str, str]
    runs: Mapping[str, RunSpec]
    evaluations: Mapping[str, EvaluationSpec]
    hardware: str
    gpus: int
    minutes: Minutes
    out_of_reach: str | None


def recipe_names() -> list[str]:
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@cache
def load_recipe(name: str) -> Recipe:
    """Reads a recipe.

    Raises:
        ValueError: there is no such recipe, with the most similar name; or its file has a mistake.
    """
    check_one_of("recipe", name, recipe_names())
    path = FOLDER / f"{name}.yaml"
    with _naming(path):
        values = _only(read_plain(path), "", ("paper", "place", "title", "setting", "columns", "rows", "order", "note"))
        columns = {key: _build(Column, value, f"columns.{key}.") for key, value in values["columns"].items()}
        rows = {key: _build(Row, value, f"rows.{key}.") for key, value in values["rows"].items()}
        for key, row in rows.items():
            if (row.run is None) == (row.elsewhere is None):
                raise ValueError(f"rows.{key}: expected either run or elsewhere")
            for what, given in (("paper", row.paper), ("evaluation", row.evaluation)):
                if isinstance(given, list) and given and len(given) != len(columns):
                    raise ValueError(f"rows.{key}.{what}: expected {len(columns)} values, got {len(given)}")
        order = values.get("order", {})
        for key, chains in order.items():
            check_one_of("order", key, columns)
            for row_name in (row_name for chain in chains for row_name in chain):
                check_one_of(f"order.{key}", row_name, rows)
        places = {key: str(values[key]) for key in ("paper", "place", "title", "setting")}
        return Recipe(name, **places, columns=columns, rows=rows, order=order, note=values.get("note", ""))


@cache
def load_setting(name: str, scale: Scale) -> Setting:
    """Reads a setting at a scale, with the options that all settings share.

    Raises:
        FileNotFoundError: there is no such setting.
        ValueError: a file has a mistake.
    """
    sections: list[Mapping[str, Any]] = []
    for key in (None, *_BELOW[scale]):
        for file in ("common", name):
            path = FOLDER / "settings" / f"{file}.yaml"
            with _naming(path):
                values = _only(read_plain(path), "", ("about", "inputs", "train", "runs", "evaluations", "scales"))
                scales = _only(values.pop("scales"), "scales", SCALES)
                sections.append(values if key is None else _only(scales.get(key, {}), f"scales.{key}", _SECTION))
    found: dict[str, Any] = {}
    for section in sections:
        found = merged(found, section)
    path = FOLDER / "settings" / f"{name}.yaml"
    with _naming(path):
        runs = {}
        for key, value in found["runs"].items():
            _only(value, f"runs.{key}", _names(RunSpec))
            runs[key] = RunSpec(**{**value, "train": merged(found.get("train", {}), value.get("train", {}))})
        evaluations = {
            key: EvaluationSpec(**_only(value, f"evaluations.{key}", _names(EvaluationSpec)))
            for key, value in found["evaluations"].items()
        }
        minutes = _build(Minutes, found["minutes"], "minutes.")
    return Setting(
        name,
        scale,
        found["about"],
        found.get("inputs", {}),
        runs,
        evaluations,
        found["hardware"],
        found.get("gpus", 0),
        minutes,
        found.get("out_of_reach"),
    )


_SECTION = ("hardware", "gpus", "minutes", "train", "runs", "evaluations", "out_of_reach")


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _only(values: Any, place: str, known: Collection[str]) -> dict[str, Any]:
    """Checks the names of a dictionary."""
    for key in values:
        check_one_of(place or "names", key, known)
    return dict(values)


def _build(kind: type[Any], values: Any, prefix: str) -> Any:
    return build(kind, checked(kind, values, prefix), prefix)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the file to messages of mistakes in it."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: {error}") from error

"""What has to be trained and evaluated for a recipe, in which order, and with which options."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sedd.recipes import Recipe, Scale, Setting, load_setting

__all__ = ["Job", "Plan", "data_file", "make_plan"]

_PLACE = re.compile(r"\{(data|run)\.([\w.-]+?)(?:\.(train|valid|test))?\}")


class _OutOfReachError(Exception):
    """Why a cell has no figure."""


@dataclass(frozen=True)
class Job:
    """A training or an evaluation.

    Attributes:
        run: name of the run.
        evaluation: name of the evaluation; None for a training.
        command: ``train``, or the command of ``sedd eval``.
        folder: folder of the run.
        model: what is evaluated: the folder, or the name of a model.
        options: options of the command, nested.
        minutes: how long it is expected to take.
    """

    run: str
    evaluation: str | None
    command: str
    folder: Path
    model: str
    options: dict[str, Any]
    minutes: float

    @property
    def name(self) -> str:
        """The name in messages, unique in a plan."""
        return self.run if self.evaluation is None else f"{self.run}: {self.evaluation}"

    @property
    def results(self) -> Path:
        """The file with the results of an evaluation."""
        return self.folder / "eval" / f"{self.evaluation}.json"

    @property
    def record(self) -> Path:
        """The file that says that the job is finished, and how it was run."""
        return self.folder / "records" / f"{self.evaluation or 'train'}.json"


@dataclass
class Plan:
    """The jobs of a recipe at a scale.

    Attributes:
        recipe, setting: what is planned.
        out: folder of all results.
        files: the user's files by name.
        seeds: number of runs of each row.
        jobs: by name, each after those it needs.
        needs: for each job, the jobs it needs.
        cells: for each row and column, the evaluations with its figure, one for each seed, or why there is none.
        data: files of the inputs that the jobs use: name and part (None: the whole file).
    """

    recipe: Recipe
    setting: Setting
    out: Path
    files: Mapping[str, Path]
    seeds: int
    jobs: dict[str, Job]
    needs: dict[str, list[str]]
    cells: dict[tuple[str, str], list[Job] | str]
    data: set[tuple[str, str | None]]

    @property
    def minutes(self) -> float:
        """How long all jobs are expected to take."""
        return sum(job.minutes for job in self.jobs.values())


def data_file(folder: Path, name: str, part: str | None) -> Path:
    """The file of an input, or of a part of it, that is made in the folder of a scale."""
    return folder / "data" / (f"{name}.{part}.txt" if part else f"{name}.txt")


def make_plan(recipe: Recipe, scale: Scale, out: Path, data: Mapping[str, Path], seeds: int = 1) -> Plan:
    """Plans a recipe.

    Args:
        recipe: the table.
        scale: the scale.
        out: folder of all results. Runs are shared by recipes with the same setting.
        data: the user's files by name. At the scale ``smoke``, made-up texts take their place.
        seeds: number of runs of each row, which differ in the seed.

    Raises:
        ValueError: the recipe names a run or an evaluation that its setting does not have.
    """
    plan = Plan(recipe, load_setting(recipe.setting, scale), out, data, seeds, {}, {}, {}, set())
    planner = _Planner(plan, scale, out / scale)
    for row in recipe.rows:
        for column in recipe.columns:
            before = dict(plan.jobs), dict(plan.needs), set(plan.data)
            try:
                plan.cells[row, column] = [planner.cell(row, column, seed) for seed in range(seeds)]
            except _OutOfReachError as reason:
                plan.cells[row, column] = str(reason)
                plan.jobs, plan.needs, plan.data = before  # without those that only this cell needs
    return plan


@dataclass
class _Planner:
    plan: Plan
    scale: Scale
    folder: Path

    def cell(self, row: str, column: str, seed: int) -> Job:
        recipe, setting = self.plan.recipe, self.plan.setting
        run = recipe.rows[row].run_at(self.scale)
        evaluation, _, pick = recipe.cell(row, column)
        for reason in (recipe.rows[row].elsewhere, recipe.columns[column].missing, setting.out_of_reach):
            if reason:
                raise _OutOfReachError(reason)
        for kind, name, known in (("run", run, setting.runs), ("evaluation", evaluation, setting.evaluations)):
            if name not in known:
                raise ValueError(f"{recipe.name}: setting {setting.name} has no {kind} {name!r}")
        assert run is not None
        assert evaluation is not None
        spec = setting.evaluations[evaluation]
        for reason in (setting.runs[run].out_of_reach, spec.out_of_reach):
            if reason:
                raise _OutOfReachError(reason)
        steps = spec.options.get("steps")
        if isinstance(steps, list) and pick.get("steps") is not None and pick["steps"] not in steps:
            raise _OutOfReachError(f"samples of at most {max(steps)} steps are written at this scale")
        return self._evaluation(run, evaluation, seed)

    def _evaluation(self, run: str, evaluation: str, seed: int) -> Job:
        setting = self.plan.setting
        spec, model = setting.evaluations[evaluation], setting.runs[run].model
        needs: list[str] = []
        if model is None:
            needs.append(self._training(run, seed))
        label, folder = self._place(run, 0 if model is not None else seed)
        options = self._filled(spec.options, needs)
        minutes = setting.minutes.evaluate if spec.minutes is None else spec.minutes
        job = Job(label, evaluation, spec.command, folder, model or str(folder), options, minutes)
        return self._added(job, needs)

    def _training(self, run: str, seed: int) -> str:
        setting = self.plan.setting
        spec = setting.runs[run]
        if spec.out_of_reach:
            raise _OutOfReachError(spec.out_of_reach)
        label, folder = self._place(run, seed)
        options = self._filled(spec.train, [])
        if seed:
            options["seed"] = options.get("seed", 0) + seed
        minutes = setting.minutes.train if spec.minutes is None else spec.minutes
        options["run_dir"] = str(folder)
        return self._added(Job(label, None, "train", folder, str(folder), options, minutes), []).name

    def _place(self, run: str, seed: int) -> tuple[str, Path]:
        label = f"{run}-seed{seed}" if seed else run
        return f"{self.plan.setting.name}/{label}", self.folder / self.plan.setting.name / label

    def _added(self, job: Job, needs: list[str]) -> Job:
        self.plan.needs.setdefault(job.name, needs)
        return self.plan.jobs.setdefault(job.name, job)

    def _filled(self, options: Any, needs: list[str]) -> Any:
        """Options with files and folders in place of ``{data.NAME}`` and ``{run.NAME}``, whose trainings are needed."""

        def replace(found: re.Match[str]) -> str:
            kind, name, part = found.groups()
            if kind == "data":
                return str(self._data(name, part))
            needs.append(self._training(name, 0))
            return str(self._place(name, 0)[1])

        return _mapped(options, lambda text: _PLACE.sub(replace, text))

    def _data(self, name: str, part: str | None) -> Path:
        if name not in self.plan.setting.inputs:
            raise ValueError(f"{self.plan.recipe.name}: setting {self.plan.setting.name} has no input {name!r}")
        if self.scale != "smoke" and name not in self.plan.files:
            raise _OutOfReachError(f"needs --data {name}=FILE")
        self.plan.data.add((name, part))
        made = self.scale == "smoke" or part is not None
        return data_file(self.folder, name, part) if made else self.plan.files[name]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value with all strings in it changed."""
    if isinstance(value, dict):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if isinstance(value, list):
        return [_mapped(entry, change) for entry in value]
    return change(value) if isinstance(value, str) else value

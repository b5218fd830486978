"""The page of ``sedd reproduce``: figures beside those of a paper, as HTML and as Markdown."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import sedd_ext
from sedd.files import write_text
from sedd.hints import pip_install
from sedd.plain import read_json
from sedd.recipes import Scale, load_recipe, load_setting, recipe_names
from sedd.recipes.order import Figure, Order, compare, paper_pairs
from sedd.recipes.plan import Job, Plan, make_plan
from sedd.recipes.results import find_figure, mean_figure

__all__ = ["Comparison", "order_table", "provenance", "write_comparison"]

NOT_FINISHED = "not finished"
"""The reason of a cell that will have a figure."""
HOW = "Paths are relative to the folder that --out names."
"""What to know about the commands."""


def provenance(seed: int | None) -> dict[str, Any]:
    """Where and with what a figure was computed: seed, commit, versions, hardware."""
    return {"seed": seed, "commit": _commit(), "versions": _versions(), "hardware": _hardware()}


def _commit() -> str | None:
    """The commit of the package, marked if files have changed since; None outside a git repository."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *words], check=True, capture_output=True, text=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # else it is an installed copy inside another repository
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "sedd_ext": sedd_ext.__version__, "torch": torch.__version__}
    for name in ("datasets", "transformers", "lm-eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.is_file() else []:
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return f"{model}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


class Comparison:
    """The finished figures of a plan, beside those of the paper.

    Args:
        plan: the plan.
        failed: why jobs failed, by name.
    """

    def __init__(self, plan: Plan, failed: Mapping[str, str]) -> None:
        self.plan, self.failed = plan, failed
        self.figures: dict[tuple[str, str], Figure] = {}
        self.reasons: dict[tuple[str, str], str] = {}  # of cells without a figure
        for cell, jobs in plan.cells.items():
            if isinstance(jobs, str):
                self.reasons[cell] = jobs
            elif lacking := [job for job in jobs if not (job.record.is_file() and job.results.is_file())]:
                self.reasons[cell] = self._why(lacking[0])
            else:
                try:
                    self.figures[cell] = mean_figure([self._figure(cell, job) for job in jobs])
                except ValueError as error:  # an older version wrote other results
                    self.reasons[cell] = str(error)

    def _why(self, job: Job) -> str:
        return f"failed: {self.failed[job.name]}" if job.name in self.failed else NOT_FINISHED

    def _figure(self, cell: tuple[str, str], job: Job) -> Figure:
        _, value, pick = self.plan.recipe.cell(*cell)
        scale = 100.0 if self.plan.recipe.columns[cell[1]].percent else 1.0
        return find_figure(job.command, read_json(job.results), value, pick, scale)

    def order(self, column: str) -> tuple[Order, int]:
        """How the pairs of the paper came out, and how many pairs it has."""
        recipe, of = self.plan.recipe, self.plan.recipe.columns[column]
        paper = {row: figure for row in recipe.rows if (figure := recipe.paper_figure(row, column)) is not None}
        pairs = paper_pairs(paper, recipe.order.get(column, []), of.better, of.equal_within)
        ours = {row: self.figures[row, column] for row in recipe.rows if (row, column) in self.figures}
        return compare(pairs, ours, of.better), len(pairs)

    def sentences(self, column: str) -> list[str]:
        """Whether the order of a column is the paper's, in words."""
        order, total = self.order(column)
        measured = len(order.same) + len(order.unclear) + len(order.reversed)
        if not measured:
            return [f"No pair of rows whose order the paper gives is measured (of {total})."]
        lines = [
            f"{measured} of {total} pairs of rows are measured: {len(order.same)} in the paper's order, "
            f"{len(order.unclear)} not separated by our errors, {len(order.reversed)} reversed."
        ]
        for what, pairs in (("Not separated", order.unclear), ("Reversed; in the paper", order.reversed)):
            if pairs:
                lines.append(f"{what}: {'; '.join(f'{first} before {second}' for first, second in pairs)}.")
        return lines

    def rows(self) -> list[list[str]]:
        """The table: name, figures of each column (ours, and the paper's if it has any), and the order of the pairs."""
        recipe = self.plan.recipe
        orders = [self.order(column)[0] for column in recipe.columns]
        lines = []
        for row in recipe.rows:
            cells = [
                show(row, column)
                for column in recipe.columns
                for show in ((self._ours, self._paper) if self._has_paper(column) else (self._ours,))
            ]
            lines.append([row, *cells, _pairs_of(row, orders)])
        return lines

    def _ours(self, row: str, column: str) -> str:
        if (row, column) in self.figures:
            return shown(self.figures[row, column])
        reason = self.reasons[row, column]
        return reason if reason == NOT_FINISHED else f"({self.notes().index(reason) + 1})"

    def _paper(self, row: str, column: str) -> str:
        figure = self.plan.recipe.paper_figure(row, column)
        return "" if figure is None else f"{figure:g}"

    def _has_paper(self, column: str) -> bool:
        """Whether the paper gives a figure of the column."""
        return any(self.plan.recipe.paper_figure(row, column) is not None for row in self.plan.recipe.rows)

    def notes(self) -> list[str]:
        """Why cells have no figure; the cells have the numbers of these reasons."""
        return list(dict.fromkeys(reason for reason in self.reasons.values() if reason != NOT_FINISHED))

    def headings(self) -> list[str]:
        """The headings of :meth:`rows`."""
        names = []
        for column in self.plan.recipe.columns:
            names += [f"{column}, here", *([f"{column}, paper"] if self._has_paper(column) else [])]
        return ["", *names, "order"]

    def facts(self) -> dict[str, str]:
        """What the table is about."""
        recipe, setting = self.plan.recipe, self.plan.setting
        done = sum(job.record.is_file() for job in self.plan.jobs.values())
        facts = {"scale": f"{setting.scale} ({setting.hardware})", "jobs": f"{done} of {len(self.plan.jobs)} finished"}
        better = {of.better for of in recipe.columns.values() if of.missing is None}
        facts["better"] = " or ".join(sorted(better)) or "-"
        facts["data"] = setting.about
        return facts

    def records(self) -> list[dict[str, str]]:
        """How each finished figure was computed."""
        found = []
        for job in self.plan.jobs.values():
            if job.record.is_file():
                record = read_json(job.record)
                versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
                found.append(
                    {
                        "job": job.name,
                        "command": self.shared(record["command"]),
                        "started": record["started"],
                        "seconds": f"{record['seconds']:,.0f}",
                        "seed": "-" if record["seed"] is None else str(record["seed"]),
                        "commit": record["commit"] or "-",
                        "versions": versions,
                        "hardware": record["hardware"],
                    }
                )
        return found

    def shared(self, command: str) -> str:
        """A command without the folders of this machine: paths are relative to the folder of all results."""
        command = re.sub(r"^.*?sedd (?=train |eval )", "sedd ", command)
        for path in self.plan.files.values():
            command = command.replace(shlex.quote(str(path)), shlex.quote(path.name))
        return command.replace(f"{self.plan.out}/", "")

    def markdown(self) -> str:
        """The comparison as Markdown."""
        recipe = self.plan.recipe
        lines = [f"# {recipe.title}", "", f"{recipe.paper}, {recipe.place}.", ""]
        lines += [f"* {name}: {value}" for name, value in self.facts().items()]
        lines += ["", *_markdown_table([self.headings(), *self.rows()])]
        for number, reason in enumerate(self.notes(), 1):
            lines += ["", f"({number}) {reason}."]
        for column in recipe.columns:
            lines += ["", f"**{column}.** {' '.join(self.sentences(column))}"]
        if recipe.note:
            lines += ["", recipe.note]
        if records := self.records():
            lines += [
                "",
                "## How",
                "",
                HOW,
                "",
                *_markdown_table([list(records[0]), *(list(r.values()) for r in records)]),
            ]
        return "\n".join(lines) + "\n"


def shown(figure: Figure) -> str:
    """A figure with its error, to two digits of the error."""
    if figure.error is None or not figure.error or figure.value in (float("inf"), float("-inf")):
        return f"{figure.value:.5g}"
    digits = max(0, 1 - int(f"{figure.error:e}".partition("e")[2]))
    return f"{figure.value:.{digits}f} ± {figure.error:.{digits}f}"


def _pairs_of(row: str, orders: Sequence[Order]) -> str:
    """How many measured pairs with a row have the paper's order, in words; empty if there are none."""
    counts = []
    for word in ("same", "unclear", "reversed"):
        counts.append(sum(row in pair for order in orders for pair in getattr(order, word)))
    same, unclear, backwards = counts
    if not sum(counts):
        return ""
    others = [f"{count} {word}" for count, word in ((unclear, "not separated"), (backwards, "reversed")) if count]
    return ", ".join([f"{same} of {sum(counts)} pairs as in the paper", *others])


def _markdown_table(rows: list[list[str]]) -> list[str]:
    first, *others = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [first, "| --- " * len(rows[0]) + "|", *others]


def order_table(scale: Scale, out: Path, seeds: int) -> str:
    """How the order of all recipes with a finished figure came out, as Markdown.

    Args:
        scale: the scale of the runs.
        out: folder of all results.
        seeds: number of runs of each row; fewer are taken of a table that has more figures with fewer.
    """
    headings = ("page", "paper", "column", "pairs", "the paper's order", "not separated", "reversed", "not measured")
    rows = []
    for name in recipe_names():
        recipe = load_recipe(name)
        inputs = load_setting(recipe.setting, scale).inputs
        files = dict.fromkeys(inputs, Path("FILE"))
        comparisons = [Comparison(make_plan(recipe, scale, out, files, n), {}) for n in range(seeds, 0, -1)]
        comparison = max(comparisons, key=lambda found: len(found.figures))  # the first one of several
        if not comparison.figures:
            continue
        for column in recipe.columns:
            order, total = comparison.order(column)
            counts = [len(pairs) for pairs in (order.same, order.unclear, order.reversed)]
            page = f"[{recipe.title}]({name}-{scale}.md)"
            cells = (page, f"{recipe.paper}, {recipe.place}", column, total, *counts, total - sum(counts))
            rows.append([str(cell) for cell in cells])
    lines = [
        f"# Reproduced at scale {scale}",
        "",
        "Pairs of rows whose order the paper gives. A pair is separated if the two figures differ by more than two",
        "standard errors of their difference.",
        "",
        *_markdown_table([list(headings), *rows]),
    ]
    return "\n".join(lines) + "\n"


def write_comparison(plan: Plan, failed: Mapping[str, str]) -> tuple[Path, Path]:
    """Writes ``OUT/NAME-SCALE.html`` and ``.md``, and ``OUT/order-SCALE.md``; returns the first two.

    Raises:
        ImportError: jinja2 is not installed.
        OSError: a file cannot be written; an existing one is not changed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(f"the page needs {error.name}: {pip_install('eval', str(error.name))}") from error
    comparison = Comparison(plan, failed)
    markdown, page = (plan.out / f"{plan.recipe.name}-{plan.setting.scale}.{suffix}" for suffix in ("md", "html"))
    write_text(markdown, comparison.markdown())
    write_text(plan.out / f"order-{plan.setting.scale}.md", order_table(plan.setting.scale, plan.out, plan.seeds))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    folder = files("sedd.commands")
    template = environment.from_string(folder.joinpath("comparison.html").read_text(encoding="utf-8"))
    style = folder.joinpath("page.css").read_text(encoding="utf-8")
    write_text(page, template.render(comparison=comparison, how=HOW, recipe=plan.recipe, style=_safe(style)))
    return page, markdown


def _safe(text: str) -> Any:
    """Marks trusted text, which is inserted into the page without escaping."""
    import markupsafe

    return markupsafe.Markup(text)

"""Draws docs/pictures and refreshes the tables in docs/performance.md from pytest-benchmark's JSON.

pytest benchmarks/ --benchmark-only --benchmark-json=benchmarks/results/latest.json
python benchmarks/report.py benchmarks/results/latest.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from cases import (
    AUTOGRAD,
    BACKWARD,
    BEYOND_ROWS,
    BOTH,
    CACHED_ROWS,
    COLUMN,
    EULER,
    FORWARD,
    HEAD_BENCH_ROWS,
    HEADS,
    LARGE,
    LINEAR_ELEMENTS,
    LINEAR_N,
    LINEAR_ROWS,
    MODEL_BATCH,
    MODEL_LENGTH,
    MODELS,
    PEERS,
    ROW,
    SAMPLE,
    SMALL_ROWS,
    TWEEDIE,
    fused_loss,
    fused_sample,
    sampling,
    training,
)
from matplotlib.axes import Axes

DOCS = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin, written by benchmarks/report.py -->", "<!-- results: end -->"

OPERATIONS = {
    FORWARD: "one read of the log-scores",
    BACKWARD: "a copy into an existing buffer",
    AUTOGRAD: "a clone",
    BOTH: "a read and a clone",
    TWEEDIE: "one read of the log-scores",
    EULER: "one read of the log-scores",
    COLUMN: "one write to new memory",
    ROW: "one write to new memory",
    SAMPLE: "a clone of the tokens",
}
COLOURS = {"kernel": "#c8452f", "compiled": "#5b7fa6", "dense": "#8fa9c4", "released": "#c2cdd9"}


@dataclass(frozen=True)
class Result:
    """One benchmark: its median and what it was timed beside."""

    seconds: float
    info: dict[str, Any]

    def times(self, rival: str) -> float | None:
        value: float | None = self.info["times_rival"].get(rival)
        return value


class Results:
    """The benchmarks of a run by operation, process, N, rows, dtype and contestant."""

    def __init__(self, run: dict[str, Any]) -> None:
        infos = [(b["stats"]["median"], b["extra_info"]) for b in run["benchmarks"]]
        self.memory = [info for _, info in infos if "memory" in info]
        self.all = [Result(seconds, info) for seconds, info in infos if "operation" in info]
        self._races = {self._key(r.info): r for r in self.all if not r.info["linearity"]}

    @staticmethod
    def _key(info: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(info[name] for name in ("operation", "process", "n", "rows", "dtype", "contestant"))

    def get(
        self,
        operation: str,
        contestant: str,
        rows: int,
        n: int = LARGE,
        process: str = "absorbing",
        dtype: str = "float32",
    ) -> Result | None:
        return self._races.get((operation, process, n, rows, dtype, contestant))

    def shapes(self, operation: str) -> list[tuple[int, int, str, str]]:
        """(N, rows, process, dtype) of an operation's races, in the order they ran."""
        found = [r.info for r in self._races.values() if r.info["operation"] == operation]
        return list(dict.fromkeys((i["n"], i["rows"], i["process"], i["dtype"]) for i in found))

    def linearity(self, operation: str) -> list[Result]:
        return [r for r in self.all if r.info["linearity"] and r.info["operation"] == operation]


# ---------------------------------------------------------------------------------------------------------- the targets


@dataclass(frozen=True)
class Row:
    """A line of a table of targets. The first figure that was measured is judged: the one beyond the cache if any."""

    what: str
    against: str
    bound: float
    measured: tuple[float | None, ...]
    at_least: bool = False  # a speed-up, else a ratio that must not be larger

    @property
    def result(self) -> str:
        value = next((value for value in self.measured if value is not None), None)
        if value is None:
            return "not measured"
        return "met" if (value >= self.bound if self.at_least else value <= self.bound) else "**missed**"

    def markdown(self) -> str:
        target = f"≥ {self.bound:g}× faster" if self.at_least else f"≤ {self.bound:g}×"
        measured = ["—" if value is None else f"{value:.3g}×" for value in self.measured]
        return "| " + " | ".join([self.what, self.against, target, *measured, self.result]) + " |"


def target_rows(results: Results) -> list[Row]:
    """The operators' lines of the target table, measured beyond the cache (4,096 rows) and at 512 rows."""

    def kernel(operation: str, rival: str, **shape: Any) -> tuple[float | None, float | None]:
        found = [results.get(operation, "kernel", rows, **shape) for rows in (BEYOND_ROWS, CACHED_ROWS)]
        beyond, cached = (None if r is None else r.times(rival) for r in found)
        return beyond, cached

    def peer(operation: str, contestant: str, process: str = "absorbing") -> tuple[None, float | None]:
        found = results.get(operation, contestant, CACHED_ROWS, process=process)
        return None, None if found is None else found.times("kernel")

    rows = [
        Row(FORWARD, "the read limit", 1.3, kernel(FORWARD, "limit")),
        Row(BACKWARD, "the copy limit", 1.15, kernel(BACKWARD, "limit")),
        Row(AUTOGRAD, "`x.clone()`", 1.15, kernel(AUTOGRAD, "limit")),
        Row(BOTH, "released formulation", 18, peer(BOTH, "released"), at_least=True),
        Row(BOTH, "dense, torch.compile", 4, peer(BOTH, "compiled"), at_least=True),
    ]
    for step in (TWEEDIE, EULER):
        rows.append(Row(step, "released formulation", 100, peer(step, "released"), at_least=True))
    for step in (TWEEDIE, EULER):
        rows.append(Row(step, "the read limit", 1.5, kernel(step, "limit")))
    for operation in (FORWARD, BACKWARD, AUTOGRAD, TWEEDIE, EULER):
        rows.append(Row(f"uniform: {operation}", "absorbing", 1.3, kernel(operation, "absorbing", process="uniform")))
    for operation in (FORWARD, BACKWARD, AUTOGRAD, TWEEDIE, EULER):
        rows.append(Row(f"bfloat16: {operation}", "float32", 1.0, kernel(operation, "float32", dtype="bfloat16")))
    return rows


def program_rows(results: Results) -> list[Row]:
    """The fused head, whole training steps and whole samples."""

    def row(operation: str, contestant: str, rival: str, bound: float, rows: int, dtype: str) -> Row:
        found = results.get(operation, contestant, rows, dtype=dtype)
        names = {"limit": "its matrix products alone", "released": "released formulation"}
        against = names[rival if contestant == "kernel" else contestant]
        measured = None if found is None else found.times(rival)
        return Row(f"{operation}, {dtype}", against, bound, (measured,), at_least=rival == "kernel")

    rows = []
    for d in HEADS:
        for dtype, faster in (("float32", 4.0), ("bfloat16", 5.0)):
            rows.append(row(fused_loss(d), "released", "kernel", faster, HEAD_BENCH_ROWS, dtype))
            rows.append(row(fused_loss(d), "kernel", "limit", 1.25, HEAD_BENCH_ROWS, dtype))
    tokens = MODEL_BATCH * MODEL_LENGTH
    for dtype in ("float32", "bfloat16"):
        rows.append(row(training("d = 256"), "released", "kernel", 5.0, tokens, dtype))
        rows.append(row(sampling("d = 256"), "released", "kernel", 12.0, tokens, dtype))
    return rows


def program_tables(results: Results) -> list[str]:
    """How the fused head and whole programs compare with every peer, and what memory they take."""
    tokens = MODEL_BATCH * MODEL_LENGTH
    text = [
        "",
        "### Fused head and whole programs",
        "",
        f"N = {LARGE:,}. The head: {HEAD_BENCH_ROWS} masked rows. Programs: {MODEL_BATCH} sequences of {MODEL_LENGTH} "
        "tokens; a training step with AdamW; a sample of four Tweedie steps and the denoising one.",
        "",
        "| what | against | target | measured | result |",
        "| --- | --- | --- | --- | --- |",
        *(r.markdown() for r in program_rows(results)),
        "",
        "A peer's time over that of the fused operator (the products' limit: the fused operator's over the limit's):",
        "",
        "| what | process | dtype | fused | products | unfused | dense | torch.compile | released | cross-entropy |",
        "| --- | --- | --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for operation in (*(f(d) for f in (fused_loss, fused_sample) for d in HEADS),):
        text += _peer_rows(results, operation, ("unfused", "dense", "compiled", "released", "cross_entropy"))
    text += [
        "",
        "| program | dtype | tokens/s | unfused | released | released, torch.compile |",
        "| --- | --- | --: | --: | --: | --: |",
    ]
    for operation in (f(model) for f in (training, sampling) for model in MODELS):
        for _, rows, process, dtype in results.shapes(operation):
            found = {
                who: results.get(operation, who, rows, process=process, dtype=dtype)
                for who in ("kernel", "unfused", "released", "released, compiled")
            }
            kernel = found.pop("kernel")
            if kernel is None:
                continue
            times = ["" if r is None else f"{r.times('kernel'):.3g}×" for r in found.values()]
            text.append("| " + " | ".join([operation, dtype, f"{rows / kernel.seconds:,.0f}", *times]) + " |")
    text += [
        "",
        "Peak memory of loss and gradients at d = 768, beside hidden states, weight and bias and their gradients: by "
        f"what the process grew, and what torch had allocated, in MB. Last, a float32 tensor of rows × {LARGE:,}.",
        "",
        "| rows | fused, resident | torch | unfused, resident | torch | one tensor of rows × N |",
        "| --: | --: | --: | --: | --: | --: |",
    ]
    memory = {(info["memory"], info["rows"], info["contestant"]): info for info in results.memory}
    for rows in sorted({rows for operation, rows, _ in memory if operation == fused_loss(768)}):
        given = 2 * 4 * (rows * 768 + LARGE * 769)
        found = [memory[fused_loss(768), rows, who] for who in ("kernel", "unfused")]
        cells = [f"{(info[count] - given) / 1e6:,.0f}" for info in found for count in ("resident", "allocated")]
        text.append(f"| {rows:,} | {' | '.join(cells)} | {4 * rows * LARGE / 1e6:,.0f} |")
    text += [
        "",
        "Peak memory of whole programs, float32, in MB, with weights, gradients and AdamW's moments: resident, and "
        "torch's own count.",
        "",
        "| program | fused, resident | torch | unfused, resident | torch | released, resident | torch |",
        "| --- | --: | --: | --: | --: | --: | --: |",
    ]
    for operation in (f(model) for f in (training, sampling) for model in MODELS):
        found = [memory.get((operation, tokens, who)) for who in ("kernel", "unfused", "released")]
        cells = [
            "" if info is None else f"{info[count] / 1e6:,.0f}" for info in found for count in ("resident", "allocated")
        ]
        text.append(f"| {operation} | {' | '.join(cells)} |")
    return text


def _peer_rows(results: Results, operation: str, peers: Iterable[str]) -> Iterable[str]:
    for n, rows, process, dtype in results.shapes(operation):
        kernel = results.get(operation, "kernel", rows, n, process, dtype)
        if kernel is None:
            continue
        limit = kernel.times("limit")
        cells = [operation, process, dtype, _time(kernel.seconds), "" if limit is None else f"{limit:.3g}×"]
        for contestant in peers:
            peer = results.get(operation, contestant, rows, n, process, dtype)
            cells.append("" if peer is None else f"{peer.times('kernel'):.3g}×")
        yield "| " + " | ".join(cells) + " |"


def scaling_rows(results: Results) -> list[Row]:
    """Cost linear in N and rows, and small shapes not slower than plain PyTorch."""
    rows = []
    for operation in (FORWARD, BACKWARD, TWEEDIE):
        along_n, along_rows = _growth(results.linearity(operation))
        rows.append(Row(f"{operation}, time per element at N = {2**18:,}", "at N = 2,048", 1.25, (along_n,)))
        rows.append(Row(f"{operation}, time per element at 65,536 rows", "at 4,096 rows", 1.25, (along_rows,)))
    for operation in OPERATIONS:
        worst = _worst_small(results, operation)
        if worst is not None:
            rows.append(Row(f"{operation}, {worst[1]}", "plain PyTorch, eager", 1.0, (worst[0],), at_least=True))
    return rows


def _growth(sweep: list[Result]) -> tuple[float | None, float | None]:
    """Time per element on all threads, the largest shape over a smaller one: along N, and along the rows."""
    per_element = {
        (r.info["n"], r.info["rows"]): r.seconds / r.info["rows"] / r.info["n"]
        for r in sweep
        if not r.info["one_thread"]
    }

    def ratio(last: tuple[int, int], first: tuple[int, int]) -> float | None:
        return per_element[last] / per_element[first] if last in per_element and first in per_element else None

    along_n = ratio((2**18, LINEAR_ELEMENTS // 2**18), (2048, LINEAR_ELEMENTS // 2048))
    return along_n, ratio((LINEAR_N, LINEAR_ROWS[-1]), (LINEAR_N, LINEAR_ROWS[-2]))


def _worst_small(results: Results, operation: str) -> tuple[float, str] | None:
    """Where plain PyTorch, eager, comes nearest to the kernel or passes it: N = 27, or few rows."""
    found: list[tuple[float, str]] = []
    for n, rows, process, dtype in results.shapes(operation):
        if n == LARGE and rows >= CACHED_ROWS and operation != SAMPLE:
            continue
        for contestant in ("dense", "released"):
            peer = results.get(operation, contestant, rows, n, process, dtype)
            if peer is not None and (times := peer.times("kernel")) is not None:
                found.append((times, f"{rows:,} x {n:,}, {process}"))
    return min(found, default=None)


# ----------------------------------------------------------------------------------------------------------- the tables


def tables(run: dict[str, Any], results: Results) -> str:
    machine, info = run["machine_info"], results.all[0].info
    text = [
        f"Measured on {run['datetime'][:10]}: {info['cpu']}, {machine['threads']} threads, {machine['isa']} kernels, "
        f"torch {machine['torch']}, sedd_ext {machine['sedd_ext']}, {machine['system']} {machine['release']}.",
        "",
        "### Targets",
        "",
        f"Absorbing with every row masked, float32, N = {LARGE:,}, unless the line says otherwise. A limit's ratio is "
        "judged beyond the cache.",
        "",
        "| what | against | target | 4,096 rows (823 MB) | 512 rows (103 MB) | result |",
        "| --- | --- | --- | --- | --- | --- |",
        *(row.markdown() for row in target_rows(results)),
        "",
        "Linear cost, and small shapes (N = 27 or few rows; each operation's worst):",
        "",
        "| what | against | target | measured | result |",
        "| --- | --- | --- | --- | --- |",
        *(row.markdown() for row in scaling_rows(results)),
        *program_tables(results),
        "",
        "![Times faster than the released formulation](pictures/programs.png)",
        "",
        "![Time per element along N and along the rows](pictures/linearity.png)",
        "",
        "![Every operator beside its peers and its limit](pictures/operators.png)",
        "",
        "### Every shape",
        "",
        "Median times. GB/s counts the least that the operation can read and write; the share is the limit's time over "
        "the kernel's. A peer's factor is its time over the kernel's.",
    ]
    for operation, limit in OPERATIONS.items():
        shapes = results.shapes(operation)
        if shapes:
            text += ["", f"**{operation[0].upper() + operation[1:]}** (limit: {limit})", ""]
            text += [
                "| process | N | rows | dtype | kernel | GB/s | limit | share | dense | torch.compile | released |",
                "| --- | --: | --: | --- | --: | --: | --: | --: | --: | --: | --: |",
                *_shape_rows(results, operation, shapes),
            ]
    return "\n".join(text)


def _shape_rows(results: Results, operation: str, shapes: Iterable[tuple[int, int, str, str]]) -> Iterable[str]:
    for n, rows, process, dtype in shapes:
        kernel = results.get(operation, "kernel", rows, n, process, dtype)
        if kernel is None:
            continue
        limit = kernel.info["rival_seconds"].get("limit")
        cells = [process, f"{n:,}", f"{rows:,}", dtype, _time(kernel.seconds), f"{kernel.info['gb_per_s']:.3g}"]
        cells += ["", ""] if limit is None else [_time(limit), f"{limit / kernel.seconds:.0%}"]
        for contestant in PEERS:
            peer = results.get(operation, contestant, rows, n, process, dtype)
            cells.append("" if peer is None else f"{_time(peer.seconds)} ({peer.times('kernel'):.3g}×)")
        yield "| " + " | ".join(cells) + " |"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


# --------------------------------------------------------------------------------------------------------- the pictures


def draw_bars(results: Results, machine: str, path: Path) -> None:
    """One panel an operation at N = 50,258: kernel and peers as bars for both processes, the limit as a line."""
    figure, axes = plt.subplots(3, 3, figsize=(15, 12), constrained_layout=True)
    for axis, operation in zip(axes.flat, OPERATIONS, strict=True):
        rows = SMALL_ROWS if operation == SAMPLE else CACHED_ROWS
        _bars(axis, results, operation, rows)
        axis.set_title(f"{operation}\n{rows:,} rows", fontsize=10)
    figure.suptitle(f"N = {LARGE:,}, float32, time in ms (log scale); dashed: the limit. {machine}", fontsize=11)
    _save(figure, path)


def _bars(axis: Axes, results: Results, operation: str, rows: int) -> None:
    labels: list[str] = []
    for process in ("absorbing", "uniform"):
        first = len(labels)
        for contestant in ("kernel", "compiled", "dense", "released"):
            result = results.get(operation, contestant, rows, process=process)
            if result is not None:
                bar = axis.bar(len(labels), result.seconds * 1e3, color=COLOURS[contestant])
                axis.bar_label(bar, fmt="%.3g", fontsize=8)
                labels.append(f"{contestant}\n{process}")
        kernel = results.get(operation, "kernel", rows, process=process)
        limit = None if kernel is None else kernel.info["rival_seconds"].get("limit")
        if limit is not None:
            axis.hlines(limit * 1e3, first - 0.5, len(labels) - 0.5, colors="black", linestyles="dashed")
    axis.set_xticks(range(len(labels)), labels, fontsize=7, rotation=45)
    axis.spines[["top", "right"]].set_visible(False)
    if labels:
        axis.set_yscale("log")
        axis.margins(y=0.3)


def draw_linearity(results: Results, path: Path) -> None:
    """Time per element along N and along the rows, on one thread and on all: level where the cost is linear."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True, sharey=True)
    for colour, operation in zip(("C0", "C1", "C2"), (FORWARD, BACKWARD, TWEEDIE), strict=True):
        for one_thread, line in ((False, "-"), (True, "--")):
            sweep = [r for r in results.linearity(operation) if r.info["one_thread"] == one_thread]
            ns = {(r.info["n"], r.info["rows"]): r.seconds / r.info["rows"] / r.info["n"] * 1e9 for r in sweep}
            along_n = sorted((n, y) for (n, rows), y in ns.items() if rows == LINEAR_ELEMENTS // n)
            along_rows = sorted((rows, y) for (n, rows), y in ns.items() if n == LINEAR_N)
            threads = sweep[0].info["threads"] if sweep else 0
            label = f"{operation}, {threads} thread{'s' * (threads > 1)}"
            for axis, points in zip(axes, (along_n, along_rows), strict=True):
                axis.plot(*zip(*points, strict=True), line, color=colour, marker="o", label=label)
    for axis, title in zip(axes, ("N, at 2²⁴ elements", f"rows, at N = {LINEAR_N:,}"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=title)
        axis.grid(alpha=0.3, which="both")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("ns per element")
    axes[1].legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_programs(results: Results, path: Path) -> None:
    """Speed-up over the released formulation: head, training step and sample, float32 and bfloat16."""
    figure, axis = plt.subplots(figsize=(11, 4.5), constrained_layout=True)
    operations = [f(d) for f in (fused_loss, fused_sample) for d in HEADS]
    operations += [f(model) for f in (training, sampling) for model in MODELS]
    labels: list[str] = []
    for operation in operations:
        for n, rows, process, dtype in results.shapes(operation):
            released = results.get(operation, "released", rows, n, process, dtype)
            times = None if released is None else released.times("kernel")
            if times is not None:
                bar = axis.barh(len(labels), times, color=COLOURS["kernel" if dtype == "float32" else "compiled"])
                axis.bar_label(bar, fmt="%.3g×", fontsize=8)
                labels.append(f"{operation}, {dtype}")
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.axvline(1.0, color="black", linestyle="dashed")
    axis.set_xlabel("times faster than the released formulation")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    plt.close(figure)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="what pytest --benchmark-json wrote")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the page to refresh, pictures beside it (%(default)s)")
    arguments = parser.parse_args()
    try:
        run = json.loads(arguments.json.read_text(encoding="utf-8"))
        page = arguments.docs.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise SystemExit(f"report.py: {error}") from error
    results = Results(run)
    if not results.all or any(r.info["smoke"] for r in results.all):
        raise SystemExit(
            f"report.py: {arguments.json} has no benchmarks, or holds a smoke run, whose times mean nothing"
        )
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise SystemExit(
            f"report.py: {arguments.docs} needs the lines '{BEGIN}' and '{END}' around its tables, once each"
        )
    info = results.all[0].info
    pictures = arguments.docs.parent / "pictures"
    pictures.mkdir(exist_ok=True)
    draw_bars(results, f"{info['cpu']}, {info['threads']} threads, {info['isa']}", pictures / "operators.png")
    draw_linearity(results, pictures / "linearity.png")
    draw_programs(results, pictures / "programs.png")
    head, tail = page[: page.index(BEGIN) + len(BEGIN)], page[page.index(END) :]
    temporary = arguments.docs.with_name(f".{arguments.docs.name}")
    temporary.write_text(f"{head}\n\n{tables(run, results)}\n\n{tail}", encoding="utf-8")
    os.replace(temporary, arguments.docs)
    missed = sum("missed" in row.result for row in target_rows(results) + scaling_rows(results) + program_rows(results))
    print(f"{arguments.docs} and {pictures}/*.png written; targets missed: {missed}")


if __name__ == "__main__":
    main()

"""The tables of gpu_check.py's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Record = dict[str, Any]


def tables(report: Record) -> str:
    """All that there is something in."""
    made = [
        _timings(report["timings"]),
        _models(report["models"]),
        _buffers(report["buffers"]),
        _counters(report["counters"]),
    ]
    return "\n\n".join(table for table in made if table)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    widths = [max(len(cell) for cell in column) for column in zip(head, *rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows))


def _timings(timings: list[Record]) -> str:
    """A line per operation and shape, with the ratios to all rivals that it was timed in turns with."""
    lines: dict[tuple[Any, ...], Record] = {}
    for record in timings:
        key = tuple(record[name] for name in ("operation", "process", "dtype", "rows", "n"))
        lines.setdefault(key, {**record, "ratios": {}})["ratios"] |= record.get("times_kernel", {})
    head = ("operation", "process", "dtype", "rows x N", "time", "GB/s", "limit", "share", "x eager", "x compile")
    rows = []
    for (operation, process, dtype, count, n), line in lines.items():
        ratios, rates = line["ratios"], line.get("gb_per_s", {})
        spent = duration(line["seconds"]["kernel"][0]) if "seconds" in line else "failed"
        speed = [f"{rates[who]:.3g}" if who in rates else "-" for who in ("kernel", "limit")]
        share = f"{ratios['limit']:.0%}" if "limit" in ratios else "-"
        factors = [
            f"{ratios[rival]:.3g}" if rival in ratios else "-" for rival in ("eager", "compile", "unfused", "triton")
        ]
        rows.append((operation, process, dtype, f"{count:,} x {n:,}", spent, *speed, share, *factors))
    return _table((*head, "x unfused", "x triton"), rows)


def _models(records: list[Record]) -> str:
    """A line per program, dtype and contestant; its time over the kernel's."""
    timed = [record for record in records if "seconds" in record]
    kernel = {(r["program"], r["dtype"]): r["seconds"][0] for r in timed if r["contestant"] == "kernel"}
    rows = []
    for record in records:
        line = [record["program"], record["model"], record["dtype"], record["contestant"]]
        if "failed" in record:
            rows.append([*line, "-", "failed", "-", "-", "-"])
            continue
        own = record["seconds"][0]
        base = kernel.get((record["program"], record["dtype"]))
        rows.append(
            [
                *line,
                f"{record['sequences']} x {record['length']:,}",
                duration(own),
                f"{own / base:.3g}" if base else "-",
                f"{record['tokens_per_s']:,.0f}",
                mebibytes(record["peak_bytes"]),
            ]
        )
    head = ("program", "model", "dtype", "contestant", "tokens", "time", "x kernel", "tokens/s", "peak MiB")
    return _table(head, rows)


def _buffers(records: list[Record]) -> str:
    head = ("operation", "dtype", "rows x N", "buffer MiB", "time", "peak MiB")
    return _table(
        head,
        [
            (
                record["operation"],
                record["dtype"],
                f"{record['rows']:,} x {record['n']:,}",
                f"{record['buffer_bytes'] / 2**20:.3g}",
                duration(record["seconds"][0]),
                mebibytes(record["peak_bytes"]),
            )
            for record in records
        ],
    )


def _counters(records: list[Record]) -> str:
    head = ("kernel", "launches", "time", "DRAM", "issue", "L2 hits")
    rows = []
    for record in records:
        shares = [f"{record[name]:.0f}%" if name in record else "-" for name in ("dram", "issue", "l2_hits")]
        rows.append((record["kernel"], str(record["launches"]), duration(record["seconds"]), *shares))
    return _table(head, rows)


def summary(report: Record) -> str:
    """On accuracy, on the samplers, on what failed and is no fault of the operators; then the verdict."""
    lines = []
    for what in ("loss", "gradient") if report["accuracy"] else ():
        mine, plain = (max(record[who][what] for record in report["accuracy"]) for who in ("kernel", "plain"))
        lines.append(f"{what}: largest error {mine:.2g} of the terms that are summed; plain PyTorch {plain:.2g}")
    if report["tokens"]:
        draws, differing = (sum(record[name] for record in report["tokens"]) for name in ("draws", "differing"))
        lines.append(f"samplers: {differing:,} of {draws:,} tokens differ from the CPU's for the same seeds")
    named = {step["name"]: f"{step['name']} ({step['why']})" for step in report["steps"]}
    wrong = [named[step["name"]] for step in report["steps"] if step["decides"]]
    failed = [named[step["name"]] for step in report["steps"] if step["outcome"] == "failed" and not step["decides"]]
    if failed:
        lines.append(f"failed, which says nothing of the operators: {', '.join(failed)}")
    return "\n".join([*lines, f"NOT RIGHT: {', '.join(wrong)}" if wrong else "nothing wrong was found"])


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def mebibytes(size: int) -> str:
    return f"{size / 2**20:,.0f}" if size else "-"

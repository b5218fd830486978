#!/usr/bin/env python3
"""Runs side by side: a table of their figures and a picture of what they write, from the files of `sedd eval --json`.

python examples/compare.py RUN... --out NAME

reads RUN/eval/perplexity.json and, where it is there, RUN/eval/generative.json, and writes NAME.md and NAME.png.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Likelihoods as a Markdown table, a row for each run and text."""
    lines = ["| run | text | bits per byte | nats per token | perplexity | mean of exp |", "| --- " * 6 + "|"]
    for name, run in runs.items():
        for text, row in run["perplexity"]["texts"].items():
            error = row["standard_error"] or 0.0
            bits = f"{row['bits_per_byte']:.4f} ± {error * row['bits_per_byte'] / row['nats_per_token']:.4f}"
            nats = f"{row['nats_per_token']:.4f} ± {error:.4f}"
            lines.append(
                f"| {name} | {text} | {bits} | {nats} | {row['perplexity']:.2f} | {row['perplexity_mean_of_exp']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def written(runs: dict[str, dict[str, Any]]) -> str:
    """What the runs write, as a Markdown table, a row for each sampler and number of steps."""
    (judge,) = {run["generative"]["settings"]["judge"] for run in runs.values()}
    lines = [
        f"| run | sampler | steps | perplexity ({judge}) | entropy, nats | unique | repeated | seconds per text |",
        "| --- " * 8 + "|",
    ]
    for name, run in runs.items():
        rows = [*run["generative"]["rows"], {**(run["generative"]["real"] or {}), "sampler": "real text"}]
        for row in rows:
            if "perplexity" in row:
                lines.append(
                    f"| {name} | {row['sampler']} | {row.get('steps', '')} | {row['perplexity']:.1f} ± "
                    f"{row['perplexity_error'] or 0:.1f} | {row['entropy']:.3f} | {row['unique']:.3f} | "
                    f"{row['repetition']:.3f} | {row.get('seconds_per_text', 0):.2f} |"
                )
    return "\n".join(lines) + "\n"


def picture(runs: dict[str, dict[str, Any]]) -> Figure:
    """The judge's perplexity and the entropy against steps: a colour for each run, a line style for each sampler."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for colour, (name, run) in enumerate(runs.items()):
        for row_name, axes in zip(("perplexity", "entropy"), panels, strict=True):
            for sampler, style in (("tweedie", "-"), ("euler", "--")):
                rows = [row for row in run["generative"]["rows"] if row["sampler"] == sampler]
                errors = [row["perplexity_error"] or 0.0 for row in rows] if row_name == "perplexity" else None
                axes.errorbar(
                    [row["steps"] for row in rows],
                    [row[row_name] for row in rows],
                    errors,
                    color=f"C{colour}",
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=f"{name}, {sampler}",
                )
    first = next(iter(runs.values()))["generative"]
    labels = (f"perplexity of {first['settings']['judge']}", "unigram entropy, nats")
    for row_name, label, axes in zip(("perplexity", "entropy"), labels, panels, strict=True):
        if first["real"]:
            axes.axhline(first["real"][row_name], color="gray", linestyle=":", label="real text")
        axes.set(xscale="log", xlabel="reverse steps", ylabel=label)
        ticks = sorted({row["steps"] for row in first["rows"]})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    panels[1].legend(fontsize="small")
    return figure


def main() -> None:
    """Reads, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", required=True, type=Path, help="what is written, without .md and .png")
    options = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    for run in options.runs:
        files = {path.stem: path for path in (run / "eval").glob("*.json")}
        if "perplexity" not in files:
            parser.error(f"{run}: there is no eval/perplexity.json; make it with sedd eval perplexity --json")
        runs[run.name] = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}
    text = table(runs)
    judged = {name: run for name, run in runs.items() if "generative" in run}
    if judged:
        text += "\n" + written(judged)
        picture(judged).savefig(options.out.with_suffix(".png"), dpi=150)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

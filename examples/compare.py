#!/usr/bin/env python3
"""Compares runs: tables and plots of their likelihoods and of their samples, from the files of `sedd eval --json`.

python examples/compare.py RUN... --out NAME [--words FILE] [--papers FILE]

Reads RUN/eval/perplexity.json and, if it exists, RUN/eval/generative.json. Writes NAME.md, NAME-bits.png and, if there
are samples, NAME.png. Runs that are called NAME, NAME-seed1 and NAME-seed2 differ only in the seed: a row gives their
mean. --papers takes a JSON file of published bits per character by name, which are set beside those of the runs.

The perplexity under a judge of real text says little about the samples of small models. For text of letters and spaces,
--words takes the training text and adds the fraction of sampled letters in words that occur at least twice in it.
"""

import argparse
import itertools
import json
import math
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure


def figure(value: float | None, error: float | None, digits: int) -> str:
    """Formats a number with its error, if it has one; None (null in JSON) is infinity."""
    text = "inf" if value is None else f"{value:.{digits}{'f' if value < 1e6 else 'e'}}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Likelihoods as a Markdown table, with a row for each run and text."""
    lines = ["| run | text | bits per byte | nats per token | perplexity | mean of exp |", "| --- " * 6 + "|"]
    for name, run in runs.items():
        for text, row in run["perplexity"]["texts"].items():
            if "standard_error" not in row:  # an n-gram model
                continue
            error = row["standard_error"]
            of_bits = None if error is None else error * row["bits_per_byte"] / row["nats_per_token"]
            lines.append(
                f"| {name} | {text} | {figure(row['bits_per_byte'], of_bits, 4)} | "
                f"{figure(row['nats_per_token'], error, 4)} | {figure(row['perplexity'], None, 2)} | "
                f"{figure(row['perplexity_mean_of_exp'], None, 2)} |"
            )
    return "\n".join(lines) + "\n"


def bits(run: dict[str, Any]) -> tuple[float, float]:
    """Bits per byte of the first text of a run, and their standard error."""
    row = next(row for row in run["perplexity"]["texts"].values() if "standard_error" in row)
    if row["bits_per_byte"] is None:  # an infinite bound
        return math.inf, 0.0
    return row["bits_per_byte"], (row["standard_error"] or 0.0) * row["bits_per_byte"] / row["nats_per_token"]


def by_seed(runs: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """Names of runs, grouped by their name without the seed."""
    groups: dict[str, list[str]] = {}
    for name in runs:
        groups.setdefault(name.split("-seed")[0], []).append(name)
    return groups


def seeds(runs: dict[str, dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds as a Markdown table; empty if every run has one seed only."""
    lines = ["| run | seeds | bits per byte, mean | standard deviation over seeds |", "| --- " * 4 + "|"]
    for name, group in by_seed(runs).items():
        values = [bits(runs[of])[0] for of in group]
        if len(values) > 1:
            mean, spread = statistics.fmean(values), statistics.stdev(values)
            lines.append(f"| {name} | {len(values)} | {mean:.4f} | {spread:.4f} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def likelihoods(runs: dict[str, dict[str, Any]], papers: dict[str, float]) -> Figure:
    """Plots bits per byte of the runs, best first, beside the published figures if there are any."""
    groups = by_seed(runs)
    order = sorted(groups, key=lambda name: statistics.fmean(bits(runs[of])[0] for of in groups[name]), reverse=True)
    figure = Figure(figsize=(9 if papers else 6, 0.9 + 0.32 * len(order)), layout="constrained")
    panels = figure.subplots(1, 2 if papers else 1, sharey=True, squeeze=False)[0]
    for y, name in enumerate(order):
        for of in groups[name]:
            value, error = bits(runs[of])
            if not math.isfinite(value):
                continue
            panels[0].errorbar(value, y, xerr=error, marker="o", markersize=4, capsize=2, color="C0")
        if name in papers:
            panels[1].plot(papers[name], y, marker="D", color="C1")
    panels[0].set_yticks(range(len(order)), order)
    panels[0].set(xlabel=f"bits per {'character' if papers else 'byte'}, these runs")
    if papers:
        panels[1].set(xlabel="bits per character, published, text8")
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


def letters_in_words(text: str, words: set[str]) -> float:
    """Fraction of the letters of a text that are in the given words, without the first and last word of the text."""
    found = text.split(" ")[1:-1]
    letters = sum(len(word) for word in found)
    return sum(len(word) for word in found if word in words) / max(1, letters)


def written(runs: dict[str, dict[str, Any]]) -> str:
    """Evaluations of samples as a Markdown table, with a row for each run, sampler and number of steps."""
    judge = next(iter(runs.values()))["generative"]["settings"]["judge"]
    lines = [
        f"| run | sampler | steps | perplexity ({judge}) | entropy, nats | unique | repeated | letters in words | "
        "seconds per text |",
        "| --- " * 9 + "|",
    ]
    for name, run in runs.items():
        rows = [*run["generative"]["rows"], {**(run["generative"]["real"] or {}), "sampler": "real text"}]
        for row in rows:
            words = f"{row['words']:.3f} ± {row['words_error']:.3f}" if "words" in row else ""
            seconds = f"{row['seconds_per_text']:.2f}" if "seconds_per_text" in row else ""
            if "perplexity" in row:
                lines.append(
                    f"| {name} | {row['sampler']} | {row.get('steps', '')} | "
                    f"{figure(row['perplexity'], row['perplexity_error'], 1)} | {row['entropy']:.3f} | "
                    f"{row['unique']:.3f} | {row['repetition']:.3f} | {words} | {seconds} |"
                )
    return "\n".join(lines) + "\n"


def picture(runs: dict[str, dict[str, Any]]) -> Figure:
    """Plots the measures against steps, with a colour for each run and a line style for each sampler."""
    first = next(iter(runs.values()))["generative"]
    measures = {"perplexity": f"perplexity of {first['settings']['judge']}", "entropy": "unigram entropy, nats"}
    if "words" in first["rows"][0]:
        measures["words"] = "letters in words of the training text"
    figure = Figure(figsize=(4.6 * len(measures), 4.4), layout="constrained")
    colours = colormaps["tab10" if len(runs) <= 10 else "tab20"].colors
    panels = figure.subplots(1, len(measures))
    for colour, (name, run) in enumerate(runs.items()):
        for measure, axes in zip(measures, panels, strict=True):
            found = dict.fromkeys(row["sampler"] for row in run["generative"]["rows"])
            for sampler, style in zip(found, itertools.cycle(("-", "--", "-.", ":")), strict=False):
                rows = [row for row in run["generative"]["rows"] if row["sampler"] == sampler]
                rows.sort(key=lambda row: row["steps"])
                errors = [row.get(f"{measure}_error") or 0.0 for row in rows]
                axes.errorbar(
                    [row["steps"] for row in rows],
                    [row[measure] for row in rows],
                    errors,
                    color=colours[colour % len(colours)],
                    linestyle=style,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=f"{name}, {sampler}",
                )
    for (measure, label), axes in zip(measures.items(), panels, strict=True):
        if measure in (first["real"] or {}):
            axes.axhline(first["real"][measure], color="gray", linestyle=":", label="real text")
        axes.set(xscale="log", xlabel="reverse steps", ylabel=label)
        ticks = sorted({row["steps"] for run in runs.values() for row in run["generative"]["rows"]})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_yscale("log")
    lines = panels[0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", fontsize="small", ncols=min(6, len(lines[0])))
    return figure


def main() -> None:
    """Reads the results, compares the runs and writes the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", required=True, type=Path, help="output files, without the suffixes .md and .png")
    parser.add_argument("--words", type=Path, help="training text of the runs, of letters and spaces")
    parser.add_argument("--papers", type=Path, help="published bits per character by name of a run, a JSON file")
    options = parser.parse_args()
    runs: dict[str, dict[str, Any]] = {}
    for run in options.runs:
        files = {kind: run / "eval" / f"{kind}.json" for kind in ("perplexity", "generative")}
        files = {kind: path for kind, path in files.items() if path.is_file()}
        if "perplexity" not in files:
            parser.error(f"{run}: no eval/perplexity.json; create it with sedd eval perplexity --json")
        name = run.resolve().name
        if name in runs:
            parser.error(f"{run}: expected runs with different names, got {name} twice")
        runs[name] = {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in files.items()}
    text = table(runs)
    if averages := seeds(runs):
        text += "\n" + averages
    papers = {} if options.papers is None else json.loads(options.papers.read_text(encoding="utf-8"))
    judged = {name: run for name, run in runs.items() if "generative" in run}
    judges = {name: run["generative"]["settings"]["judge"] for name, run in judged.items()}
    if len(set(judges.values())) > 1:
        found = ", ".join(f"{name}: {judge}" for name, judge in judges.items())
        parser.error(f"expected one judge for all runs, got {found}; run sedd eval generative with the same --judge")
    if options.words is not None:
        counts = Counter(options.words.read_text(encoding="utf-8").split())
        words = {word for word, count in counts.items() if count > 1}
        for row in (row for run in judged.values() for row in run["generative"]["rows"]):
            values = [letters_in_words(text, words) for text in row["texts"]]
            row["words"] = statistics.fmean(values)
            row["words_error"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    likelihoods(runs, papers).savefig(f"{options.out}-bits.png", dpi=120)
    if judged:
        text += "\n" + written(judged)
        picture(judged).savefig(options.out.with_suffix(".png"), dpi=150)
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

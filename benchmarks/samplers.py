"""Measures the quality of samples against calls of the network, for every sampler, on one trained model.

examples:
  python benchmarks/samplers.py runs/md4 --judge runs/ar --text runs/test.txt --json samplers.json --plot samplers.png
      a second call with the same --json computes what is missing

A call of the network for one sequence counts as one, so sequences that have left the batch cost nothing. Prints a table
in Markdown. The model needs absorbing noise with one schedule for all tokens.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from sedd.commands.judge import load_judge
from sedd.commands.text_quality import measure
from sedd.data.text import DataConfig, load_text, valid_batches
from sedd.diffusion import SAMPLERS, Sampler, sample
from sedd.figures import write_figure
from sedd.files import write_json
from sedd.hub.pretrained import LoadedModel, load_model
from sedd.plain import read_json

POINTS: dict[str, list[tuple[int, dict[str, Any]]]] = {  # steps and parameters
    **{name: [(steps, {}) for steps in (8, 32, 128)] for name in ("tweedie", "tweedie_cosine", "ancestral", "greedy")},
    **{name: [(steps, {}) for steps in (8, 32, 128)] for name in ("confidence", "margin", "entropy")},
    "remask": [(steps, {"eta": 0.02}) for steps in (8, 32, 128)],
    "predictor_corrector": [(steps, {"correctors": 1, "size": 0.1}) for steps in (8, 32, 64)],
    "semi_autoregressive": [(steps, {"block": 32}) for steps in (8, 32, 128)],
    "entropy_bounded": [(1, {"gamma": gamma}) for gamma in (0.3, 3.0, 30.0)],
    "first_hitting": [(1, {})],
}


def row(sampler: Sampler, loaded: LoadedModel, judge: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Samples texts, counts the calls of the network, and measures the texts."""
    network, sequences = loaded.model, 0
    hidden = network.hidden

    def counting(x_t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        nonlocal sequences
        sequences += len(x_t)
        return hidden(x_t, sigma)

    generator = torch.Generator(loaded.diffusion.device).manual_seed(options.seed)
    started, length = time.perf_counter(), network.config.length
    network.hidden = counting  # type: ignore[assignment, method-assign]
    try:
        texts = sample(
            loaded.diffusion,
            batch=options.num,
            length=length,
            sampler=sampler,
            generator=generator,
            autocast_dtype=loaded.autocast_dtype,
        ).cpu()
    finally:
        network.hidden = hidden  # type: ignore[method-assign]
    seconds = (time.perf_counter() - started) / options.num
    found = measure(texts, loaded, judge, options.num, False)
    found["entropy_error"] = found["entropy_std"] / options.num**0.5
    return {"calls": sequences / options.num, "seconds_per_text": seconds, **found}


def table(rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table with a line for each sampler."""
    lines = [
        "| sampler | steps, parameters | calls per text: perplexity, entropy | | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(found["sampler"] for found in rows):
        line = [found for found in rows if found["sampler"] == name]
        cells = [
            f"{r['calls']:.0f}: {r['perplexity']:.1f} ± {r['perplexity_error']:.1f}, {r['entropy']:.2f}" for r in line
        ]
        cells += [""] * (3 - len(cells))
        lines.append(f"| `{name}` | {'; '.join(found['how'] for found in line)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Perplexity and entropy against calls of the network, with a line for each sampler."""

    def draw(figure: Any) -> None:
        from matplotlib import colormaps

        panels = figure.subplots(1, 2)
        names = dict.fromkeys(found["sampler"] for found in report["rows"])
        for axes, measured in zip(panels, ("perplexity", "entropy"), strict=True):
            for i, name in enumerate(names):
                line = sorted((r for r in report["rows"] if r["sampler"] == name), key=lambda found: found["calls"])
                axes.errorbar(
                    [found["calls"] for found in line],
                    [found[measured] for found in line],
                    [found[f"{measured}_error"] for found in line],
                    color=colormaps["tab20"].colors[i],
                    marker="osD^v<>PXph*"[i % 12],
                    markersize=5,
                    linewidth=1,
                    capsize=2,
                    label=name,
                )
            axes.axhline(report["real"][measured], color="gray", linestyle="--", label="real text")
            ticks = [8, 16, 32, 64, 128, 256]
            axes.set(xscale="log", xlabel="calls of the network per text")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.grid(alpha=0.3)
        panels[0].set(ylabel=f"perplexity of {report['judge']}", yscale="log")
        panels[0].set_yticks(ticks := [4, 8, 16, 32, 64, 128], [str(tick) for tick in ticks])
        panels[1].set(ylabel="unigram entropy, nats")
        for axes in panels:
            axes.minorticks_off()
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize="small", ncols=5)

    write_figure(path, (9.6, 4.8), draw)


def main() -> None:
    """Reads the results that there are, computes the others, and writes table and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run with absorbing noise")
    parser.add_argument("--judge", required=True, help="a causal language model, see sedd eval generative")
    parser.add_argument("--text", required=True, help="real text, measured too")
    parser.add_argument("--json", required=True, type=Path, help="the results; those that it has are kept")
    parser.add_argument("--plot", type=Path, help="the picture")
    parser.add_argument("--num", type=int, default=32, help="texts of each point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no point after this time")
    options = parser.parse_args()
    started, loaded, judge = time.monotonic(), load_model(options.run), load_judge(options.judge)
    if options.json.exists():
        report = read_json(options.json)
        if (report["run"], report["num"]) != (Path(options.run).name, options.num):
            parser.error(f"--json: expected results of the same run and --num, got {report['run']}, {report['num']}")
    else:
        blocks = load_text(DataConfig(options.text), loaded.tokenizer, loaded.model.config.length)
        real = measure(torch.cat(list(valid_batches(blocks, options.num, options.num))), loaded, judge, 32, False)
        report = {"run": Path(options.run).name, "judge": judge.name, "num": options.num, "real": real, "rows": []}
    done = {(found["sampler"], found["how"]) for found in report["rows"]}
    for name, points in POINTS.items():
        for steps, params in points:
            how = ", ".join([*[str(steps)] * (steps > 1), *(f"{key} {value}" for key, value in params.items())])
            if (name, how) in done or time.monotonic() - started > 60 * options.minutes:
                continue
            found = row(SAMPLERS[name](steps, **params), loaded, judge, options)
            report["rows"].append({"sampler": name, "how": how, **found})
            print(f"{name:20} {how:24} {found['calls']:6.1f} calls, {found['seconds_per_text']:.2f} s", flush=True)
            write_json(options.json, report)
    report["rows"].sort(key=lambda found: (list(POINTS).index(found["sampler"]), found["calls"]))
    print(f"\n{table(report['rows'])}")
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()

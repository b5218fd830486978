#!/usr/bin/env python3
"""Draws the learned schedules of a GenMD4 run: which tokens are generated first, and which last?

python examples/powers.py RUN --out FILE [--most 40]

A token of power w is masked at time t with probability (1-ε) t^w. A small w means that the token is masked early, and
so is generated late. Draws the powers, in order, and the probability of being masked over time. With a large
vocabulary, only the --most tokens with the smallest and the largest powers are drawn.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure

from sedd import load_model
from sedd.diffusion import PerToken


def main() -> None:
    """Reads the run and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of sedd train --objective genmd4")
    parser.add_argument("--out", required=True, type=Path, help="the picture")
    parser.add_argument("--most", type=int, default=40, help="tokens to draw (default: 40)")
    options = parser.parse_args()
    loaded = load_model(options.run)
    schedule = loaded.diffusion.schedule
    if not isinstance(schedule, PerToken):
        parser.error(f"{options.run}: expected a run of sedd train --objective genmd4")
    power = schedule.power().detach()[:-1]
    order = power.argsort()
    if len(order) > options.most:
        order = torch.cat([order[: options.most // 2], order[-(options.most - options.most // 2) :]])
    labels = [loaded.tokenizer.decode([token]).replace(" ", "␣") for token in order.tolist()]

    figure = Figure(figsize=(4 + 0.22 * len(order), 4), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=[0.22 * len(order), 4])
    bars.bar(range(len(order)), power[order] - 1, bottom=1)  # up or down from where the powers usually start
    bars.axhline(1.0, color="gray", linestyle=":")
    bars.set_xticks(range(len(order)), labels)
    bars.set(
        ylabel="power w", xlabel="token: generated late on the left, early on the right", xlim=(-0.7, len(order) - 0.3)
    )
    time = torch.linspace(0, 1, 101)
    for i in (0, len(order) // 2, len(order) - 1):
        lines.plot(time, time ** power[order[i]], label=f"{labels[i]}, w = {power[order[i]]:.2f}")
    lines.set(xlabel="t", ylabel="probability of being masked")
    lines.legend()
    figure.savefig(options.out, dpi=120)
    print(", ".join(f"{label} {value:.3f}" for label, value in zip(labels, power[order].tolist(), strict=True)))


if __name__ == "__main__":
    main()

"""Prints exact bounds in a toy world, and draws how the bound of discrete time tends to that of continuous time.

python tests/exact_bounds.py [PICTURE]

The toy world is that of test_bounds.py: texts of three positions over five tokens, whose positions depend on one
another, and networks that predict exactly. Every expectation is summed over all sequences, and the integral over time
is a quadrature.
"""

from __future__ import annotations

import math
import sys

import torch
from matplotlib.figure import Figure
from test_bounds import D3PM, MEANS, PROCESSES, SCHEDULE, N, at, discrete, expected, genmd4, integral, joint, model
from toy import JointScore, sequences

from sedd.diffusion import Diffusion, Score, ScoreEntropy


def main() -> None:
    """Prints the table; draws the picture if there is a name for it."""
    text, x_0 = joint(), torch.tensor([0, 1, 2])
    exact = -math.log(text[tuple(x_0)])
    print(f"-log p = {exact:.9f}\n\n| objective | process | bound, nats | bound + log p |\n| --- | --- | --- | --- |")

    def row(name: str, family: str, bound: float) -> None:
        print(f"| {name} | {family} | {bound:.7f} | {bound - exact:+.1e} |")

    for family, process in PROCESSES.items():
        diffusion = Diffusion(JointScore(process, text), process, SCHEDULE, ScoreEntropy(), Score(False, False))
        bound = integral(lambda t, d=diffusion, p=process: expected(d, at(p, text, t), x_0, t))
        row("score entropy", family, bound + at(process, text, 1.0).information(x_0))
    for name, (kind, family) in MEANS.items():
        process = PROCESSES[family]
        diffusion = model(kind(), process, text)
        bound = integral(lambda t, d=diffusion, p=process: expected(d, at(p, text, t), x_0, t))
        row(name, family, bound + at(process, text, 1.0).information(x_0))
    diffusion, toy = genmd4(text)
    # from its first time on; before it, what the noise leaves
    bound = integral(lambda t: expected(diffusion, toy(t), x_0, t))
    row("genmd4", "absorbing", bound + toy(1.0).information(x_0) + exact - toy(0.0).information(x_0))
    if len(sys.argv) < 2:
        return

    texts = sequences(N, 3)[torch.multinomial(text.flatten(), 12, generator=torch.Generator().manual_seed(0))]
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    steps = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for family in ("absorbing", "uniform", "hybrid"):
        process = PROCESSES[family]
        gaps = [
            sum(
                discrete(process, text, T, x) + at(process, text, 1.0).information(x) + math.log(text[tuple(x)])
                for x in texts
            )
            / len(texts)
            for T in steps
        ]
        print(f"{D3PM.__name__}, {family}: " + ", ".join(f"{gap:.2e}" for gap in gaps))
        axes.loglog(steps, gaps, marker="o", label=family)
    axes.loglog(steps, [gaps[0] * 2 / T for T in steps], color="gray", linestyle=":", label="1/T")
    axes.set(xlabel="number of steps T", ylabel="bound of D3PM + log p, nats per text")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()

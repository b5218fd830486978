#!/usr/bin/env python3
"""Measures how noisy the training losses of trained runs are, with evenly spread and with independent times.

python examples/loss_variance.py RUN... [--batches 64] [--batch_size 16] [--json FILE]

For each run, and for the other objectives that its network can be trained with, draws batches of validation text, times
and noise. Prints the mean of the loss and its standard deviation from batch to batch, in nats per token, and the
standard deviation of the gradient: the root of the summed variance of its entries. Compare the latter between
objectives of one run, whose losses have the same expectation up to a constant (but for concrete_score, which is another
loss).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from sedd import load_model
from sedd.data.corpora import CORPORA
from sedd.diffusion import Diffusion, get_objective, sample_times
from sedd.files import write_json

OTHERS = {"score_entropy": ["implicit_score_entropy", "concrete_score"], "md4": ["tauldr"]}
"""Objectives that train the same network as the one of a run."""


def measure(
    diffusion: Diffusion, blocks: torch.Tensor, options: argparse.Namespace, antithetic: bool
) -> dict[str, Any]:
    """The loss and its gradient on batches of the same texts, with the times drawn in one of the two ways."""
    texts, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    parameters = [p for p in diffusion.parameters() if p.requires_grad]
    losses, first, second = [], [torch.zeros_like(p) for p in parameters], 0.0
    for _ in range(options.batches):
        x_0 = blocks[torch.randint(len(blocks), (options.batch_size,), generator=texts)]
        t = sample_times(len(x_0), antithetic=antithetic, generator=generator)
        loss = diffusion(x_0, t, scale=1 / x_0.numel(), generator=generator).sum()
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        losses.append(loss.detach().double())
        for total, g in zip(first, gradient, strict=True):
            if g is not None:
                total += g / options.batches
                second += float(g.double().square().sum()) / options.batches
    mean = sum(float(m.double().square().sum()) for m in first)
    variance = (second - mean) * options.batches / (options.batches - 1)
    values = torch.stack(losses)
    return {
        "loss": float(values.mean()),
        "standard_deviation": float(values.std()),
        "gradient_deviation": math.sqrt(variance),
    }


def main() -> None:
    """Measures all runs and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="runs of sedd train")
    parser.add_argument("--batches", type=int, default=64, help="batches (default: 64)")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences in a batch (default: 16)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.batches < 2:
        parser.error(f"--batches: expected at least 2, got {options.batches}")
    rows = []
    print("| run | objective | times | loss | standard deviation | of the gradient |\n" + "| --- " * 6 + "|")
    for run in options.runs:
        loaded = load_model(run)
        if loaded.config is None or loaded.diffusion.objective.autoregressive:
            parser.error(f"{run}: expected a run of sedd train with a diffusion objective")
        blocks = CORPORA[loaded.config.corpus](loaded.config.data, loaded.tokenizer, loaded.model.config.length).valid(
            256
        )
        name = loaded.config.objective
        for objective in (name, *OTHERS.get(name, [])):
            model = loaded.diffusion
            if objective != name:
                made = get_objective(objective)
                model = Diffusion(model.network, model.process, model.schedule, made, model.parameterization)
            model.requires_grad_(True)
            for antithetic in (True, False):
                row = measure(model, blocks, options, antithetic)
                times = "evenly spread" if antithetic else "independent"
                rows.append({"run": run.name, "objective": objective, "times": times, **row})
                figures = " | ".join(f"{value:.4f}" for value in row.values())
                print(f"| {run.name} | {objective} | {times} | {figures} |", flush=True)
    if options.json:
        write_json(options.json, json.loads(json.dumps(rows)))


if __name__ == "__main__":
    main()

"""The README shows what an example does, and the example works."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from sedd_ext import Absorbing, linear_score_entropy_loss, score_entropy_loss

ROOT = Path(__file__).parent.parent


def test_own_trainer_learns() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "own_trainer.py"))
    first, last = example["train"](steps=300)
    # the bound cannot fall below the entropy of the tokens, 1.208 nats, but for the noise of 50 steps
    assert last < first
    assert last == pytest.approx(1.208, abs=0.06)


def test_readme_shows_the_example() -> None:
    source = (ROOT / "examples" / "own_trainer.py").read_text(encoding="utf-8")
    shown = source.split("# [five lines]\n")[1].split("        # [/five lines]")[0]
    lines = [line.removeprefix("        ") for line in shown.splitlines()]
    assert len(lines) == 5
    assert "\n".join(lines) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_without_the_log_scores() -> None:
    """The snippet of the fused head runs as it stands, and gives the unfused gradients."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "body(" in block)
    generator = torch.Generator().manual_seed(0)
    batch, length, d, n = 2, 5, 8, 11
    graph = Absorbing(n)
    states = torch.randn(batch, length, d, generator=generator, requires_grad=True)
    head = torch.nn.Linear(d, graph.dim)
    sigma_bar, sigma = torch.tensor([0.3, 1.5]), torch.tensor([0.7, 2.0])
    x_0 = torch.randint(n, (batch, length), generator=generator)
    x_t = torch.where(torch.rand(batch, length, generator=generator) < 0.6, n, x_0)
    names = {
        "linear_score_entropy_loss": linear_score_entropy_loss,
        "body": lambda x_t, sigma_bar: states,
        **{"head": head, "x_t": x_t, "x_0": x_0, "sigma_bar": sigma_bar, "sigma": sigma, "graph": graph},
    }
    exec(snippet, names)
    leaves = (states, head.weight, head.bias)
    fused = [leaf.grad for leaf in leaves]
    loss = (sigma[:, None] * score_entropy_loss(head(states), x_t, x_0, sigma_bar[:, None], graph)).sum()
    torch.testing.assert_close(names["loss"], loss)
    torch.testing.assert_close(fused, list(torch.autograd.grad(loss, leaves)))

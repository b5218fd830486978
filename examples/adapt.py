#!/usr/bin/env python3
"""Adapt a language model: turn a GPT-2 into a diffusion model, and compare with training from random weights.

Trains a small GPT-2 of ``transformers`` on the bytes of a text to predict the next byte. Then it trains diffusion
models of the same network on the same text: from random weights, and from those of the GPT-2 with full attention at
once, with attention that grows from causal to full, and without the shift. All of them take equally many steps and see
the same noise. ``python examples/adapt.py FILE --out FOLDER`` takes about two and a half minutes on one CPU core. It
needs ``pip install "sedd_ext[eval]"``.

To adapt a real model, only ``sedd train --init openai-community/gpt2 --objective md4 --data.source FILE`` is needed.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sedd import Run, TrainConfig, elbo, load_model, sample
from sedd.config import ModelOptions
from sedd.data.options import DataConfig
from sedd.hub import read_init

LENGTH = 64  # tokens in a sequence
START = 256  # end-of-text of the tokeniser "bytes": GPT-2 reads it before a text
BATCH = 16


def make_model() -> GPT2LMHeadModel:
    """Creates a GPT-2 with 0.4 million parameters for 256 bytes and end-of-text."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=257,
            n_positions=LENGTH + 1,
            n_embd=96,
            n_layer=3,
            n_head=4,
            bos_token_id=START,
            eos_token_id=START,
            **dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0),
        )
    )


def next_byte_loss(model: GPT2LMHeadModel, x: Tensor) -> Tensor:
    """Mean of -log p(x_i | x_1, ..., x_{i-1}) over the bytes of sequences [B, LENGTH], in nats."""
    logits = model(F.pad(x[:, :-1], (1, 0), value=START)).logits
    return F.cross_entropy(logits.flatten(0, 1), x.flatten())


def pretrain(text: Tensor, steps: int, lr: float = 2e-3) -> GPT2LMHeadModel:
    """Trains a GPT-2 to predict the next byte of a text [n]."""
    torch.manual_seed(0)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 50) * (1 - step / steps)
        start = torch.randint(len(text) - LENGTH, (BATCH, 1))
        next_byte_loss(model, text[start + torch.arange(LENGTH)]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def adapt(folder: Path, steps: int) -> dict[str, Run]:
    """Trains the diffusion models, from the GPT-2 in ``folder / "gpt2"``. Returns the finished runs by name."""
    base = TrainConfig(
        data=DataConfig(source=str(folder / "train.txt"), valid_source=str(folder / "valid.txt")),
        objective="md4",
        steps=steps,
        batch_size=BATCH,
        lr=1e-3,
        lr_schedule="linear",
        warmup=50,
        ema=0.99,
        valid_every=steps,
        checkpoint_every=steps,
        valid_samples=0,
    )
    gpt2 = str(folder / "gpt2")
    same_sizes = ModelOptions(**dataclasses.asdict(read_init(gpt2).config))
    variants: dict[str, dict[str, Any]] = {
        "random weights": {"model": same_sizes},
        "GPT-2": {"init": gpt2},
        "GPT-2, attention annealed": {"init": gpt2, "init_anneal": steps // 4},
        "GPT-2, without the shift": {"init": gpt2, "model": ModelOptions(shift=False)},
    }
    runs = {}
    for i, (name, changes) in enumerate(variants.items()):
        run = Run(dataclasses.replace(base, run_dir=str(folder / f"run{i}"), **changes), load_init=read_init)
        run.train()
        runs[name] = run
    return runs


def main() -> None:
    """Trains all models, and prints their bits per byte on held-out text and a sample."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file; its last tenth is held out")
    parser.add_argument("--out", type=Path, required=True, help="folder of the models; a new one")
    parser.add_argument("--pretrain", type=int, default=800, help="steps of GPT-2 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps of each diffusion model (default: %(default)s)")
    parser.add_argument("--blocks", type=int, default=128, help="held-out sequences to score (default: %(default)s)")
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    text = options.text.read_bytes()
    held_out = len(text) // 10
    (options.out / "train.txt").write_bytes(text[:-held_out])
    (options.out / "valid.txt").write_bytes(text[-held_out:])

    model = pretrain(torch.frombuffer(bytearray(text[:-held_out]), dtype=torch.uint8).long(), options.pretrain)
    model.save_pretrained(options.out / "gpt2")
    runs = adapt(options.out, options.steps)

    blocks = next(iter(runs.values())).corpus.valid(options.blocks)
    print("bits per byte on held-out text ± standard error; difference to random weights on the same noise")
    with torch.no_grad():
        exact = torch.stack([next_byte_loss(model, block[None]) for block in blocks]) / math.log(2)
    error = float(exact.std()) / math.sqrt(len(blocks))
    print(f"{'GPT-2 itself (exact)':28} {float(exact.mean()):.3f} ± {error:.3f}")
    first: Tensor | None = None
    for name, run in runs.items():
        diffusion = load_model(run.run_dir).diffusion
        result = elbo(diffusion, blocks, draws=8, generator=torch.Generator().manual_seed(0))
        bits = result.sequences / LENGTH / math.log(2)
        first = bits if first is None else first
        gain, root = bits - first, math.sqrt(len(bits))
        print(
            f"{name:28} {float(bits.mean()):.3f} ± {float(bits.std()) / root:.3f}   "
            f"{float(gain.mean()):+.3f} ± {float(gain.std()) / root:.3f}"
        )
    loaded = load_model(runs["GPT-2, attention annealed"].run_dir)
    tokens = sample(loaded.diffusion, batch=1, length=LENGTH, steps=64, generator=torch.Generator().manual_seed(0))
    print(f"\nA sample of the annealed model:\n{loaded.tokenizer.decode(tokens[0].tolist())}")


if __name__ == "__main__":
    main()

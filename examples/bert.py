"""Train BERT as a diffusion language model: use the loss in your own trainer, with an unmodified network.

Trains a small ModernBERT of ``transformers``, with random weights, on the bytes of the Python standard library with
absorbing diffusion, and then samples from it. ``python examples/bert.py`` takes about 40 seconds on one CPU core. It
needs ``pip install transformers``.
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

from sedd_ext import Absorbing, Tweedie, linear_score_entropy_loss, reverse_sample, sample_transition

LENGTH = 64  # tokens in a sequence
EPS = 1e-3  # at t = 1 this fraction of the tokens is still unmasked

process = Absorbing(256)  # bytes 0 to 255, and MASK as token 256: N = process.dim = 257


def noise(t: Tensor) -> tuple[Tensor, Tensor]:
    """Log-linear noise at times t in (0, 1]: total noise σ̄(t) and rate σ(t) = dσ̄/dt."""
    return -torch.log1p(-(1 - EPS) * t), (1 - EPS) / (1 - (1 - EPS) * t)


def log_score_shift(sigma_bar: Tensor) -> Tensor:
    """Shift of the log-scores, log(e^σ̄ - 1) + log(N - 1): log-scores are the output of the network minus the shift.

    The scores of a masked position sum to 1 / (e^σ̄ - 1), which spans six orders of magnitude over (0, 1]. With the
    shift, an output of 0 means that all N - 1 tokens are equally likely, at every noise level.
    """
    return torch.log(torch.expm1(sigma_bar)) + math.log(process.dim - 1)


def make_model() -> ModernBertForMaskedLM:
    """Creates a ModernBERT with 0.4 million parameters. Its vocabulary is that of the process, including MASK."""
    config = ModernBertConfig(
        vocab_size=process.dim,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        **dict.fromkeys(
            ["pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"]
        ),  # there are no special tokens
    )
    return ModernBertForMaskedLM(config)


def read_bytes(size: int = 2_000_000) -> Tensor:
    """Returns the first bytes of the Python standard library, int64 [size]."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)[:size]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def train(
    model: ModernBertForMaskedLM, text: Tensor, steps: int, batch: int = 16, lr: float = 3e-3, every: int = 50
) -> list[float]:
    """Trains the model. Returns the loss of each step in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses: list[float] = []
    for step in range(1, steps + 1):
        start = torch.randint(len(text) - LENGTH, (batch, 1))
        x_0 = text[start + torch.arange(LENGTH)]  # [B, L]
        t = (torch.rand(1) + torch.arange(batch) / batch) % 1.0  # [B], stratified: reduces the variance of the loss
        sigma_bar, sigma = noise(t.clamp(min=EPS))

        x_t = sample_transition(x_0, sigma_bar[:, None], process)
        # The network does not need σ̄: under absorbing noise, p(masked | unmasked tokens) does not depend on it.
        hidden = model.head(model.model(x_t).last_hidden_state)  # [B, L, d]
        loss = linear_score_entropy_loss(
            hidden,
            model.decoder.weight,
            model.decoder.bias,
            x_t,
            x_0,
            sigma_bar[:, None],
            process,
            log_score_shift=log_score_shift(sigma_bar)[:, None],
            loss_weight=sigma[:, None],
            reduction="mean",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % every == 0:
            recent = losses[-every:]
            print(f"step {step:4}: {sum(recent) / len(recent):.3f} nats per token, mean of {len(recent)} steps")
    return losses


@torch.no_grad()
def sample(model: ModernBertForMaskedLM, num: int = 1, steps: int = 64) -> Tensor:
    """Samples texts [num, LENGTH]: starts from MASK at all positions and takes ``steps`` reverse steps."""
    x = process.sample_limit((num, LENGTH))
    sigma_bar, _ = noise(torch.linspace(1.0, 1e-5, steps))
    for i, sigma in enumerate(sigma_bar):
        last = i == steps - 1
        step = Tweedie(sigma if last else sigma - sigma_bar[i + 1])
        x = reverse_sample(model(x).logits, x, step, process, log_score_shift=log_score_shift(sigma), denoise=last)
    return x


def main() -> None:
    """Trains the model, prints the loss and prints two samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps (default: %(default)s)")
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    model = make_model()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters; uniform bytes have log(256) = 5.545 nats per token"
    )
    train(model, read_bytes(), steps)
    print("\nTwo samples:")
    for tokens in sample(model, num=2):
        print(repr(bytes(tokens.tolist()).decode(errors="replace")))


if __name__ == "__main__":
    main()

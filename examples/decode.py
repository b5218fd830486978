"""Decode a masked diffusion model of ``transformers`` by confidence, without a tensor of positions × vocabulary.

The decoding loop is that of LLaDA and Dream: each step predicts all masked positions and keeps the predictions of which
the model is surest. The usual loop computes the logits of every position in float64, adds Gumbel noise and takes a
softmax. ``linear_unmask`` gives token and confidence from the hidden states instead. The model is a small ModernBERT
with random weights and the vocabulary of LLaDA, because time and memory of the head do not depend on the weights.

``python examples/decode.py`` prints time and memory of both. It needs ``pip install transformers``, and Linux.
"""

import argparse
import multiprocessing
import re
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForMaskedLM

from sedd_ext import linear_unmask

VOCABULARY = 126_464
MASK = 126_336


def make_model(vocabulary: int = VOCABULARY) -> ModernBertForMaskedLM:
    """Creates a ModernBERT with two layers of width 256."""
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        **dict.fromkeys(["pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"]),
    )
    return ModernBertForMaskedLM(config).eval()


def predict_from_logits(model: ModernBertForMaskedLM, x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their probabilities [B, L], as the published loops compute them."""
    logits = model(x).logits.double()
    logits[..., MASK] = -torch.inf
    noise = torch.rand_like(logits)
    gumbel = logits.exp() / (-noise.log()) ** temperature
    token = gumbel.argmax(-1)
    confidence = logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1)
    return token, confidence


def predict_fused(model: ModernBertForMaskedLM, x: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The same in one sweep over the head, and at masked positions only."""
    masked = x == MASK
    hidden = model.head(model.model(x).last_hidden_state)[masked]
    found = linear_unmask(
        hidden,
        model.decoder.weight,
        model.decoder.bias,
        mask_id=MASK,
        temperature=temperature,
        statistics=("log_prob",),
    )
    token = x.masked_scatter(masked, found.token)
    confidence = torch.zeros(x.shape).masked_scatter(masked, found.log_prob.exp())
    return token, confidence


PREDICTIONS = {"logits": predict_from_logits, "fused": predict_fused}


@torch.no_grad()
def decode(
    model: ModernBertForMaskedLM, way: str, batch: int, length: int, steps: int, temperature: float = 0.5
) -> Tensor:
    """Decodes texts [batch, length] from MASK at all positions, ``length / steps`` positions in each step."""
    torch.manual_seed(1)
    x = torch.full((batch, length), MASK)
    for i in range(steps):
        token, confidence = PREDICTIONS[way](model, x, temperature)
        confidence = confidence.float().masked_fill(x != MASK, -1.0)
        count = length * (i + 1) // steps - length * i // steps
        surest = confidence.topk(count, dim=1).indices
        x = x.scatter(1, surest, token.gather(1, surest))
    return x


def measure(way: str, batch: int, length: int, steps: int) -> tuple[float, int]:
    """Seconds of a step, and bytes by which the memory of this process grows at most."""
    model = make_model()
    decode(model, way, 1, 4, 1)  # loads what is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # resets the largest memory
    before = _status("VmRSS")
    started = time.perf_counter()
    decode(model, way, batch, length, steps)
    return (time.perf_counter() - started) / steps, _status("VmHWM") - before


def _status(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    """Measures both ways, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="texts (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="decoding steps (default: %(default)s)")
    options = parser.parse_args()
    print(f"{options.batch} texts of {options.length} tokens, a vocabulary of {VOCABULARY:,}, {options.steps} steps")
    for way in PREDICTIONS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(measure, (way, options.batch, options.length, options.steps))
        print(f"{way:>6}: {seconds:6.2f} s a step, {memory / 1e6:8,.0f} MB more at most")


if __name__ == "__main__":
    main()

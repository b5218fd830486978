"""The released SEDD network once more, as plain functions of its weights: what :class:`sedd.SEDD` is held against.

Written from its published description (see ``docs`` of the model): explicit loops over the heads, rotations as complex
numbers, norms and activations by their formulas. The dtype is that of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def shapes(d: int, n_blocks: int, n_heads: int, vocabulary: int, cond: int = 128) -> dict[str, tuple[int, ...]]:
    """The released names and shapes, in the released order."""
    named: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (vocabulary, d),
        "sigma_map.mlp.0.weight": (cond, 256),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "rotary_emb.inv_freq": (d // n_heads // 2,),
    }
    for block in range(n_blocks):
        named |= {
            f"blocks.{block}.norm1.weight": (d,),
            f"blocks.{block}.attn_qkv.weight": (3 * d, d),
            f"blocks.{block}.attn_out.weight": (d, d),
            f"blocks.{block}.norm2.weight": (d,),
            f"blocks.{block}.mlp.0.weight": (4 * d, d),
            f"blocks.{block}.mlp.0.bias": (4 * d,),
            f"blocks.{block}.mlp.2.weight": (d, 4 * d),
            f"blocks.{block}.mlp.2.bias": (d,),
            f"blocks.{block}.adaLN_modulation.weight": (6 * d, cond),
            f"blocks.{block}.adaLN_modulation.bias": (6 * d,),
        }
    return named | {
        "output_layer.norm_final.weight": (d,),
        "output_layer.linear.weight": (vocabulary, d),
        "output_layer.linear.bias": (vocabulary,),
        "output_layer.adaLN_modulation.weight": (2 * d, cond),
        "output_layer.adaLN_modulation.bias": (2 * d,),
    }


def random_weights(
    d: int, n_blocks: int, n_heads: int, vocabulary: int, cond: int = 128, seed: int = 0
) -> dict[str, Tensor]:
    """Weights under which every part of the network matters, float32."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(d, n_blocks, n_heads, vocabulary, cond).items():
        scale = 1.0 if name == "vocab_embed.embedding" else shape[-1] ** -0.5 if len(shape) > 1 else 0.1
        weights[name] = scale * torch.randn(shape, generator=generator)
        if "norm" in name:
            weights[name] += 1
    weights["rotary_emb.inv_freq"] = 1 / 10_000 ** (torch.arange(0, d // n_heads, 2).float() / (d // n_heads))
    return weights


def silu(z: Tensor) -> Tensor:
    return z / (1 + torch.exp(-z))


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def norm(z: Tensor, weight: Tensor) -> Tensor:
    return weight * (z - z.mean(-1, keepdim=True)) / (z.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def hidden(w: Mapping[str, Tensor], x: Tensor, sigma: Tensor) -> Tensor:
    """States before the head [B, L, d] for tokens [B, L] and total noise [B]."""

    def affine(name: str, z: Tensor) -> Tensor:
        return z @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    # the sinusoids are float32 whatever the weights are
    angles = sigma.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32) / 128)
    h = w["vocab_embed.embedding"][x]
    waves = torch.cat([angles.cos(), angles.sin()], -1).to(h.dtype)
    c = silu(affine("sigma_map.mlp.2", silu(affine("sigma_map.mlp.0", waves))))
    d, half = h.shape[-1], w["rotary_emb.inv_freq"].numel()
    turn = torch.exp(1j * torch.arange(x.shape[1])[:, None] * w["rotary_emb.inv_freq"].double())
    turn = turn.to(torch.complex128 if h.dtype == torch.float64 else torch.complex64)
    for b in range(sum(name.endswith("attn_qkv.weight") for name in w)):
        part = [p[:, None] for p in affine(f"blocks.{b}.adaLN_modulation", c).split(d, -1)]
        qkv = affine(f"blocks.{b}.attn_qkv", norm(h, w[f"blocks.{b}.norm1.weight"]) * (1 + part[1]) + part[0])
        out = []
        for k in range(d // (2 * half)):
            q, key, v = (qkv[..., i * d + k * 2 * half : i * d + (k + 1) * 2 * half] for i in range(3))
            q, key = (torch.complex(z[..., :half], z[..., half:]) * turn for z in (q, key))
            logits = (q @ key.conj().transpose(-1, -2)).real / math.sqrt(2 * half)
            out.append(logits.softmax(-1) @ v)
        h = h + part[2] * affine(f"blocks.{b}.attn_out", torch.cat(out, -1))
        m = norm(h, w[f"blocks.{b}.norm2.weight"]) * (1 + part[4]) + part[3]
        h = h + part[5] * affine(f"blocks.{b}.mlp.2", gelu(affine(f"blocks.{b}.mlp.0", m)))
    shift, scale = (p[:, None] for p in affine("output_layer.adaLN_modulation", c).split(d, -1))
    return norm(h, w["output_layer.norm_final.weight"]) * (1 + scale) + shift


def log_score(w: Mapping[str, Tensor], x: Tensor, sigma: Tensor, scale_by_sigma: bool) -> Tensor:
    """Log-scores [B, L, V], zero at the token that is there."""
    logits = hidden(w, x, sigma) @ w["output_layer.linear.weight"].T + w["output_layer.linear.bias"]
    if scale_by_sigma:
        lowered = torch.where(sigma < 0.5, torch.expm1(sigma), sigma.exp() - 1).log()
        logits = logits - lowered.to(logits.dtype)[:, None, None] - math.log(logits.shape[-1] - 1)
    return torch.scatter(logits, -1, x[..., None], torch.zeros_like(logits[..., :1]))

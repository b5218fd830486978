"""Unigram and bigram models, as baselines for a small language model."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ngram_bits"]


def ngram_bits(train_tokens: Tensor, valid_tokens: Tensor, dim: int, order: int) -> float:
    """Bits per token of a unigram or bigram model, a baseline for a small language model.

    The unigram model counts tokens and adds one to each count. The bigram model interpolates the counts of pairs with
    the unigram (Witten-Bell smoothing): ``p(y|x) = (c(xy) + k(x) p(y)) / (c(x) + k(x))``, where k(x) is the number of
    different tokens seen after x. Each row of a two-dimensional input is a separate text, as for a diffusion model
    trained on blocks: its first token is scored by the unigram.

    Args:
        train_tokens: text whose tokens are counted, [T] or [S, L], int64.
        valid_tokens: text to score, [T] or [S, L], int64.
        dim: number of tokens in the vocabulary.
        order: 1 for unigram, 2 for bigram.

    Returns:
        Mean bits per token of ``valid_tokens``.

    Raises:
        ValueError: ``order`` is neither 1 nor 2, a tensor is empty or has another shape, or a token is out of range.

    Source: Witten & Bell (1991), method C, in the interpolated form of Chen & Goodman (1998).
    """
    if order not in (1, 2):
        raise ValueError(f"order: expected 1 (unigram) or 2 (bigram), got {order}")
    for name, tokens in (("train_tokens", train_tokens), ("valid_tokens", valid_tokens)):
        if tokens.dim() not in (1, 2) or tokens.numel() == 0:
            raise ValueError(f"{name}: expected a non-empty tensor [T] or [S, L], got shape {list(tokens.shape)}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= dim:
            raise ValueError(f"{name}: expected tokens in [0, {dim}), got {int(tokens.min())} to {int(tokens.max())}")
    train, valid = (tokens.reshape(-1, tokens.shape[-1]) for tokens in (train_tokens, valid_tokens))
    unigram = torch.bincount(train.flatten(), minlength=dim).double() + 1
    unigram /= unigram.sum()
    prob = unigram[valid]
    if order == 2 and train.shape[1] > 1:
        pairs, counts = (train[:, :-1] * dim + train[:, 1:]).unique(return_counts=True)
        followers = torch.bincount(pairs // dim, minlength=dim)  # k(x)
        seen = torch.bincount(pairs // dim, weights=counts.double(), minlength=dim)  # c(x)
        first, wanted = valid[:, :-1], valid[:, :-1] * dim + valid[:, 1:]
        slot = torch.searchsorted(pairs, wanted).clamp_(max=len(pairs) - 1)
        count = torch.where(pairs[slot] == wanted, counts[slot], 0)
        smoothed = (count + followers[first] * prob[:, 1:]) / (seen + followers)[first]
        prob = torch.cat([prob[:, :1], torch.where(seen[first] > 0, smoothed, prob[:, 1:])], dim=1)
    return float(-prob.log2().mean())

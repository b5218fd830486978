"""The autoregressive baseline: a causal network on the same backbone that predicts each token from those before it.

The network reads MASK, which no text contains, before the first token. The process therefore stays absorbing, and
embedding and head have the rows of a diffusion model; MASK's logit is left out of the softmax. Time and noise play no
part.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from sedd.diffusion.diffusion import Diffusion, LossOptions, Objective
from sedd.network import KeyValueCache, Network
from sedd_ext import RankOne, linear_mean_prediction_loss

__all__ = ["Autoregressive", "Reader"]

EVEN = math.log(2)
"""The total noise at which half of the tokens are masked. There, the loss of a masked token is its cross-entropy."""


class _CausalNetwork(Network, Protocol):
    def hidden(
        self, x_t: Tensor, sigma: Tensor, cache: KeyValueCache | None = None, labels: Tensor | None = None
    ) -> Tensor: ...


class Autoregressive(Objective):
    """The exact negative log-likelihood: -Σ_i log p(x_0^i | x_0^1, ..., x_0^{i-1}) for each sequence, in nats."""

    autoregressive = True

    def check(self, process: RankOne) -> None:
        """The process must be absorbing."""
        if process.family != "absorbing":
            raise ValueError(
                "process: expected absorbing for the objective autoregressive, whose MASK token is read before the "
                f"first token, got {process.family}"
            )

    def check_network(self, network: Network) -> None:
        """The network must be causal."""
        if not getattr(network, "causal", False):
            raise ValueError(
                "network: expected a causal one, got one whose positions see those after them; use "
                "ModelConfig(causal=True)"
            )

    def loss(self, diffusion: Diffusion, x_0: Tensor, x_t: Tensor, t: Tensor, options: LossOptions) -> Tensor:
        """See :meth:`sedd.diffusion.Diffusion.loss`. ``x_t`` and ``t`` are ignored."""
        network, n = diffusion.network, diffusion.process.dim - 1
        hidden = network.hidden(_delayed(x_0, n), _no_noise(x_0))[:, options.given :]
        target = x_0[:, options.given :]
        head = network.head_parameters() if options.fused else None
        if head is None:
            logits = network.head(hidden)[..., :n].flatten(0, 1)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            nats = options.scale * F.cross_entropy(logits, target.flatten(), reduction="none").view(target.shape)
        else:
            masks = torch.full_like(target, n)
            nats = linear_mean_prediction_loss(
                hidden,
                *head,
                masks,
                target,
                EVEN,
                diffusion.process,
                loss_weight=options.scale,
                capacity=options.positions(target),
            )
        return nats.sum(1).float()


class Reader:
    """Reads sequences from left to right and predicts their next tokens, with keys and values kept between calls.

    Args:
        diffusion: an autoregressive model, in evaluation mode.
        length: the most tokens of a sequence.
        cached: keep keys and values. Without, each call reads all tokens again, with the same result.
    """

    def __init__(self, diffusion: Diffusion, length: int, *, cached: bool = True) -> None:
        self.network: Any = cast(_CausalNetwork, diffusion.network)
        self.mask_id = diffusion.process.dim - 1
        self.cache = KeyValueCache(length) if cached else None

    @torch.no_grad()
    def logits(self, tokens: Tensor, position: int) -> Tensor:
        """Logits of the token at a position, from the tokens before it.

        Args:
            tokens: the sequences [B, L], int64. Tokens before the position of an earlier call are those of that call.
            position: at least that of the call before plus 1.

        Returns:
            Logits [B, N], float32 or float64; MASK's has no meaning.
        """
        start = 0 if self.cache is None else self.cache.length
        text = _delayed(tokens[:, : position + 1], self.mask_id)[:, start:]
        hidden = self.network.hidden(text, _no_noise(text), self.cache)[:, -1]
        logits: Tensor = self.network.head(hidden)
        return logits if logits.dtype == torch.float64 else logits.float()


def _delayed(x_0: Tensor, mask_id: int) -> Tensor:
    """What the network reads to predict x_0 [B, L]: MASK, and all tokens but the last."""
    return F.pad(x_0[:, :-1], (1, 0), value=mask_id)


def _no_noise(x_0: Tensor) -> Tensor:
    """A total noise for a network that ignores it."""
    return torch.ones(1, device=x_0.device)

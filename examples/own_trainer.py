"""score_entropy_loss in a trainer of one's own: noise the tokens, predict log-scores, weigh the loss with σ(t).

The model here is a stand-in that knows nothing but the noise level; it learns how frequent the tokens are. Run it:
``python examples/own_trainer.py``.
"""

import torch

from sedd_ext import Absorbing, sample_transition, score_entropy_loss


class Frequencies(torch.nn.Module):
    """One log-score per token, scaled by the noise level: the least a score model can be."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(dim))

    def forward(self, x_t: torch.Tensor, sigma_bar: torch.Tensor) -> torch.Tensor:
        """Log-scores [B, L, N] for tokens [B, L] at total noise [B]."""
        return self.bias.expand(*x_t.shape, -1) - sigma_bar.expm1().log()[:, None, None]


def train(steps: int = 300) -> tuple[float, float]:
    """Trains on random tokens of unequal frequency.

    Returns:
        The mean loss per token over the first and over the last 50 steps, in nats.
    """
    torch.manual_seed(0)
    frequencies = torch.tensor([0.5, 0.25, 0.15, 0.1])
    graph = Absorbing(len(frequencies))
    model = Frequencies(graph.dim)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        x_0 = torch.multinomial(frequencies, 64 * 16, replacement=True).view(64, 16)
        t = 1 - torch.rand(64)  # in (0, 1]: at 0 there is no noise, and nothing to learn
        # [five lines]
        sigma_bar, sigma = -torch.log1p(-0.999 * t), 0.999 / (1 - 0.999 * t)  # log-linear noise: total, and its rate
        x_t = sample_transition(x_0, sigma_bar[:, None], graph)
        log_score = model(x_t, sigma_bar)  # [B, L, N]: your network
        loss = score_entropy_loss(log_score, x_t, x_0, sigma_bar[:, None], graph)  # [B, L]
        (sigma[:, None] * loss).sum(-1).mean().backward()
        # [/five lines]
        optimizer.step()
        optimizer.zero_grad()
        losses.append((sigma[:, None] * loss).mean().item())
    return sum(losses[:50]) / 50, sum(losses[-50:]) / 50


if __name__ == "__main__":
    first, last = train()
    print(f"loss per token: {first:.3f} nats at first, {last:.3f} at last; the entropy of the tokens is 1.208")

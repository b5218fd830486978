"""Likelihood: the evidence bound of a diffusion model on text, and the exact value of an autoregressive one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.schedule import Schedule
from sedd.progress import track
from sedd.unfinished import Unfinished, identity
from sedd_ext import RankOne

__all__ = ["ElboResult", "closed_terms", "elbo", "joined", "prior_kl", "with_onset"]


@dataclass(frozen=True)
class ElboResult:
    """An estimate of the bound -log p(text) ≤ ∫ σ(t) Σ L dt + prior term, with the draws it was made from.

    Attributes:
        sequences: estimated upper bound of each sequence in nats [S], float64: the mean of its draws plus its prior
            term.
        length: tokens in each sequence.
        times: t of each draw [S, draws], float64.
        integrand: σ(t) Σ_i L of each draw [S, draws], float64, in nats per sequence and unit of time.
        onset: for a schedule with σ̄(0) > 0, the integrand of the noise from 0 to σ̄(0) [S, D]; else None.
        prior: the contribution of the terms without Monte Carlo noise (:func:`closed_terms`) in nats per token.
        n_bytes: number of bytes of the scored text, if known.
        exact: the result of an autoregressive model: each sequence has one draw, its -log p(text), without Monte Carlo
            noise and prior term.
    """

    sequences: Tensor
    length: int
    times: Tensor
    integrand: Tensor
    prior: float
    n_bytes: int | None = None
    onset: Tensor | None = None
    exact: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens scored."""
        return self.sequences.numel() * self.length

    @property
    def nats_per_token(self) -> float:
        """The bound: mean over all tokens."""
        return float(self.sequences.mean()) / self.length

    @property
    def standard_error(self) -> float:
        """Standard error of ``nats_per_token`` as an estimate for all text of this kind; NaN for one sequence.

        It is the standard deviation over sequences / √S, and includes both the differences between texts and the Monte
        Carlo noise. It is a little too large, because it ignores that the times are spread evenly over the sequences.
        """
        count = self.sequences.numel()
        return float(self.sequences.std()) / math.sqrt(count) / self.length if count > 1 else math.nan

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of ``nats_per_token`` as an estimate of the bound of these very sequences; NaN for one draw.

        0 for an exact result.

        The draws of a sequence are stratified in t. The variances within the strata, Σ_k Var_k, are estimated by half
        the sum of squared differences between neighbouring draws. The first and the last draw have only one neighbour,
        so their squares are added once more. The trend over t counts as noise, which makes the error a little too
        large. The sequences are treated as independent. More draws make the error smaller.
        """
        if self.exact:
            return 0.0
        parts = [self.integrand] if self.onset is None else [self.integrand, self.onset]
        if min(part.shape[1] for part in parts) < 2:
            return math.nan
        variance = 0.0
        for part in parts:
            squares = part.diff(dim=1).square()
            total = squares.sum(dim=1) + squares[:, 0] + squares[:, -1]
            variance += float(total.sum()) / 2 / part.shape[1] ** 2
        return math.sqrt(variance) / len(self.integrand) / self.length

    @property
    def bits_per_token(self) -> float:
        """``nats_per_token`` in bits (bits per character if the tokens are characters)."""
        return self.nats_per_token / math.log(2)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the text; None if its number of bytes is not known."""
        return None if self.n_bytes is None else self.bits_per_token * self.tokens / self.n_bytes

    @property
    def perplexity(self) -> float:
        """exp(mean nats per token)."""
        return float(torch.tensor(self.nats_per_token, dtype=torch.float64).exp())  # infinite where math.exp raises

    @property
    def perplexity_mean_of_exp(self) -> float:
        """The mean over sequences of exp(nats per token), as the SEDD paper averages. Never below ``perplexity``."""
        return float((self.sequences / self.length).exp().mean())


def joined(results: Sequence[ElboResult]) -> ElboResult:
    """One result for the sequences of several, which all have the same length, draws and schedule."""

    def together(name: str) -> Tensor:
        return torch.cat([getattr(result, name) for result in results])

    first, counts = results[0], [len(result.sequences) for result in results]
    return ElboResult(
        sequences=together("sequences"),
        length=first.length,
        times=together("times"),
        integrand=together("integrand"),
        prior=sum(result.prior * count for result, count in zip(results, counts, strict=True)) / sum(counts),
        n_bytes=None if first.n_bytes is None else sum(result.n_bytes or 0 for result in results),
        onset=None if first.onset is None else together("onset"),
        exact=first.exact,
    )


class Onset(Schedule):
    """The noise from 0 to the σ̄(0) > 0 at which another schedule starts, as σ̄(0) t².

    For small σ̄ a token is changed with probability σ̄, and its loss is then proportional to 1/σ̄. With times drawn evenly
    in σ̄ the estimate would have infinite variance; drawn evenly in t, it is finite.
    """

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    def total(self, t: Tensor) -> Tensor:
        return self.sigma * t.double() ** 2

    def rate(self, t: Tensor) -> Tensor:
        return 2 * self.sigma * t.double()


def elbo(
    diffusion: Diffusion,
    blocks: Tensor,
    *,
    draws: int,
    n_bytes: int | None = None,
    labels: Tensor | None = None,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    autocast_dtype: torch.dtype | None = None,
    unfinished: Path | None = None,
    progress: bool = False,
) -> ElboResult:
    """Monte Carlo estimate of the likelihood bound of Theorem 3.6 on given text.

    ``-log p(x_0) ≤ ∫₀¹ E[σ(t) Σ_i L(x_t^i, x_0^i)] dt + D_KL(p_{1|0}(·|x_0) ‖ p_base)``

    The integral covers all of (0, 1], although training starts at a small ε. A schedule with σ̄(0) > 0 (geometric)
    leaves out the noise from 0 to σ̄(0). That part is integrated separately, with an eighth as many additional draws,
    but at least two. The bound is therefore always one for the clean text.

    Times are stratified: the k-th draw of a sequence lies in [k/draws, (k+1)/draws), and the k-th draws of all
    sequences are spread evenly there. Each draw is uniform within its part, so the estimate has no bias. For many
    sequences a few draws each are enough.

    An autoregressive model has no bound but the exact -log p(x_0), in one call of the model for each sequence.

    Args:
        diffusion: the model. It is put into evaluation mode, and back into its own mode at the end.
        blocks: text [S, L], int64, without MASK tokens.
        draws: times drawn per sequence; of no effect for an autoregressive model.
        n_bytes: number of bytes of text in the blocks, for ``bits_per_byte``.
        labels: for a network with classes: the class of each sequence [S], int64, on which the likelihood is then
            conditional; None for no class.
        batch_size: sequences in a call of the model. The noise does not depend on it.
        generator: random number generator, on ``device``; torch's default one if None.
        device: where to compute; the model's device if None.
        autocast_dtype: run the model under autocast in this dtype, e.g. torch.bfloat16.
        unfinished: a file for partial results, written every half minute and when the evaluation is interrupted. Called
            again with the same arguments, the evaluation continues from it and gives the same result. The caller
            deletes the file once it has saved the result.
        progress: show a progress bar.

    Returns:
        The estimate with its errors, see :class:`ElboResult`.

    Raises:
        TypeError: ``blocks`` is not int64.
        ValueError: ``blocks`` is empty, not [S, L], or contains MASK or a token outside the vocabulary; a count is
            below 1; ``unfinished`` is given without a generator, or is a file of another evaluation.
        OSError: ``unfinished`` cannot be written.
        ImportError: ``progress`` without rich, ``unfinished`` without safetensors.

    Source: SEDD (Lou, Meng & Ermon 2024), theorem 3.6; p_base as explained at :func:`prior_kl`.
    """
    for name, value in (("draws", draws), ("batch_size", batch_size), ("n_bytes", n_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    process, schedule = diffusion.process, diffusion.schedule
    _check_blocks(blocks, process)
    if labels is not None and labels.shape != blocks.shape[:1]:
        raise ValueError(f"labels: expected shape [{len(blocks)}], one for each sequence, got {list(labels.shape)}")
    device = torch.device(device) if device is not None else diffusion.device
    n_sequences, length = blocks.shape
    exact = diffusion.objective.autoregressive

    # of the schedule's own part, then of the part before it
    if exact:
        times = torch.ones(n_sequences, 1, dtype=torch.float64, device=device)
    else:
        times = _stratified(n_sequences, draws, generator, device)
    before = with_onset(diffusion)[1:]
    parts = [
        (diffusion, times),
        *((part, _stratified(n_sequences, max(2, draws // 8), generator, device)) for part in before),
    ]
    values = torch.empty(sum(t.numel() for _, t in parts), dtype=torch.float64, device=device)
    saved, done = None, 0
    if unfinished is not None:
        if generator is None:
            raise ValueError("unfinished: an evaluation that may be resumed needs a generator of its own")
        given = () if labels is None else (labels,)
        what = (*diffusion.parameters(), process.stationary, blocks, *given, *(t for _, t in parts))
        settings = f"{process} {schedule} {getattr(diffusion.network, 'config', '')} {batch_size} {autocast_dtype}"
        saved = Unfinished(unfinished, identity(what, settings))
        done = saved.resume(values)
    noise = int(torch.randint(2**62, (1,), generator=generator, device=device))
    training = diffusion.training
    diffusion.train(False)
    try:
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            _integrand(parts, blocks, labels, values, done, batch_size, noise, saved, progress)
    finally:
        diffusion.train(training)
        if saved is not None:  # after Ctrl-C too
            saved.write()
    integrand, *early = (
        part.view(t.shape).clone()
        for part, (_, t) in zip(values.cpu().split([t.numel() for _, t in parts]), parts, strict=True)
    )
    prior = closed_terms(diffusion, blocks).sum(dim=1)
    return ElboResult(
        sequences=prior + integrand.mean(dim=1) + sum(part.mean(dim=1) for part in early),
        length=length,
        times=times.cpu(),
        integrand=integrand,
        prior=float(prior.mean()) / length,
        n_bytes=n_bytes,
        onset=early[0] if early else None,
        exact=exact,
    )


@torch.no_grad()
def _integrand(
    parts: Sequence[tuple[Diffusion, Tensor]],
    blocks: Tensor,
    labels: Tensor | None,
    values: Tensor,
    done: int,
    batch_size: int,
    seed: int,
    saved: Unfinished | None,
    progress: bool,
) -> None:
    """Writes the losses of all blocks at all times of all parts into ``values``, of which ``done`` are there.

    The noise depends on the seed and on the place in ``values``, and not on ``batch_size``.
    """
    generator = torch.Generator(values.device)
    batches = [
        (part, t.flatten()[first : first + batch_size], owner[first : first + batch_size])
        for part, t in parts
        for owner in [torch.arange(len(blocks)).repeat_interleave(t.shape[1])]
        for first in range(0, t.numel(), batch_size)
    ]
    first = 0
    for part, t, owner in track(batches, "likelihood", progress):
        last = first + len(owner)
        if last > done:
            x_0 = blocks[owner.to(blocks.device)].to(values.device)
            x_t = part.noise(x_0, t, generator=generator.manual_seed(seed), first=first)
            classes = None if labels is None else labels[owner.to(labels.device)].to(values.device)
            values[first:last] = part.loss(x_0, x_t, t, labels=classes).double()
            done = last
            if saved is not None:
                saved.update(values[:done])
        first = last


def _stratified(n_sequences: int, draws: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """Times [S, draws] in (0, 1], column k in the k-th of ``draws`` equal parts. 0 has no noise and is left out."""
    # the place within its stratum of every (sequence, draw): a random order of S evenly spread points, moved as a whole
    uniform = torch.rand(n_sequences + 1, draws, generator=generator, dtype=torch.float64, device=device)
    place = (uniform[:-1].argsort(dim=0) + uniform[-1]) / n_sequences
    return (torch.arange(1, draws + 1, device=device) - place) / draws


def with_onset(diffusion: Diffusion) -> list[Diffusion]:
    """The models whose integrals add up to the bound.

    They are the model itself and, if its schedule starts at σ̄(0) > 0, the model under the noise from 0 to σ̄(0).
    """
    start = float(diffusion.schedule.total(torch.zeros(())))
    if start == 0 or diffusion.objective.autoregressive or diffusion.objective.reconstructs:
        return [diffusion]
    return [diffusion, diffusion.with_schedule(Onset(start))]


@torch.no_grad()
def closed_terms(diffusion: Diffusion, x_0: Tensor) -> Tensor:
    """The terms of the bound that have a formula: the prior term, and what the objective reconstructs.

    Args:
        diffusion: the model.
        x_0: tokens, any shape, int64, none of them MASK.

    Returns:
        Nats of each token, float64, of the shape of ``x_0``, on the CPU. 0 for an autoregressive model.
    """
    if diffusion.objective.autoregressive:
        return torch.zeros(x_0.shape, dtype=torch.float64)
    nats = prior_kl(x_0, float(diffusion.schedule.total(torch.ones(()))), diffusion.process)
    return nats + diffusion.objective.reconstruction(diffusion, x_0.to(diffusion.device)).double().cpu()


def prior_kl(x_0: Tensor, sigma: float, process: RankOne) -> Tensor:
    """The prior term of the bound, D_KL(p_{T|0}(·|x_0) ‖ p_base), for each token in closed form.

    With ``a = exp(-σ̄(T))``, ``p_{T|0} = a δ_{x_0} + (1-a) π``. The base is the distribution of a uniformly random token
    after the noise up to T: ``p_base = a u + (1-a) π``, with u uniform over all tokens but MASK. For the uniform
    process it equals π, the paper's choice. For the absorbing process the base π would make the term infinite, because
    a fraction a of the text is still there at T; published figures leave the term out. With this base it is a·log n
    nats per token.

    Args:
        x_0: tokens, any shape, int64, none of them MASK.
        sigma: σ̄(T), the total noise at the end.
        process: the process.

    Returns:
        Nats, float64, of the shape of ``x_0``, on the CPU.
    """
    a, b = math.exp(-sigma), -math.expm1(-sigma)
    stationary = process.stationary
    base = torch.full_like(stationary, a / (process.dim - (process.mask_id is not None)))
    if process.mask_id is not None:
        base[process.mask_id] = 0.0
    base += b * stationary
    # Σ_y p log(p/base), first as if x_0 had no mass of its own, then with the term of y = x_0 exchanged
    away = torch.special.entr(b * stationary).neg() - torch.special.xlogy(b * stationary, base)
    home: Tensor = torch.special.xlogy(a + b * stationary, (a + b * stationary) / base)
    terms: Tensor = away.sum() - away + torch.where(base > 0, home, 0.0)
    return terms[x_0.cpu()]


def _check_blocks(blocks: Tensor, process: RankOne) -> None:
    if blocks.dtype != torch.int64:
        raise TypeError(f"blocks: expected an int64 tensor [S, L], got {blocks.dtype}")
    if blocks.dim() != 2 or blocks.numel() == 0:
        raise ValueError(f"blocks: expected a non-empty tensor [S, L], got shape {list(blocks.shape)}")
    low, high = (int(value) for value in blocks.aminmax())
    if low < 0 or high >= process.dim:
        raise ValueError(f"blocks: expected tokens in [0, {process.dim}), got values from {low} to {high}")
    if process.mask_id is not None and bool((blocks == process.mask_id).any()):
        raise ValueError(f"blocks: expected text, got the MASK token {process.mask_id} in it")

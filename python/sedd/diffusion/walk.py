"""The sequences on their way from noise to text, and the calls of network and operators that samplers need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sedd.diffusion.diffusion import Diffusion
from sedd.diffusion.schedule import Schedule
from sedd_ext import (
    Euler,
    GeneralizedMasked,
    RankOne,
    Tweedie,
    Unmasked,
    linear_reverse_sample,
    linear_unmask,
    reverse_probs,
    reverse_sample,
    sample_transition,
    unmask,
)
from sedd_ext.unmask import STATISTICS

__all__ = ["AnyStep", "Walk"]

AnyStep = Tweedie | Euler | GeneralizedMasked
"""A reverse step."""


class Walk:
    """The sequences that a sampler moves from noise to text, and what it can do with them.

    Attributes:
        diffusion: the model.
        tokens: the sequences [B, L], int64.
        free: positions that the sampler may change [B, L], bool; the others are given.

    Args:
        diffusion: the model, in evaluation mode.
        tokens: where the walk starts: noise at t = 1, and the given tokens.
        free: see above.
        temperature: see :func:`sedd_ext.reverse_sample`.
        top_p: see :func:`sedd_ext.reverse_sample`.
        fused: draw from a linear head tile by tile, without log-scores of the whole vocabulary.
        generator: random number generator; torch's default one if None.
        autocast_dtype: dtype that a linear head is cast to once, for all steps.
        labels: for a network with classes: the class of each sequence [B], int64; None for no class.
        guidance: how much the class counts: log-scores, or log-probabilities of the clean token, are
            ``without + guidance * (with - without)``, those without and with the class. 1: they are those with the
            class. Otherwise each step calls the network twice.
        whole_batch: all positions go through network and head in every step, so that no step waits for a GPU to find
            out which ones need it. The tokens are the same, but for the rounding of products; with a temperature or
            top_p other than 1 they have other random numbers.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        tokens: Tensor,
        free: Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        fused: bool = True,
        generator: torch.Generator | None = None,
        autocast_dtype: torch.dtype | None = None,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        whole_batch: bool = False,
    ) -> None:
        self.diffusion, self.tokens, self.free = diffusion, tokens, free
        self.generator, self.whole_batch = generator, whole_batch
        self.labels, self.guidance = labels, guidance
        self._options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "generator": generator}
        self._head = diffusion.network.head_parameters() if fused else None
        if self._head is not None and autocast_dtype is not None:
            weight, bias = (None if tensor is None else tensor.detach().to(autocast_dtype) for tensor in self._head)
            assert weight is not None
            self._head = weight, bias
        # of a network that does not depend on the time: the tokens it has seen last [B, L], and its states [B, L, d]
        self._seen: Tensor | None = None
        self._states: Tensor | None = None

    @property
    def process(self) -> RankOne:
        """The noise process."""
        return self.diffusion.process

    @property
    def schedule(self) -> Schedule:
        """The noise schedule."""
        return self.diffusion.schedule

    def open(self) -> Tensor:
        """Positions that a reverse step can change [B, L], bool: free and, for absorbing processes, masked."""
        return self.free & (self.tokens == self.process.mask_id) if self.process.family == "absorbing" else self.free

    def positions(self, where: Tensor) -> Tensor:
        """The indices of the positions ``where`` [B, L] in the flattened batch, in order [R].

        With ``whole_batch`` those of all other positions follow, so that there are always B L of them.
        """
        flat = where.reshape(-1)
        return flat.argsort(descending=True, stable=True) if self.whole_batch else flat.nonzero()[:, 0]

    @torch.no_grad()
    def draw(self, where: Tensor, t: Tensor | float, step: AnyStep, *, denoise: bool = False) -> Tensor:
        """Draws tokens after a reverse step, without writing them.

        Args:
            where: positions to draw [B, L], bool.
            t: time of the sequences, one number or [B].
            step: the step; its noise is one number or [B].
            denoise: the last step: MASK is never drawn.

        Returns:
            Tokens [R] for the R positions, in the order of :meth:`positions`.
        """
        rows = self.positions(where)
        hidden, x_t, options = self._hidden(where, rows, t)
        options.update(self._options, denoise=denoise)
        step = self._per_position(step, rows)
        if self._head is not None:
            capacity = len(rows) if self.whole_batch else None
            return linear_reverse_sample(hidden, *self._head, x_t, step, self.process, capacity=capacity, **options)
        return reverse_sample(self.diffusion.network.head(hidden), x_t, step, self.process, **options)

    @torch.no_grad()
    def probs(self, where: Tensor, t: Tensor | float, step: AnyStep, *, denoise: bool = False) -> Tensor:
        """Probabilities [R, N] of the tokens that :meth:`draw` draws from, in float32 or float64."""
        rows = self.positions(where)
        hidden, x_t, options = self._hidden(where, rows, t)
        log_score = self.diffusion.network.head(hidden)
        log_score = log_score if log_score.dtype == torch.float64 else log_score.float()
        step = self._per_position(step, rows)
        return reverse_probs(log_score, x_t, step, self.process, denoise=denoise, **options)

    @torch.no_grad()
    def unmask(self, where: Tensor, t: Tensor | float, *, statistics: Sequence[str] = STATISTICS) -> Unmasked:
        """Draws clean tokens at positions, without writing them, and measures how sure the model is of each.

        Args:
            where: R positions [B, L], bool.
            t: time of the sequences, one number or [B].
            statistics: see :func:`sedd_ext.unmask`.
        """
        rows = self.positions(where)
        hidden, x_t, options = self._hidden(where, rows, t)
        # a position has the same numbers whatever the other sequences do
        draw: dict[str, Any] = {"row_ids": rows, "mask_id": self.process.mask_id, "statistics": statistics}
        draw.update(self._options)
        if self.process.family != "absorbing":  # the scores depend on the token at the position
            step = Tweedie(self._here(self.schedule.total(torch.as_tensor(t, dtype=torch.float64))))
            logits = self.diffusion.network.head(hidden)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            probs = reverse_probs(logits, x_t, self._per_position(step, rows), self.process, denoise=True, **options)
            return unmask(probs.log(), **draw)
        if self._head is not None:
            return linear_unmask(hidden, *self._head, **draw)
        return unmask(self.diffusion.network.head(hidden), **draw)

    def choose(self, logits: Tensor) -> Tensor:
        """Draws tokens [R] from softmax(logits [R, n]) without the last one, with the walk's temperature and top_p."""
        return unmask(logits, mask_id=logits.shape[1] - 1, statistics=(), **self._options).token

    def uniform(self, *shape: int) -> Tensor:
        """Random numbers in [0, 1), float64."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64, device=self.tokens.device)

    def write(self, where: Tensor, tokens: Tensor, only: Tensor | None = None) -> None:
        """Puts tokens [R] at the positions ``where`` [B, L]; given ``only`` [B, L], at those of them alone."""
        written = self.tokens.masked_scatter(where, tokens)
        self.tokens = written if only is None else torch.where(where & only, written, self.tokens)

    def remask(self, where: Tensor) -> None:
        """Puts MASK at the positions ``where`` [B, L].

        Raises:
            ValueError: the process has no MASK.
        """
        if self.process.mask_id is None:
            raise ValueError(f"remask: expected a process with a MASK token, got {self.process}")
        self.tokens = self.tokens.masked_fill(where, self.process.mask_id)

    def step(self, t: Tensor | float, step: AnyStep, *, denoise: bool = False) -> None:
        """Takes a reverse step at all open positions; calls nothing if there are none."""
        where = self.open()
        if self._any(where):
            self.write(where, self.draw(where, t, step, denoise=denoise))

    def fill(self, where: Tensor, t: Tensor | float) -> None:
        """Draws clean tokens at the positions ``where`` [B, L] and writes them; calls nothing if there are none."""
        if self._any(where):
            self.write(where, self.unmask(where, t, statistics=()).token)

    def noise(self, dsigma: float) -> None:
        """Adds noise Δσ̄ at all free positions."""
        noised = sample_transition(self.tokens, dsigma, self.process, generator=self.generator)
        self.tokens = torch.where(self.free, noised, self.tokens)

    def _any(self, where: Tensor) -> bool:
        """Whether there may be such a position.

        If there is none, the seed of a draw is drawn all the same, so that later random numbers do not depend on
        ``whole_batch``.
        """
        if self.whole_batch or bool(where.any()):
            return True
        torch.randint(2**63 - 1, (1,), generator=self.generator, device=self.tokens.device)
        return False

    def _here(self, values: Tensor) -> Tensor:
        """The values on the device of the tokens, without waiting for a copy if it is one number."""
        device = self.tokens.device
        if values.is_cpu and device.type != "cpu" and values.numel() == 1:
            return torch.full(values.shape, float(values), dtype=values.dtype, device=device)
        return values.to(device)

    def _per_position(self, step: AnyStep, rows: Tensor) -> AnyStep:
        """A step whose noise is one number, or one for each of the R positions."""
        if isinstance(step, GeneralizedMasked):  # its times are those of all sequences
            return step
        noise = step.noise
        if not isinstance(noise, Tensor) or noise.numel() == 1:
            return step
        return type(step)(self._here(noise)[rows // self.tokens.shape[1]])

    def _hidden(self, where: Tensor, rows: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """States [R, d], tokens [R] and options of the steps at the R positions, with few calls of the network.

        Sequences without such a position are left out. A network that does not depend on the time sees a sequence again
        only after one of its tokens has changed.
        """
        network = self.diffusion.network
        time = torch.as_tensor(t, dtype=torch.float64).reshape(-1)
        sigma = self._here(self.schedule.total(time))
        x_t, active = self.tokens.flatten()[rows], where.any(1)
        if self.whole_batch:
            hidden = self._states_of(None, sigma).flatten(0, 1)[rows]
        elif network.time_conditioning:
            given = sigma if sigma.numel() == 1 else sigma[active]
            hidden = self._states_of(active, given)[where[active]]
        else:
            if self._seen is None or self._states is None:
                self._seen, self._states = self.tokens.clone(), self._states_of(None, sigma)
            else:
                stale = active & (self.tokens != self._seen).any(1)
                if bool(stale.any()):
                    self._seen[stale] = self.tokens[stale]
                    given = sigma if sigma.numel() == 1 else sigma[stale]
                    self._states[stale] = self._states_of(stale, given)
            hidden = self._states[where]
        by_row = sigma if sigma.numel() == 1 else sigma[rows // self.tokens.shape[1]]
        return hidden, x_t, self.diffusion.step_options(by_row, x_t)

    def _states_of(self, which: Tensor | None, sigma: Tensor) -> Tensor:
        """States [*, L, d] of the sequences ``which`` [B], bool, or of all, at their total noise.

        The head is affine, so what guidance does to log-scores or logits, it may do to states.
        """
        network = self.diffusion.network
        tokens = self.tokens if which is None else self.tokens[which]
        if self.labels is None:
            return network.hidden(tokens, sigma)
        conditional = network.hidden(tokens, sigma, labels=self.labels if which is None else self.labels[which])
        if self.guidance == 1:
            return conditional
        return torch.lerp(network.hidden(tokens, sigma), conditional, self.guidance)

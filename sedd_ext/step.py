"""The two reverse steps, Tweedie and Euler: the argument ``step`` of the operators that sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

__all__ = ["Euler", "Step", "Tweedie"]


@dataclass(frozen=True, eq=False)
class Tweedie:
    """A Tweedie τ-leaping step: the optimal reverse step if each position is drawn independently.

    With s = exp(log_score), s_x = 1, S = Σ_z s_z and Δ = σ̄(t) - σ̄(t - Δt)::

        p(y) ∝ max(0, e^Δ s_y + (1 - e^Δ) π_y S) · (e^{-Δ} [y = x] + (1 - e^{-Δ}) π_x)

    Args:
        dsigma: Δ > 0, a number or a floating-point tensor that broadcasts to [*B]. The last, denoising step of a
            sampler has Δ = σ̄(t).

    Source: SEDD (Lou, Meng & Ermon 2024), Theorem 4.2, eq. 19; clamped at 0 and normalised.
    """

    dsigma: Tensor | float
    name: ClassVar[str] = "tweedie"
    """Its name in ``torch.ops.sedd_ext``."""

    @property
    def noise(self) -> Tensor | float:
        """Δ."""
        return self.dsigma


@dataclass(frozen=True, eq=False)
class Euler:
    """An Euler (τ-leaping) step.

    With s = exp(log_score)::

        p(y) = Δt σ(t) π_x s_y for y ≠ x,   p(x) = max(0, 1 - Σ_{y≠x} p(y)),   then normalised

    Args:
        step: Δt σ(t) > 0, the step size times the noise rate, a number or a floating-point tensor that broadcasts to
            [*B].

    Source: SEDD (Lou, Meng & Ermon 2024), eq. 17; clamped at 0 and normalised.
    """

    step: Tensor | float
    name: ClassVar[str] = "euler"
    """Its name in ``torch.ops.sedd_ext``."""

    @property
    def noise(self) -> Tensor | float:
        """Δt σ(t)."""
        return self.step


Step = Tweedie | Euler

NOISE_NAME = {Tweedie.name: "dsigma", Euler.name: "step"}
"""The name of the noise of a step in error messages."""


def check_step(value: object) -> Step:
    """Checks that ``value`` is a reverse step."""
    if not isinstance(value, (Tweedie, Euler)):
        got = f"a {value.dtype} tensor" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"step: expected Tweedie(dsigma) or Euler(step), got {got}")
    return value

"""The two reverse steps, Tweedie and Euler: the argument ``step`` of the operators that sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

__all__ = ["Euler", "GeneralizedMasked", "Step", "Tweedie"]


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


@dataclass(frozen=True, eq=False)
class GeneralizedMasked:
    """A step of masked diffusion in which every token has a schedule of its own, α_k(t) = 1 - t^{w_k}.

    From time t to s < t, with the prediction μ of the clean token, for a masked position::

        p(k) = μ_k (1 - (s/t)^{w_k}) for k ≠ MASK,   p(MASK) = the rest

    At s = 0, p(k) = μ_k. For an absorbing process and ``parameterization="mean"`` only.

    Args:
        s: the earlier time, 0 ≤ s < t, a number or a floating-point tensor that broadcasts to [*B].
        t: the current time, likewise.
        power: w > 0, a floating-point tensor [N]; the entry of MASK is ignored.

    Source: MD4 (Shi et al. 2024), its generalised form GenMD4.
    """

    s: Tensor | float
    t: Tensor | float
    power: Tensor
    name: ClassVar[str] = "generalized_masked"
    """Its name in ``torch.ops.sedd_ext``."""


Step = Tweedie | Euler
MeanStep = Tweedie | Euler | GeneralizedMasked

NOISE_NAME = {Tweedie.name: "dsigma", Euler.name: "step"}
"""The name of the noise of a step in error messages."""


def check_step(value: object) -> Step:
    """Checks that ``value`` is a reverse step."""
    if not isinstance(value, (Tweedie, Euler)):
        got = f"a {value.dtype} tensor" if isinstance(value, Tensor) else repr(value)
        if isinstance(value, GeneralizedMasked):
            got = "GeneralizedMasked, which needs parameterization='mean'"
        raise TypeError(f"step: expected Tweedie(dsigma) or Euler(step), got {got}")
    return value


def check_mean_step(value: object) -> MeanStep:
    """Checks that ``value`` is a reverse step from a mean prediction."""
    if not isinstance(value, (Tweedie, Euler, GeneralizedMasked)):
        got = f"a {value.dtype} tensor" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"step: expected Tweedie(dsigma), Euler(step) or GeneralizedMasked(s, t, power), got {got}")
    return value

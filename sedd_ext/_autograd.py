"""Gradients that can be computed once only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__: list[str] = []


def gradient_function(loss: str, compute: Callable[..., Any]) -> type[torch.autograd.Function]:
    """A function of autograd that computes the gradient of a loss.

    Its own backward raises, because a second derivative would silently lack terms.

    Args:
        loss: the name of the loss, for the error.
        compute: computes the gradient.
    """

    class Gradient(torch.autograd.Function):
        """Computes the gradient."""

        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            return compute(*arguments)

        @staticmethod
        def backward(ctx: Any, *_: Tensor) -> None:
            raise RuntimeError(f"{loss}: differentiable once only, and this asks for a second derivative")

    return Gradient

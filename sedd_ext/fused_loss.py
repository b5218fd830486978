"""What the losses with a fused output head share: the operators of a loss, and its gradients.

The gradients are computed together with the loss, for an upstream gradient of 1 in every row. If the upstream gradient
is another number, the same for all rows, the backward pass scales them. If it differs from row to row, the backward
pass computes them again, with the head's matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ._autograd import gradient_function
from ._dispatch import compute_dtype, may_wait, per_row
from ._operators import OPERATORS, define, schema

__all__: list[str] = []


def common_gradient(grad_loss: Tensor, capacity: int | None) -> Tensor | None:
    """The upstream gradient, if it is known to be the same number for all rows, which is the usual case; else None.

    The gradient of a sum has stride 0, which shows this without a read. Other numbers are compared if the operator may
    wait for the device; computing the gradients again is always correct.
    """
    if grad_loss.numel() == 0:
        return grad_loss.new_ones(())
    first = grad_loss[(0,) * grad_loss.dim()]
    if all(stride == 0 or size == 1 for stride, size in zip(grad_loss.stride(), grad_loss.shape, strict=True)):
        return first
    return first if may_wait(grad_loss, capacity) and bool((grad_loss == first).all()) else None


def empty_results(a: Any, names: Sequence[str] = ("hidden", "weight", "bias")) -> tuple[Tensor, ...]:
    """Memory for the loss [*B] and the gradients of the named arguments; a gradient that is not needed is empty."""
    gradients = []
    for name in names:
        value = a.weight[:, 0] if name == "bias" and a.bias is None else getattr(a, name)
        gradients.append(value.new_empty(value.shape if getattr(a, f"grad_{name}") else (0,)))
    return a.hidden.new_empty(a.x_t.shape, dtype=compute_dtype(a.dtype)), *gradients


def row_weights(
    reduction: str, loss_weight: Tensor | float | None, batch: torch.Size, device: torch.device
) -> Tensor | None:
    """The factor of the loss of each position, [*B], float64, or None for 1: that of the caller, and that of a mean."""
    if reduction == "mean":
        scale = 1.0 / max(1, batch.numel())
        loss_weight = scale if loss_weight is None else loss_weight * scale
    return None if loss_weight is None else per_row("loss_weight", loss_weight, batch, device)


def shared_arguments(
    reduction: str, loss_weight: Tensor | float | None, batch: torch.Size, device: torch.device, **parts: Tensor | None
) -> dict[str, Any]:
    """The arguments that all losses share: ``loss_weight``, and for each differentiable part ``grad_NAME``.

    Args:
        reduction: the reduction of the loss; a mean goes into the weights, which the gradients then contain.
        loss_weight: a factor for the loss of each position, or None.
        batch: the shape of the batch.
        device: the device of the loss.
        **parts: the tensors that may need a gradient.
    """
    enabled = torch.is_grad_enabled()
    return {
        "loss_weight": row_weights(reduction, loss_weight, batch, device),
        **{f"grad_{name}": enabled and part is not None and part.requires_grad for name, part in parts.items()},
    }


class FusedLoss:
    """A loss with a fused head: registers ``NAME`` and ``NAME_backward``; a call gives the differentiable loss [*B].

    Args:
        name: the name of the operator.
        arguments: the NamedTuple of its arguments: first the tensors, among them ``hidden``, ``weight``, ``bias``,
            ``x_t`` and ``loss_weight``, then options, among them ``dtype``, ``capacity`` and for each of ``names`` a
            bool ``grad_NAME``, whether its gradient is needed.
        forward: computes the loss and the gradients, see :func:`empty_results`.
        names: the arguments that get a gradient; the first is ``hidden``.
    """

    def __init__(
        self,
        name: str,
        arguments: Any,
        forward: Callable[..., tuple[Tensor, ...]],
        names: Sequence[str] = ("hidden", "weight", "bias"),
    ) -> None:
        self.name, self.arguments, self.names = name, arguments, names
        self.gradient = gradient_function(f"{name}_loss", self._gradients)
        self.function = self._function()
        result = ", ".join(["Tensor"] * len(names))
        made = ", ".join(f"Tensor {field}_gradient" for field in names)
        define(f"{name}({schema(arguments)}) -> (Tensor, {result})", forward, self._fake)
        define(
            f"{name}_backward(Tensor grad_loss, {made}, {schema(arguments)}) -> ({result})",
            self._backward,
            self._backward_fake,
        )

    def __call__(self, *arguments: Any) -> Tensor:
        loss: Tensor = self.function.apply(*arguments)
        return loss

    def _fake(self, *arguments: Any) -> tuple[Tensor, ...]:
        return empty_results(self.arguments(*arguments), self.names)

    def _backward_fake(self, grad_loss: Tensor, *given: Any) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, given[: len(self.names)]))

    @torch.no_grad()
    def _backward(self, grad_loss: Tensor, *given: Any) -> tuple[Tensor, ...]:
        gradients, a = given[: len(self.names)], self.arguments(*given[len(self.names) :])
        if not any(getattr(a, f"grad_{field}") for field in self.names[1:]):
            # the gradient of a row is proportional to the upstream one of the row
            factors = grad_loss.unsqueeze(-1).to(gradients[0].dtype)
            hidden = gradients[0] * factors if a.grad_hidden else gradients[0].clone()
            return hidden, *map(torch.clone, gradients[1:])
        factor = common_gradient(grad_loss, a.capacity)
        if factor is not None:
            return tuple(gradient * factor.to(gradient.dtype) for gradient in gradients)
        loss_weight = grad_loss.double() if a.loss_weight is None else a.loss_weight * grad_loss
        operator = getattr(OPERATORS, self.name)
        everything: tuple[Tensor, ...] = operator(*a._replace(loss_weight=loss_weight.contiguous()))
        return everything[1:]

    def _gradients(self, grad_loss: Tensor, *given: Any) -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling() and grad_loss.device.type == "cpu" and bool((grad_loss == 1).all()):
            return given[: len(self.names)]
        gradients: tuple[Tensor, ...] = getattr(OPERATORS, f"{self.name}_backward")(grad_loss, *given)
        return gradients

    def _function(self) -> type[torch.autograd.Function]:
        name, names, fields, count = self.name, self.names, self.arguments._fields, len(self.names)
        places, flags = [fields.index(f) for f in names], [fields.index(f"grad_{f}") for f in names]
        kinds = get_type_hints(self.arguments).values()
        tensors = sum(kind in (Tensor, Tensor | None) for kind in kinds)
        gradient = self.gradient

        class Loss(torch.autograd.Function):
            """Computes the loss, and the gradients for an upstream gradient of 1."""

            @staticmethod
            def forward(ctx: Any, *given: Any) -> Tensor:
                loss, *gradients = getattr(OPERATORS, name)(*given)
                ctx.save_for_backward(*gradients, *given[:tensors])
                ctx.options = given[tensors:]
                result: Tensor = loss
                return result

            @staticmethod
            def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
                found: list[Tensor | None] = [None] * len(fields)
                made = gradient.apply(grad_loss, *ctx.saved_tensors, *ctx.options)
                for place, flag, one in zip(places, flags, made[:count], strict=True):
                    found[place] = one if ctx.options[flag - tensors] else None
                return tuple(found)

        return Loss

"""A frozen linear layer and the LoRA pairs of runs of rows, in as few passes over memory as there can be.

Adapters are added in place, by the product itself, to the rows they act on. In training one autograd function stands
for the layer and all pairs: what comes back to the input is summed in place too, and the frozen weight gets nothing.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from .dense import FEW, MANY, dense, plain_weight, thin

Where = slice | torch.Tensor | None
"""Rows along the first dimension: a run, any others by their indices, or all."""


@dataclass(frozen=True)
class Pair:
    """A LoRA pair and the rows it acts on.

    Attributes:
        where: rows of the input's first dimension.
        down: `[r, in]`; up: `[out, r]`; scaling: alpha / r.
        dropout: share of the input that is dropped, in training.
    """

    where: Where
    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    dropout: float = 0.0


def tokens_of(where: Where, length: int) -> slice:
    """A run of rows `[rows, length, size]` as a run of `[rows * length, size]`."""
    if where is None:
        return slice(None)
    assert isinstance(where, slice)
    return slice(where.start * length, where.stop * length)


def add_pairs(
    out: torch.Tensor, x: torch.Tensor, pairs: list[Pair], quick: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Adds what the pairs give for `x` `[rows, length, in]` to `out` `[rows, length, out]`, in place.

    Args:
        quick: few tokens are multiplied as [`thin`] says. Bits then depend on where in memory a matrix lies, so that a
            model loaded twice may differ by rounding.

    Returns:
        For each pair what its `down` gives, `[tokens, r]`, and where dropout let the input through, `[tokens, in]`.
    """
    flat_x, flat_out, length = x.flatten(0, 1), out.view(-1, out.shape[-1]), x.shape[1]
    product, few = (thin, MANY - 1) if quick and x.is_cpu else (dense, FEW)
    kept = []
    for pair in pairs:
        seen = None
        if isinstance(pair.where, torch.Tensor):
            hidden = product(x.index_select(0, pair.where).flatten(0, 1), pair.down)
            added = product(hidden, pair.up).unflatten(0, (len(pair.where), length))
            out.index_add_(0, pair.where, added, alpha=pair.scaling)
        else:
            run = tokens_of(pair.where, length)
            mine = flat_x[run]
            if pair.dropout:
                mine, seen = torch.native_dropout(mine, pair.dropout, True)
            hidden = product(mine, pair.down)
            if hidden.shape[0] <= few:
                flat_out[run].add_(product(hidden, pair.up), alpha=pair.scaling)
            else:
                flat_out[run].addmm_(hidden, pair.up.t(), alpha=pair.scaling)
        kept.append((hidden, seen))
    return kept


class RoutedSum(torch.autograd.Function):
    """`F.linear(x, weight, bias)` and the pairs of runs of rows; `weight` and `bias` are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        places: list[tuple[slice | None, float, float]],
        *matrices: torch.Tensor,
    ) -> torch.Tensor:
        """`x` `[rows, length, in]` -> `[rows, length, out]`; `places` are the pairs' `where`, `scaling` and
        `dropout`."""
        out = dense(x, weight, bias)
        pairs = [Pair(p[0], d, u, *p[1:]) for p, d, u in zip(places, matrices[::2], matrices[1::2], strict=True)]
        kept = add_pairs(out, x, pairs)
        ctx.places = places
        ctx.save_for_backward(x, weight, *matrices, *(tensor for each in kept for tensor in each))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, *rest = ctx.saved_tensors
        matrices, kept = rest[: 2 * len(ctx.places)], rest[2 * len(ctx.places) :]
        grad, flat_x, length = grads[0].flatten(0, 1), x.flatten(0, 1), x.shape[1]
        back = dense(grad, weight.t()) if ctx.needs_input_grad[0] else None
        found: list[torch.Tensor | None] = []
        for i, (where, scaling, dropout) in enumerate(ctx.places):
            down, up = matrices[2 * i : 2 * i + 2]
            hidden, seen = kept[2 * i : 2 * i + 2]
            needs_down, needs_up = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            run = tokens_of(where, length)
            mine = grad[run]
            grad_down = None
            if back is not None or needs_down:
                through = (mine @ up).mul_(scaling)  # [tokens, r]
                if back is not None and seen is None:
                    back[run].addmm_(through, down)
                elif back is not None:
                    back[run].addcmul_(through @ down, seen, value=1 / (1 - dropout))
                if needs_down:
                    entered = flat_x[run] if seen is None else flat_x[run] * seen * (1 / (1 - dropout))
                    grad_down = through.t() @ entered
            found.append(grad_down)
            found.append((mine.t() @ hidden).mul_(scaling) if needs_up else None)
        return (None if back is None else back.view_as(x), None, None, None, *found)


def apply_linear(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, quicker where the layer is plain, as [`plain_weight`] says, and does not learn."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or plain_weight(layer, x) is None:
        return layer(x)
    assert isinstance(layer, nn.Linear)
    if not torch.is_grad_enabled():
        return dense(x, layer.weight, layer.bias)
    if x.dim() != 3 or any(parameter.requires_grad for parameter in layer.parameters()):
        return layer(x)
    return RoutedSum.apply(x, layer.weight, layer.bias, [])

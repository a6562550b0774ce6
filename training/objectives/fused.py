"""A loss of the next token's distribution whose gradients are made in the forward pass, chunk by chunk."""

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mixlora.training.objectives.chunks import chunk_length

ChunkLoss = Callable[[torch.Tensor, slice], tuple[torch.Tensor, torch.Tensor]]
"""Log-probabilities `[tokens of the chunk, vocabulary]`, and which tokens these are -> the sum of the loss over them,
and its gradient by the logits, of the same shape. It may write over what it is given."""


def fused_loss(
    hidden: torch.Tensor, head: torch.Tensor, chunk_loss: ChunkLoss, temperature: float = 1.0
) -> torch.Tensor:
    """Sum of a loss over all tokens; a chunk's logits are all that ever exists of `[tokens, vocabulary]`.

    Args:
        hidden: `[tokens, width]`; head: `[vocabulary, width]`. Both get gradients, where they are required.
        temperature: divides the logits.

    Returns:
        A scalar in the dtype of `hidden`, fp32 at least.
    """
    total: torch.Tensor = _FusedLoss.apply(hidden, head, chunk_loss, temperature)
    return total


def chunk_memory(tokens: int, head: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a chunk's logits `[tokens, vocabulary]`, to be made once: a tensor of this size is dear to make."""
    size = min(chunk_length(len(head), dtype.itemsize), max(tokens, 1))
    return torch.empty(size, len(head), dtype=dtype, device=head.device)


def log_softmax(hidden: torch.Tensor, head: torch.Tensor, temperature: float, memory: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token `[tokens, vocabulary]`, in the dtype of `memory` and in its first rows."""
    logits = memory[: len(hidden)]
    if hidden.dtype == head.dtype == memory.dtype:
        torch.mm(hidden, head.T, out=logits)
    else:
        logits.copy_(hidden @ head.T)
    return torch.log_softmax(logits if temperature == 1 else logits.div_(temperature), -1, out=logits)


class _FusedLoss(torch.autograd.Function):
    """See [`fused_loss`]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: torch.Tensor, chunk_loss: ChunkLoss, temperature: float
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        hidden_grad = torch.zeros_like(hidden) if wants_hidden else None
        head_grad = torch.zeros_like(head, dtype=dtype) if wants_head else None
        memory = chunk_memory(len(hidden), head, dtype)
        for start in range(0, len(hidden), len(memory)):
            part = slice(start, start + len(memory))
            value, by_logits = chunk_loss(log_softmax(hidden[part], head, temperature, memory), part)
            total += value
            if temperature != 1:
                by_logits.div_(temperature)
            by_logits = by_logits.to(head.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = by_logits @ head
            if head_grad is not None:
                head_grad += by_logits.T @ hidden[part]
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if saved is None else (grad * saved).to(saved.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None)

"""Mimicking a teacher: how far the student's next-token distribution is from the teacher's, from hidden states."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from mixlora.training.objectives.chunks import chunk_length

Divergence = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
"""Log-probabilities `[tokens, vocabulary]` of student and teacher, and beta -> the sum of the divergence over tokens
and its gradient by the student's logits, of the same shape. It writes over both, so that few exist at once."""


def mimic_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    mask: torch.Tensor,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    beta: float = 0.5,
    t_squared: bool = False,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Divergence of the student's next-token distribution from the teacher's, averaged over the masked positions.

    Logits are made chunk by chunk, and gradients with them, so that memory does not grow with the number of tokens.
    Gradients reach `student_hidden` and `student_head`, where they are required, and nothing of the teacher. LLaVA-MoD
    (arXiv 2408.15881, section 3.2) mimics by `forward_kl`.

    Args:
        student_hidden: final hidden states `[tokens, width]`; teacher_hidden: `[tokens, teacher width]`.
        student_head: `[vocabulary, width]`; teacher_head: `[vocabulary, teacher width]`.
        mask: `[tokens]`, true where a hidden state predicts a token of the response (see `response_mask`).
        divergence: one of `DIVERGENCES`, with p the student and q the teacher: `forward_kl` KL(q, p); `reverse_kl`
            KL(p, q); `jsd` beta KL(q, m) + (1 - beta) KL(p, m) with m = beta q + (1 - beta) p; `tv` half the sum of
            |p - q|; `skew_kl` KL(q, beta q + (1 - beta) p).
        temperature: divides the logits of both.
        beta: of `jsd` and `skew_kl`, strictly between 0 and 1.
        t_squared: multiply by the squared temperature, which keeps the size of the gradients.
        num_items: divide by this in place of the masked positions of this call.

    Returns:
        A scalar in the student's dtype, fp32 at least; 0 where nothing is masked.

    Raises:
        ValueError: shapes that do not fit, an unknown divergence, or a temperature or beta out of range.
    """
    _check(student_hidden, student_head, teacher_hidden, teacher_head, mask)
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence {divergence!r} is not one of {', '.join(DIVERGENCES)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if divergence in ("jsd", "skew_kl") and not 0 < beta < 1:
        raise ValueError(f"beta of {divergence} must lie between 0 and 1, got {beta}")
    chosen = mask.bool()
    total = _Mimic.apply(
        student_hidden[chosen],
        student_head,
        teacher_hidden[chosen].detach(),
        teacher_head.detach(),
        DIVERGENCES[divergence],
        temperature,
        beta,
    )
    scale = temperature**2 if t_squared else 1.0
    return scale * total / (num_items if num_items is not None else chosen.sum().clamp(min=1))


def _check(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    mask: torch.Tensor,
) -> None:
    """Raises ValueError for shapes that do not fit."""
    for name, hidden, head in (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head)):
        if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
            raise ValueError(
                f"{name}: hidden states {tuple(hidden.shape)} do not fit a head of {tuple(head.shape)}, expected "
                "[tokens, width] and [vocabulary, width]"
            )
    if len(student_head) != len(teacher_head):
        raise ValueError(f"vocabularies: the student has {len(student_head)} tokens, the teacher {len(teacher_head)}")
    if not len(student_hidden) == len(teacher_hidden) == mask.numel():
        raise ValueError(
            f"{len(student_hidden)} hidden states of the student, {len(teacher_hidden)} of the teacher and a mask of "
            f"{mask.numel()}: expected the same number of tokens"
        )


def _by_logits(by_log_p: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """From the gradient by log-probabilities, whose memory it takes."""
    return by_log_p.addcmul_(p, by_log_p.sum(-1, keepdim=True), value=-1)


def _forward_kl(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    q = log_q.exp()
    value = log_q.sub_(log_p).mul_(q).sum()
    return value, log_p.exp_().sub_(q)


def _reverse_kl(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp()
    by_log_p = log_p.sub_(log_q).mul_(p)
    return by_log_p.sum(), _by_logits(by_log_p, p)


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta))


def _jsd(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = _mixture(log_p, log_q, beta)
    of_q = (log_q.exp() * log_q.sub_(log_m)).sum()
    p = log_p.exp()
    by_log_p = log_p.sub_(log_m).mul_(p).mul_(1 - beta)
    return beta * of_q + by_log_p.sum(), _by_logits(by_log_p, p)


def _tv(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp_()
    apart = log_q.exp_().neg_().add_(p)
    return apart.abs().sum() / 2, _by_logits(apart.sign_().mul_(p).div_(2), p)


def _skew_kl(log_p: torch.Tensor, log_q: torch.Tensor, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = _mixture(log_p, log_q, beta)
    q_by_m, q = (log_q - log_m).exp_(), log_q.exp()
    value = log_q.sub_(log_m).mul_(q).sum()
    p = log_p.exp_()
    return value, _by_logits(q_by_m.mul_(p).mul_(beta - 1), p)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tv": _tv,
    "skew_kl": _skew_kl,
}


def _log_softmax(hidden: torch.Tensor, head: torch.Tensor, temperature: float, dtype: torch.dtype) -> torch.Tensor:
    """Log-probabilities `[tokens, vocabulary]` in `dtype`."""
    logits = (hidden @ head.T).to(dtype)
    return (logits if temperature == 1 else logits.div_(temperature)).log_softmax(-1)


class _Mimic(torch.autograd.Function):
    """Sum of the divergence over all tokens. The forward pass makes the gradients, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        divergence: Divergence,
        temperature: float,
        beta: float,
    ) -> torch.Tensor:
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=dtype, device=student_hidden.device)
        hidden_grad = torch.zeros_like(student_hidden) if wants_hidden else None
        head_grad = torch.zeros_like(student_head, dtype=dtype) if wants_head else None
        size = chunk_length(len(student_head), total.element_size())
        for start in range(0, len(student_hidden), size):
            part = slice(start, start + size)
            hidden = student_hidden[part]
            log_p = _log_softmax(hidden, student_head, temperature, dtype)
            log_q = _log_softmax(teacher_hidden[part], teacher_head, temperature, dtype)
            value, by_logits = divergence(log_p, log_q, beta)
            total += value
            if hidden_grad is not None or head_grad is not None:
                by_logits = by_logits.div_(temperature).to(student_head.dtype)
            if hidden_grad is not None:
                hidden_grad[part] = by_logits @ student_head
            if head_grad is not None:
                head_grad += by_logits.T @ hidden
        ctx.save_for_backward(hidden_grad, None if head_grad is None else head_grad.to(student_head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if saved is None else (grad * saved).to(saved.dtype) for saved in ctx.saved_tensors]
        return (*scaled, None, None, None, None, None)

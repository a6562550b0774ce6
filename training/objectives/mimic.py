"""Mimicking a teacher: how far the student's next-token distribution is from the teacher's, from hidden states."""

import math
from collections.abc import Callable

import torch

from mixlora.training.objectives.fused import chunk_memory, fused_loss, log_softmax

Divergence = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
"""Log-probabilities `[tokens, vocabulary]` of student and teacher, memory of that shape, and beta -> the sum of the
divergence over tokens and its gradient by the student's logits, of the same shape. It writes over all three: tensors
of this size are dear to make."""


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
    taught, wanted, wanted_head = student_hidden[chosen], teacher_hidden[chosen].detach(), teacher_head.detach()
    dtype = torch.promote_types(taught.dtype, torch.float32)
    log_qs, spare = (chunk_memory(len(taught), wanted_head, dtype) for _ in range(2))

    def chunk_loss(log_p: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        log_q = log_softmax(wanted[part], wanted_head, temperature, log_qs)
        return DIVERGENCES[divergence](log_p, log_q, spare[: len(log_p)], beta)

    total = fused_loss(taught, student_head, chunk_loss, temperature)
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


def _forward_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, spare: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    q = torch.exp(log_q, out=spare)
    value = log_q.sub_(log_p).mul_(q).sum()
    return value, log_p.exp_().sub_(q)


def _reverse_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, spare: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    p = torch.exp(log_p, out=spare)
    by_log_p = log_p.sub_(log_q).mul_(p)
    return by_log_p.sum(), _by_logits(by_log_p, p)


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, spare: torch.Tensor, beta: float) -> torch.Tensor:
    return torch.logaddexp(log_q + math.log(beta), log_p + math.log(1 - beta), out=spare)


def _jsd(
    log_p: torch.Tensor, log_q: torch.Tensor, spare: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = _mixture(log_p, log_q, spare, beta)
    q = log_q.exp()
    of_q = log_q.sub_(log_m).mul_(q).sum()
    p = torch.exp(log_p, out=q)
    by_log_p = log_p.sub_(log_m).mul_(p).mul_(1 - beta)
    return beta * of_q + by_log_p.sum(), _by_logits(by_log_p, p)


def _tv(
    log_p: torch.Tensor, log_q: torch.Tensor, spare: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    p = log_p.exp_()
    apart = log_q.exp_().neg_().add_(p)
    return torch.abs(apart, out=spare).sum() / 2, _by_logits(apart.sign_().mul_(p).div_(2), p)


def _skew_kl(
    log_p: torch.Tensor, log_q: torch.Tensor, spare: torch.Tensor, beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    log_m = _mixture(log_p, log_q, spare, beta)
    q_by_m = (log_q - log_m).exp_()
    by_q = log_q.exp()
    value = log_q.sub_(log_m).mul_(by_q).sum()
    p = log_p.exp_()
    return value, _by_logits(q_by_m.mul_(p).mul_(beta - 1), p)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "tv": _tv,
    "skew_kl": _skew_kl,
}

"""Mimicking a teacher of whose distribution a few tokens are known: its likeliest ones, or some that were drawn."""

import torch

from mixlora.training.objectives.chunks import chunk_length
from mixlora.training.objectives.fused import fused_loss

KINDS = ("top", "sample")


def sparse_mimic_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    token_ids: torch.Tensor,
    log_probs: torch.Tensor,
    *,
    kind: str = "top",
    temperature: float = 1.0,
    t_squared: bool = False,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """KL of the teacher's next-token distribution q to the student's p from k tokens a position, averaged.

    `top`: the KL over the k tokens and one bucket for all others, `sum_i q_i log(q_i / p_i)` with the tails' masses as
    its last term. It is biased: never above the whole KL, blind to how the tail's mass is spread, and 0 gradient says
    only that the k tokens and the tail's mass agree.

    `sample`: the mean of `log q_i - log p_i` over k tokens that were drawn from q, with repeats. Its expectation is
    the whole KL, and that of its gradient the whole gradient (after arXiv 2503.16870); it is noisy, perhaps below 0.

    Logits are made chunk by chunk, and gradients with them.

    Args:
        student_hidden: `[tokens, width]`; student_head: `[vocabulary, width]`.
        token_ids: LongTensor `[tokens, k]`; log_probs: their log q `[tokens, k]`, at the same temperature.
        kind: `top` or `sample`.
        temperature: divides the student's logits.
        t_squared: multiply by the squared temperature.
        num_items: divide by this in place of the number of tokens.

    Returns:
        A scalar, fp32 at least.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, or `top` of the whole vocabulary.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(KINDS)}")
    if token_ids.shape != log_probs.shape or token_ids.ndim != 2 or len(token_ids) != len(student_hidden):
        raise ValueError(
            f"{len(student_hidden)} hidden states, ids of {tuple(token_ids.shape)} and log-probabilities of "
            f"{tuple(log_probs.shape)}: expected [tokens, k] of both"
        )
    if kind == "top" and token_ids.shape[1] >= len(student_head):
        raise ValueError(f"top {token_ids.shape[1]} of {len(student_head)} tokens leave no tail: keep hidden states")
    dtype = torch.promote_types(student_hidden.dtype, torch.float32)
    divergence = _top if kind == "top" else _sampled

    def chunk_loss(log_p: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return divergence(log_p, token_ids[part], log_probs[part].to(dtype))

    scale = temperature**2 if t_squared else 1.0
    total = fused_loss(student_hidden, student_head, chunk_loss, temperature)
    return scale * total / (num_items if num_items is not None else max(1, len(student_hidden)))


def _top(log_p: torch.Tensor, ids: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    q, known = log_q.exp(), log_p.gather(-1, ids)
    tail_q = (1 - q.sum(-1, keepdim=True)).clamp(min=0)  # rounded log-probabilities may sum to a bit more than 1
    others = log_p.scatter_(-1, ids, -torch.inf)
    highest = others.amax(-1, keepdim=True)
    shares = torch.softmax(others, -1, out=others)  # of the tail's mass
    tail_p = highest - shares.amax(-1, keepdim=True).log()
    value = (q * (log_q - known)).sum() + (torch.xlogy(tail_q, tail_q) - tail_q * tail_p).sum()
    mass = q.sum(-1, keepdim=True) + tail_q
    return value, shares.mul_(mass * tail_p.exp() - tail_q).scatter_(-1, ids, mass * known.exp() - q)


def _sampled(log_p: torch.Tensor, ids: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value = (log_q - log_p.gather(-1, ids)).mean(-1).sum()
    drawn = torch.full_like(log_q, 1 / ids.shape[1])
    return value, log_p.exp_().scatter_add_(-1, ids, drawn.neg_())


@torch.no_grad()
def known_tokens(
    hidden: torch.Tensor,
    head: torch.Tensor,
    count: int,
    *,
    kind: str = "top",
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`sparse_mimic_loss`] needs to know of a teacher, from its hidden states, chunk by chunk.

    Args:
        hidden: `[tokens, width]`; head: `[vocabulary, width]`.
        count: tokens a position: its likeliest (`top`), or drawn with repeats (`sample`).
        generator: of the draws, on the CPU.

    Returns:
        LongTensor of ids and their log-probabilities, both `[tokens, count]`.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    ids, log_probs = [], []
    for part in hidden.split(chunk_length(len(head), torch.finfo(dtype).bits // 8)):
        log_q = ((part @ head.T).to(dtype) / temperature).log_softmax(-1)
        if kind == "top":
            chosen = log_q.topk(count, dim=-1).indices
        else:
            draws = torch.rand(len(part), count, generator=generator, dtype=torch.float64).to(log_q.device)
            steps = log_q.double().exp().cumsum(-1)
            chosen = torch.searchsorted(steps, draws * steps[:, -1:], right=True).clamp(max=len(head) - 1)
        ids.append(chosen)
        log_probs.append(log_q.gather(-1, chosen))
    empty = hidden.new_zeros(0, count, dtype=dtype)
    return torch.cat([empty.long(), *ids]), torch.cat([empty, *log_probs])

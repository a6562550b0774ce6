"""Preferences: the chosen answer is made likelier than the rejected one, beside a reference."""

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mixlora.modeling.ranks import sum_over_ranks
from mixlora.training.objectives.chunks import chunk_length

PREFERENCES = ("sigmoid", "ipo", "hinge", "kto_pair")


def preference_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor | None = None,
    reference_rejected: torch.Tensor | None = None,
    *,
    kind: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    llavamod_compat: bool = False,
    num_pairs: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """A loss on summed log-probabilities of chosen and rejected answers, averaged over the pairs.

    With c and r the policy's log-probability over the reference's, of the chosen and of the rejected answer:
    `sigmoid` -log s(beta (c - r)) (DPO, arXiv 2305.18290, eq. 7; smoothed as in conservative DPO); `hinge`
    max(0, 1 - beta (c - r)) (SLiC, arXiv 2305.10425); `ipo` (c - r - 1 / (2 beta))^2 (arXiv 2310.12036, eq. 17);
    `kto_pair` the mean of 1 - s(beta (c - K_r)) and 1 - s(beta (K_c - r)), with K the mean of c or r over all pairs of
    all ranks, at least 0, without gradient (after KTO, arXiv 2402.01306; it is what LLaVA-MoD's script runs).

    Args:
        policy_chosen: `[pairs]`, likewise the three others. Without the two of the reference there is none.
        kind: one of `PREFERENCES`.
        beta: how strongly the reference holds the policy, above 0.
        label_smoothing: share of pairs taken to be the wrong way round, from 0 to below 0.5; of `sigmoid` alone.
        llavamod_compat: `kto_pair` as LLaVA-MoD released it: gradients flow through K, which is that of this rank.
        num_pairs: the pairs of all ranks: gives this rank's share of their average, 0 where it has no pair at all.

    Raises:
        ValueError: shapes that do not fit, one reference without the other, or a setting out of range.
    """
    if (reference_chosen is None) != (reference_rejected is None):
        raise ValueError("give both reference_chosen and reference_rejected, or neither")
    if reference_chosen is None or reference_rejected is None:
        reference_chosen, reference_rejected = torch.zeros_like(policy_chosen), torch.zeros_like(policy_rejected)
    shapes = [tuple(x.shape) for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)]
    if policy_chosen.ndim != 1 or len(set(shapes)) > 1 or not (len(policy_chosen) or num_pairs):
        raise ValueError(f"expected four tensors of the same shape [pairs], at least one pair, got {shapes}")
    if kind not in PREFERENCES:
        raise ValueError(f"kind {kind!r} is not one of {', '.join(PREFERENCES)}")
    if beta <= 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and kind != "sigmoid"):
        raise ValueError(
            f"label_smoothing is a share below 0.5 and for sigmoid alone, got {label_smoothing} for {kind}"
        )
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    margin = chosen - rejected

    def average(each: torch.Tensor) -> torch.Tensor:
        """Over the pairs; of `kto_pair`, `each` has two values a pair."""
        if num_pairs is None:
            return each.mean()
        return each.sum() / (num_pairs * (2 if kind == "kto_pair" else 1))

    if kind == "hinge":
        return average(F.relu(1 - beta * margin))
    if kind == "ipo":
        return average((margin - 1 / (2 * beta)).square())
    if kind == "kto_pair":
        baselines = [x.mean() if llavamod_compat else mean_over_ranks(x) for x in (chosen, rejected)]
        k_chosen, k_rejected = (k.clamp(min=0) for k in baselines)
        halves = torch.cat([(beta * (chosen - k_rejected)).sigmoid(), (beta * (k_chosen - rejected)).sigmoid()])
        return average(1 - halves)
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -average((1 - label_smoothing) * right + label_smoothing * wrong)


def mean_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Mean of all values of all ranks, which may have different numbers of them; without gradient."""
    sums = sum_over_ranks(torch.stack([values.sum(), values.new_tensor(float(values.numel()))]))
    return sums[0] / sums[1]


def sequence_log_probs(
    hidden: torch.Tensor, head: torch.Tensor, targets: torch.Tensor, rows: torch.Tensor, num_rows: int
) -> torch.Tensor:
    """Summed log-probability of each row's targets `[num_rows]`, from hidden states.

    Logits are made chunk by chunk, again in the backward pass, so that memory does not grow with the number of tokens.

    Args:
        hidden: `[tokens, width]`, the hidden states that predict the targets; head: `[vocabulary, width]`.
        targets: `[tokens]`; rows: `[tokens]`, the row that each belongs to.

    Raises:
        ValueError: shapes that do not fit.
    """
    if not len(hidden) == len(targets) == len(rows):
        raise ValueError(f"{len(hidden)} hidden states, {len(targets)} targets and {len(rows)} rows do not fit")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    size = chunk_length(len(head), torch.finfo(dtype).bits // 8)

    def log_probs(part: torch.Tensor, head: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return -F.cross_entropy((part @ head.T).to(dtype), targets, reduction="none")

    parts = [
        checkpoint(log_probs, h, head, t, use_reentrant=False)
        for h, t in zip(hidden.split(size), targets.split(size), strict=True)
    ]
    return hidden.new_zeros(num_rows, dtype=dtype).index_add(0, rows, torch.cat(parts))

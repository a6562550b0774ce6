"""Training objectives: tensors in, a scalar out. They know nothing of the trainer or the model."""

import torch
from torch.nn import functional as F

IGNORED = -100


def next_token_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Cross entropy of each position's target, summed and divided by the number of targets of the optimizer step.

    Args:
        logits: `[batch, positions, vocab]`; taken to fp32.
        targets: `[batch, positions]`, already shifted: the token that follows each position, -100 where none counts.
        num_items: targets in all batches of the optimizer step; those of this batch alone by default.

    Raises:
        ValueError: shapes that do not fit.
    """
    if logits.shape[:2] != targets.shape:
        raise ValueError(f"logits of {tuple(logits.shape[:2])} positions do not fit targets of {tuple(targets.shape)}")
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (num_items if num_items is not None else (targets != IGNORED).sum().clamp(min=1))


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions whose next token counts in some row, so that logits are made there only.

    Args:
        labels: `[batch, length]`, -100 where a token is not to be predicted.

    Returns:
        LongTensor of positions `[positions]`, and their targets `[batch, positions]`.
    """
    shifted = labels[:, 1:]
    positions = (shifted != IGNORED).any(dim=0).nonzero().squeeze(1)
    return positions, shifted[:, positions]

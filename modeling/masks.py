"""What an attention mask must be, and the positions that follow from it."""

import torch
from transformers.cache_utils import Cache


def check_mask(attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, varies: bool) -> None:
    """Refuses a mask `[batch, 1, length, seen]` that would be misread.

    Args:
        varies: whether a row's rotary factors follow its length.

    Raises:
        ValueError: it is of integers, or `position_ids` are needed beside it.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() == 2:  # flex_attention has its own type
        return
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise ValueError(
            f"an attention_mask of {attention_mask.dim()} dimensions is bool (True is seen) or is added to the "
            f"scores, got {attention_mask.dtype}"
        )
    if position_ids is None and varies:
        raise ValueError(
            f"position_ids are needed with an attention_mask of {attention_mask.dim()} dimensions: a row's rotary "
            "factors follow its real length, which such a mask does not tell"
        )


def count_positions(
    inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
) -> torch.Tensor:
    """Positions `[batch, length]` that count real tokens only, so that left padding shifts nothing.

    With a mask of more than 2 dimensions they count all tokens.
    """
    batch, length = inputs_embeds.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    return (torch.arange(length, device=inputs_embeds.device) + past).expand(batch, -1)

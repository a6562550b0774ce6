"""What tensors a model takes: a wrong shape is named before it is misread or fails deep inside."""

from typing import Any

import torch
from transformers.cache_utils import Cache


def check_ids(input_ids: torch.Tensor) -> None:
    """Raises ValueError where `input_ids` are not integers `[batch, length]`, one row of one token at least."""
    if not _is_integers(input_ids) or input_ids.dim() != 2 or not input_ids.numel():
        raise ValueError(f"input_ids: expected integers [batch, length], none of them 0, got {_shape(input_ids)}")


def check_rows(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    adapter_ids: torch.Tensor | None,
    row_lengths: torch.Tensor | None,
    past_key_values: Cache | None,
) -> None:
    """Checks what is given for each row of a batch. Nothing is read back from the device.

    Args:
        tokens: `input_ids` `[batch, length]` or `inputs_embeds` `[batch, length, width]`.
        attention_mask: of any number of dimensions; one of two must be `[batch, past + length]`.
        adapter_ids, row_lengths: integers `[batch]`.

    Raises:
        ValueError: another shape or type; it names the argument and what was expected.
    """
    if tokens.dim() != 3:
        check_ids(tokens)
    batch, length = tokens.shape[:2]
    for name, values in (("adapter_ids", adapter_ids), ("row_lengths", row_lengths)):
        if values is not None and not (_is_integers(values) and values.shape == (batch,)):
            raise ValueError(f"{name}: expected a LongTensor [{batch}], one number a row, got {_shape(values)}")
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return
    rows, columns = attention_mask.shape
    if past_key_values is None:
        wanted, fits = length, columns == length
    elif past_key_values.is_compileable:  # its length lies on the device, and its mask may be as long as it can grow
        wanted, fits = length, columns >= length
    else:
        wanted = int(past_key_values.get_seq_length()) + length
        fits = columns >= wanted
    if rows != batch or not fits:
        raise ValueError(
            f"attention_mask: expected [{batch}, {wanted}], a column for each token of input_ids and of the cache, "
            f"got {list(attention_mask.shape)}"
        )


def check_labels(labels: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises ValueError where `labels` are not `[batch, length]` as `logits` `[batch, length, vocabulary]` are."""
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels: expected {list(logits.shape[:2])}, one for each logit, got {list(labels.shape)}")


def check_pictures(
    pixel_values: torch.Tensor, image_sizes: torch.Tensor | None, image_attention_mask: torch.Tensor | None
) -> None:
    """Checks pictures `[crops, channels, height, width]`, their sizes `[images, 2]` and masks `[crops, h, w]`.

    Raises:
        ValueError: another shape, or no crop at all.
    """
    if pixel_values.dim() != 4 or not pixel_values.numel():
        raise ValueError(
            "pixel_values: expected [crops, channels, height, width], the crops of all pictures one after another, "
            f"got {_shape(pixel_values)}"
        )
    if image_sizes is not None and (image_sizes.dim() != 2 or image_sizes.shape[1] != 2):
        raise ValueError(f"image_sizes: expected [images, 2], height and width, got {_shape(image_sizes)}")
    crops = len(pixel_values)
    if image_attention_mask is not None and (image_attention_mask.dim() != 3 or len(image_attention_mask) != crops):
        raise ValueError(
            f"image_attention_mask: expected [{crops}, patches_h, patches_w], got {_shape(image_attention_mask)}"
        )


def check_clips(input_features: torch.Tensor, mask: torch.Tensor, mels: int) -> None:
    """Checks clips `[clips, frames, mels]` and their mask `[clips, frames]`.

    Raises:
        ValueError: another shape, no clip at all, or a clip whose real frames are none or do not come first.
    """
    if input_features.dim() != 3 or not input_features.numel() or input_features.shape[2] != mels:
        raise ValueError(f"input_features: expected [clips, frames, {mels}], got {_shape(input_features)}")
    if mask.shape != input_features.shape[:2]:
        raise ValueError(f"input_features_mask: expected {list(input_features.shape[:2])}, got {_shape(mask)}")
    real = mask.bool()
    wrong = ~real[:, 0] | (real[:, 1:] & ~real[:, :-1]).any(dim=1)
    if clips := wrong.nonzero().flatten().tolist():
        raise ValueError(
            f"clip {clips[0]}: input_features_mask must be 1 at its real frames, one at least, which come first"
        )


def _is_integers(values: Any) -> bool:
    return isinstance(values, torch.Tensor) and not values.is_floating_point() and values.dtype != torch.bool


def _shape(values: Any) -> str:
    """A tensor's type and shape, for errors."""
    if isinstance(values, torch.Tensor):
        return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
    return type(values).__name__

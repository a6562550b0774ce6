"""A tensor of a wrong shape is refused by its name, not misread, nor left to fail deep inside."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from tests.modeling.model_fixtures import batch_inputs, row_inputs, tiny_model
from tests.modeling.phi4_fixtures import make_row, our_inputs
from tests.modeling.test_phi4_parity import models

Batch = dict[str, Any]


def mixed() -> Batch:
    """Four rows of at most 18 tokens, two pictures, two clips."""
    return batch_inputs([row_inputs(kind) for kind in ("image", "speech", "text", "both")])


def changed(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Batch], None]:
    return lambda batch: batch.update({name: change(batch[name])})


def given(**values: Any) -> Callable[[Batch], None]:
    return lambda batch: batch.update(values)


def spoil(place: tuple[int | slice, ...], value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = value
        return tensor

    return change


WRONG = {
    "one adapter for four rows": (given(adapter_ids=torch.tensor([0])), "adapter_ids: expected a LongTensor [4]"),
    "adapters as a list": (
        given(adapter_ids=[0, 1, -1, 1]),
        "adapter_ids: expected a LongTensor [4], one number a row",
    ),
    "adapters as floats": (given(adapter_ids=torch.ones(4)), "got float32 [4]"),
    "adapters as a table": (given(adapter_ids=torch.ones(4, 1, dtype=torch.long)), "got int64 [4, 1]"),
    "lengths of two rows": (given(row_lengths=torch.tensor([5, 6])), "row_lengths: expected a LongTensor [4]"),
    "a short mask": (changed("attention_mask", lambda mask: mask[:, 1:]), "attention_mask: expected [4, 18]"),
    "a mask of two rows": (changed("attention_mask", lambda mask: mask[:2]), "attention_mask: expected [4, 18]"),
    "one row without its batch": (changed("input_ids", lambda ids: ids[0]), "input_ids: expected integers [batch"),
    "ids as floats": (changed("input_ids", torch.Tensor.float), "input_ids: expected integers [batch, length], none"),
    "no token": (changed("input_ids", lambda ids: ids[:, :0]), "none of them 0, got int64 [4, 0]"),
    "no row": (changed("input_ids", lambda ids: ids[:0]), "none of them 0, got int64 [0, 18]"),
    "one picture without its batch": (changed("pixel_values", lambda x: x[0]), "pixel_values: expected [crops, chan"),
    "pictures row by row": (changed("pixel_values", lambda x: x[None]), "the crops of all pictures one after another"),
    "no picture": (changed("pixel_values", lambda x: x[:0]), "got float32 [0, 3, 8, 8]"),
    "sizes in one row": (given(image_sizes=torch.tensor([8, 8])), "image_sizes: expected [images, 2]"),
    "a mask for one picture": (
        given(image_attention_mask=torch.ones(1, 2, 2)),
        "image_attention_mask: expected [2, ",
    ),
    "one clip without its batch": (changed("input_features", lambda x: x[0]), "input_features: expected [clips, fram"),
    "other mel bins": (
        changed("input_features", lambda x: x[..., :4]),
        "expected [clips, frames, 8], got float32 [",
    ),
    "another clip mask": (changed("input_features_mask", lambda x: x[:, 1:]), "input_features_mask: expected [2, 40]"),
    "a clip of padding": (changed("input_features_mask", spoil((1,), 0)), "clip 1: input_features_mask must be 1 at"),
    "a clip padded in front": (changed("input_features_mask", spoil((0, slice(3)), 0)), "clip 0: input_features_mask"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_wrong_shape_is_refused_by_name(kind: str, call: str) -> None:
    change, message = WRONG[kind]
    model, batch = tiny_model(), mixed()
    change(batch)
    with pytest.raises(ValueError, match=re.escape(message)):
        model(**batch) if call == "forward" else model.generate(**batch, max_new_tokens=1)


PHI4_WRONG = {
    "sizes between crops": (changed("image_sizes", lambda x: x + 1), "picture 0: image_sizes [113, 169] must be mult"),
    "no size": (changed("image_sizes", torch.zeros_like), "picture 0: image_sizes [0, 0] must be multiples of the"),
    "a mask of pixels": (
        given(image_attention_mask=torch.ones(7, 56, 56)),
        "image_attention_mask: expected (7, 4, 4), got (7, 56, 56)",
    ),
    "transformers' form": (changed("pixel_values", lambda x: x[None]), "one after another, got float32 [1, 7, 3, 56,"),
}


@pytest.mark.parametrize("kind", PHI4_WRONG)
def test_a_wrong_shape_of_phi4_s_pictures_is_refused_by_name(kind: str) -> None:
    change, message = PHI4_WRONG[kind]
    batch = our_inputs([make_row(sizes=[(70, 130)]), make_row()])
    change(batch)
    with pytest.raises(ValueError, match=re.escape(message)):
        models(0)[1](**batch)


def test_labels_of_another_length_are_refused() -> None:
    batch = mixed()
    with pytest.raises(ValueError, match=re.escape("labels: expected [4, 18], one for each logit, got [4, 17]")):
        tiny_model()(**batch, labels=batch["input_ids"][:, 1:])


@torch.no_grad()
def test_a_step_needs_the_mask_of_the_past_too() -> None:
    """That of the new token alone would give it the first position."""
    model, batch, cache = tiny_model(), mixed(), DynamicCache()
    model(**batch, past_key_values=cache)
    step: Batch = {"adapter_ids": model.router(batch["input_ids"]), "past_key_values": cache}
    new, mask = torch.full((4, 1), 20), batch["attention_mask"]
    with pytest.raises(ValueError, match=re.escape("attention_mask: expected [4, 19], a column for each token of")):
        model(new, attention_mask=torch.ones(4, 1, dtype=torch.long), **step)
    assert model(new, attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), **step).logits.isfinite().all()


@torch.no_grad()
def test_a_cache_of_fixed_length_takes_a_mask_as_long_as_itself() -> None:
    model, batch = tiny_model(), mixed()
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    wanted = model(**batch).logits
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (0, 32 - 18))
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, :18]
    found = model(**batch, past_key_values=cache, position_ids=positions).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)

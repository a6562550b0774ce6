"""A mask of four dimensions, as transformers makes it or as a user does, means what the plain mask means."""

import pytest
import torch

from mixlora.modeling.masks import check_mask
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_rope_switch import long_model, text_row


def causal(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`[batch, length]` as `[batch, 1, length, length]`; a padded token sees itself, so that no row is empty."""
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None, None]
    seen = seen | torch.eye(length, dtype=torch.bool)
    return seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(dtype).min)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_mask_of_four_dimensions_means_the_same(attention: str, dtype: torch.dtype, side: str) -> None:
    """Without positions too: they count the padding then, and rotary attention sees distances alone."""
    model = tiny_model()
    model.set_attn_implementation(attention)
    batch = batch_inputs([row_inputs(kind) for kind in ROWS], side)
    real = batch["attention_mask"].bool()
    wanted = model(**batch).logits[real]
    mask = causal(batch["attention_mask"], dtype)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for options in ({}, {"position_ids": positions}):
        found = model(**(batch | {"attention_mask": mask}), **options).logits[real]
        assert (found - wanted).abs().max() < 2e-4 * wanted.std()


@torch.no_grad()
def test_rotary_factors_by_length_need_positions_beside_such_a_mask() -> None:
    model = long_model()
    batch = batch_inputs([text_row(20), text_row(30)])
    wanted = model(**batch).logits
    mask = causal(batch["attention_mask"], torch.bool)
    with pytest.raises(ValueError, match="position_ids are needed with an attention_mask of 4 dimensions"):
        model(batch["input_ids"], attention_mask=mask)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found = model(batch["input_ids"], attention_mask=mask, position_ids=positions).logits
    real = batch["attention_mask"].bool()
    assert (found - wanted)[real].abs().max() < 2e-4 * wanted.std()


def test_a_mask_of_integers_is_refused() -> None:
    with pytest.raises(ValueError, match="is bool .* got torch.int64"):
        check_mask(torch.ones(1, 1, 4, 4, dtype=torch.long), torch.arange(4)[None], varies=False)

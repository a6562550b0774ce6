"""A step of decoding leaves out padding in front of short rows, and answers as it does without that."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from mixlora.modeling import row_windows
from mixlora.modeling.row_windows import windows_of
from tests.modeling.model_fixtures import batch_inputs, row_inputs, tiny_model


def mask_of(*lengths, columns=12):
    return torch.stack([(torch.arange(columns) >= columns - length).long() for length in lengths])


def cache_of(tokens):
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, tokens, 2), torch.zeros(1, 1, tokens, 2), 0)
    return cache


@pytest.fixture
def eager_to_split(monkeypatch):
    monkeypatch.setattr(row_windows, "FEWEST", 1)


def test_runs_of_rows_with_what_they_need(eager_to_split):
    found = windows_of(mask_of(2, 2, 12, 11, 3), cache_of(11), 1, "sdpa")
    assert found == ((slice(0, 2), 10, True), (slice(2, 4), 0, False), (slice(4, 5), 9, True))
    holed = mask_of(2, 12)
    holed[1, 5] = 0
    assert windows_of(holed, cache_of(11), 1, "sdpa") == ((slice(0, 1), 10, True), (slice(1, 2), 0, False))


def test_where_one_call_does(eager_to_split):
    mask, cache = mask_of(2, 12), cache_of(11)
    assert windows_of(mask, cache, 1, "sdpa")
    assert windows_of(mask_of(12, 11), cache, 1, "sdpa") is None
    assert windows_of(mask, cache, 2, "sdpa") is None
    assert windows_of(mask, None, 1, "sdpa") is None
    assert windows_of(mask, cache, 1, "eager") is None
    assert windows_of(mask, cache_of(9), 1, "sdpa") is None
    assert windows_of(mask[:, None, None], cache, 1, "sdpa") is None


@torch.no_grad()
def test_generation_stays_as_it_was(monkeypatch):
    model = tiny_model(exact_base=False)
    batch = batch_inputs([row_inputs(kind) for kind in ("text", "two_clips", "image", "speech")])
    options = {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(**batch, **options)
    monkeypatch.setattr(row_windows, "FEWEST", 1)
    monkeypatch.setattr(row_windows, "NEAR", 0.05)
    found = model.generate(**batch, **options)
    assert torch.equal(found.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(want.logits), rtol=1e-4, atol=1e-4)

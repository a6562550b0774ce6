"""The cache goes in and comes out by the name of the installed transformers, and is taken by the other one too."""

import logging
import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from mixlora.modeling.cache_name import CACHE, NAMES, given_cache
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_rope_switch import SWITCH, long_model, text_row

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
RENAMED = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 24)


def test_the_name_is_that_of_the_installed_release() -> None:
    assert CACHE == ("cache" if RENAMED else "past_key_values")


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_step_goes_on_from_a_cache_of_either_name(name: str) -> None:
    model, cache = tiny_model(), DynamicCache()
    ids, route = batch_inputs([row_inputs("text")])["input_ids"], torch.tensor([-1])
    first = model(ids[:, :-1], adapter_ids=route, **{name: cache})
    assert getattr(first, CACHE) is first["past_key_values" if RENAMED else CACHE] is cache
    assert cache.get_seq_length() == ids.shape[1] - 1
    inner = model.model(ids[:, -1:], adapter_ids=route, **{name: cache})
    assert getattr(inner, CACHE) is cache and cache.get_seq_length() == ids.shape[1]
    found = model.lm_head(inner.last_hidden_state)[:, 0]
    torch.testing.assert_close(found, model(ids, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("long", [False, True])
def test_generation_goes_on_from_a_cache_of_either_name(long: bool, name: str) -> None:
    """The second turn holds no picture: its route, and what was said, come from the first one's cache."""
    model = long_model() if long else tiny_model()
    row = row_inputs("image")
    row["ids"] = row["ids"] + text_row(SWITCH - 4 - len(row["ids"]))["ids"]
    batch, cache = batch_inputs([row]), DynamicCache()
    turn = batch_inputs([row | {"ids": row["ids"] + text_row(5, 3)["ids"]}])
    answered = model.generate(**batch, **GREEDY | {"max_new_tokens": 1}, **{name: cache})
    assert answered.shape[1] == batch["input_ids"].shape[1] + 1 and cache.get_seq_length() == len(row["ids"])
    ids = {key: turn[key] for key in ("input_ids", "attention_mask")}
    found = model.generate(**ids, **GREEDY, **{name: cache})
    assert torch.equal(found, model.generate(**turn, **GREEDY, use_cache=False))


@torch.no_grad()
def test_two_caches_are_refused() -> None:
    model, both = tiny_model(), {"past_key_values": DynamicCache(), "cache": DynamicCache()}
    batch = batch_inputs([row_inputs("text")])
    for call in (model, model.model, lambda **inputs: model.generate(**inputs, **GREEDY)):
        with pytest.raises(ValueError, match="past_key_values and cache are two names of one argument"):
            call(**batch, **both)
    one = DynamicCache()
    assert given_cache(one, one) is one and given_cache(None, None) is None


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str)
def test_no_old_name_reaches_transformers(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be renamed with a warning, for as long as transformers cares for the old name."""
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, message, *args: said.append(message))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model = long_model(1)
        model.generate(**batch_inputs([text_row(SWITCH - 2)]), **GREEDY, **options)
        model.generate(**batch_inputs([text_row(3)]), **GREEDY, past_key_values=DynamicCache())
        model(**batch_inputs([row_inputs(kind) for kind in ROWS]))
    assert not [message for message in said if "cache" in message or "past_key_values" in message]


@torch.no_grad()
@pytest.mark.parametrize("long", [False, True])
def test_drafts_in_a_static_cache(long: bool) -> None:
    """From 5.24 on a cache of fixed length can forget refused drafts; before, transformers says that it cannot."""
    model = long_model() if long else tiny_model()
    row = text_row(SWITCH - 4)
    row["ids"] = row["ids"][:-4] + row["ids"][:4]
    batch = batch_inputs([row])
    options = {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"}
    if not RENAMED:
        with pytest.raises(ValueError, match="Static cache"):
            model.generate(**batch, **GREEDY, **options)
        return
    found = model.generate(**batch, **GREEDY, **options)
    assert torch.equal(found, model.generate(**batch, **GREEDY, use_cache=False))

"""What a user of other implementations meets, and must not meet here: what fails, is ignored or is answered wrongly.

Most of it is tested beside the part that it concerns; `docs/differences.md` compares case by case.
"""

from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import (
    AUDIO,
    IMAGE,
    ROWS,
    batch_inputs,
    make_loud,
    row_inputs,
    tiny_model,
)
from tests.modeling.phi4_fixtures import make_row, native_config, our_inputs
from tests.modeling.test_phi4_parity import models

PICTURE, CLIP = {"sizes": [(70, 130)]}, {"frames": [61]}
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def mixed_batch() -> dict[str, torch.Tensor]:
    """Text, a picture, a clip, and both: one batch for the tiny Phi-4."""
    return our_inputs([make_row(), make_row(**PICTURE), make_row(**CLIP), make_row(**PICTURE, **CLIP)])


def test_adapter_names_are_refused_not_ignored() -> None:
    """PEFT's way to name an adapter for each row; transformers' class takes it without a word and without effect."""
    _, model = models(0)
    inputs = our_inputs([make_row(), make_row(**PICTURE)])
    with pytest.raises(ValueError, match="adapters act row by row here: pass adapter_ids"):
        model(**inputs, adapter_names=["vision", "nonsense"])
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(**inputs, adapter_names=["vision", "nonsense"], max_new_tokens=1)


@torch.no_grad()
@pytest.mark.parametrize("cause", ["in the last layer", "wrong crops", "unknown adapter"])
def test_a_call_that_fails_leaves_nothing_behind(cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next calls, of any kind of row, are bit for bit those before."""
    _, model = models(0)
    mixed, text = mixed_batch(), our_inputs([make_row()])
    before = model(**mixed).logits, model(**text).logits
    spoiled: dict[str, Any] = dict(mixed)
    if cause == "wrong crops":
        spoiled["pixel_values"] = spoiled["pixel_values"][:-1]
    elif cause == "unknown adapter":
        spoiled["adapter_ids"] = torch.tensor([-1, 0, 9, 0])
    with monkeypatch.context() as patched, pytest.raises(ValueError):
        if cause == "in the last layer":

            def fail(*args: Any, **kwargs: Any) -> None:
                raise ValueError("out of memory")

            patched.setattr(model.model.language_model.layers[-1].mlp.down_proj, "forward", fail)
        model(**spoiled)
    assert torch.equal(model(**mixed).logits, before[0])
    assert torch.equal(model(**text).logits, before[1])


@torch.no_grad()
def test_hidden_states_can_be_asked_for_after_a_picture_and_the_next_picture_is_seen() -> None:
    """In each order of calls, with the outputs of a call that asks for nothing."""
    _, model = models(0)
    inputs = mixed_batch()
    plain = model(**inputs).logits
    asked = {"output_hidden_states": True, "output_attentions": True}
    for options in (asked, {}, asked):
        outputs = model(**inputs, **options)
        assert torch.equal(outputs.logits, plain)
        assert (outputs.hidden_states is not None) == bool(options)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    generated = model.generate(**inputs, **GREEDY, **asked, return_dict_in_generate=True)
    assert len(generated.hidden_states) == len(generated.attentions) == 6
    assert torch.equal(generated.sequences, model.generate(**inputs, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"suppress_tokens": [5]}], ids=str)
def test_a_model_that_would_say_a_placeholder_says_something_else(options: dict[str, Any]) -> None:
    """A placeholder in an answer would ask for a picture or a clip that is not there."""
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([IMAGE, AUDIO]), 50))
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    answers = model.generate(**batch, **GREEDY | options)[:, batch["input_ids"].shape[1] :]
    assert answers.shape == (len(ROWS), 6)
    assert not torch.isin(answers, torch.tensor([IMAGE, AUDIO, *options.get("suppress_tokens", [])])).any()


@torch.no_grad()
@pytest.mark.parametrize("words", [40, 1100], ids=["short", "beyond the switch"])
def test_a_model_moved_to_bfloat16_is_one_loaded_in_bfloat16(words: int, tmp_path: Any) -> None:
    """Rotary frequencies, short and long, are not rounded on the way."""
    _, ours = models(0)
    ours.save_pretrained(tmp_path)
    moved = MixLoraForConditionalGeneration.from_pretrained(tmp_path).to(torch.bfloat16)
    loaded = MixLoraForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = our_inputs([make_row(words=words)])
    assert moved.dtype == loaded.dtype == torch.bfloat16
    assert torch.equal(moved(**inputs).logits, loaded(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("size", [3, 8])
def test_a_prompt_read_in_chunks_keeps_its_media(size: int) -> None:
    """Pictures and clips that lie across the border of chunks, in rows of every kind."""
    _, model = models(0)
    inputs = mixed_batch()
    assert torch.equal(model.generate(**inputs, **GREEDY, prefill_chunk_size=size), model.generate(**inputs, **GREEDY))


def test_media_beside_embeddings_are_refused_not_ignored() -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs("both")])
    embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    for name in ("pixel_values", "input_features"):
        with pytest.raises(ValueError, match="media need input_ids"):
            model(inputs_embeds=embeds, adapter_ids=torch.tensor([0]), **{name: batch[name]})


@torch.no_grad()
def test_a_config_without_a_switch_of_factors_generates() -> None:
    """`original_max_position_embeddings=None` is allowed by Phi-4's config."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    native = native_config(original_max_position_embeddings=None, rope_parameters=rope)
    config = MixLoraConfig.from_dict(native.to_dict() | {"adapters": {"vision": {"r": 2}}})
    model = make_loud(MixLoraForConditionalGeneration(config)).eval()
    inputs = our_inputs([make_row(**PICTURE)])
    found = model.generate(**inputs, **GREEDY, adapter_ids=torch.tensor([-1]))
    assert torch.equal(found, model.generate(**inputs, **GREEDY, adapter_ids=torch.tensor([-1]), use_cache=False))


@torch.no_grad()
def test_ids_as_labels_teach_no_placeholder() -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs("both"), row_inputs("image"), row_inputs("speech")], "right")
    ids = batch["input_ids"]
    text = ids.masked_fill((ids == IMAGE) | (ids == AUDIO), -100)
    assert (text == -100).sum() > 10
    assert torch.equal(model(**batch, labels=ids).loss, model(**batch, labels=text).loss)


# ------------------------------------------------------------------------------------ a conversation with a kept cache


def turns(first: dict[str, Any], second: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two turns of a conversation, and the same as one row."""
    whole = {key: first[key] + second[key] for key in ("ids", "pictures", "clips")}
    return our_inputs([first]), our_inputs([whole])


def second_turn(first: dict[str, Any], second: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Answers to the second turn: with the cache of the first and the new media alone, and without a cache."""
    _, model = models(0)
    opening, whole = turns(first, second)
    cache = DynamicCache()
    model(**opening, past_key_values=cache)
    media = {k: v for k, v in our_inputs([second]).items() if k not in ("input_ids", "attention_mask")}
    ids = {name: whole[name] for name in ("input_ids", "attention_mask")}
    cached = model.generate(**ids, **media, **GREEDY, past_key_values=cache)
    return cached, model.generate(**whole, **GREEDY, use_cache=False)


@torch.no_grad()
@pytest.mark.parametrize("new", [PICTURE, CLIP, PICTURE | CLIP, {}], ids=["picture", "clip", "both", "text"])
def test_a_second_turn_with_new_media_is_answered_as_without_a_cache(new: dict[str, Any]) -> None:
    """A clip that follows a picture of an earlier turn takes the projector of clips beside pictures."""
    cached, uncached = second_turn(make_row(sizes=[(56, 56)]), make_row(**new, seed=3))
    assert torch.equal(cached, uncached)


@torch.no_grad()
@pytest.mark.parametrize(
    ("first", "new", "message"),
    [
        ({}, PICTURE, "row 0: what is new in it needs vision, but its cache was computed with the base"),
        (CLIP, PICTURE, "row 0: what is new in it needs vision, but its cache was computed with speech"),
        ({}, CLIP, "row 0: what is new in it needs speech, but its cache was computed with the base"),
    ],
)
def test_a_second_turn_that_changes_the_adapter_asks_for_an_empty_cache(
    first: dict[str, Any], new: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        second_turn(make_row(**first), make_row(**new, seed=3))


@torch.no_grad()
def test_media_of_an_earlier_turn_given_again_are_refused_not_taken_for_new_ones() -> None:
    _, model = models(0)
    opening, whole = turns(make_row(sizes=[(56, 56)]), make_row(**PICTURE, seed=3))
    cache = DynamicCache()
    model(**opening, past_key_values=cache)
    with pytest.raises(ValueError, match="image"):
        model.generate(**whole, **GREEDY, past_key_values=cache)

"""Cached equals uncached where a row's rotary factors change with its length: LongRoPE's switch, dynamic scaling."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicCache

from mixlora.modeling.rope_switch import kept_layer
from tests.modeling.model_fixtures import batch_inputs, of_type, row_inputs, tiny_model
from tests.modeling.phi4_fixtures import AUDIO, IMAGE, make_row, our_inputs
from tests.modeling.test_modeling_mixlora import plain_decoder
from tests.modeling.test_phi4_parity import expected, models

SWITCH = 24
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.5, 4.0, 9.0, 20.0],
    "original_max_position_embeddings": SWITCH,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}


def long_model(seed=0, rope=LONGROPE, **text):
    return tiny_model(seed, text={"rope_parameters": dict(rope)} | text)


def text_row(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 400, (length,), generator=generator).tolist()
    return {"ids": ids, "pixels": torch.zeros(0, 3, 8, 8), "mels": []}


def uncached(model, row):
    """Logits of the last token of a row alone, without a cache."""
    return model(**batch_inputs([row]), use_cache=False).logits[0, -1]


def steps(model, rows, count, cache):
    """Logits of the last tokens, `[steps, rows, vocab]`, when `count` known tokens follow a prompt with a cache."""
    batch = of_type(batch_inputs([{**row, "ids": row["ids"][:-count]} for row in rows]), model.dtype)
    mask, ids = batch["attention_mask"], model.model.router(batch["input_ids"])
    found = [model(**batch, past_key_values=cache).logits[:, -1]]
    for i in range(count, 0, -1):
        token = torch.tensor([[row["ids"][-i]] for row in rows])
        mask = torch.cat([mask, torch.ones_like(token)], -1)
        found.append(model(token, attention_mask=mask, past_key_values=cache, adapter_ids=ids).logits[:, -1])
    return torch.stack(found)


def shortened(row, count):
    return {**row, "ids": row["ids"][: len(row["ids"]) - count]}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_each_row_of_a_padded_batch_passes_the_switch_as_if_alone(rope, kind):
    """Rows that stay below, pass at different steps, and are beyond from the start; one with a picture."""
    model = long_model(rope=rope, max_position_embeddings=SWITCH if rope is DYNAMIC else 256)
    image = row_inputs("image")
    image["ids"] = image["ids"] + text_row(15, seed=9)["ids"]
    rows = [text_row(length, seed=length) for length in (12, 26, 29, 36)] + [image]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=48)
    found = steps(model, rows, 8, cache)
    for i, row in enumerate(rows):
        for step in range(9):
            wanted = uncached(model, shortened(row, 8 - step))
            assert (found[step, i] - wanted).abs().max() < 2e-4 * wanted.std(), (i, step)


@torch.no_grad()
def test_a_cache_that_is_not_rebuilt_would_be_seen(monkeypatch):
    model = long_model()
    row = text_row(30)
    right = steps(model, [row], 10, DynamicCache())[-1, 0]
    monkeypatch.setattr(type(model.model), "rebuild_cache", lambda *args: None)
    stale = steps(model, [row], 10, DynamicCache())[-1, 0]
    assert (stale - right).abs().max() > 0.1 * right.std()


@torch.no_grad()
def test_a_short_row_keeps_its_bits_when_its_neighbour_switches():
    model = long_model()
    cache = DynamicCache()
    batch = batch_inputs([text_row(5), text_row(SWITCH)])
    model(**batch, past_key_values=cache)
    before = [layer.keys[:, :, :SWITCH].clone() for layer in cache.layers[:2]]
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], -1)
    ids = torch.tensor([-1, -1])
    model(torch.tensor([[20], [21]]), attention_mask=mask, past_key_values=cache, adapter_ids=ids)
    for old, layer in zip(before, cache.layers, strict=False):
        assert torch.equal(layer.keys[0, :, :SWITCH], old[0])
        assert not torch.allclose(layer.keys[1, :, :SWITCH], old[1], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}], ids=str
)
def test_generation_across_the_switch(options):
    model = long_model(1)
    speech = row_inputs("two_clips")
    rows = [text_row(20), speech, text_row(8, 1), text_row(33, 2)]
    batch = batch_inputs(rows)
    shared = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    for name in ("cache_implementation", "prefill_chunk_size"):
        options = {k: v for k, v in options.items() if k != name}
    plain = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None} | options
    found = model.generate(**batch, **shared)
    assert torch.equal(found, model.generate(**batch, **plain, use_cache=False))
    for i, row in enumerate(rows):
        alone = model.generate(**batch_inputs([row]), **plain, use_cache=False)[0, len(row["ids"]) :]
        assert found[i, batch["input_ids"].shape[1] :].tolist() == alone.tolist()


@torch.no_grad()
@pytest.mark.parametrize("turn", [3, 12])
def test_a_second_turn_passes_the_switch_without_the_picture_of_the_first(turn):
    """Only the new ids are given, with the cache; the picture lives on in it."""
    model = long_model(2)
    batch = batch_inputs([row_inputs("image")])
    first = model.generate(**batch, max_new_tokens=6, do_sample=False, return_dict_in_generate=True, eos_token_id=None)
    ids = torch.cat([first.sequences, torch.tensor([text_row(turn, 5)["ids"]])], -1)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    route = model.model.router(ids)
    cached = model.generate(ids, **options, past_key_values=first.past_key_values, adapter_ids=route)
    assert torch.equal(cached, model.generate(ids, **options, pixel_values=batch["pixel_values"], use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("announced", [False, True])
def test_a_prompt_in_two_parts_equals_one(announced):
    model = long_model()
    row = text_row(30)
    ids, route = torch.tensor([row["ids"]]), torch.tensor([-1])
    lengths = {"row_lengths": torch.tensor([30])} if announced else {}
    cache = DynamicCache()
    model(ids[:, :18], past_key_values=cache, adapter_ids=route, **lengths)
    found = model(ids[:, 18:], past_key_values=cache, adapter_ids=route, **lengths).logits[0]
    whole = model(ids, use_cache=False).logits[0]
    assert (found - whole[18:]).abs().max() < 2e-4 * whole.std()


@torch.no_grad()
def test_a_cropped_cache_goes_back_to_the_short_factors():
    """As assisted generation does when it rejects tokens."""
    model = long_model()
    row, cache = text_row(30), DynamicCache()
    model(torch.tensor([row["ids"]]), past_key_values=cache)
    cache.crop(-10)
    found = model(torch.tensor([[50]]), past_key_values=cache, adapter_ids=torch.tensor([-1])).logits[0, -1]
    wanted = uncached(model, {**row, "ids": [*row["ids"][:20], 50]})
    assert (found - wanted).abs().max() < 2e-4 * wanted.std()


@torch.no_grad()
def test_hidden_states_at_the_switch_are_those_of_one_pass():
    model = long_model()
    row, cache, route = text_row(SWITCH + 1), DynamicCache(), torch.tensor([-1])
    ids = torch.tensor([row["ids"]])
    model(ids[:, :-1], past_key_values=cache)
    options = {"output_hidden_states": True, "output_attentions": True}
    model.set_attn_implementation("eager")
    found = model(ids[:, -1:], past_key_values=cache, adapter_ids=route, **options)
    wanted = model(ids, use_cache=False, output_hidden_states=True)
    assert len(found.hidden_states) == 3 and len(found.attentions) == 2
    for mine, whole in zip(found.hidden_states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(mine, whole[:, -1:], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_quantized_cache_is_rebuilt_as_a_whole():
    """As if its prompts had been read with the right factors at once: the same numbers are quantized."""
    model = long_model()
    batch = batch_inputs([text_row(9), text_row(SWITCH)])
    step = {
        "attention_mask": torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], -1),
        "adapter_ids": torch.tensor([-1, -1]),
    }
    found = []
    for announced in ({}, {"row_lengths": torch.tensor([10, SWITCH + 1])}):
        cache = QuantizedCache("fp8", model.config.text_config)
        model(**batch, past_key_values=cache, **announced)
        found.append(model(torch.tensor([[20], [21]]), past_key_values=cache, **step).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_foreign_cache_raises_at_the_switch():
    model = long_model()
    row, cache = text_row(SWITCH), DynamicCache()
    model(torch.tensor([row["ids"]]), past_key_values=cache)
    kept_layer(cache, 2).reset()
    with pytest.raises(ValueError, match="not filled by this model"):
        model(torch.tensor([[20]]), past_key_values=cache, adapter_ids=torch.tensor([-1]))


@torch.no_grad()
def test_a_plain_decoder_keeps_no_embeddings():
    model = tiny_model()
    assert len(model(torch.tensor([text_row(4)["ids"]])).past_key_values.layers) == 2


@torch.no_grad()
def test_dynamic_scaling_is_that_of_llama():
    ours = plain_decoder(tiny_model())
    text = ours.config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "rms_norm_eps", "tie_word_embeddings")
    fields = {name: getattr(text, name) for name in names}
    llama = LlamaForCausalLM(
        LlamaConfig(**fields, max_position_embeddings=SWITCH, rope_parameters=dict(DYNAMIC), pad_token_id=0)
    ).eval()
    state = ours.state_dict().items()
    llama.load_state_dict({k.replace("language_model.", "").replace(".base_layer", ""): v for k, v in state})
    model = long_model(rope=DYNAMIC, max_position_embeddings=SWITCH)
    for length in (SWITCH, SWITCH + 7):
        ids = torch.tensor([text_row(length)["ids"]])
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-4)


def test_phi4_answers_across_its_switch_as_transformers_does_without_a_cache():
    """With one, transformers forgets everything before the last token."""
    peer, ours = models(0)
    row = make_row(sizes=[(56, 56)], words=1006)
    assert len(row["ids"]) < 1024
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = ours.generate(**our_inputs([row, make_row(frames=[33])]), **options)[0, -12:]
    for i, token in enumerate(found.tolist()):
        logits = expected(peer, row | {"ids": row["ids"] + found[:i].tolist()})[-1]
        logits[[IMAGE, AUDIO]] = -torch.inf  # never an answer of ours
        assert logits[token] > logits.max() - 1e-3

"""Every class of cache, and generation that starts from embeddings, gives what no cache gives."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig, StaticCache
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.streamers import BaseStreamer

from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_rope_switch import SWITCH, long_model, text_row

GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_given_cache_serves_rows_of_every_kind(kind: str) -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs(each) for each in ROWS])
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=48)
    found = model.generate(**batch, **GREEDY, past_key_values=cache)
    assert torch.equal(found, model.generate(**batch, **GREEDY, use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("rows", [[20], [20, 20]], ids=["one row", "two rows"])
def test_a_static_cache_passes_the_switch_without_padding(rows: list[int]) -> None:
    """transformers drops a mask of ones, so the lengths come from the positions."""
    model = long_model(1)
    batch = batch_inputs([text_row(length, seed) for seed, length in enumerate(rows)])
    found = model.generate(**batch, **GREEDY, cache_implementation="static")
    assert torch.equal(found, model.generate(**batch, **GREEDY, use_cache=False))


class LayerAway(DynamicLayer):
    """Tells whether it was fetched before it was used, as a layer on another device has to be."""

    away = False

    def offload(self) -> None:
        self.away = True

    def prefetch(self) -> None:
        self.away = False

    def update(self, *args: Any, **kwargs: Any) -> Any:
        assert not self.away, "used while it was away"
        return super().update(*args, **kwargs)


class Stream:
    def wait_stream(self, other: Any) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *error: Any) -> None: ...


@torch.no_grad()
@pytest.mark.parametrize("long", [False, True])
def test_an_offloaded_cache_has_its_first_layer_back_in_time(long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer of kept embeddings must not take the place of the first one in what is fetched next."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    model = long_model() if long else tiny_model()
    cache = DynamicCache(config=model.config.text_config, offloading=True)
    cache.layers = [LayerAway() for _ in cache.layers]
    batch = batch_inputs([text_row(SWITCH - 2), text_row(12)])
    found = model.generate(**batch, **GREEDY, past_key_values=cache)
    assert torch.equal(found, model.generate(**batch, **GREEDY, use_cache=False))


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="layers move between an accelerator and the host")
def test_an_offloaded_cache_on_an_accelerator() -> None:
    model = long_model().cuda()
    batch = {name: value.cuda() for name, value in batch_inputs([text_row(SWITCH - 2), text_row(12)]).items()}
    found = model.generate(**batch, **GREEDY, cache_implementation="offloaded")
    assert torch.equal(found, model.generate(**batch, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("long", [False, True])
def test_generation_starts_from_embeddings(long: bool) -> None:
    model = long_model() if long else tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    media = {name: value for name, value in batch.items() if name != "attention_mask"}
    embeds = model.model.embed(batch["input_ids"], model.model.encode_media(**media))
    inputs = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    with pytest.raises(ValueError, match="adapter_ids is needed with inputs_embeds"):
        model.generate(**inputs, **GREEDY)
    found = model.generate(**inputs, **GREEDY, adapter_ids=model.router(batch["input_ids"]))
    assert torch.equal(found, model.generate(**batch, **GREEDY)[:, embeds.shape[1] :])


class Listener(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 2}, {"cache_implementation": "static"}], ids=str)
def test_a_streamer_hears_every_token_once(options: dict[str, Any]) -> None:
    model, listener = tiny_model(), Listener()
    found = model.generate(**batch_inputs([row_inputs("both")]), **GREEDY, **options, streamer=listener)
    assert listener.tokens == found[0].tolist() and listener.ended == 1


@torch.no_grad()
def test_a_generation_config_is_taken_as_it_is_and_left_so() -> None:
    """By position too. Placeholders are never an answer, though the config does not say so."""
    model = tiny_model()
    batch = batch_inputs([row_inputs("image")])
    ids = batch.pop("input_ids")
    wanted = model.generate(ids, **batch, **GREEDY)
    first = int(wanted[0, ids.shape[1]])
    config = GenerationConfig(**GREEDY, suppress_tokens=[first])
    found = model.generate(ids, config, **batch)
    assert first not in found[0, ids.shape[1] :].tolist()
    assert config.suppress_tokens == [first]
    model.lm_head.weight[1] = 100 * model.model(ids, **batch).last_hidden_state[0, -1]  # a placeholder would win
    assert model(ids, **batch).logits[0, -1].argmax() == 1
    assert 1 not in model.generate(ids, config, **batch)[0, ids.shape[1] :].tolist()


def test_continuous_batching_is_refused() -> None:
    """It would give all requests the route of one row."""
    with pytest.raises(ValueError, match="continuous batching packs all requests into one row"):
        tiny_model().generate_batch([row_inputs("text")["ids"], row_inputs("text", seed=1)["ids"]])


@pytest.mark.parametrize("by", ["argument", "config", "model"])
def test_guidance_by_a_second_prompt_is_refused_by_name(by: str) -> None:
    model, batch = tiny_model(), batch_inputs([row_inputs("image"), row_inputs("speech")])
    config = GenerationConfig(**GREEDY, guidance_scale=1.5)
    options: dict[str, Any] = {
        "argument": GREEDY | {"guidance_scale": 1.5},
        "config": {"generation_config": config},
    }.get(by, {})
    if by == "model":
        model.generation_config.guidance_scale = 1.5
    with pytest.raises(ValueError, match="guidance_scale is 1.5, but .*: leave guidance_scale out"):
        model.generate(**batch, **options)
    wanted = tiny_model().generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, guidance_scale=1), wanted)

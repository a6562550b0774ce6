"""A prompt read in chunks (`prefill_chunk_size`): media are encoded once, and memory goes with the chunk."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from mixlora.modeling.growing_cache import ROOM
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_long_rows import chunked_model, long_row, mixed_rows
from tests.modeling.test_rope_switch import long_model, text_row

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
MODELS = {"plain": tiny_model, "longrope": long_model, "dual chunk": chunked_model}


def counted(model: MixLoraForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills with the names of the towers as they run."""
    calls: list[str] = []
    for name in ("vision_tower", "speech_tower"):
        tower = getattr(model.model, name)

        def run(*args: Any, forward: Any = tower.forward, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return forward(*args, **kwargs)

        monkeypatch.setattr(tower, "forward", run)
    return calls


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [1, 4, 7, 64, 1000])
def test_media_are_encoded_once_and_cut_by_chunk(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Media at the front, in the middle, over several chunks, and none."""
    model = MODELS[name](1)
    batch = batch_inputs(mixed_rows())
    wanted = model.generate(**batch, **GREEDY)
    calls = counted(model, monkeypatch)
    assert torch.equal(model.generate(**batch, **GREEDY, prefill_chunk_size=size), wanted)
    assert sorted(calls) == ["speech_tower", "vision_tower"]


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_chunks_go_with_other_ways_to_generate(options: dict[str, Any]) -> None:
    model = tiny_model()
    kinds = ("both",) if "prompt_lookup_num_tokens" in options else ROWS
    batch = batch_inputs([row_inputs(kind) for kind in kinds])
    shared = GREEDY | options
    assert torch.equal(model.generate(**batch, **shared, prefill_chunk_size=3), model.generate(**batch, **shared))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_second_turn_brings_its_media_in_chunks(kind: str) -> None:
    """The first turn's media are in the cache; those of the second lie across the border of its chunks."""
    model = tiny_model()
    first, second = row_inputs("image"), row_inputs("image", 9)
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=64)
    start = batch_inputs([first])
    ids = model.generate(**start, **GREEDY, past_key_values=cache)
    every = torch.cat([ids, torch.tensor([second["ids"]])], -1)
    pixels = torch.cat([first["pixels"], second["pixels"]])
    wanted = model.generate(
        every, attention_mask=torch.ones_like(every), pixel_values=pixels, **GREEDY, use_cache=False
    )
    options = {"attention_mask": torch.ones_like(every), "past_key_values": cache, "prefill_chunk_size": 3}
    assert torch.equal(model.generate(every, pixel_values=second["pixels"], **options, **GREEDY), wanted)


@torch.no_grad()
def test_media_that_are_encoded_before_are_cut_too() -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    media = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    wanted = model.generate(**batch, **GREEDY)
    encoded = model.model.encode_media(batch["input_ids"], **media)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    found = model.generate(**inputs, mm_encoder_outputs=encoded, **GREEDY, prefill_chunk_size=3)
    assert torch.equal(found, wanted)


def test_embeddings_are_not_cut() -> None:
    model = tiny_model()
    embeds = model.get_input_embeddings()(torch.tensor([text_row(9)["ids"]]))
    with pytest.raises(ValueError, match="prefill_chunk_size needs input_ids"):
        model.generate(inputs_embeds=embeds, adapter_ids=torch.tensor([-1]), prefill_chunk_size=3)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, torch.Tensor):
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return result


def largest(model: MixLoraForConditionalGeneration, rows: list[dict[str, Any]], **options: Any) -> int:
    """The largest tensor of generating one token."""
    with Largest() as seen:
        model.generate(**batch_inputs(rows), **GREEDY | {"max_new_tokens": 1}, **options)
    return seen.elements


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_the_largest_tensor_goes_with_the_chunk(name: str) -> None:
    """Padded rows with media. What still goes with the length: a layer's cache, its mask, the ids of the prompt."""
    model, chunk, length = MODELS[name](0), 8, 900
    rows = [long_row("both", length), text_row(length - 100)]
    text = model.config.text_config
    held = length + max(ROOM, length // 8)
    cache = len(rows) * held * max(text.num_key_value_heads * text.head_dim, text.hidden_size)  # LongRoPE keeps inputs
    rotations = 3 if name == "dual chunk" else 1
    scores = len(rows) * chunk * length * text.num_attention_heads * rotations
    features = max(p.numel() for p in model.parameters())
    assert largest(model, rows, prefill_chunk_size=chunk) <= max(cache, scores, features)
    whole = largest(model, rows)
    if name == "dual chunk":  # without a mask of all pairs, nor their scores
        assert whole <= len(rows) * length * text.intermediate_size
    else:
        assert whole > 10 * max(cache, scores, features)

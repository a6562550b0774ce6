"""The model with dual chunk attention: cached equals uncached, a row in a batch equals the row alone."""

from typing import Any

import pytest
import torch
from transformers import StaticCache
from transformers.cache_utils import DynamicCache

from mixlora.modeling.long_attention import FEW
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import ROWS, batch_inputs, of_type, row_inputs, tiny_model
from tests.modeling.test_compile import GRAPHS, on_the_cpu_too
from tests.modeling.test_rope_switch import LONGROPE, shortened, steps, text_row

CHUNK, LOCAL = 30, 10
STEP = CHUNK - LOCAL
SPEC = {"method": "dual_chunk", "chunk_size": CHUNK, "local_size": LOCAL, "temperature": True}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
ENDS = [STEP - 3, STEP, CHUNK, 2 * STEP - 5, 3 * STEP - 1, 3 * STEP + 1]
"""Lengths whose next tokens pass a border."""


def chunked_model(seed: int = 0, attention: str = "sdpa", **text: Any) -> MixLoraForConditionalGeneration:
    model = tiny_model(seed, text={"long_context": SPEC} | text)
    model.set_attn_implementation({"text_config": attention})  # the towers' would round otherwise
    return model


def long_row(kind: str, length: int) -> dict[str, Any]:
    """A row with its media at the front, continued with text up to `length` tokens."""
    row = row_inputs(kind)
    return row | {"ids": row["ids"] + text_row(length - len(row["ids"]), seed=length)["ids"]}


def mixed_rows() -> list[dict[str, Any]]:
    """Rows of every kind that end around every border; one has its media beyond the first chunks."""
    late = row_inputs("both")
    late["ids"] = text_row(2 * STEP - 3, 7)["ids"] + late["ids"] + text_row(9, 8)["ids"]
    lengths = [CHUNK, 2 * STEP - 5, 3 * STEP - 1, 3 * STEP + 1, 65]
    return [text_row(STEP - 3), late, *(long_row(kind, length) for kind, length in zip(ROWS, lengths, strict=True))]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits agree as rows in a batch must, to what processors of several makes round."""
    return bool((found - wanted).abs().max() < 1e-3 * wanted.std())


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_rows_in_a_batch_equal_rows_alone(side: str, attention: str) -> None:
    model = chunked_model(attention=attention)
    rows = mixed_rows()
    batch = batch_inputs(rows, side)
    logits = model(**batch).logits
    for i, row in enumerate(rows):
        assert close(logits[i][batch["attention_mask"][i].bool()], model(**batch_inputs([row])).logits[0]), i


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_give_the_logits_of_every_pair(side: str) -> None:
    batch = of_type(batch_inputs(mixed_rows(), side), torch.double)
    real = batch["attention_mask"].bool()
    found, wanted = (chunked_model(attention=each).double()(**batch).logits[real] for each in ("sdpa", "eager"))
    assert (found - wanted).abs().max() < 1e-12 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("rope", [None, YARN, LONGROPE], ids=["plain", "yarn", "longrope"])
def test_each_cached_step_is_that_of_the_row_alone(kind: str, rope: dict[str, Any] | None) -> None:
    model = chunked_model(rope_parameters=rope).double()  # in fp32, rounding comes near to the bound
    rows = [text_row(end + 4, end) for end in ENDS] + mixed_rows()[1:]
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config.text_config, max_cache_len=96)
    found = steps(model, rows, 8, cache)
    for i, row in enumerate(rows):
        for step in (0, 1, 4, 7, 8):
            alone = of_type(batch_inputs([shortened(row, 8 - step)]), torch.double)
            assert close(found[step, i], model(**alone, use_cache=False).logits[0, -1]), (i, step)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        *({"prefill_chunk_size": size} for size in (1, 3, FEW + 1, STEP, CHUNK, 50)),
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "prefill_chunk_size": 17},
        {"num_beams": 2},
        {"num_beams": 2, "prefill_chunk_size": 17},
    ],
    ids=str,
)
def test_generation_with_a_cache_is_that_without(options: dict[str, Any]) -> None:
    model = chunked_model(1)
    batch = batch_inputs(mixed_rows())
    plain = {name: value for name, value in options.items() if name == "num_beams"}
    wanted = model.generate(**batch, **GREEDY, **plain, use_cache=False)
    assert torch.equal(model.generate(**batch, **GREEDY, **options), wanted)


@torch.no_grad()
@pytest.mark.parametrize("length", ENDS)
def test_one_row_decodes_over_every_border(length: int) -> None:
    model = chunked_model(2)
    batch = batch_inputs([text_row(length, length)])
    options = GREEDY | {"max_new_tokens": STEP + 5}
    wanted = model.generate(**batch, **options, use_cache=False)
    for chosen in ({}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(**batch, **options, **chosen), wanted)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("rope", [None, YARN, LONGROPE], ids=["plain", "yarn", "longrope"])
def test_it_is_plain_up_to_one_token_beyond_the_chunk(attention: str, rope: dict[str, Any] | None) -> None:
    """And no further. Rows of one chunk keep their bits."""
    plain, model = tiny_model(text={"rope_parameters": rope}), chunked_model(attention=attention, rope_parameters=rope)
    plain.set_attn_implementation({"text_config": attention})
    batch = batch_inputs([text_row(length) for length in (STEP, 7)])
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    ids = torch.tensor([text_row(CHUNK + 2)["ids"]])
    found, wanted = model(ids).logits, plain(ids).logits
    assert close(found[:, :-1], wanted[:, :-1])
    assert (found[:, -1] - wanted[:, -1]).abs().max() > 2e-3 * wanted.std()


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other() -> None:
    model = chunked_model()
    rows = [text_row(length, length) for length in (STEP + 3, 3 * STEP, 5)]
    ids = torch.tensor([[token for row in rows for token in row["ids"]]])
    positions = torch.cat([torch.arange(len(row["ids"])) for row in rows])[None]
    found = model(ids, position_ids=positions).logits[0].split([len(row["ids"]) for row in rows])
    for mine, row in zip(found, rows, strict=True):
        assert close(mine, model(torch.tensor([row["ids"]])).logits[0])


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_taken_where_nothing_is_cached() -> None:
    model = chunked_model()
    batch = batch_inputs([text_row(50), text_row(33)])
    real = batch["attention_mask"].bool()
    whole = real[:, None, None] & torch.ones(50, 50, dtype=torch.bool).tril()
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    wanted = model(**batch).logits[real]
    added = torch.zeros(whole.shape).masked_fill(~whole, torch.finfo(torch.float).min)
    for mask in (whole, added):
        given = {"attention_mask": mask, "position_ids": positions}
        assert close(model(batch["input_ids"], **given).logits[real], wanted)
    cache = DynamicCache()
    model(**batch, past_key_values=cache)
    with pytest.raises(ValueError, match=r"with a filled cache the attention_mask must be \[batch, length\]"):
        model(
            torch.tensor([[20], [21]]), attention_mask=whole[:, :, -1:], past_key_values=cache, adapter_ids=NO_ADAPTER
        )
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1, dtype=torch.long)], -1)
    step = {"attention_mask": mask, "past_key_values": cache, "adapter_ids": NO_ADAPTER}
    with pytest.raises(
        ValueError, match=r"row 1: position_ids behind a filled cache must count its real tokens, \[33\]"
    ):
        model(torch.tensor([[20], [21]]), position_ids=torch.tensor([[50], [50]]), **step)


NO_ADAPTER = torch.tensor([-1, -1])


@torch.no_grad()
def test_a_second_turn_needs_no_media_of_the_first() -> None:
    model = chunked_model(3)
    batch = batch_inputs([long_row("image", STEP + 5)])
    first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([text_row(STEP, 5)["ids"]])], -1)
    given = {"attention_mask": torch.ones_like(ids), "adapter_ids": model.router(ids)} | GREEDY
    found = model.generate(ids, **given, past_key_values=first.past_key_values)
    assert torch.equal(found, model.generate(ids, **given, pixel_values=batch["pixel_values"], use_cache=False))


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_compiled_steps_of_a_static_cache(padded: bool) -> None:
    GRAPHS.clear()
    torch.compiler.reset()
    model = chunked_model()
    batch = batch_inputs([text_row(2 * STEP - 3), text_row(STEP if padded else 2 * STEP - 3, 1)])
    found = model.generate(**batch, **GREEDY, cache_implementation="static", compile_config=on_the_cpu_too())
    assert 1 <= len(GRAPHS) <= 2
    assert torch.equal(found, model.generate(**batch, **GREEDY, use_cache=False))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_every_pair(checkpointing: bool) -> None:
    def gradients(attention: str) -> dict[str, torch.Tensor]:
        model = chunked_model(attention=attention).double().train()
        if checkpointing and attention == "sdpa":
            model.gradient_checkpointing_enable()
        batch = batch_inputs([text_row(50), long_row("image", 44)])
        model(**batch).logits[batch["attention_mask"].bool()].square().sum().backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    found, wanted = gradients("sdpa"), gradients("eager")
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-9 * wanted[name].norm() + 1e-9, name


@torch.no_grad()
def test_settings_are_saved_and_may_be_given_when_loading(tmp_path: Any) -> None:
    plain = tiny_model()
    plain.save_pretrained(tmp_path / "plain")
    model = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "plain", long_context=SPEC)
    model.save_pretrained(tmp_path / "chunked")
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "chunked")
    ids = torch.tensor([text_row(70)["ids"]])
    wanted = chunked_model()(ids).logits
    assert torch.equal(model(ids).logits, wanted) and torch.equal(again(ids).logits, wanted)
    assert torch.equal(tiny_model(long_context=SPEC)(ids).logits, wanted)  # put into the decoder's config
    blunt = tiny_model(long_context=SPEC | {"temperature": False})(ids).logits
    assert torch.equal(blunt[:, : CHUNK + 1], wanted[:, : CHUNK + 1]) and not close(blunt, wanted)
    back = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "chunked", long_context=None)
    assert torch.equal(back(ids).logits, plain(ids).logits)
    given = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "plain", config=plain.config, long_context=SPEC)
    assert plain.config.text_config.long_context is None and given.config.text_config.long_context == SPEC
    with pytest.raises(ValueError, match="local_size"):
        MixLoraForConditionalGeneration.from_pretrained(tmp_path / "plain", long_context=SPEC | {"local_size": 20})

"""A quantized cache is near, and rounds each row as if it were alone."""

from typing import Any

import pytest
import torch
from transformers import QuantizedCache

from mixlora.modeling.quantized_cache import TokenFp8Layer, settings_within_rows
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_rope_switch import SWITCH, long_model, text_row

STEPS = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
OPTIONS = STEPS | {"return_dict_in_generate": True, "output_logits": True}
BACKENDS: dict[str, dict[str, Any]] = {"fp8": {}, "hqq": {"nbits": 8}, "quanto": {"nbits": 4}}
MODULES = {"hqq": "hqq", "quanto": "optimum.quanto"}
ROUNDING = 0.02
"""Standard deviations of the logits: a number that lies between two steps may be rounded to either."""


def quantized(backend: str, **settings: Any) -> dict[str, Any]:
    if backend in MODULES:
        pytest.importorskip(MODULES[backend])
    return {"cache_implementation": "quantized", "cache_config": {"backend": backend, **BACKENDS[backend], **settings}}


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_in_a_batch_is_rounded_as_if_alone(backend: str) -> None:
    model, cache = tiny_model(), quantized(backend)
    rows = [row_inputs(kind) for kind in ROWS]
    together = model.generate(**batch_inputs(rows), **OPTIONS, **cache).logits
    for index, row in enumerate(rows):
        alone = model.generate(**batch_inputs([row]), **OPTIONS, **cache).logits
        for mine, wanted in zip(together, alone, strict=True):
            assert (mine[index] - wanted[0]).abs().max() < ROUNDING * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["fp8", "hqq"])
def test_answers_are_near(backend: str) -> None:
    """The prompt is read before it is quantized, so the first token is exact, and the next one is near."""
    model, batch = tiny_model(), batch_inputs([row_inputs(kind) for kind in ROWS])
    exact = model.generate(**batch, **OPTIONS).logits
    near = model.generate(**batch, **OPTIONS, **quantized(backend)).logits
    assert torch.equal(near[0], exact[0])
    assert 0 < (near[1] - exact[1]).pow(2).mean().sqrt() < 0.1 * exact[1].std()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["fp8", "hqq"])
def test_rows_pass_the_switch_as_if_alone(backend: str) -> None:
    model, cache = long_model(), quantized(backend)
    rows = [text_row(SWITCH - 2), text_row(12)]
    together = model.generate(**batch_inputs(rows), **OPTIONS, **cache).logits
    alone = model.generate(**batch_inputs(rows[:1]), **OPTIONS, **cache).logits
    for mine, wanted in zip(together[:3], alone[:3], strict=True):
        assert (mine[0] - wanted[0]).abs().max() < ROUNDING * wanted.std()


@torch.no_grad()
def test_beams_take_their_rows_with_them() -> None:
    model, rows = tiny_model(), [row_inputs(kind) for kind in ("two_clips", "image")]
    cache = quantized("fp8")
    together = model.generate(**batch_inputs(rows), **STEPS, num_beams=3, **cache)[:, -4:]
    for index, row in enumerate(rows):
        alone = model.generate(**batch_inputs([row]), **STEPS, num_beams=3, **cache)[:, -4:]
        assert torch.equal(together[index], alone[0])


def test_fp8_keeps_what_is_louder_than_the_prompt() -> None:
    """With a scale that the prompt fixes, it would overflow to NaN."""
    layer, prompt = TokenFp8Layer(), torch.randn(2, 3, 5, 8)
    assert layer.update(prompt, prompt)[0] is prompt
    loud = 1000 * torch.randn(2, 3, 1, 8)
    keys, values = layer.update(loud, 1e-6 * loud)
    for found, wanted in ((keys, torch.cat((prompt, loud), 2)), (values, torch.cat((prompt, 1e-6 * loud), 2))):
        step = wanted.abs().amax(-1, keepdim=True) / 16  # three bits behind the leading one
        assert ((found - wanted).abs() <= step).all()
    layer.reorder_cache(torch.tensor([1, 1]))
    again, _ = layer.update(loud, loud)
    assert torch.equal(again[0], again[1]) == torch.equal(loud[0], loud[1])
    torch.testing.assert_close(again[0, :, :6], keys[1])
    assert layer.get_seq_length() == 7


@torch.no_grad()
def test_a_given_cache_is_of_the_same_kind() -> None:
    model, batch = tiny_model(), batch_inputs([row_inputs(kind) for kind in ROWS])
    cache = QuantizedCache("fp8", model.config.text_config)
    found = model.generate(**batch, **STEPS, past_key_values=cache)
    assert all(type(layer) is TokenFp8Layer for layer in cache.layers)
    assert torch.equal(found, model.generate(**batch, **STEPS, **quantized("fp8")))


def test_groups_over_several_rows_are_refused() -> None:
    model, batch = tiny_model(), batch_inputs([row_inputs("text"), row_inputs("image")])
    with pytest.raises(ValueError, match="must not mix rows: with this backend pass axis_key=1, axis_value=1"):
        model.generate(**batch, **STEPS, **quantized("hqq", axis_key=0))
    with pytest.raises(ValueError, match="a q_group_size that divides 8, got .*, q_group_size=64"):
        model.generate(**batch, **STEPS, **quantized("hqq", q_group_size=64))


def test_settings_that_are_left_open_keep_rows_apart() -> None:
    assert settings_within_rows({"backend": "fp8"}, 8) == {"backend": "fp8"}
    for backend, axis in (("hqq", 1), ("quanto", 0)):
        apart = {"axis_key": axis, "axis_value": axis}
        assert settings_within_rows({"backend": backend}, 128) == {"backend": backend, "q_group_size": 64} | apart
        found = settings_within_rows({"backend": backend, "nbits": 2}, 80)
        assert found == {"backend": backend, "nbits": 2, "q_group_size": 80} | apart
    assert settings_within_rows(None, 64) == {"backend": "quanto", "axis_key": 0, "axis_value": 0, "q_group_size": 64}

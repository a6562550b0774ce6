"""A cache that grows in place holds what transformers' default holds, whatever is done to it in between."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from mixlora.modeling.growing_cache import ROOM, GrowingLayer, growing
from tests.modeling.model_fixtures import batch_inputs, row_inputs, tiny_model


def appended(layers, tokens, rows=3):
    """Appends the same random tokens to each layer."""
    states = [torch.randn(rows, 2, tokens, 4) for _ in range(2)]
    return [layer.update(*states) for layer in layers]


def assert_same(ours, wanted):
    for mine, theirs in ((ours.keys, wanted.keys), (ours.values, wanted.values)):
        assert torch.equal(mine, theirs)


@torch.no_grad()
@pytest.mark.parametrize("change", ["nothing", "crop", "reorder", "select", "repeat", "copy", "replace", "cut"])
def test_it_holds_what_the_default_holds(change):
    layers = ours, wanted = GrowingLayer(), DynamicLayer()
    appended(layers, 5)
    appended(layers, 1)
    rows = 3
    for layer in layers:
        if change == "crop":
            layer.crop(-2)
        elif change == "reorder":
            layer.reorder_cache(torch.tensor([2, 0, 0]))
        elif change == "select":
            layer.batch_select_indices(torch.tensor([1, 2]))
            rows = 2
        elif change == "repeat":
            layer.batch_repeat_interleave(2)
            rows = 6
        elif change == "replace":
            layer.keys = layer.keys + 1
        elif change == "cut":
            layer.keys, layer.values = layer.keys[:, :, 1:], layer.values[:, :, 1:]
    if change == "copy":
        before, layers = ours.keys.clone(), [copy.deepcopy(ours), wanted]
        appended(layers, 1)
        appended([ours], 1)
        assert torch.equal(ours.keys[:, :, :-1], before), "the copy wrote into the original"
        ours = layers[0]
    for tokens in (1, ROOM, 1, 1):
        appended(layers, tokens, rows)
        assert_same(ours, wanted)


@torch.no_grad()
def test_a_step_copies_nothing():
    layer = GrowingLayer()
    appended([layer], 5)
    place = layer.keys.data_ptr()
    for _ in range(ROOM):
        appended([layer], 1)
    assert layer.keys.data_ptr() == place and layer.keys.shape == (3, 2, 5 + ROOM, 4)
    appended([layer], 1)
    assert layer.keys.data_ptr() != place


def test_gradients_reach_what_was_appended():
    layer, states = GrowingLayer(), torch.randn(1, 2, 3, 4, requires_grad=True)
    layer.update(states, states)
    keys, _ = layer.update(states, states)
    keys.sum().backward()
    assert torch.equal(states.grad, torch.full_like(states, 2))


def test_a_cache_made_in_inference_mode_may_be_used_outside():
    layer = GrowingLayer()
    with torch.inference_mode():
        appended([layer], 2)
    with torch.no_grad():
        appended([layer], 2)
    assert layer.keys.shape[2] == 4


def test_only_empty_layers_of_the_default_kind_are_replaced():
    cache = DynamicCache()
    cache.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), 0)
    cache.layers.append(DynamicLayer())
    assert [type(layer) for layer in growing(cache).layers] == [DynamicLayer, GrowingLayer]


@torch.no_grad()
def test_generate_makes_one():
    model = tiny_model()
    output = model.generate(
        **batch_inputs([row_inputs("text"), row_inputs("image")]), max_new_tokens=3, return_dict_in_generate=True
    )
    assert all(type(layer) is GrowingLayer for layer in output.past_key_values.layers)

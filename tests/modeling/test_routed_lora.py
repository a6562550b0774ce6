"""The two forms of a route are one plan, and a loaded adapter acts where the table sends it."""

import pytest
import torch
from torch import nn

from mixlora.modeling.routed_lora import Route, RoutedLinear
from tests.modeling.model_fixtures import batch_inputs, row_inputs, tiny_model


def loud_linear() -> RoutedLinear:
    torch.manual_seed(0)
    linear = RoutedLinear(nn.Linear(6, 5))
    for name, rank in (("a", 2), ("b", 3)):
        linear.add_adapter(name, rank, alpha=4)
        nn.init.normal_(linear.lora_B[name].weight)
    return linear


@torch.no_grad()
@pytest.mark.parametrize("ids", [[-1, 0, 1, 0], [1, 1, 1, 1], [-1, -1, -1, -1]])
def test_masks_and_rows_give_the_same(ids):
    linear, x = loud_linear(), torch.randn(4, 3, 6)
    rows = Route.from_adapter_ids(torch.tensor(ids), ["a", "b"]).to("cpu")
    masks = Route.from_adapter_ids(torch.tensor(ids), ["a", "b"], masked=True).to("cpu")
    want = linear.base_layer(x)
    for row, i in enumerate(ids):
        if i >= 0:
            name = "ab"[i]
            delta = x[row] @ linear.lora_A[name].weight.T @ linear.lora_B[name].weight.T * linear.scaling[name]
            want[row] = want[row] + delta
    for route in (rows, masks):
        out = linear(x, route)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        base = torch.tensor(ids) == -1
        assert torch.equal(out[base], linear.base_layer(x)[base])


def test_what_no_row_needs_is_not_planned():
    assert Route.from_adapter_ids(torch.tensor([-1, -1]), ["a", "b"]) == Route()
    ((name, index),) = Route.from_adapter_ids(torch.tensor([1, 1]), ["a", "b"]).rows
    assert name == "b" and index is None


@torch.no_grad()
def test_a_modality_is_never_answered_without_its_adapter(tmp_path):
    model = tiny_model()
    batch = batch_inputs([row_inputs("speech")])
    want = model(**batch).logits
    model.save_adapter(tmp_path, "speech")
    model.delete_adapter("speech")
    for call in (lambda: model(**batch), lambda: model.generate(**batch, max_new_tokens=1)):
        with pytest.raises(ValueError, match="row 0 .speech. needs adapter 'speech'"):
            call()
    model.load_adapter(tmp_path, adapter_name="speech")
    assert torch.equal(model(**batch).logits, want)


def test_a_model_without_any_adapter_says_so_too():
    with pytest.raises(ValueError, match="row 0 .vision. needs adapter 'vision'"):
        tiny_model(adapters={})(**batch_inputs([row_inputs("image")]))
    base_alone = {"vision": None, "vision_speech": None, "speech": None}
    assert tiny_model(adapters={}, routing=base_alone)(**batch_inputs([row_inputs("image")])).logits.isfinite().all()

"""The two forms of a route are one plan, and a loaded adapter acts where the table sends it."""

from dataclasses import replace

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
        assert torch.equal(out[base], linear(x, Route())[base])
    torch.testing.assert_close(linear(x, Route()), linear.base_layer(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [3, 20])
@pytest.mark.parametrize("ids", [[-1, -1, 0, 0], [0, 1, 0, -1], [1, 1, 1, 1]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_fused_layer_gives_the_gradients_of_plain_operations(length, ids, dropout):
    linear = loud_linear()
    linear.base_layer.requires_grad_(False)
    for name in "ab":
        linear.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()
    route = replace(Route.from_adapter_ids(torch.tensor(ids), ["a", "b"], length=length), quick=True)
    x = torch.randn(4, length, 6)
    weight = torch.randn(4, length, linear.out_features)
    found = []
    for fused in (True, False):
        torch.manual_seed(3)
        entered = x.clone().requires_grad_()
        linear.zero_grad()
        if fused:
            out = linear(entered, route)
        else:  # the same draws of dropout, run by run
            out = linear.base_layer(entered)
            for name, where in route.rows:
                rows = (
                    torch.arange(4)[where] if isinstance(where, slice) else torch.arange(4) if where is None else where
                )
                out = out.index_add(0, rows, linear.delta(name, entered[rows]))
        (out * weight).sum().backward()
        grads = {name: p.grad.clone() for name, p in linear.named_parameters() if p.grad is not None}
        found.append({"out": out.detach(), "x": entered.grad, **grads})
    assert found[0].keys() == found[1].keys() and not linear.base_layer.weight.requires_grad
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
def test_dropout_acts_on_rows_by_index_without_gradients_too():
    linear = loud_linear()
    linear.lora_dropout["a"] = nn.Dropout(0.5)
    route = Route.from_adapter_ids(torch.tensor([0, -1, 0, -1]), ["a", "b"])
    assert not torch.equal(linear(torch.ones(4, 3, 6), route), linear.eval()(torch.ones(4, 3, 6), route))


def test_the_fused_layer_under_checkpointing_and_where_only_some_matrices_learn():
    linear, x = loud_linear(), torch.randn(4, 20, 6)
    linear.requires_grad_(False)
    linear.lora_B["a"].weight.requires_grad_()
    route = replace(Route.from_adapter_ids(torch.tensor([0, 0, 1, 1]), ["a", "b"]), quick=True)
    linear(x, route).sum().backward()
    want = linear.lora_B["a"].weight.grad.clone()
    linear.zero_grad()
    torch.utils.checkpoint.checkpoint(linear, x, route, use_reentrant=False).sum().backward()
    assert torch.equal(linear.lora_B["a"].weight.grad, want) and want.any()
    assert linear.lora_A["a"].weight.grad is None and linear.lora_B["b"].weight.grad is None


def test_hooks_of_others_are_still_called():
    linear, x, seen = loud_linear(), torch.randn(4, 3, 6), []
    route = Route.from_adapter_ids(torch.tensor([0, 0, 1, 1]), ["a", "b"])
    with torch.no_grad():
        want = linear(x, route)
        linear.lora_A["a"].register_forward_hook(lambda *args: seen.append(1))
        torch.testing.assert_close(linear(x, route), want)
    assert seen == [1]


def test_rows_are_planned_as_runs_where_they_are_long():
    ids, names = torch.tensor([0, 1, 0, -1, 0, 0]), ["a", "b"]
    found = dict(Route.from_adapter_ids(ids, names).rows)
    assert found["a"].tolist() == [0, 2, 4, 5] and found["b"] == slice(1, 2)
    long = Route.from_adapter_ids(ids, names, length=100)
    assert [where for name, where in long.rows if name == "a"] == [slice(0, 1), slice(2, 3), slice(4, 6)]


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

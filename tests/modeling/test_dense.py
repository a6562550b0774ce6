"""The quicker product is the same product, and is taken by the shape alone."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mixlora.modeling import routed_function
from mixlora.modeling.dense import FEW, MANY, dense, thin
from mixlora.modeling.routed_function import apply_linear

SIZES = [0, 1, FEW, FEW + 1, MANY - 1, MANY, 100]


@torch.no_grad()
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_is_the_linear_layer(tokens, dtype):
    x, weight, bias = (torch.randn(*shape, dtype=dtype) for shape in ((tokens, 1, 24), (40, 24), (40,)))
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 2e-2}
    for each in (None, bias):
        torch.testing.assert_close(dense(x, weight, each), F.linear(x, weight, each), **near)
    other = torch.randn(24, tokens, dtype=dtype).t()
    torch.testing.assert_close(dense(other, weight), F.linear(other, weight), **near)
    for rows in (x[:, 0], other):
        torch.testing.assert_close(thin(rows, weight), F.linear(rows, weight), **near)


@torch.no_grad()
def test_rows_of_one_shape_keep_their_bits():
    x, weight = torch.randn(12, 1, 768), torch.randn(1280, 768)
    changed = x.clone()
    changed[4:] = torch.randn(8, 1, 768)
    assert torch.equal(dense(x, weight)[:4], dense(changed, weight)[:4])


def test_a_frozen_layer_passes_gradients_on_and_others_take_the_usual_way():
    layer, x = nn.Linear(3, 2), torch.randn(1, 40, 3, requires_grad=True)
    assert "Routed" not in apply_linear(layer, x).grad_fn.name()
    layer.requires_grad_(False)
    found = apply_linear(layer, x)
    assert "Routed" in found.grad_fn.name()
    torch.testing.assert_close(found, layer(x))
    weights = torch.randn(1, 40, 2)
    (found * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ layer.weight)


@torch.no_grad()
def test_hooks_of_others_are_called(monkeypatch):
    seen = []
    monkeypatch.setattr(routed_function, "dense", lambda *args: seen.append(args) or F.linear(*args))
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    torch.testing.assert_close(apply_linear(layer, x), layer(x))
    assert len(seen) == 1
    layer.register_forward_hook(lambda *args: None)
    apply_linear(layer, x)
    apply_linear(nn.Sequential(nn.Linear(3, 2)), x)
    assert len(seen) == 1

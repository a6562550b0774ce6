"""Eager attention keeps its precision, and padding gives finite gradients."""

import math

import pytest
import torch

from mixlora.modeling.attention import RoutedAttention, eager_attention
from mixlora.modeling.configuration_mixlora import MixLoraTextConfig
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model


def test_eager_attention_is_exact_in_fp64():
    generator = torch.Generator().manual_seed(0)
    module = RoutedAttention(MixLoraTextConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2), 0)
    query = torch.randn(2, 4, 5, 8, generator=generator, dtype=torch.double)
    key, value = (torch.randn(2, 2, 5, 8, generator=generator, dtype=torch.double) for _ in range(2))
    output, weights = eager_attention(module, query, key, value, None, scaling=8**-0.5)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key.repeat_interleave(2, dim=1)) / math.sqrt(8)
    wanted = scores.exp() / scores.exp().sum(-1, keepdim=True)
    assert weights.dtype == torch.double and (weights - wanted).abs().max() < 1e-14
    mixed = torch.einsum("bhqk,bhkd->bqhd", wanted, value.repeat_interleave(2, dim=1))
    assert (output - mixed).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_eager_softmax_of_half_precision_runs_in_fp32(dtype):
    module = RoutedAttention(MixLoraTextConfig(hidden_size=16, num_attention_heads=2), 0)
    query = torch.randn(1, 2, 300, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    _, weights = eager_attention(module, query, query, query, None, scaling=0.01)
    scores = query @ query.transpose(2, 3) * 0.01
    assert torch.equal(weights, scores.float().softmax(-1).to(dtype))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_left_padded_fp64_batch_has_the_gradients_of_its_rows(attention):
    def gradients(groups):
        model = tiny_model().double()
        model.set_attn_implementation(attention)
        for rows in groups:
            batch = batch_inputs(rows)
            real = batch["attention_mask"].bool()
            model(**batch).logits[real].square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    rows = [row_inputs(kind) for kind in ROWS]
    together, apart = gradients([rows]), gradients([[row] for row in rows])
    assert together.keys() == apart.keys()
    for name, gradient in together.items():
        assert gradient.isfinite().all(), name
        # 1e-9: a bias of keys cancels in the softmax, so its gradient is 0 but for rounding
        assert (gradient - apart[name]).norm() <= 1e-6 * apart[name].norm() + 1e-9, name

"""The budget search: recall is measured as it is, the cheapest budget that reaches it wins, others stay dense."""

from typing import Any

import pytest
import torch

from mixlora.evaluation.sparse_budgets import Tried, calibrate, choose_budget, measure
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.rope import apply_rotary
from tests.modeling.model_fixtures import batch_inputs, tiny_model
from tests.modeling.test_long_rows import SPEC, close, long_row
from tests.modeling.test_rope_switch import text_row

SIZES = {"min_length": 60, "block_size": 4, "segment": 1000, "sinks": 1}
TRIED = {"columns": (0, 4, 16), "diagonals": (1, 2, 6)}


@torch.no_grad()
def full_weights(model: MixLoraForConditionalGeneration, length: int, seed: int) -> torch.Tensor:
    """Attention of the first layer `[heads, length, length]`, computed plainly."""
    decoder = model.model.language_model
    ids = torch.tensor([text_row(length, seed)["ids"]])
    layer, positions = decoder.layers[0], torch.arange(length)[None]
    x = layer.input_layernorm(decoder.embed_tokens(ids))
    query, key, _ = layer.self_attn.project(x, model.model.route(torch.tensor([-1]), None, None))
    turn = decoder.rotary_emb(x, positions)
    query, key = apply_rotary(query, *turn), apply_rotary(key, *turn).repeat_interleave(2, dim=1)
    scores = query @ key.transpose(2, 3) * layer.self_attn.scaling
    return scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)[0]


def test_recall_is_the_share_of_the_attention_that_is_read() -> None:
    """The own block and the sinks alone: what is read can be told without the search."""
    length = 80
    model = tiny_model()
    _, heads = calibrate(
        model, [batch_inputs([text_row(length, 3)])], recall=0.0, most=1.0, columns=(0,), diagonals=(1,), **SIZES
    )
    weights = full_weights(model, length, 3)
    at = torch.arange(length)
    seen = (at // 4 == at[:, None] // 4) | (at == 0)
    wanted = (weights * seen).sum(-1).unflatten(-1, (-1, 4)).mean(-1)[:, : length // 4 - 1]
    assert [(each.layer, each.head) for each in heads] == [(layer, head) for layer in range(2) for head in range(4)]
    found = torch.tensor([each.recalls for each in heads[:4]])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunked", [False, True])
@torch.no_grad()
def test_budgets_act_when_set_and_are_saved(chunked: bool, tmp_path: Any) -> None:
    model = tiny_model()
    model.config.set_long_context(long_context=SPEC if chunked else None)
    batch = batch_inputs([text_row(97), long_row("image", 80), text_row(20)])
    dense = model(**batch).logits
    spec, heads = calibrate(model, [batch], recall=0.5, most=0.9, **TRIED, **SIZES)
    assert torch.equal(model(**batch).logits, dense)  # looking changes nothing
    chosen = [each.budget for each in heads]
    assert spec["budgets"] == [[budget and list(budget) for budget in chosen[i : i + 4]] for i in (0, 4)]
    sparse = [each for each in heads if each.budget]
    assert sparse and all(each.share <= 0.9 and sum(each.recalls) / len(each.recalls) >= 0.5 for each in sparse)
    model.config.set_long_context(sparse_prefill=spec)
    assert [(each.budget, each.recalls, each.share) for each in measure(model, batch)] == [
        (each.budget, each.recalls, each.share) for each in heads
    ]
    found = model(**batch).logits
    assert not close(found[0], dense[0]) and close(found[2][-20:], dense[2][-20:])
    model.save_pretrained(tmp_path)
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.text_config.sparse_prefill == spec
    assert torch.equal(again(**batch).logits, found)


@torch.no_grad()
def test_heads_that_need_everything_stay_dense() -> None:
    model = tiny_model()
    batch = batch_inputs([text_row(97)])
    spec, heads = calibrate(model, [batch], recall=1.01, **TRIED, **SIZES)
    assert spec["budgets"] == [[None] * 4] * 2 and all(each.share == 1 for each in heads)
    dense = model(**batch).logits
    model.config.set_long_context(sparse_prefill=spec)
    assert close(model(**batch).logits, dense)


def test_the_cheapest_that_reaches_it_is_taken() -> None:
    tried = {(4, 2): Tried([0.5, 0.9], 100), (8, 2): Tried([1.0, 0.9], 200), (4, 8): Tried([1.0, 1.0], 180)}
    assert choose_budget(0, 1, tried, 1000, 0.95, 0.25).budget == (4, 8)
    assert choose_budget(0, 1, tried, 1000, 0.7, 0.25).budget == (4, 2)
    assert choose_budget(0, 1, tried, 1000, 0.95, 0.18).share == 0.18
    assert choose_budget(0, 1, tried, 1000, 0.95, 0.17).budget is None


def test_what_cannot_be_measured_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="no prompt of at least 60 tokens"):
        calibrate(model, [batch_inputs([text_row(50)])], **TRIED, **SIZES)
    model.set_attn_implementation({"text_config": "eager"})
    with pytest.raises(ValueError, match="eager attention is never sparse"):
        calibrate(model, [batch_inputs([text_row(97)])], **TRIED, **SIZES)

"""LoRA experts: the same function at conversion, rows on their own, and a balance loss counted once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora.modeling.lora_experts import LoraExperts, Usage
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.routed_lora import Route
from tests.modeling.model_fixtures import ROWS, batch_inputs, make_loud, row_inputs, tiny_config, tiny_model

SPARSE = {
    "vision": {"r": 4, "alpha": 8, "experts": 4, "top_k": 2},
    "speech": {"r": 2, "alpha": 4, "experts": 3, "top_k": 1},
}


def sparse_model(**changes: Any) -> MixLoraForConditionalGeneration:
    """Experts that differ, as training leaves them."""
    return tiny_model(adapters=SPARSE, **changes)


def loud_experts(experts: int = 4, top_k: int = 2) -> LoraExperts:
    torch.manual_seed(0)
    module = LoraExperts((6, 5), 3, experts, top_k, scaling=0.5)
    return make_loud(module)  # type: ignore[return-value]


@torch.no_grad()
def test_a_token_takes_its_best_experts_weighted_by_a_softmax_over_them() -> None:
    module, x = loud_experts(), torch.randn(2, 3, 6)
    found = module(x, x)
    for place in [(row, position) for row in range(2) for position in range(3)]:
        token = x[place]
        scores = module.router @ token
        best = scores.argsort(descending=True)[:2]
        weights = scores[best].exp() / scores[best].exp().sum()
        expected = sum(
            0.5 * weight * (module.up[:, expert] @ (module.down[expert] @ token))
            for weight, expert in zip(weights, best, strict=True)
        )
        torch.testing.assert_close(found[place], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_function_is_the_same_at_conversion() -> None:
    model = tiny_model().double()
    inputs = batch_inputs([row_inputs(kind) for kind in ROWS])
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    want = model(**inputs).logits
    for name in ("vision", "speech"):
        model.split_adapter(name, experts=4, top_k=2)
    assert model.config.adapters["vision"]["experts"] == 4 and model.config.adapters["speech"]["top_k"] == 2
    torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=1e-12)
    router = model.model.language_model.layers[0].mlp.up_proj.lora_experts["vision"].router
    assert len({tuple(row.tolist()) for row in router}) == 4


def test_experts_split_only_once_and_by_sensible_numbers() -> None:
    model = tiny_model()
    for experts, top_k in ((1, 1), (4, 5), (4, 0)):
        with pytest.raises(ValueError, match="adapter 'vision': experts must be"):
            model.split_adapter("vision", experts, top_k)
    model.split_adapter("vision", 2, 1)
    with pytest.raises(ValueError, match="has 2 experts already"):
        model.split_adapter("vision", 4, 2)
    with pytest.raises(ValueError, match="no adapter 'smell'"):
        model.split_adapter("smell")
    with pytest.raises(Exception, match="experts must be .* got 4 and None"):  # the hub's class of error wraps it
        tiny_config(adapters={"vision": {"r": 4, "experts": 4}})


@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path) -> None:
    model = sparse_model()
    inputs = batch_inputs([row_inputs(kind) for kind in ROWS])
    model.save_pretrained(tmp_path)
    again, info = MixLoraForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.adapters["vision"]["experts"] == 4
    assert torch.equal(again.eval()(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_row_in_any_batch_equals_the_row_alone_and_the_base_stays() -> None:
    model = sparse_model()
    rows = [row_inputs(kind) for kind in ROWS]
    together = model(**batch_inputs(rows)).logits
    for row, logits in zip(rows, together, strict=True):
        alone = model(**batch_inputs([row])).logits[0]
        torch.testing.assert_close(logits[-len(row["ids"]) :], alone, rtol=1e-4, atol=1e-4)
    text = batch_inputs([row_inputs("text")] * 3)
    base = tiny_model(adapters={})
    base.load_state_dict({name: value for name, value in model.state_dict().items() if "lora_" not in name})
    assert torch.equal(model(**text).logits, base(**text).logits)


@torch.no_grad()
def test_cached_equals_uncached() -> None:
    model, inputs = sparse_model(), batch_inputs([row_inputs("image"), row_inputs("speech"), row_inputs("text")])
    found = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    slow = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(found, slow)


@torch.no_grad()
def test_masks_and_rows_give_the_same() -> None:
    model = sparse_model()
    layer = model.model.language_model.layers[0].mlp.up_proj
    x, ids = torch.randn(4, 3, 32), torch.tensor([-1, 0, 1, 0])
    tokens = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 1]])
    outputs, losses = [], []
    for masked in (False, True):
        usage = Usage(tokens)
        route = Route.from_adapter_ids(ids, ["speech", "vision"], masked)
        outputs.append(layer(x, Route(route.rows, route.masks, usage)))
        losses.append(usage.close())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses[0], losses[1])


def test_the_balance_loss_is_one_where_all_are_used_alike_and_padding_does_not_count() -> None:
    logits = torch.tensor([[[4.0, 0.0], [0.0, 4.0], [9.0, 0.0]]])
    gates = (logits > 1).float()
    usage = Usage(torch.tensor([[1, 1, 0]]))
    usage.add(logits, gates, None, trained=False)
    assert usage.close() == pytest.approx(1.0)
    usage = Usage()
    usage.add(logits, gates, None, trained=False)
    probability = logits.softmax(-1).mean((0, 1))
    assert usage.close() == pytest.approx(2 * (2 / 3 * probability[0] + 1 / 3 * probability[1]).item())
    assert Usage().close() is None


def test_the_balance_loss_of_a_batch_needs_a_row_with_experts() -> None:
    model = sparse_model()
    assert model(**batch_inputs([row_inputs("text")]), output_aux_loss=True).aux_loss is None
    inputs = batch_inputs([row_inputs("image"), row_inputs("text")])
    assert model(**inputs).aux_loss is None
    alone = model(**batch_inputs([row_inputs("image")]), output_aux_loss=True).aux_loss
    torch.testing.assert_close(model(**inputs, output_aux_loss=True).aux_loss, alone, rtol=1e-5, atol=0)
    assert 1 < alone.item() < 4


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_the_same_gradients_and_counts_once(dropout: float) -> None:
    adapters = {name: {**spec, "dropout": dropout} for name, spec in SPARSE.items()}
    inputs = batch_inputs([row_inputs(kind) for kind in ROWS])
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    runs = []
    for checkpointed in (False, True):
        model = make_loud(MixLoraForConditionalGeneration(tiny_config(adapters=adapters))).double().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(1)
        output = model(**inputs, use_cache=False, output_aux_loss=True)
        (output.logits.square().mean() + 0.5 * output.aux_loss).backward()
        runs.append((output.aux_loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (want, wanted), (found, gradients) = runs
    assert found == want and gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-9 * wanted[name].norm() + 1e-12, name
    routers = [name for name in gradients if name.endswith(".router")]
    assert routers and all(gradients[name].abs().max() > 0 for name in routers if ".speech." not in name)


def test_the_balance_loss_alone_reaches_the_routers_under_checkpointing() -> None:
    gradients: list[list[torch.Tensor]] = []
    for checkpointed in (False, True):
        model = sparse_model().train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(**batch_inputs([row_inputs("image")]), use_cache=False, output_aux_loss=True).aux_loss.backward()
        gradients.append([p.grad for n, p in model.named_parameters() if n.endswith("vision.router")])  # type: ignore[misc]
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again)


def test_reentrant_checkpointing_is_refused() -> None:
    model = sparse_model().train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(**batch_inputs([row_inputs("image")]), use_cache=False, output_aux_loss=True)


def test_experts_that_no_token_picks_get_no_gradient() -> None:
    module, x = loud_experts(top_k=1), torch.randn(1, 2, 6)
    module(x, x).sum().backward()
    picked = {int(expert) for expert in (x @ module.router.T).argmax(-1).flatten()}
    for expert in range(4):
        assert module.down.grad is not None
        assert bool(module.down.grad[expert].abs().sum()) == (expert in picked)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, folder: model.save_adapter(folder / "peft", "vision"),
        lambda model, folder: model.get_adapter_state_dict("vision"),
        lambda model, folder: model.merge_adapter("vision"),
    ],
    ids=["save_adapter", "get_adapter_state_dict", "merge_adapter"],
)
def test_what_has_no_place_for_experts_says_so(call: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter 'vision' has 4 experts, for which .* has no place"):
        call(sparse_model(), tmp_path)
    assert not (tmp_path / "peft").exists()


def test_experts_are_in_their_adapters_group_and_can_be_deleted() -> None:
    model = sparse_model()
    group = model.parameter_groups()["adapter.vision"]
    assert {name.rpartition(".")[2] for name in group} == {"down", "up", "router"}
    model.delete_adapter("vision")
    assert "adapter.vision" not in model.parameter_groups()
    assert not any("vision.down" in name for name in model.state_dict())

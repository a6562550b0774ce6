"""Rows without their padding: the same answers and gradients, and a text row keeps its bits."""

import pytest
import torch

from mixlora.modeling import packing
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.packing import Packing
from mixlora.modeling.routed_lora import Route, RoutedLinear
from tests.modeling.model_fixtures import batch_inputs, row_inputs, tiny_model

KINDS = ("text", "two_clips", "image", "text", "speech", "both")


@pytest.fixture
def eager_to_pack(monkeypatch):
    """Packs wherever there is any padding."""
    monkeypatch.setattr(packing, "SAVED", 1)
    monkeypatch.setattr(packing, "SHARE", 0.0)


def batch_of(side="left"):
    return batch_inputs([row_inputs(kind, seed) for seed, kind in enumerate(KINDS)], side)


def padded(monkeypatch):
    monkeypatch.setattr(packing, "SAVED", 10**9)


def real(logits, batch):
    return logits[batch["attention_mask"].bool()]


def test_what_it_is_made_of():
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    assert Packing.of(mask) is None, "there is little to gain"
    big = torch.nn.functional.pad(mask, (200, 0))
    found = Packing.of(big)
    assert found.rows == (2, 0, 1) and found.lengths == (1, 2, 3)
    assert found.index.tolist() == [2 * 203 + 202, 201, 202, 203 + 200, 203 + 201, 203 + 202]
    x = torch.randn(3, 203, 2)
    there_and_back = found.unpack(found.pack(x))
    assert torch.equal(there_and_back, x * big[..., None])
    assert Packing.of(torch.cat([big, torch.zeros_like(big[:1])])) is None, "a row of padding alone"


def test_the_route_of_tokens():
    mask = torch.nn.functional.pad(torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1]]), (200, 0))
    packed = Packing.of(mask)
    route = Route(rows=(("a", slice(0, 1)), ("b", torch.tensor([1, 2]))))
    assert packed.route(route).rows == (("a", slice(1, 3)), ("b", slice(0, 1)), ("b", slice(3, 6)))
    everywhere = Route(rows=(("a", None),))
    assert packed.route(everywhere) == everywhere


@pytest.mark.parametrize(("training", "packed"), [(False, False), (False, True), (True, True)])
def test_layers_take_the_quick_way(monkeypatch, eager_to_pack, training, packed):
    """One product after the other in place: no adapter is computed by its modules."""
    model, batch = tiny_model(exact_base=False).train(training), batch_of()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    if not packed:
        padded(monkeypatch)
    slow, quick = [], []
    fused, delta = RoutedLinear._fused, RoutedLinear.delta
    monkeypatch.setattr(RoutedLinear, "_fused", lambda *args: quick.append(args[3]) or fused(*args))
    monkeypatch.setattr(RoutedLinear, "delta", lambda *args: slow.append(1) or delta(*args))
    with torch.set_grad_enabled(training):
        model(**batch)
    assert all(quick) and len(quick) == sum(isinstance(layer, RoutedLinear) for layer in model.modules())
    assert not slow


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rope", ["default", "longrope"])
def test_logits_are_those_of_the_padded_batch(monkeypatch, eager_to_pack, side, rope):
    text = {}
    if rope == "longrope":  # so that some rows take other factors than others
        text = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 20,
                                    "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}}  # fmt: skip
    model, batch = tiny_model(text=text, exact_base=False), batch_of(side)
    seen = []
    attend = Packing.attend
    monkeypatch.setattr(Packing, "attend", lambda *args: seen.append(1) or attend(*args))
    found = model(**batch).logits
    assert len(seen) == model.config.text_config.num_hidden_layers
    padded(monkeypatch)
    wanted = model(**batch).logits
    assert len(seen) == model.config.text_config.num_hidden_layers
    assert (real(found, batch) - real(wanted, batch)).abs().max() < 1e-4 * wanted.std()
    for i, kind in enumerate(KINDS):
        alone = model(**batch_inputs([row_inputs(kind, i)])).logits[0]
        mine = found[i][batch["attention_mask"][i].bool()]
        assert (mine - alone).abs().max() < 1e-3 * wanted.std(), kind


@torch.no_grad()
def test_a_text_row_keeps_its_bits(eager_to_pack):
    model, batch = tiny_model(exact_base=False), batch_of()
    base = model(**batch, adapter_ids=torch.full((len(KINDS),), -1)).logits
    mixed = model(**batch).logits
    for row, kind in enumerate(KINDS):
        assert torch.equal(mixed[row], base[row]) == (kind == "text")


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_generation_is_that_of_the_padded_batch(monkeypatch, eager_to_pack, options):
    model, batch = tiny_model(exact_base=False), batch_of()
    options |= {"max_new_tokens": 5, "do_sample": False, "disable_compile": True}
    found = model.generate(**batch, **options)
    padded(monkeypatch)
    assert torch.equal(found, model.generate(**batch, **options))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_padded_batch(monkeypatch, eager_to_pack, checkpointing):
    model, batch = tiny_model(exact_base=False).train(), batch_of("right")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or "projector" in name)
    if checkpointing:
        model.activation_checkpointing_enable()
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        padded(monkeypatch)
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 20
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1), msg=name)


@torch.no_grad()
def test_hidden_states_are_still_those_of_a_batch(eager_to_pack):
    model: MixLoraForConditionalGeneration = tiny_model(exact_base=False)
    batch = batch_of()
    outputs = model(**batch, output_hidden_states=True)
    assert all(states.shape[:2] == batch["input_ids"].shape for states in outputs.hidden_states)
    assert outputs.logits.shape[:2] == batch["input_ids"].shape


def frozen_decoder():
    """A model whose adapters and projectors learn, and nothing else."""
    model = tiny_model(exact_base=False).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or "projector" in name)
    return model


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_is_looked_at_is_computed_to_the_end(monkeypatch, eager_to_pack, side, checkpointing):
    model, batch = frozen_decoder(), batch_of(side)
    if checkpointing:
        model.activation_checkpointing_enable()
    wanted = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    last = batch["attention_mask"].cumsum(1) * batch["attention_mask"]
    wanted |= (last >= last.amax(1, keepdim=True) - 1) & (last > 0)
    wanted[1] = False  # nothing of it
    weight = torch.randn(int(wanted.sum()), model.config.text_config.hidden_size)
    found = []
    for options in ({"wanted": wanted}, {}, "padded"):
        if options == "padded":
            padded(monkeypatch)
            monkeypatch.setattr(type(model.model), "_still_rows", lambda *args: None)
            options = {}
        model.zero_grad()
        states = model.model(**batch, use_cache=False, **options).last_hidden_state[wanted]
        (states * weight).sum().backward()
        found.append((states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    for states, grads in found[:2]:
        torch.testing.assert_close(states, found[2][0], rtol=1e-4, atol=1e-4)
        assert grads.keys() == found[2][1].keys() and len(grads) > 20
        for name, grad in found[2][1].items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max() + 1), msg=name)


def test_rows_without_anything_that_learns_have_no_backward_pass(eager_to_pack):
    model, batch = frozen_decoder(), batch_of("right")
    states = model.model(**batch, use_cache=False).last_hidden_state
    seen = torch.zeros(len(KINDS))
    for row in range(len(KINDS)):
        for parameter in model.parameters():
            parameter.grad = None
        states[row].sum().backward(retain_graph=True)
        seen[row] = max(p.grad.abs().max() for n, p in model.named_parameters() if p.grad is not None)
    assert [bool(each) for each in seen] == [kind != "text" for kind in KINDS]
    assert model.model._still_rows(batch["input_ids"], Route(), None) == [kind == "text" for kind in KINDS]
    model.model.language_model.norm.weight.requires_grad_(True)
    assert model.model._still_rows(batch["input_ids"], Route(), None) is None, "the decoder learns from all rows"


@torch.no_grad()
def test_a_prompt_is_computed_to_the_end_for_its_logits_alone(monkeypatch, eager_to_pack):
    model, batch = tiny_model(exact_base=False), batch_of()
    whole = model(**batch).logits
    last = model.model.language_model.layers[-1].mlp
    tokens, forward = [], type(last).forward
    monkeypatch.setattr(type(last), "forward", lambda *args: tokens.append(args[1].shape[0]) or forward(*args))
    few = model(**batch, logits_to_keep=1).logits
    assert tokens[-1] == len(KINDS) and tokens[0] == int(batch["attention_mask"].sum())
    assert (few - whole[:, -1:]).abs().max() < 1e-4 * whole.std()
    chosen = model(**batch, logits_to_keep=torch.tensor([-2, -1])).logits
    assert (chosen - whole[:, -2:]).abs().max() < 1e-4 * whole.std()

"""What a user of any transformers model may ask for: hidden states, attentions, tuples, other embeddings."""

from typing import Any

import pytest
import torch

from tests.modeling.model_fixtures import ROWS, VOCAB, batch_inputs, of_type, row_inputs, tiny_model
from tests.modeling.test_modeling_mixlora import llama_of

ASKED = {"output_hidden_states": True, "output_attentions": True}


def eager_model(**changes: Any) -> Any:
    model = tiny_model(**changes)
    model.set_attn_implementation("eager")
    return model


@torch.no_grad()
@pytest.mark.parametrize("asked_first", [False, True])
def test_hidden_states_and_attentions_come_when_asked_and_change_nothing(asked_first: bool) -> None:
    model = eager_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    plain = None if asked_first else model(**batch)
    asked = model(**batch, **ASKED)
    after = model(**batch)
    assert torch.equal(after.logits, asked.logits)
    assert after.hidden_states is None and after.attentions is None
    assert plain is None or torch.equal(plain.logits, asked.logits)
    real = batch["attention_mask"].bool()
    rows, length = batch["input_ids"].shape
    assert [tuple(each.shape) for each in asked.hidden_states] == [(rows, length, 32)] * 3
    assert [tuple(each.shape) for each in asked.attentions] == [(rows, 4, length, length)] * 2
    torch.testing.assert_close(asked.attentions[0].sum(-1).mean(1)[real], torch.ones(int(real.sum())))
    torch.testing.assert_close(model.lm_head(asked.hidden_states[-1]), asked.logits)


@torch.no_grad()
def test_hidden_states_and_attentions_are_those_of_llama() -> None:
    model = eager_model()
    llama = llama_of(model)
    llama.set_attn_implementation("eager")
    batch = batch_inputs([row_inputs("text"), row_inputs("text", seed=3)], "right")
    found, wanted = model(**batch, **ASKED), llama(**batch, **ASKED)
    real = batch["attention_mask"].bool()
    for name in ("hidden_states", "attentions"):
        for mine, theirs in zip(getattr(found, name), getattr(wanted, name), strict=True):
            mine, theirs = (each.transpose(1, 2) if each.dim() == 4 else each for each in (mine, theirs))
            torch.testing.assert_close(mine[real], theirs[real], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generation_tells_hidden_states_step_by_step() -> None:
    model = eager_model()
    batch = batch_inputs([row_inputs("image"), row_inputs("speech")])
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    found = model.generate(**batch, **options, **ASKED, output_logits=True)
    length = batch["input_ids"].shape[1]
    assert [[each.shape[1] for each in step] for step in found.hidden_states] == [[length] * 3, [1] * 3, [1] * 3]
    assert [step[0].shape[2:] for step in found.attentions] == [(length, length), (1, length + 1), (1, length + 2)]
    for step, logits in zip(found.hidden_states, found.logits, strict=True):
        torch.testing.assert_close(model.lm_head(step[-1][:, -1]), logits)


def test_hidden_states_under_checkpointing_carry_gradients() -> None:
    model = eager_model().train()
    model.activation_checkpointing_enable()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    output = model(**batch, output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == 3
    output.hidden_states[1].retain_grad()
    output.logits.square().mean().backward()
    assert output.hidden_states[1].grad.abs().sum() > 0


@torch.no_grad()
def test_a_tuple_holds_what_the_output_holds() -> None:
    model = eager_model()
    batch = batch_inputs([row_inputs("both")])
    named = model(**batch, labels=batch["input_ids"], use_cache=False)
    loss, logits = model(**batch, labels=batch["input_ids"], use_cache=False, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)


@torch.no_grad()
def test_each_part_takes_its_own_attention_backend() -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    wanted = model(**batch).logits
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa", "speech_config": "eager"})
    found = model(**batch, output_attentions=True)
    assert len(found.attentions) == 2
    real = batch["attention_mask"].bool()
    assert (found.logits - wanted)[real].abs().max() < 2e-4 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_more_tokens_may_be_added(tied: bool, tmp_path: Any) -> None:
    model = tiny_model(text={"tie_word_embeddings": tied})
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    wanted = model(**batch).logits
    model.resize_token_embeddings(VOCAB + 5)
    assert model.config.text_config.vocab_size == VOCAB + 5
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    found = model(**batch, labels=batch["input_ids"])
    assert found.logits.shape[-1] == VOCAB + 5 and torch.isfinite(found.loss)
    torch.testing.assert_close(found.logits[..., :VOCAB], wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, found.logits)


@torch.no_grad()
def test_half_precision_is_near() -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    wanted = model(**batch).logits
    half = model.to(torch.bfloat16)
    found = half(**of_type(batch, torch.bfloat16)).logits.float()
    real = batch["attention_mask"].bool()
    assert (found - wanted)[real].pow(2).mean().sqrt() < 0.3 * wanted[real].std()  # loud weights; unlike models: 1.4


@torch.no_grad()
def test_the_config_may_ask_for_hidden_states() -> None:
    model = tiny_model()
    batch = batch_inputs([row_inputs("image")])
    assert model(**batch).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == len(model.model(**batch).hidden_states) == 3
    assert model(**batch, output_hidden_states=False).hidden_states is None

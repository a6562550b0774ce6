"""What transformers' own testers ask of every model, as far as no other file here does."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import disk_offload
from transformers import PreTrainedModel

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import ROWS, VOCAB, batch_inputs, row_inputs, tiny_config, tiny_model
from tests.modeling.phi4_fixtures import native_config

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
Model = MixLoraForConditionalGeneration


def batch() -> dict[str, torch.Tensor]:
    return batch_inputs([row_inputs(kind) for kind in ROWS])


@pytest.fixture
def saved(tmp_path: Path) -> str:
    tiny_model().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


# ------------------------------------------------------------------------------------------------------------- loading


@torch.no_grad()
def test_a_state_dict_and_a_config_make_a_model() -> None:
    model = tiny_model()
    again = Model.from_pretrained(None, config=model.config, state_dict=model.state_dict()).eval()
    assert torch.equal(again(**batch()).logits, model(**batch()).logits)


def test_weights_that_are_missing_are_drawn() -> None:
    """None is left on the meta device or as it lay in memory; a fresh adapter changes nothing."""
    model = tiny_model()
    kept = {
        name: value
        for name, value in model.state_dict().items()
        if not any(part in name for part in ("projector", "lora_", "layers.0.mlp", "norm"))
    }
    found, info = Model.from_pretrained(None, config=model.config, state_dict=kept, output_loading_info=True)
    assert info["missing_keys"] == model.state_dict().keys() - kept.keys() - {"lm_head.weight"}
    for name, parameter in found.named_parameters():
        assert not parameter.is_meta and torch.isfinite(parameter).all() and parameter.abs().max() < 10, name
        if ".lora_B." in name:
            assert not parameter.any(), name
        elif name.removesuffix(".weight").endswith("norm"):
            assert name in kept or (parameter == 1).all(), name


def test_tied_weights_are_not_missed(saved: str) -> None:
    _, info = Model.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())


def test_every_tensor_is_a_parameter_or_a_buffer() -> None:
    """Others would stay behind when the model moves."""
    for name, module in tiny_model().named_modules():
        assert not [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)], name


def test_another_vocabulary_raises_or_is_drawn_where_asked(saved: str) -> None:
    config = tiny_config(text={"vocab_size": VOCAB + 7})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        Model.from_pretrained(saved, config=config)
    model = Model.from_pretrained(saved, config=config, ignore_mismatched_sizes=True)
    assert model.lm_head.weight.shape[0] == VOCAB + 7 and torch.isfinite(model.lm_head.weight).all()


def test_a_model_is_loaded_in_the_type_that_it_has_on_disk(tmp_path: Path) -> None:
    tiny_model().bfloat16().save_pretrained(tmp_path)
    for options, dtype in (
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "float16"}, torch.half),
    ):
        model = Model.from_pretrained(tmp_path, **options)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_one_name_sets_the_attention_of_all_parts(saved: str) -> None:
    config = Model.from_pretrained(saved, attn_implementation="eager").config
    parts = (config, config.text_config, config.vision_config, config.speech_config)
    assert {part._attn_implementation for part in parts} == {"eager"}


def test_parts_share_their_config_with_the_whole() -> None:
    """What is set in one is seen by the other."""
    model = tiny_model()
    assert model.model.language_model.config is model.config.text_config
    assert model.model.vision_tower.encoder.config is model.config.vision_config
    assert model.model.speech_tower.encoder.config is model.config.speech_config


# ------------------------------------------------------------------------------------------------------------- offload


@torch.no_grad()
@pytest.mark.parametrize("way", ["device_map", "disk_offload"])
def test_weights_may_lie_on_disk(way: str, saved: str, tmp_path: Path) -> None:
    """Fetched part by part; the route and media go to each as they are."""
    wanted = tiny_model()
    if way == "disk_offload":
        model = disk_offload(tiny_model(), str(tmp_path / "away"), execution_device=torch.device("cpu"))
    else:
        places = {name: "disk" for name, _ in wanted.model.named_children()}
        layers = {f"language_model.layers.{i}": place for i, place in enumerate(("cpu", "disk"))}
        inner = {f"language_model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb", "dropout")}
        del places["language_model"]
        places = {f"model.{name}": place for name, place in (places | layers | inner).items()} | {"lm_head": "cpu"}
        model = Model.from_pretrained(saved, device_map=places, offload_folder=str(tmp_path / "away"))
        assert model.hf_device_map["model.language_model.layers.1"] == "disk"
    assert any(parameter.is_meta for parameter in model.parameters())
    # a layer with hooks is called as it is, so adapters' products round otherwise
    torch.testing.assert_close(model(**batch()).logits, wanted(**batch()).logits, rtol=1e-4, atol=2e-4)
    assert torch.equal(model.generate(**batch(), **GREEDY), wanted.generate(**batch(), **GREEDY))


@pytest.mark.parametrize("config", [tiny_config(), native_config()], ids=["clip and whisper", "phi4"])
def test_layers_with_a_residual_are_not_split_over_devices(config: Any) -> None:
    """Those of towers too: what they may not be split into is theirs to say."""
    with torch.device("meta"):
        model = Model(Model.config_class.from_dict(config.to_dict()))
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    named = {name for part in parts for name in type(part)._no_split_modules or ()}
    present = {type(module).__name__ for module in model.modules()}
    assert "DecoderLayer" in named and named & present <= set(model._no_split_modules)
    assert len(named & present) >= 3


# ------------------------------------------------------------------------------------------------------------ training


def test_reentrant_checkpointing_has_the_same_gradients() -> None:
    found = []
    for options in (None, {"use_reentrant": True}, {"use_reentrant": False}):
        model = tiny_model().train()
        if options:
            model.gradient_checkpointing_enable(options)
        model(**batch(), labels=batch()["input_ids"]).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for grads in found[1:]:
        assert grads.keys() == found[0].keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, found[0][name], rtol=1e-4, atol=1e-5)


def test_embeddings_and_head_may_be_exchanged() -> None:
    model = tiny_model()
    table, head = torch.nn.Embedding(VOCAB, 32), torch.nn.Linear(32, VOCAB, bias=False)
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is model.model.language_model.embed_tokens is table
    assert model.get_output_embeddings() is model.lm_head is head
    assert model.main_input_name == next(name for name in inspect.signature(model.forward).parameters)


# ---------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
@pytest.mark.parametrize("given", ["model", "config", "none"])
def test_text_from_nothing_begins_with_its_token(given: str) -> None:
    model = tiny_model()
    if given == "none":
        with pytest.raises(ValueError, match="bos_token_id"):
            model.generate(**GREEDY)
        return
    model.generation_config.bos_token_id = 5
    found = model.generate(**GREEDY)
    assert torch.equal(found, model.generate(torch.tensor([[5]]), **GREEDY))


@torch.no_grad()
def test_an_answer_goes_on_from_its_own_cache() -> None:
    model = tiny_model()
    first = model.generate(**batch(), **GREEDY, return_dict_in_generate=True)
    mask = torch.nn.functional.pad(batch()["attention_mask"], (0, 5), value=1)
    second = model.generate(first.sequences, attention_mask=mask, **GREEDY, past_key_values=first.past_key_values)
    assert torch.equal(second, model.generate(**batch(), **GREEDY | {"max_new_tokens": 10}))


@torch.no_grad()
def test_beams_tell_their_scores() -> None:
    """A sequence's score is the mean log probability of its own tokens, computed without a cache."""
    model, inputs = tiny_model(), batch()
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    found = model.generate(**inputs, **options, output_scores=True)
    assert found.beam_indices.shape == (2 * len(ROWS), 5)
    for i, sequence in enumerate(found.sequences):
        row = row_inputs(ROWS[i // 2])
        logits = model(**batch_inputs([row | {"ids": row["ids"] + sequence[-5:].tolist()}])).logits[0, -6:-1]
        scores = logits.log_softmax(-1).gather(1, sequence[-5:, None])
        assert float(scores.mean()) == pytest.approx(float(found.sequences_scores[i]), abs=2e-3)

"""Both layouts of Phi-4-Multimodal load as they lie on the hub, every tensor used or reported."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Phi4MultimodalConfig,
)

from mixlora.modeling.backbone import MixLoraModel
from mixlora.modeling.base_checkpoint import checkpoint_folder
from mixlora.modeling.configuration_mixlora import MixLoraConfig, Phi4MMConfig
from mixlora.modeling.key_maps import KEY_MAPS, NATIVE, PHI4MM, adapter_map, renamer
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.phi4_config import from_phi4, to_native, to_phi4mm
from mixlora.modeling.processing_phi4 import Phi4MMProcessor
from tests.modeling.phi4_fixtures import (
    RANKS,
    add_adapters,
    make_row,
    native_config,
    native_model,
    our_inputs,
    phi4mm_tensors,
    write_native,
)
from tests.modeling.phi4mm_config import RELEASED, tiny
from tests.modeling.test_phi4_processing import write_microsofts


@pytest.fixture(scope="module")
def peer() -> Any:
    """Transformers' model with both adapters."""
    model = native_model(0)
    add_adapters(model, 0)
    return model


@pytest.fixture
def original(peer: Any, tmp_path: Path) -> Path:
    """A folder in Microsoft's layout, two shards."""
    folder = tmp_path / "original"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny()))
    tensors = phi4mm_tensors(peer)
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")
    return folder


def rewrite(folder: Path, change: Any) -> None:
    """Applies `change` to the tensors of a folder's first shard."""
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.fixture(scope="module")
def full_size() -> MixLoraForConditionalGeneration:
    """The released size, without storage."""
    with torch.device("meta"):
        return MixLoraForConditionalGeneration(MixLoraConfig.from_dict(RELEASED))


def test_released_size_has_the_published_number_of_parameters(full_size: MixLoraForConditionalGeneration) -> None:
    assert sum(parameter.numel() for parameter in full_size.parameters()) == 5_574_460_224
    groups = full_size.parameter_groups()
    sizes = {name: sum(full_size.get_parameter(n).numel() for n in names) for name, names in groups.items()}
    assert sizes == {
        "decoder": 3_836_021_760,
        "adapter.vision": 369_098_752,
        "adapter.speech": 461_373_440,
        "vision_tower": 428_565_440 - 30_480_160,
        "vision_tower.unused": 30_480_160,
        "vision_projector": 12_984_576,
        "speech_tower": 441_238_304 - 160,  # 160 of the published number are statistics
        "speech_projector.speech": 12_589_056,
        "speech_projector.vision_speech": 12_589_056,
    }


def test_released_size_has_the_tensors_of_the_original_shards(full_size: MixLoraForConditionalGeneration) -> None:
    """2,047 of them, counted by place, and each name comes back from its rename."""
    back, forth = renamer(PHI4MM, to_ours=False), renamer(PHI4MM, to_ours=True)
    ours = [name for name in full_size.state_dict() if name != "lm_head.weight"]
    theirs = [back(name) for name in ours]
    assert None not in theirs and len(set(theirs)) == 2047
    assert [forth(name) for name in theirs] == ours
    places = Counter(
        next(place for place in ("lora_", "img_processor", "audio_embed.encoder", "") if place in n) for n in theirs
    )
    assert places["lora_"] == 512 and places["img_processor"] == 448 and places["audio_embed.encoder"] == 879
    audio = "model.embed_tokens_extend.audio_embed."
    for name in (
        "model.layers.31.self_attn.qkv_proj.base_layer.weight",
        "model.layers.0.mlp.gate_up_proj.lora_A.speech.weight",
        "model.embed_tokens_extend.image_embed.glb_GN",
        "model.embed_tokens_extend.image_embed.img_projection.2.bias",
        "model.embed_tokens_extend.image_embed.img_processor.head.probe",
        audio + "encoder.embed.conv.6.weight",
        audio + "encoder.encoder_embedding.global_invstd",
        audio + "encoder.relative_attention_bias_layer.bias_values.weight",
        audio + "encoder.encoders.23.feed_forward_in.net.0.linear.weight",
        audio + "encoder.encoders.23.feed_forward_out.net.2.bias",
        audio + "encoder.encoders.0.self_attn.linear_q.weight",
        audio + "encoder.encoders.0.self_attn.linear_out.weight",
        audio + "audio_projection.vision.0.weight",
    ):
        assert name in theirs


def test_separators_keep_the_shapes_of_the_checkpoint(full_size: MixLoraForConditionalGeneration) -> None:
    projector = full_size.model.vision_projector
    assert projector.row_separator.shape == (1, 1, 1, 1152) and projector.global_separator.shape == (1, 1, 1152)


def test_native_names_are_those_of_transformers(peer: Any) -> None:
    model = MixLoraForConditionalGeneration(MixLoraConfig.from_dict(native_config().to_dict()))
    back = renamer(NATIVE, to_ours=False)
    assert {back(name) for name in model.state_dict()} == set(native_model(0).state_dict())


def test_both_configs_of_the_released_model_translate_to_one() -> None:
    ours = MixLoraConfig.from_dict(RELEASED)
    text = ours.text_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (3072, 24, 8, 128)
    assert text.fused_projections and text.tie_word_embeddings and text.eos_token_id == [199999, 200020]
    assert text.rope_parameters["original_max_position_embeddings"] == 4096
    assert len(text.rope_parameters["long_factor"]) == 48 and text.rope_parameters["partial_rotary_factor"] == 0.75
    assert ours.speech_config.bias_max_distance == 500 and ours.vision_config.num_hidden_layers == 27
    assert (ours.vision_layers, ours.vision_tokens_per_side, ours.speech_stack) == ([-2], 16, 1)
    assert (ours.image_token_id, ours.audio_token_id) == (200010, 200011)
    assert ours.adapters["speech"] == {
        "r": 320,
        "alpha": 640,
        "dropout": 0.01,
        "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    }
    native = Phi4MultimodalConfig(**{k: v for k, v in to_native(ours).items() if k != "model_type"})
    again = MixLoraConfig.from_dict(native.to_dict())
    ours.adapters = {}
    assert again.to_diff_dict() == ours.to_diff_dict()


@pytest.mark.parametrize("layout", [to_native, to_phi4mm])
def test_the_rope_mode_goes_through_both_layouts(layout: Any) -> None:
    """Under our name, which transformers' own config overlooks; the usual one is not written."""
    ours = MixLoraConfig.from_dict(RELEASED)
    assert "rope_mode" not in layout(ours)
    ours.text_config.rope_mode = "fixed_long"
    theirs = layout(ours)
    assert MixLoraConfig.from_dict(theirs).text_config.rope_mode == "fixed_long"
    if layout is to_native:
        Phi4MultimodalConfig(**{k: v for k, v in theirs.items() if k != "model_type"})


def test_microsoft_s_config_comes_back_field_by_field() -> None:
    for config in (RELEASED, tiny()):
        back = to_phi4mm(MixLoraConfig.from_dict(config))
        ignored = {"auto_map", "transformers_version"}
        assert {k: v for k, v in back.items() if k not in ignored} == {
            k: v for k, v in config.items() if k not in ignored
        }


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("audio_processor", "config", "causal"), False, "audio_processor.config.causal is False"),
        (("embd_layer", "image_embd_layer", "hd_transform_order"), "glb_sub", "hd_transform_order is 'glb_sub'"),
        (("embd_layer", "audio_embd_layer", "use_qformer"), True, "use_qformer is True"),
        (("vision_lora", "layer"), "nothing", "vision_lora.layer 'nothing' fits none"),
        (("sliding_window",), 2048, "sliding_window 2048"),
        (("embd_pdrop",), 0.1, "embd_pdrop 0.1"),
    ],
)
def test_what_is_not_built_is_named(path: tuple[str, ...], value: Any, message: str) -> None:
    config = json.loads(json.dumps(tiny()))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        from_phi4(config)


def test_a_model_that_the_layouts_cannot_hold_is_refused() -> None:
    config = MixLoraConfig.from_dict(tiny())
    config.projector_norm = True
    with pytest.raises(ValueError, match="projector_norm is True, expected False"):
        to_native(config)
    config = MixLoraConfig.from_dict(tiny() | {"speech_lora": None})
    with pytest.raises(ValueError, match=r"this model has \['vision'\]"):
        to_phi4mm(config)


def test_auto_classes_load_microsoft_s_layout_without_its_code(original: Path) -> None:
    """The folder names remote code; none is there, and none is asked for."""
    config = AutoConfig.from_pretrained(original)
    assert type(config) is MixLoraConfig
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(original)) is MixLoraForConditionalGeneration
    assert type(AutoModelForCausalLM.from_config(Phi4MMConfig.from_dict(tiny()))) is MixLoraForConditionalGeneration


@pytest.mark.parametrize("loader", [MixLoraModel, AutoModel])
def test_the_model_without_its_head_loads_the_same_weights(loader: Any, original: Path) -> None:
    """Not random ones, under names that no tensor of the checkpoint has."""
    wanted = MixLoraForConditionalGeneration.from_pretrained(original).model.state_dict()
    model, info = loader.from_pretrained(original, output_loading_info=True)
    assert type(model) is MixLoraModel and not model.training and not info["missing_keys"]
    found = model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_model_without_its_head_loads_transformers_layout(tmp_path: Path) -> None:
    write_native(native_model(0), tmp_path / "native", 0)
    model = MixLoraModel.from_pretrained(tmp_path / "native", dtype=torch.bfloat16)
    wanted = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "native", dtype=torch.bfloat16).model
    assert sorted(model.config.adapters) == ["speech", "vision"] and model.dtype == torch.bfloat16
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_in_a_subfolder_loads(original: Path) -> None:
    """Config and weights from there, not the weights of the folder above."""
    wanted = MixLoraForConditionalGeneration.from_pretrained(original)
    for loader in (MixLoraForConditionalGeneration, AutoModelForCausalLM):
        model = loader.from_pretrained(original.parent, subfolder=original.name)
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in wanted.state_dict().items())


def test_the_hub_is_asked_with_all_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the public files of the usual cache, where a token or a cache is named."""
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("mixlora.modeling.base_checkpoint.snapshot_download", download)
    hub = {"revision": "abc", "token": "secret", "cache_dir": "somewhere", "local_files_only": True}
    assert checkpoint_folder("some/model", without="*-lora/*", subfolder="inner", **hub) == tmp_path / "inner"
    assert asked["name"] == "some/model" and asked["ignore_patterns"] == "*-lora/*" and hub.items() <= asked.items()


def test_a_whole_folder_of_microsoft_s_loads_by_auto_classes_alone(original: Path) -> None:
    """Config, weights and processor files in one place, as on the hub; each config names code that is not there."""
    write_microsofts(original)
    assert type(AutoConfig.from_pretrained(original)) is MixLoraConfig
    assert type(AutoModelForCausalLM.from_pretrained(original)) is MixLoraForConditionalGeneration
    assert type(AutoProcessor.from_pretrained(original)) is Phi4MMProcessor


def test_both_layouts_load_to_one_model(original: Path, peer: Any, tmp_path: Path) -> None:
    """Bit by bit, in eval mode, and every tensor of the checkpoint is in the model."""
    fresh = native_model(0)
    write_native(fresh, tmp_path / "native", 0)
    from_original = MixLoraForConditionalGeneration.from_pretrained(original)
    from_native = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "native")
    first, second = from_original.state_dict(), from_native.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    back = renamer(PHI4MM, to_ours=False)
    mine = {back(name): value for name, value in first.items() if name != "lm_head.weight"}
    theirs = phi4mm_tensors(peer)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for name, (rank, alpha, dropout) in RANKS.items():
        for model in (from_original, from_native):
            spec = model.config.adapters[name]
            assert (spec["r"], spec["alpha"], spec["dropout"]) == (rank, alpha, dropout)
            assert sorted(spec["target_modules"]) == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert not any(module.training for model in (from_original, from_native) for module in model.modules())


def test_a_loaded_checkpoint_is_saved_as_one_of_ours(original: Path, tmp_path: Path) -> None:
    model = MixLoraForConditionalGeneration.from_pretrained(original)
    model.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "mixlora"
    again = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "ours")
    inputs = our_inputs([make_row(sizes=[(70, 56)], frames=[20])])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)


def test_a_zero_lora_b_is_an_error(original: Path) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in tensors if "lora_B.speech" in name)].zero_()

    rewrite(original, zero)
    with pytest.raises(ValueError, match=r"lora_B\.speech\.weight is all zeros"):
        MixLoraForConditionalGeneration.from_pretrained(original)


def test_a_missing_tensor_is_an_error(original: Path) -> None:
    rewrite(original, lambda tensors: tensors.pop(next(name for name in tensors if "audio_embed.encoder" in name)))
    with pytest.raises(ValueError, match=r"lacks tensors of this model: \['model\.speech_tower"):
        MixLoraForConditionalGeneration.from_pretrained(original)


def test_a_broken_shard_is_named(original: Path) -> None:
    """As one that was not fetched to its end."""
    shard = original / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors can't be read as safetensors"):
        MixLoraForConditionalGeneration.from_pretrained(original)


def test_an_unknown_tensor_is_reported(original: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(original, lambda tensors: tensors.update({"model.extra.weight": torch.ones(1)}))
    MixLoraForConditionalGeneration.from_pretrained(original)
    assert "1 tensors are not used: model.extra.weight" in caplog.text


def test_native_checkpoint_without_adapter_folders_says_what_is_missing(tmp_path: Path) -> None:
    native_model(0).save_pretrained(tmp_path)
    model = MixLoraForConditionalGeneration.from_pretrained(tmp_path)
    model(**our_inputs([make_row()]))
    with pytest.raises(ValueError, match="needs adapter 'vision', which is not loaded"):
        model(**our_inputs([make_row(sizes=[(56, 56)])]))


@pytest.mark.parametrize("layout", KEY_MAPS)
def test_each_row_of_a_key_map_reads_and_writes(layout: str) -> None:
    """Both templates of a row hold the same placeholders, so that no rename loses anything."""
    for theirs, ours in (*KEY_MAPS[layout], *adapter_map("vision")):
        assert sorted(re.findall(r"\{\w+\}", theirs)) == sorted(re.findall(r"\{\w+\}", ours))

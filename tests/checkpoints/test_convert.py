"""Conversion and export on disk: every layout comes back bit by bit, in little memory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM, Phi4MultimodalForCausalLM, Phi4MultimodalProcessor

from mixlora.checkpoints import convert as conversion
from mixlora.checkpoints.stored import read, read_file, write, write_file
from mixlora.cli import main
from mixlora.modeling.audio_processing_phi4 import Phi4AudioProcessor
from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.image_processing_phi4 import Phi4ImageProcessor
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.modeling.processing_phi4 import Phi4MMProcessor
from tests.modeling.model_fixtures import tiny_model
from tests.modeling.phi4_fixtures import CROP, MELS, make_row, native_model, our_inputs, phi4mm_tensors, write_native
from tests.modeling.phi4mm_config import RELEASED, tiny
from tests.modeling.processor_fixtures import native_tokenizer


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformers' layout with adapter folders."""
    folder = tmp_path_factory.mktemp("phi4") / "native"
    model = native_model(0)
    write_native(model, folder, 0)
    original = folder.parent / "original"
    original.mkdir()
    (original / "config.json").write_text(json.dumps(tiny()))
    (original / "tokenizer.json").write_text("{}")
    (original / "generation_config.json").write_text('{"eos_token_id": [102, 103]}')
    save_file(phi4mm_tensors(model), original / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def original(native: Path) -> Path:
    """Microsoft's layout of the same model."""
    return native.parent / "original"


def command(arguments: list[str]) -> None:
    """Runs the command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype and torch.equal(value, second[name]), name


def test_original_layout_comes_back_bit_by_bit(original: Path, tmp_path: Path) -> None:
    command(["convert", str(original), str(tmp_path / "ours")])
    command(["export", "phi4", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert_equal(tensors(original), tensors(tmp_path / "back"))
    assert json.loads((tmp_path / "back" / "preprocessor_config.json").read_text())["dynamic_hd"] == 36
    for file in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / file).read_text() == (original / file).read_text()
    before, after = tiny(), json.loads((tmp_path / "back" / "config.json").read_text())
    for config in (before, after):
        for name in ("auto_map", "transformers_version"):
            config.pop(name, None)
    assert after == before


def test_transformers_layout_comes_back_bit_by_bit(native: Path, tmp_path: Path) -> None:
    command(["convert", str(native), str(tmp_path / "ours")])
    command(["export", "transformers", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert_equal(tensors(native), tensors(tmp_path / "back"))
    for adapter in ("vision", "speech"):
        prefix = "base_model.model."
        before, after = (tensors(folder / f"{adapter}-lora") for folder in (native, tmp_path / "back"))
        assert all(name.startswith(prefix + "model.layers.") for name in after)
        assert_equal({prefix + name.removeprefix(prefix): value for name, value in before.items()}, after)
    loaded, info = Phi4MultimodalForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    row = our_inputs([make_row()])
    with torch.no_grad():
        expected = Phi4MultimodalForCausalLM.from_pretrained(native)(**row).logits
        assert torch.equal(loaded(**row).logits, expected)


@pytest.mark.parametrize("layout", ["phi4", "transformers"])
@pytest.mark.parametrize("saved", [True, False], ids=["beside the weights", "none"])
def test_an_export_keeps_the_settings_of_the_processor(
    original: Path, tmp_path: Path, layout: str, saved: bool
) -> None:
    """Fewer crops a picture, another size of them, other mel bins; without a processor they follow from the model."""
    conversion.convert(original, tmp_path / "ours")
    most = 4 if saved else 36
    mine = Phi4MMProcessor(
        Phi4ImageProcessor(size=CROP, dynamic_hd=most), Phi4AudioProcessor(feature_size=MELS), native_tokenizer()
    )
    (mine if saved else mine.tokenizer).save_pretrained(tmp_path / "ours")
    command(["export", layout, str(tmp_path / "ours"), str(tmp_path / "out")])
    again = MixLoraProcessor.from_pretrained(tmp_path / "out")
    picture, clip = Image.effect_noise((300, 200), 50), (np.sin(np.arange(4000) / 7), 16000)
    row = {"text": "<|user|><|image|><|audio|>What?<|end|>", "images": [picture], "audio": [clip]}
    wanted = mine(**row)
    assert len(wanted["pixel_values"]) == 1 + (4 if saved else 24) and wanted["input_features"].shape[-1] == MELS
    found = again(**row)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    if layout == "transformers":
        theirs = Phi4MultimodalProcessor.from_pretrained(tmp_path / "out")
        assert (theirs.image_processor.dynamic_hd, theirs.image_processor.size.height) == (most, CROP)
        assert theirs.audio_processor.feature_size == MELS


def test_both_layouts_convert_to_what_from_pretrained_gives(native: Path, original: Path, tmp_path: Path) -> None:
    inputs = our_inputs([make_row(sizes=[(70, 56)]), make_row(frames=[20]), make_row()])
    for name, folder in (("native", native), ("original", original)):
        assert conversion.convert(folder, tmp_path / name) == []
        converted = MixLoraForConditionalGeneration.from_pretrained(tmp_path / name)
        loaded = MixLoraForConditionalGeneration.from_pretrained(folder)
        assert_equal(converted.state_dict(), loaded.state_dict())
        with torch.no_grad():
            assert torch.equal(converted(**inputs).logits, loaded(**inputs).logits)


def test_adapters_load_in_peft_on_the_plain_decoder(original: Path, tmp_path: Path) -> None:
    """The vision adapter on a Phi-3 of the same weights gives our logits of a row that is routed to vision."""
    conversion.convert(original, tmp_path / "ours")
    command(["export", "peft", str(tmp_path / "ours"), str(tmp_path / "peft")])
    model = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    text = model.config.text_config
    fields = {k: v for k, v in text.to_dict().items() if k in Phi3Config.__dataclass_fields__ and k != "architectures"}
    fields |= {"original_max_position_embeddings": 1024, "sliding_window": None, "eos_token_id": 102}
    decoder = Phi3ForCausalLM._from_config(Phi3Config(**fields), attn_implementation="eager").eval()
    state = {
        name.replace("language_model.", "").replace(".base_layer", ""): value
        for name, value in model.state_dict().items()
        if name.startswith(("model.language_model", "lm_head")) and ".lora_" not in name
    }
    decoder.load_state_dict(state)
    row = our_inputs([make_row()])
    for i, adapter in enumerate(("speech", "vision")):
        peft = PeftModel.from_pretrained(decoder, tmp_path / "peft" / adapter)
        with torch.no_grad():
            wanted = peft(**row).logits
            found = model(**row, adapter_ids=torch.tensor([i])).logits
        decoder = peft.unload()
        assert (found - wanted).abs().max() < 2e-4 * wanted.std()


def test_what_vllm_needs(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Microsoft's layout, adapter folders without adapter names in their keys, the rank in the command."""
    conversion.convert(original, tmp_path / "ours")
    with pytest.raises(ValueError, match="fixed sizes and ids.*'hidden_size': 32.*'image_token_id': 100"):
        conversion.export_vllm(tmp_path / "ours", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(conversion, "hard_coded_differences", lambda config: {})
    served = conversion.export_vllm(tmp_path / "ours", tmp_path / "served")
    assert "--trust-remote-code --enable-lora --max-lora-rank 4 --max-loras 2" in served
    for adapter in ("vision", "speech"):
        folder = tmp_path / "served" / f"{adapter}-lora"
        assert f"{adapter}={folder}" in served
        assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
        for name in read_file(folder / "adapter_model.safetensors"):
            assert name.startswith("base_model.model.model.layers.") and name.endswith((".lora_A.weight", "_B.weight"))
    assert served in (tmp_path / "served" / "serve.sh").read_text()
    config = json.loads((tmp_path / "served" / "config.json").read_text())
    assert config["architectures"] == ["Phi4MMForCausalLM"] and config["model_type"] == "phi4mm"
    assert config["embd_layer"] == tiny()["embd_layer"] and config["img_processor"] is None
    assert config["auto_map"]["AutoConfig"].endswith("configuration_phi4mm.Phi4MMConfig")
    processor = json.loads((tmp_path / "served" / "preprocessor_config.json").read_text())
    rates = {"audio_compression_rate": 8, "audio_downsample_rate": 1, "audio_feat_stride": 1, "dynamic_hd": 36}
    assert rates.items() <= processor.items()
    assert all("processing_phi4mm.Phi4MM" in name for name in processor["auto_map"].values())
    stored = read_file(tmp_path / "served" / "model.safetensors")
    assert stored.keys() == tensors(original).keys()  # LoRA and `base_layer` included: vLLM skips and strips those


def test_released_size_is_fit_for_vllm() -> None:
    assert conversion.hard_coded_differences(MixLoraConfig.from_dict(RELEASED)) == {}


def test_bad_checkpoints_are_named(native: Path, original: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'mixlora' is none of"):
        tiny_model().save_pretrained(tmp_path / "mixlora")
        conversion.convert(tmp_path / "mixlora", tmp_path / "x")
    with pytest.raises(ValueError, match="vision_config.model_type is 'clip_vision_model'"):
        conversion.export_phi4(tmp_path / "mixlora", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        conversion.convert(tmp_path, tmp_path / "x")
    with pytest.raises(ValueError, match="not an empty folder"):
        conversion.convert(original, native)

    def broken(change: Any) -> Path:
        folder = tmp_path / f"broken {len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "config.json").write_text((original / "config.json").read_text())
        values = tensors(original)
        change(values)
        save_file(values, folder / "model.safetensors")
        return folder

    norm, up = "model.norm.weight", "model.layers.0.self_attn.o_proj.lora_B.vision.weight"
    for change, message in (
        (lambda values: values.pop(norm), "lacks tensors of this model"),
        (lambda values: values.update({norm: torch.ones(3)}), r"has shape \(3,\), expected \(64,\)"),
        (lambda values: values[up].zero_(), "is all zeros"),
    ):
        folder = broken(change)
        with pytest.raises(ValueError, match=message):
            conversion.convert(folder, folder / "out")
    folder = broken(lambda values: values.update({"extra": torch.ones(1)}))
    assert conversion.convert(folder, folder / "out") == ["extra"]


@pytest.mark.parametrize("limit", [1, 10_000, 10**9])
def test_shards_and_their_index(original: Path, tmp_path: Path, limit: int) -> None:
    """Any number of shards holds the same bytes, readable by safetensors itself."""
    stored = read(original)
    write(tmp_path, stored, limit)
    assert_equal(tensors(original), tensors(tmp_path))
    index = tmp_path / "model.safetensors.index.json"
    if limit == 10**9:
        assert not index.exists()
        return
    for name, file in json.loads(index.read_text())["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as opened:
            assert name in opened.keys()


def test_types_are_kept_and_aligned(tmp_path: Path) -> None:
    values = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.randn(2, 3).to(torch.bfloat16),
        "c": torch.randn(5, dtype=torch.float64),
        "d": torch.zeros(0, 4),
        "e": torch.tensor(1.5),
    }
    save_file(values, tmp_path / "before.safetensors")
    write_file(tmp_path / "after.safetensors", read_file(tmp_path / "before.safetensors"))
    assert_equal(values, load_file(tmp_path / "after.safetensors"))
    widths = {"F64": 8, "F32": 4, "BF16": 2, "U8": 1}
    for tensor in read_file(tmp_path / "after.safetensors").values():
        assert tensor.start % widths[tensor.dtype] == 0


def test_conversion_reads_no_more_than_a_block_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlora.checkpoints.stored.BLOCK", 64)
    save_file({"a": torch.randn(1000)}, tmp_path / "before.safetensors")
    stored = read_file(tmp_path / "before.safetensors")
    assert max(len(block) for block in stored["a"].blocks()) == 64
    write_file(tmp_path / "after.safetensors", stored)
    assert_equal(load_file(tmp_path / "before.safetensors"), load_file(tmp_path / "after.safetensors"))

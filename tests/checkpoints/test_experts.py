"""`mixlora convert --experts`: adapters become experts on disk, and exports that have no place for them say so."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixlora.cli import main
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.phi4_fixtures import native_model, phi4mm_tensors, write_native
from tests.modeling.phi4mm_config import tiny
from tests.training.training_fixtures import make_start


def command(*arguments: str | Path) -> str | int | None:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def load(folder: Path) -> MixLoraForConditionalGeneration:
    return MixLoraForConditionalGeneration.from_pretrained(folder, dtype=torch.float64).eval()


@torch.no_grad()
def test_a_checkpoint_of_ours_computes_the_same_with_experts(tmp_path: Path) -> None:
    source = Path(make_start(tmp_path / "source"))
    assert not command("convert", source, tmp_path / "sparse", "--experts", "4", "--top-k", "2")
    dense, sparse = load(source), load(tmp_path / "sparse")
    assert {spec["experts"] for spec in sparse.config.adapters.values()} == {4}
    inputs = batch_inputs([row_inputs(kind) for kind in ROWS])
    for placeholder, new in ((1, dense.config.image_token_id), (2, dense.config.audio_token_id)):
        inputs["input_ids"][inputs["input_ids"] == placeholder] = new
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    inputs["input_ids"] %= dense.config.text_config.vocab_size
    torch.testing.assert_close(sparse(**inputs).logits, dense(**inputs).logits, rtol=0, atol=1e-10)
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "sparse").iterdir()} == files and len(files) > 4


def test_one_adapter_alone(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "source")
    assert not command(
        *("convert", tmp_path / "source", tmp_path / "sparse", "--experts", "3", "--top-k", "1"),
        *("--adapter", "speech", "--seed", "5"),
    )
    adapters = load(tmp_path / "sparse").config.adapters
    assert "experts" not in adapters["vision"] and adapters["speech"]["experts"] == 3


def test_phi4_becomes_experts_in_one_go(tmp_path: Path) -> None:
    model = native_model(0)
    write_native(model, tmp_path / "native", 0)
    source = tmp_path / "phi4"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(tiny()))
    save_file(phi4mm_tensors(model), source / "model.safetensors")
    assert not command("convert", source, tmp_path / "out/sparse", "--experts", "4")
    assert load(tmp_path / "out/sparse").config.adapters["vision"]["top_k"] == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sparse"]


@pytest.mark.parametrize("layout", ["peft", "phi4", "transformers"])
def test_exports_without_a_place_for_experts_say_so(tmp_path: Path, layout: str) -> None:
    model = tiny_model()
    model.split_adapter("vision", 4, 2)
    model.save_pretrained(tmp_path / "sparse")
    code = str(command("export", layout, tmp_path / "sparse", tmp_path / "out"))
    if layout == "peft":  # the others may name another difference of this model first
        assert "adapter 'vision' has 4 experts, for which a PEFT folder has no place" in code
    assert code.startswith("error: ") and "\n" not in code and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "4", "--top-k", "5"], "top_k one from 1 to experts, got 4 and 5"),
        (["--experts", "2", "--adapter", "smell"], "no adapter 'smell'"),
    ],
)
def test_wrong_numbers_and_names_are_named(tmp_path: Path, arguments: list[str], message: str) -> None:
    tiny_model().save_pretrained(tmp_path / "source")
    assert message in str(command("convert", tmp_path / "source", tmp_path / "out", *arguments))

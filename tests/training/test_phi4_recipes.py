"""Phi-4-Multimodal's own stages run their first steps, on a model of its shape at a tiny size."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.training.recipe import find_recipe, load_recipe
from mixlora.training.train import train
from tests.training.training_fixtures import make_phi4_start, write_rows

SIZE = (70, 100)
NAMES = ("phi4/vision", "phi4/speech", "phi4/vision_speech", "phi4/follow")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Path]]:
    """A start, and rows for each objective with pictures of several crops and clips."""
    folder = tmp_path_factory.mktemp("phi4")
    rows = write_rows(folder, rows=8, size=SIZE)
    lines = rows.read_text().splitlines()[1:]
    chats = [json.loads(line)["messages"] for line in lines]
    pairs = [{"prompt": chat[:1], "chosen": chat[1]["content"], "rejected": "never"} for chat in chats]
    files = {"sft": rows, "mimic": rows, "preference": folder / "pairs.jsonl"}
    files["preference"].write_text("\n".join(json.dumps(pair) for pair in pairs))
    return make_phi4_start(folder / "start"), files


@pytest.mark.parametrize("name", NAMES)
def test_the_first_steps(tmp_path: Path, made: tuple[str, dict[str, Path]], name: str) -> None:
    """Everything but the data, the steps and the size of batches is as the recipe has it."""
    start, files = made
    recipe = load_recipe(find_recipe(name))
    overrides = [f"model={start}"]
    for stage in recipe.stages:
        sources = ", ".join(f"{{path: {files[stage.objective]}, weight: {source.weight}}}" for source in stage.data)
        changes = {"data": f"[{sources}]", "epochs": 0, "max_steps": 2, "tokens_per_batch": 600, "window": 8}
        changes |= {"logging_steps": 1, "save_steps": 2} | ({"teacher": start} if stage.teacher else {})
        overrides += [f"{stage.name}.{key}={value}" for key, value in changes.items()]
    train(Path(name), tmp_path, overrides)
    before = Path(start)
    groups = MixLoraForConditionalGeneration.from_pretrained(start).parameter_groups()
    for number, stage in enumerate(recipe.stages, start=1):
        folder = tmp_path / f"{number:02d}-{stage.name}"
        points = json.loads((folder / "log.json").read_text())
        losses = [point["loss"] for point in points if "loss" in point]
        assert len(losses) == 2 and torch.tensor(losses).isfinite().all()
        weights = [load_file(path / "model.safetensors") for path in (before, folder)]
        changed = {key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])}
        assert changed and changed <= {key for group in stage.train for key in groups[group]}
        before = folder


def test_published_values_are_as_published() -> None:
    stages = {stage.name: stage for name in NAMES[:3] for stage in load_recipe(find_recipe(name)).stages}
    assert list(stages) == ["align", "joint", "generative", "frames", "pretrain", "posttrain", "vision_speech"]
    speech = [stages["pretrain"], stages["posttrain"]]
    assert [(stage.learning_rate, stage.max_steps) for stage in speech] == [(4e-5, 50_000), (1e-4, 50_000)]
    assert [source.weight for source in stages["posttrain"].data] == [28, 28, 26, 1, 17]
    assert stages["frames"].max_length == 65_536
    assert {name: set(stage.train) for name, stage in stages.items()} == {
        "align": {"vision_projector"},
        "joint": {"vision_projector", "vision_tower"},
        "generative": {"adapter.vision", "vision_tower", "vision_projector"},
        "frames": {"adapter.vision", "vision_projector"},
        "pretrain": {"speech_tower", "speech_projector.speech"},
        "posttrain": {"adapter.speech", "speech_projector.speech"},
        "vision_speech": {"adapter.vision", "vision_tower", "vision_projector"},
    }


@pytest.mark.parametrize("name", NAMES[:3])
def test_each_value_says_whether_it_is_published(name: str) -> None:
    """A rate, a length or a number of steps stands in a line that tells where it comes from."""
    for line in find_recipe(name).read_text().splitlines():
        key = line.strip().partition(":")[0]
        if key in ("learning_rate", "max_steps", "epochs", "max_length", "schedule", "warmup", "tokens_per_batch"):
            assert "published" in line, line

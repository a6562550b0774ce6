"""A plan is kept: what it says will change does, and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixlora.training.train import plan_recipe, train
from tests.training.training_fixtures import make_start, write_rows

STAGES = {
    "text": {"train": ["decoder"], "epochs": 1, "rows_per_batch": 2},
    "align": {"train": ["vision_projector"], "max_steps": 3, "rows_per_batch": 6, "gradient_accumulation": 2},
    "both": {
        "train": ["adapter.vision", "adapter.speech", "speech_projector.vision_speech"],
        "epochs": 2,
        "tokens_per_batch": 200,
    },
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    rows, path = write_rows(tmp_path), tmp_path / "recipe.yaml"
    common = {"data": [{"path": str(rows)}], "learning_rate": 1e-2, "logging_steps": 1}
    stages = [{"name": name} | common | stage for name, stage in STAGES.items()]
    path.write_text(json.dumps({"model": make_start(tmp_path / "start"), "stages": stages}))
    return path


def test_after_each_stage_what_the_plan_promised_has_changed(
    tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = plan_recipe(recipe)
    said = capsys.readouterr().out
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("features"))
    train(recipe, tmp_path / "out")
    before = load_file(tmp_path / "start/model.safetensors")
    for number, plan in enumerate(plans, start=1):
        folder = tmp_path / f"out/{number:02d}-{plan.name}"
        after = load_file(folder / "model.safetensors")
        assert {name for name in after if not torch.equal(after[name], before[name])} == plan.tensors
        assert json.loads((folder / "done.json").read_text())["steps"] == plan.steps
        assert sum(plan.trained.values()) == sum(before[name].numel() for name in plan.tensors)
        everything = sum(tensor.numel() for tensor in before.values())
        assert sum(plan.trained.values()) + sum(plan.frozen.values()) == everything
        assert plan.state_bytes == 4 * everything + 12 * sum(plan.trained.values())
        assert str(plan) in said
        before = after
    assert plans[2].learnt < plans[2].tokens and plans[2].largest <= 200


def test_what_a_stage_sets_before_it_trains_is_promised_too(tmp_path: Path) -> None:
    """The basis in which CTC reads a projector, and that of its copy; of a projector that is frozen it stays."""
    rows = write_rows(tmp_path)
    clips = rows.with_name("clips.jsonl")
    clips.write_text("\n".join(line for line in rows.read_text().splitlines() if "wav" in line and "png" not in line))
    context = {"layers": 1, "kernel_size": 3, "intermediate_size": 12}
    start = make_start(tmp_path / "start", speech_context=context, speech_letters={})
    ours, theirs = "speech_projector.speech", "speech_projector.vision_speech"
    stages: dict[str, dict[str, Any]] = {
        "context": {"train": ["speech_context"], "ctc_weight": 1},
        "heard": {"train": ["speech_context", ours], "ctc_weight": 1},
        "spelled": {"train": ["speech_letters"], "ctc_weight": 1},
        "copied": {"train": [theirs], "copy": {theirs: ours}, "data": [{"path": str(rows)}]},
        "heard_again": {"train": ["speech_context", ours], "ctc_weight": 1},
        "copied_again": {"train": [theirs], "copy": {theirs: ours}, "data": [{"path": str(rows)}]},
    }
    common = {"data": [{"path": str(clips)}], "learning_rate": 1e-2, "logging_steps": 1}
    common |= {"max_steps": 2, "rows_per_batch": 8}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"model": start, "stages": [{"name": n} | common | s for n, s in stages.items()]}))
    plans = plan_recipe(recipe)
    basis, spelling = {name: f"model.{name}.basis" for name in (ours, theirs)}, "model.speech_letters.spelling"
    assert [plan.buffers for plan in plans] == [(), (basis[ours],), (spelling,), (basis[theirs],), (), ()]
    assert f"sets {basis[ours]}" in str(plans[1])
    train(recipe, tmp_path / "out")
    files = [Path(start), *(tmp_path / f"out/{number:02d}-{name}" for number, name in enumerate(stages, start=1))]
    weights = [load_file(folder / "model.safetensors") for folder in files]
    for plan, before, after in zip(plans, weights, weights[1:], strict=False):
        assert {name for name in after if not torch.equal(after[name], before[name])} == plan.tensors, plan.name


def test_a_batch_of_text_counts_each_token_once(recipe: Path) -> None:
    """The rows are twelve conversations and a block of text: in one epoch each is seen once."""
    (plan,) = plan_recipe(recipe, ["stages=[text]"])
    assert plan.examples == 13 and plan.batches == plan.steps == 7
    (twice,) = plan_recipe(recipe, ["stages=[text]", "text.epochs=2"])
    assert (twice.tokens, twice.learnt) == (2 * plan.tokens, 2 * plan.learnt)

"""Stages that make experts of adapters and train them, with every objective."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixlora.training.expert_adapters import Balance, balance_of
from mixlora.training.objectives import mimic_loss, response_mask
from mixlora.training.stages import Experts, Mimic, Preference, RecipeError
from mixlora.training.steps import MimicStep, PreferenceStep, SupervisedStep
from mixlora.training.teacher import CheckpointTeacher
from mixlora.training.teachers import share_frozen
from mixlora.training.train import train
from tests.training.taught_fixtures import TRAINED, batch, load, log, louder
from tests.training.training_fixtures import write_recipe


def sparse(folder: str) -> Any:
    model = load(folder)
    for name in ("vision", "speech"):
        model.split_adapter(name, 4, 2)
    return model


@pytest.mark.parametrize("objective", ["sft", "mimic", "preference"])
def test_the_balance_joins_every_objective_once(start: str, rows: Path, pairs: Path, objective: str) -> None:
    model, teacher = sparse(start), CheckpointTeacher(load(start))
    inputs = batch(start, pairs if objective == "preference" else rows)
    losses = []
    for balance in (None, Balance(0.5, accumulation=4)):
        steps = {
            "sft": SupervisedStep(0.0, 0, 6, balance=balance),
            "mimic": MimicStep(teacher, Mimic(), balance),
            "preference": PreferenceStep(teacher, Preference(), balance=balance),
        }
        losses.append(steps[objective](model, inputs, None))
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    expected = model(**rest, output_aux_loss=True).aux_loss
    torch.testing.assert_close(losses[1][0] - losses[0][0], 0.5 * expected / 4, rtol=1e-3, atol=1e-5)
    assert "balance" not in losses[0][1] and losses[1][1]["balance"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_mimic_stage_makes_experts_and_trains_them(tmp_path: Path, start: str, rows: Path) -> None:
    """From the dense function on; with checkpointing the curve is the same, and only what is named changes."""
    teacher = louder(start, tmp_path / "teacher")
    curves = []
    for name, checkpointed in (("plain", False), ("again", True)):
        recipe = write_recipe(
            tmp_path, start, rows, TRAINED, objective="mimic", teacher=teacher, max_steps=10,
            experts={"count": 4, "top_k": 2, "balance_weight": 0.1}, gradient_checkpointing=checkpointed,
            rows_per_batch=13, tokens_per_batch=0,
        )  # fmt: skip
        train(recipe, tmp_path / name)
        curves.append((log(tmp_path / name / "01-only", "loss"), log(tmp_path / name / "01-only", "balance")))
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-3)
    assert curves[1][1] == pytest.approx(curves[0][1], rel=1e-3) and all(1 <= value < 4 for value in curves[0][1])
    assert sum(curves[0][0][-3:]) < sum(curves[0][0][:3])
    model = load(str(tmp_path / "plain/01-only"))
    assert {spec["experts"] for spec in model.config.adapters.values()} == {4}
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "plain/01-only"))
    frozen = [name for name in before if name in after and "projector" not in name]
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    experts = after["model.language_model.layers.0.mlp.up_proj.lora_experts.vision.down"]
    assert not torch.equal(experts[0], experts[1])


def test_a_later_stage_goes_on_with_them(tmp_path: Path, start: str, pairs: Path) -> None:
    sparse(start).save_pretrained(start)
    changes: dict[str, Any] = {"objective": "preference", "teacher": "self", "max_steps": 2}
    train(write_recipe(tmp_path, start, pairs, TRAINED, **changes), tmp_path / "out")
    assert log(tmp_path / "out/01-only", "balance")
    for experts, message in (({"count": 3}, "has 4 already"), ({"count": 1}, "must be at least 2")):
        with pytest.raises(RecipeError, match=message):
            train(write_recipe(tmp_path, start, pairs, TRAINED, experts=experts, **changes), tmp_path / str(experts))


def test_experts_need_an_adapter_that_is_trained(tmp_path: Path, start: str, rows: Path) -> None:
    recipe = write_recipe(tmp_path, start, rows, ["vision_projector"], experts={"count": 4})
    with pytest.raises(RecipeError, match="it trains no adapter"):
        train(recipe, tmp_path / "out")


def test_dense_adapters_have_no_balance(start: str) -> None:
    stage: Any = type("", (), {"experts": Experts(), "gradient_accumulation": 1})
    labels = torch.tensor([[-100, 5], [-100, -100]])
    assert balance_of(load(start), stage).wanted(labels) == {}
    assert balance_of(sparse(start), stage).wanted(labels)["output_aux_loss"].tolist() == [True, False]


def test_a_teacher_of_the_same_weights_is_kept_once(tmp_path: Path, start: str, rows: Path) -> None:
    """Another adapter on the same decoder: what is frozen and equal shares its memory; what is trained never."""
    student, teacher = load(start), load(start)
    with torch.no_grad():
        for name in teacher.parameter_groups()["adapter.vision"]:
            teacher.get_parameter(name).add_(0.5)
    trained = student.parameter_groups()["adapter.speech"]
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    inputs = batch(start, rows)
    before = CheckpointTeacher(teacher).hidden({k: v for k, v in inputs.items() if k != "labels"})
    shared = share_frozen(student, teacher)
    theirs = dict(teacher.named_parameters())
    same = {n for n, p in student.named_parameters() if p.data_ptr() == theirs[n].data_ptr()}
    own = {*trained, *student.parameter_groups()["adapter.vision"]}
    assert same == set(theirs) - own
    assert shared == sum(theirs[name].numel() for name in same)
    after = CheckpointTeacher(teacher).hidden({k: v for k, v in inputs.items() if k != "labels"})
    assert torch.equal(before, after)


def test_a_preference_may_hold_on_to_the_teacher(tmp_path: Path, start: str, pairs: Path) -> None:
    student, teacher = load(start), load(louder(start, tmp_path / "teacher"))
    inputs = batch(start, pairs)
    alone, _ = PreferenceStep(CheckpointTeacher(teacher), Preference())(student, inputs, None)
    found, _ = PreferenceStep(CheckpointTeacher(teacher), Preference(mimic_weight=0.5))(student, inputs, None)
    half = len(inputs["labels"]) // 2
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    where = response_mask(inputs["labels"])[:half]
    ours, theirs = (model.model(**rest).last_hidden_state[:half][where] for model in (student, teacher))
    expected = mimic_loss(ours, student.lm_head.weight, theirs, teacher.lm_head.weight, torch.ones(len(ours)))
    torch.testing.assert_close(found, alone + 0.5 * expected, rtol=1e-4, atol=1e-5)

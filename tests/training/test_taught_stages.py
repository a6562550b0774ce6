"""Stages that follow a teacher or learn preferences, on a tiny model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.collate import Collator, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import RowError, read_rows
from mixlora.training.objectives import preference_loss, response_mask
from mixlora.training.stages import Mimic, Preference, RecipeError
from mixlora.training.steps import MimicStep, PreferenceStep
from mixlora.training.teacher import CheckpointTeacher, SelfTeacher, check_fit
from mixlora.training.teacher_cache import Form, cache_states
from mixlora.training.train import train
from tests.training.taught_fixtures import TRAINED, batch, load, log, louder, naive_log_probs
from tests.training.training_fixtures import write_recipe


def test_the_mimicked_loss_is_the_divergence_of_the_logits(tmp_path: Path, start: str, rows: Path) -> None:
    student, teacher = load(start), load(louder(start, tmp_path / "teacher"))
    inputs = batch(start, rows)
    loss, _ = MimicStep(CheckpointTeacher(teacher), Mimic())(student, inputs, None)
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    p, q = (model(**rest).logits[:, :-1].double().log_softmax(-1) for model in (student, teacher))
    each = (q.exp() * (q - p)).sum(-1)
    expected = each[inputs["labels"][:, 1:] != -100].mean()
    assert expected > 0.01
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)


def test_a_part_of_cross_entropy_is_mixed_in(tmp_path: Path, start: str, rows: Path) -> None:
    student, inputs = load(start), batch(start, rows)
    teacher = CheckpointTeacher(load(louder(start, tmp_path / "teacher")))
    alone, _ = MimicStep(teacher, Mimic())(student, inputs, None)
    mixed, _ = MimicStep(teacher, Mimic(sft_weight=0.25))(student, inputs, None)
    sft = -naive_log_probs(student, inputs).sum() / (inputs["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(mixed, 0.75 * alone + 0.25 * sft, rtol=1e-4, atol=1e-6)


def test_the_student_comes_nearer_to_the_teacher(tmp_path: Path, start: str, rows: Path) -> None:
    teacher = louder(start, tmp_path / "teacher")
    recipe = write_recipe(
        tmp_path, start, rows, ["decoder", *TRAINED], objective="mimic", teacher=teacher, max_steps=20
    )
    train(recipe, tmp_path / "out")
    losses = log(tmp_path / "out/01-only", "loss")
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


@pytest.mark.parametrize("teacher", ["", "self", "other"])
def test_preferences_of_any_modality_share_a_batch(tmp_path: Path, start: str, pairs: Path, teacher: str) -> None:
    """The loss is that of log-probabilities from all logits, whoever the reference is."""
    student, inputs = load(start), batch(start, pairs)
    other = load(louder(start, tmp_path / "teacher"))
    reference = {"": None, "self": SelfTeacher(student), "other": CheckpointTeacher(other)}[teacher]
    with torch.no_grad():  # the student moves on; its copy does not
        expected_reference = naive_log_probs(other if teacher == "other" else student, inputs)
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    loss, figures = PreferenceStep(reference, Preference(beta=0.5))(student, inputs, None)
    policy = naive_log_probs(student, inputs)
    expected = preference_loss(
        *policy.chunk(2), *(expected_reference if teacher else torch.zeros_like(policy)).chunk(2), beta=0.5
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert set(figures) == {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}


@pytest.mark.parametrize("adapter", ["speech", "vision"])
def test_each_adapter_gets_the_gradients_of_its_own_rows(
    start: str, pairs: Path, tmp_path: Path, adapter: str
) -> None:
    """Clips alone are the speech adapter's; pictures, and pictures beside clips, the vision adapter's."""
    lines = pairs.read_text().splitlines()
    pictures = [line for line in lines if '"image"' in line]
    own = pictures if adapter == "vision" else [line for line in lines if '"audio"' in line and line not in pictures]
    assert 0 < len(own) < len(lines)
    gradients = []
    for chosen in (lines, own):
        path = pairs.with_name("some.jsonl")
        path.write_text("\n".join(chosen))
        model = load(start)
        loss, _ = PreferenceStep(None, Preference())(model, batch(start, path), None)
        (loss * len(chosen)).backward()
        gradients.append([model.get_parameter(name).grad for name in model.parameter_groups()[f"adapter.{adapter}"]])
    assert any(grad is not None and grad.abs().max() > 1e-6 for grad in gradients[0])
    for mixed, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(mixed, alone, rtol=1e-3, atol=1e-6)


def test_the_chosen_answers_become_likelier(tmp_path: Path, start: str, pairs: Path) -> None:
    changes: dict[str, Any] = {"objective": "preference", "teacher": "self", "preference": {"beta": 0.5}}
    train(write_recipe(tmp_path, start, pairs, TRAINED, max_steps=25, **changes), tmp_path / "out")
    margins, accuracies = (log(tmp_path / "out/01-only", f"rewards/{name}") for name in ("margins", "accuracies"))
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.1
    assert accuracies[-1] > 0.6
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "out/01-only"))
    groups = load(start).parameter_groups()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= {name for group in TRAINED for name in groups[group]}


def test_the_copy_of_the_start_shares_what_is_frozen(start: str) -> None:
    model = load(start)
    model.requires_grad_(False)
    names = model.parameter_groups()["adapter.vision"]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    teacher = SelfTeacher(model)
    assert {f"model.{name}" for name in teacher.values} == set(names)
    assert teacher.head is model.lm_head.weight


def test_the_reference_has_no_dropout_and_leaves_the_mode(start: str, pairs: Path) -> None:
    model = load(start)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    rest = {name: value for name, value in batch(start, pairs).items() if name != "labels"}
    teacher = SelfTeacher(model.train())
    assert torch.equal(teacher.hidden(rest), teacher.hidden(rest))
    assert model.training


def test_a_teacher_with_towers_of_its_own_sees_with_them(tmp_path: Path, start: str, rows: Path) -> None:
    other = load(start)
    with torch.no_grad():
        for tower in (other.model.vision_tower, other.model.speech_tower):
            for parameter in tower.parameters():
                parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "teacher")
    MixLoraProcessor.from_pretrained(start).save_pretrained(tmp_path / "teacher")
    changes: dict[str, Any] = {"objective": "mimic", "teacher": str(tmp_path / "teacher"), "max_steps": 1}
    train(
        write_recipe(tmp_path, start, rows, TRAINED, rows_per_batch=20, tokens_per_batch=0, **changes),
        tmp_path / "out",
    )
    (found,) = log(tmp_path / "out/01-only", "loss")[:1]
    expected, _ = MimicStep(CheckpointTeacher(other), Mimic())(load(start), batch(start, rows), None)
    assert expected > 1e-4 and found == pytest.approx(expected.item(), rel=0.02)  # cached features are fp16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "kd"}, "objective 'kd' is not one of sft, mimic, preference"),
        ({"objective": "mimic"}, "needs a teacher"),
        ({"teacher": "x"}, "not to sft"),
        ({"objective": "preference", "ctc_weight": 0.5}, "ctc_weight goes with objective sft"),
        ({"mimic": {"divergence": "kl"}}, "divergence 'kl'"),
        ({"preference": {"kind": "dpo"}}, "kind 'dpo'"),
        ({"preference": {"betta": 1}}, "did you mean 'beta'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    tmp_path: Path, start: str, rows: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(write_recipe(tmp_path, start, rows, TRAINED, **change), tmp_path / "out")


def test_rows_of_the_wrong_kind_are_named(tmp_path: Path, start: str, rows: Path, pairs: Path) -> None:
    with pytest.raises(RowError, match=r"rows.jsonl:1: objective preference takes rows with prompt"):
        train(write_recipe(tmp_path, start, rows, TRAINED, objective="preference"), tmp_path / "out")
    with pytest.raises(RowError, match=r"pairs.jsonl:1: objective sft takes rows with messages or text"):
        train(write_recipe(tmp_path, start, pairs, TRAINED), tmp_path / "two")


def test_a_teacher_with_other_tokens_is_refused(start: str) -> None:
    model, processor, other = load(start), *(MixLoraProcessor.from_pretrained(start) for _ in range(2))
    other.tokenizer.add_tokens(["zebra"])
    with pytest.raises(RecipeError, match="1 tokens have other ids.*'zebra' None here"):
        check_fit(model, processor, model, other, "big")
    longer = load(start)
    longer.config.speech_stack = 7
    with pytest.raises(RecipeError, match="speech_stack is 7"):
        check_fit(model, processor, longer, processor, "big")


@pytest.mark.parametrize("objective", ["mimic", "preference"])
def test_a_cached_teacher_teaches_the_same(
    tmp_path: Path, start: str, rows: Path, pairs: Path, objective: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"objective": objective, "teacher": louder(start, tmp_path / "teacher")}
    recipe = write_recipe(tmp_path, start, rows if objective == "mimic" else pairs, TRAINED, max_steps=4, **changes)
    train(recipe, tmp_path / "online")
    cached = ["only.teacher_cache=float32", f"cache={tmp_path / 'cache'}"]
    train(recipe, tmp_path / "cached", cached, cache_teacher=True)
    assert "computed now" in capsys.readouterr().out
    assert not (tmp_path / "cached/01-only/log.json").exists()
    train(recipe, tmp_path / "cached", cached)
    assert "answers, 0 computed now" in capsys.readouterr().out
    online, again = (log(tmp_path / name / "01-only", "loss") for name in ("online", "cached"))
    assert again == pytest.approx(online, rel=1e-4)


def test_states_are_kept_apart_by_teacher_and_by_answer(tmp_path: Path, start: str, pairs: Path) -> None:
    processor, model = MixLoraProcessor.from_pretrained(start), load(start)
    media = Media(model, processor)
    examples = Tokenizer(processor, media, 512)(read_rows(pairs))
    collator = Collator(media, processor.tokenizer.pad_token_id)
    caches = [
        cache_states(CheckpointTeacher(each), each, collator, examples, tmp_path / "cache", Form("states"))
        for each in (model, load(louder(start, tmp_path / "teacher")))
    ]
    assert caches[0].folder != caches[1].folder
    model.config.routing["text"] = "speech"  # other rows take an adapter: other states, of the same weights
    routed = cache_states(CheckpointTeacher(model), model, collator, examples, tmp_path / "cache", Form("states"))
    assert routed.folder != caches[0].folder
    model.config.routing["text"] = None
    chosen, rejected = examples[1], examples[1].rejected
    assert rejected is not None
    for example in (chosen, rejected):
        assert len(caches[0][example]) == (example.labels != -100).sum()  # type: ignore[index]
    inputs = collator([chosen])
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    expected = model.model(**rest).last_hidden_state[0][response_mask(inputs["labels"])[0]]
    torch.testing.assert_close(caches[0][chosen], expected, rtol=1e-4, atol=1e-5)  # type: ignore[index]

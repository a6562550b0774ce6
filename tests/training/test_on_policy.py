"""Answers that the student or the teacher draws, in place of the data's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.objectives import response_mask
from mixlora.training.on_policy import last_answers, resample
from mixlora.training.stages import Mimic
from mixlora.training.steps import MimicStep
from mixlora.training.teacher import CheckpointTeacher
from mixlora.training.train import train
from tests.training.taught_fixtures import TRAINED, batch, load, log, louder
from tests.training.training_fixtures import write_recipe


@pytest.fixture
def chats(rows: Path) -> Path:
    """Without plain text, which has no prompt."""
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[1:9]))
    return rows


def end_of(folder: str) -> int:
    end: int = MixLoraProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids("<|end|>")
    return end


def test_the_last_answer_is_found() -> None:
    labels = torch.tensor([[-100, 5, 6, -100, -100, 7], [-100, -100, 5, 6, -100, -100]])
    assert last_answers(labels).tolist() == [5, 2]


def test_prompts_and_media_stay_and_answers_are_what_is_drawn(start: str, chats: Path) -> None:
    model, inputs, end = load(start).train(), batch(start, chats), end_of(start)
    torch.manual_seed(0)
    drawn = resample(model, inputs, end=end, pad=0, max_new_tokens=7)
    assert drawn is not None and model.training
    assert drawn["input_ids"].shape == drawn["labels"].shape == drawn["attention_mask"].shape
    changed = 0
    for row, begin in enumerate(last_answers(inputs["labels"]).tolist()):
        length = int(drawn["attention_mask"][row].sum())
        ids, labels = drawn["input_ids"][row], drawn["labels"][row]
        assert torch.equal(ids[:begin], inputs["input_ids"][row, :begin]) and begin < length <= begin + 7
        assert torch.equal(labels[begin:length], ids[begin:length]) and (labels[:begin] == -100).all()
        assert (labels[length:] == -100).all() and (ids[length:] == 0).all()
        answer = ids[begin:length].tolist()
        assert end not in answer[:-1] and (answer[-1] == end or len(answer) == 7)
        changed += answer != inputs["input_ids"][row, begin : begin + len(answer)].tolist()
    assert changed == len(inputs["labels"])
    assert all(drawn[name] is inputs[name] for name in inputs if name not in ("input_ids", "attention_mask", "labels"))


def test_greedy_draws_are_the_models_answers(start: str, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the draw taken out, rows of every modality get what the model says alone."""
    model, inputs, end = load(start), batch(start, chats), end_of(start)
    generate = type(model).generate

    def greedy(self: Any, **kwargs: Any) -> Any:
        sampling = ("do_sample", "temperature", "top_k", "top_p")
        return generate(self, **{name: value for name, value in kwargs.items() if name not in sampling})

    monkeypatch.setattr(type(model), "generate", greedy)
    drawn = resample(model, inputs, end=end, pad=0, max_new_tokens=5)
    assert drawn is not None
    with torch.no_grad():
        rest = {name: value for name, value in drawn.items() if name != "labels"}
        logits = model(**rest).logits
    banned = [model.config.image_token_id, model.config.audio_token_id]
    logits[..., banned] = -torch.inf
    where = response_mask(drawn["labels"])
    assert torch.equal(logits[where].argmax(-1), drawn["labels"][drawn["labels"] != -100])


def test_plain_text_is_left_alone(start: str, rows: Path) -> None:
    assert resample(load(start), batch(start, rows), end=end_of(start), pad=0, max_new_tokens=3) is None


@pytest.mark.parametrize("speaker", ["student", "teacher"])
def test_the_divergence_is_on_what_was_drawn(tmp_path: Path, start: str, chats: Path, speaker: str) -> None:
    student, other = load(start), load(louder(start, tmp_path / "teacher"))
    teacher, inputs, end = CheckpointTeacher(other), batch(start, chats), end_of(start)
    settings = Mimic(on_policy=1.0, sampled_by=speaker, max_new_tokens=5)
    torch.manual_seed(3)
    step = MimicStep(teacher, settings, pad=0, end=end, accumulation=2)
    loss, figures = step(student, inputs, torch.tensor(10_000))  # the data's tokens, which are of no use here
    torch.manual_seed(3)
    torch.rand(())  # the step's own draw
    drawn = resample(student if speaker == "student" else other, inputs, end=end, pad=0, max_new_tokens=5)
    assert drawn is not None and figures == {"on_policy": 1.0}
    expected, _ = MimicStep(teacher, Mimic())(student, drawn, None)
    torch.testing.assert_close(loss, expected / 2)


def test_a_recipe_draws_a_share_of_its_batches(tmp_path: Path, start: str, chats: Path) -> None:
    settings = {"on_policy": 0.5, "max_new_tokens": 4}
    changes = {"objective": "mimic", "teacher": louder(start, tmp_path / "teacher"), "mimic": settings}
    train(write_recipe(tmp_path, start, chats, TRAINED, max_steps=12, **changes), tmp_path / "out")
    assert set(log(tmp_path / "out/01-only", "on_policy")) == {0.0, 1.0}

"""Pairs of answers: the better one chosen, whatever was drawn."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mixlora.evaluation.preferences import load_judge, preferences, truth, write_preferences
from mixlora.evaluation.tasks import EvalRow
from mixlora.rows import Row
from mixlora.training.data.rows import read_rows


class Drawn:
    """Answers that were settled beforehand, by question."""

    def __init__(self, answers: dict[str, list[str]]):
        self.answers = answers
        self.batches: list[int] = []

    def sample_batch(self, rows: list[Row], samples: int, temperature: float) -> list[list[str]]:
        self.batches.append(len(rows))
        return [self.answers[row.text or ""][:samples] for row in rows]


def asked(text: str, answer: str, metric: str = "exact", **media: tuple[Path, ...]) -> EvalRow:
    return EvalRow("task", metric, (answer,), Row(text, **media, where="here"))


def test_the_best_draw_is_chosen_over_the_worst() -> None:
    row = asked("say", "the cat sat down", "wer")
    session = Drawn({"say": ["the cat sat up", "a dog", "The cat sat down!"]})
    ((found, chosen, rejected),) = preferences(session, [row], samples=3)
    assert (found, chosen, rejected) == (row, "The cat sat down!", "a dog")


def test_the_row_s_own_answer_stands_in_where_no_draw_is_right() -> None:
    ((_, chosen, rejected),) = preferences(Drawn({"?": ["8", "8"]}), [asked("?", "3")], samples=2)
    assert (chosen, rejected) == ("3", "8")


def test_a_row_without_a_worse_answer_gives_no_pair() -> None:
    session = Drawn({"right": ["3", "3."], "empty": ["", " "]})
    assert not list(preferences(session, [asked("right", "3"), asked("empty", "3")], batch_size=1))
    assert session.batches == [1, 1]


def test_a_judge_decides_alone() -> None:
    pairs = preferences(Drawn({"?": ["long answer", "short"]}), [asked("?", "x")], judge=lambda row, text: -len(text))
    assert [pair[1:] for pair in pairs] == [("short", "long answer")]
    assert load_judge("mixlora.evaluation.preferences:truth") is truth
    with pytest.raises(ValueError, match="no judge at 'mixlora.evaluation.preferences:lies'"):
        load_judge("mixlora.evaluation.preferences:lies")


def test_a_judge_may_lie_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_judge_of_answers.py").write_text("def shorter(row, answer):\n    return 1 / len(answer)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    assert load_judge("my_judge_of_answers:shorter")(asked("?", "x"), "four") == 0.25


@pytest.mark.parametrize("given", [float("nan"), None, "good"])
def test_a_judge_that_gives_no_number_is_named(given: Any) -> None:
    with pytest.raises(ValueError, match="the judge gave .* to 'a' .*here.*expected a finite number"):
        list(preferences(Drawn({"?": ["a", "b"]}), [asked("?", "x")], judge=lambda row, text: given))


def test_what_is_written_trains(tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "a.png"
    picture.parent.mkdir()
    picture.write_bytes(b"")
    row = asked("?", "yes", "yes_no", images=(picture,))
    assert write_preferences([(row, "yes", "no")], tmp_path / "out" / "pairs.jsonl") == 1
    record = json.loads((tmp_path / "out" / "pairs.jsonl").read_text())
    assert record["prompt"][0]["content"][0] == {"type": "image", "path": "../pictures/a.png"}
    (read,) = read_rows(tmp_path / "out" / "pairs.jsonl")
    assert read.images[0].samefile(picture) and read.rejected is not None
    assert [messages[-1]["content"] for messages in (read.messages or [], read.rejected)] == ["yes", "no"]

"""Choosing rows, measuring, and what is printed and written."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixlora.evaluation import tasks
from mixlora.evaluation.run import evaluate, heading, line, write_results
from mixlora.rows import Row, RowError


class Parrot:
    """Answers with the question, and notes the sizes of its batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def answer_batch(self, rows: list[Row]) -> list[Any]:
        self.sizes.append(len(rows))
        return [SimpleNamespace(text=row.text) for row in rows]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(prompt: str, answer: str, metric: str = "exact", **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "answers": [answer], "metric": metric} | more


def test_figures(tmp_path: Path) -> None:
    words = [row("one two", "one two", "wer", task="hear"), row("one", "one two three four", "wer", task="hear")]
    data = write(tmp_path / "mine.jsonl", *[row("5", "5")] * 3, *words, row("6", "5"))
    parrot = Parrot()
    results = list(evaluate(parrot, tasks.select(data, None, None), batch_size=3))
    assert [(r.task, r.metric, r.n, r.value) for r in results] == [("mine", "exact", 4, 0.75), ("hear", "wer", 2, 0.5)]
    assert parrot.sizes == [3, 1, 2]
    assert [(one.answer, one.score) for one in results[0].graded] == [("5", (1, 1))] * 3 + [("6", (0, 1))]
    assert results[0].interval == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert len(line(results[0])) == len(heading()) and "75.0%" in line(results[0])
    write_results(results, tmp_path / "new" / "out.json")
    figures = json.loads((tmp_path / "new" / "out.json").read_text())
    assert [list(figure) for figure in figures] == [["task", "n", "metric", "value", "seconds_per_row"]] * 2


def test_task_and_limit(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", *[row("5", "5", task=name) for name in ("a", "b", "a", "a")])
    assert {key: len(rows) for key, rows in tasks.select(data, None, 2).items()} == {
        ("a", "exact"): 2,
        ("b", "exact"): 1,
    }
    assert list(tasks.select(data, "b", None)) == [("b", "exact")]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"answers": []}, "answers must be a list"),
        ({"answers": "5"}, "answers must be a list"),
        ({"answers": ["..."]}, "has no word"),
        ({"metric": "bleu"}, "metric must be one of wer, exact, yes_no, got 'bleu'"),
        ({"metric": ["wer"]}, "metric must be one of"),
        ({"metric": "yes_no"}, "needs the answer yes or no"),
        ({"task": 3}, "task must be a printable string, got 3"),
        ({"task": "a\ud800"}, "task must be a printable string"),
        ({"task": "a\x1b[2J"}, "task must be a printable string"),
        ({"text": "5"}, "unknown field text"),
        ({"prompt": None}, "nothing is asked"),
        ({"images": ["absent.png"]}, "no such file"),
        ({"noise": 10}, "noise must be a string with something in it, got 10"),
        ({"voice": " "}, "voice must be a string"),
        ({"labels": {"voice": "Ann"}}, "unknown field labels"),
    ],
)
def test_bad_rows(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    data = write(tmp_path / "mine.jsonl", row("5", "5"), row("5", "5") | change)
    with pytest.raises(RowError, match="mine.jsonl, line 2: ") as caught:
        tasks.read_eval_rows(data)
    assert message in str(caught.value)


def test_labels(tmp_path: Path) -> None:
    data = write(tmp_path / "mine.jsonl", row("5", "5", voice="Ann", noise="10 dB"), row("5", "5", font=None))
    assert [one.labels for one in tasks.read_eval_rows(data)] == [{"voice": "Ann", "noise": "10 dB"}, {}]


def test_held_out_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "held_out_folder", lambda: tmp_path)
    with pytest.raises(tasks.MissingSplit, match=r"pairs is missing: .*fetch\.py && .*prepare_pairs\.py"):
        tasks.held_out("pairs")
    with pytest.raises(ValueError, match="no task 'smell'; built in are digits"):
        tasks.held_out("smell")
    write(tmp_path / "digits.jsonl", row("5", "5", task="digits"))
    assert len(tasks.select(None, "digits", None)["digits", "exact"]) == 1


def test_the_scripts_that_make_the_splits_exist() -> None:
    scripts = Path(__file__).resolve().parents[2] / "scripts"
    assert (scripts / "fetch.py").is_file()
    assert all((scripts / script).is_file() for script in tasks.HELD_OUT.values())

"""Rows to evaluate on: a file of the user's, or the held-out splits that the preparation scripts write."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora.evaluation.metrics import METRICS, plain
from mixlora.rows import MEDIA_FIELDS, Row, RowError, question, read_objects

LABELS = ("voice", "font", "style", "noise")
"""Optional fields that say what a row is like; a report breaks figures down by them."""
FIELDS = {"task", "prompt", "answers", "metric", *LABELS, *MEDIA_FIELDS}
HELD_OUT = {
    "digits": "prepare_pictures.py",
    "numbers": "prepare_pictures.py",
    "clothes": "prepare_pictures.py",
    "spoken_digit": "prepare_speech.py",
    "spoken_letter": "prepare_speech.py",
    "spoken_words": "prepare_speech.py",
    "studio_prompts": "prepare_speech.py",
    "game_voices": "prepare_game.py",
    "game_joe": "prepare_game.py",
    "game_scenes": "prepare_game.py",
    "pairs": "prepare_pairs.py",
}
"""Built-in task -> the script of a checkout that writes its held-out split."""


@dataclass(frozen=True)
class EvalRow:
    """A question with its answers, any of which is right."""

    task: str
    metric: str
    answers: tuple[str, ...]
    question: Row
    labels: dict[str, str] = field(default_factory=dict)
    """Those of `LABELS` that the row names."""


class MissingSplit(FileNotFoundError):
    """A held-out split that has not been prepared; the message says how to."""


def prepared_folder() -> Path:
    """Where prepared rows lie: in this checkout, or under the working directory of an installed package."""
    root = Path(__file__).resolve().parents[2]
    return (root if (root / "scripts" / "fetch.py").is_file() else Path.cwd()) / "build" / "data"


def held_out_folder() -> Path:
    """Where the held-out splits lie."""
    return prepared_folder() / "eval"


def how_to_prepare(script: str) -> str:
    """What to run for the rows that a script of a checkout writes."""
    scripts = ["fetch.py", script]
    if script == "prepare_pairs.py":  # made from the rows of two others
        scripts[1:1] = ["prepare_pictures.py", "prepare_speech.py"]
    return f"In a checkout, run: {' && '.join(f'python scripts/{each}' for each in scripts)}"


def held_out(task: str) -> list[EvalRow]:
    """The held-out split of a built-in task.

    Raises:
        ValueError: no such task. MissingSplit: not prepared yet.
    """
    if task not in HELD_OUT:
        raise ValueError(f"no task {task!r}; built in are {', '.join(HELD_OUT)}")
    path = held_out_folder() / f"{task}.jsonl"
    if not path.is_file():
        raise MissingSplit(f"the held-out split of {task} is missing: {path}. {how_to_prepare(HELD_OUT[task])}")
    return read_eval_rows(path)


def read_eval_rows(path: Path) -> list[EvalRow]:
    """Rows `{"task"?, "prompt"?, "images"?, "audio"?, "answers", "metric"}` and any of `LABELS`.

    The task is the file's name by default.

    Raises:
        RowError: with the file and line of what is wrong.
    """
    return [_eval_row(row, path, where) for where, row in read_objects(path, FIELDS)]


def _eval_row(row: dict[str, Any], path: Path, where: str) -> EvalRow:
    task, metric, answers = row.get("task", path.stem), row.get("metric"), row.get("answers")
    if not isinstance(task, str) or not task.strip() or not task.isprintable():  # it stands in a terminal's table
        raise RowError(f"{where}: task must be a printable string, got {task!r}")
    if not isinstance(metric, str) or metric not in METRICS:
        raise RowError(f"{where}: metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise RowError(f"{where}: answers must be a list of one or more strings")
    for answer in answers:
        if not plain(answer):
            raise RowError(f"{where}: answer {answer!r} has no word in it")
        if metric == "yes_no" and plain(answer) not in ("yes", "no"):
            raise RowError(f"{where}: metric yes_no needs the answer yes or no, got {answer!r}")
    asked = question(row, path.parent, where, text_field="prompt")
    return EvalRow(task, metric, tuple(answers), asked, _labels(row, where))


def _labels(row: dict[str, Any], where: str) -> dict[str, str]:
    """The labels that a row names."""
    labels = {name: row[name] for name in LABELS if row.get(name) is not None}
    for name, value in labels.items():
        if not isinstance(value, str) or not value.strip():
            raise RowError(f"{where}: {name} must be a string with something in it, got {value!r}")
    return labels


def select(data: Path | None, task: str | None, limit: int | None) -> dict[tuple[str, str], list[EvalRow]]:
    """(task, metric) -> rows, of a file or of the held-out splits.

    Args:
        task: this task only. limit: the first so many rows of each task only.

    Raises:
        RowError, ValueError, MissingSplit: nothing to evaluate on.
    """
    if data is not None:
        rows = [row for row in read_eval_rows(data) if task in (None, row.task)]
        if not rows:
            raise ValueError(f"{data} has no row of task {task!r}")
    else:
        rows = [row for name in ([task] if task else HELD_OUT) for row in held_out(name)]
    groups: dict[tuple[str, str], list[EvalRow]] = {}
    for row in rows:
        groups.setdefault((row.task, row.metric), []).append(row)
    return {key: group[:limit] for key, group in groups.items()}

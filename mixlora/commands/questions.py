"""Training rows as questions with known answers: what `mixlora data prefer` asks a model."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixlora.evaluation.metrics import plain
from mixlora.evaluation.tasks import EvalRow, MissingSplit, how_to_prepare, prepared_folder, read_eval_rows
from mixlora.rows import Row
from mixlora.training.data import rows as training

PREPARED = {
    "digits": "prepare_pictures.py",
    "numbers": "prepare_pictures.py",
    "clothes": "prepare_pictures.py",
    "transcribe": "prepare_speech.py",
    "spoken_digit": "prepare_speech.py",
    "spoken_letter": "prepare_speech.py",
    "game": "prepare_game.py",
    "pairs": "prepare_pairs.py",
}
"""Built-in training file -> the script of a checkout that writes it."""


def select_questions(data: Path | None, task: str | None, limit: int | None) -> list[EvalRow]:
    """The rows of a file, for evaluation or for training, or of the built-in training files.

    Args:
        task: this task only. limit: the first so many rows of each task only.

    Raises:
        ValueError: a broken row, or nothing to ask. MissingSplit: a built-in file is not prepared yet.
    """
    counts: dict[str, int] = {}
    chosen = []
    for row in _built_in() if data is None else _of(data):
        if task in (None, row.task) and (limit is None or counts.get(row.task, 0) < limit):
            counts[row.task] = counts.get(row.task, 0) + 1
            chosen.append(row)
    if not chosen:
        raise ValueError(f"{data or prepared_folder()} has no row{f' of task {task!r}' if task else ''} to ask")
    return chosen


def _built_in() -> Iterator[EvalRow]:
    for name, script in PREPARED.items():
        path = prepared_folder() / f"{name}.jsonl"
        if not path.is_file():
            raise MissingSplit(f"the training rows of {name} are missing: {path}. {how_to_prepare(script)}")
        yield from _learnt(path)


def _of(data: Path) -> Iterator[EvalRow]:
    if data.is_file() and data.suffix != ".parquet" and not _is_for_training(data):
        yield from read_eval_rows(data)
    else:
        yield from _learnt(data)


def _is_for_training(path: Path) -> bool:
    """Whether a file's first row is one; a row that is broken is named by who reads it."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip()), b"null")
    try:
        row = json.loads(first)
    except ValueError:
        return False
    return isinstance(row, dict) and any(kind in row for kind in ("messages", "text", "chosen"))


def _learnt(data: Path) -> Iterator[EvalRow]:
    """Those training rows that are one question and its answer; how many are not is said."""
    others = 0
    for row in training.scan_rows(data):
        if isinstance(row, training.RowError):
            raise row
        asked = _as_question(row, data.stem)
        others += asked is None
        if asked is not None:
            yield asked
    if others:
        print(f"{data}: {others} rows that are not media, then text, then one answer are passed over", file=sys.stderr)


def _as_question(row: training.Row, name: str) -> EvalRow | None:
    """A row of a user's turn, with media before text, and of an assistant's with a word in it; else None."""
    if row.rejected is not None or [each["role"] for each in row.messages or []] != ["user", "assistant"]:
        return None
    question, answer = (_parts(message) for message in row.messages or [])
    kinds = [part["type"] for part in question]
    media = ["image"] * len(row.images) + ["audio"] * len(row.audio)
    if kinds not in (media, [*media, "text"]) or [part["type"] for part in answer] != ["text"]:
        return None
    text = answer[0]["text"].strip()
    if not plain(text):
        return None
    images, audio = (tuple(_file(each, row.source) for each in group) for group in (row.images, row.audio))
    asked = question[-1]["text"] if kinds[-1:] == ["text"] else None
    return EvalRow(row.task or name, _metric(text), (text,), Row(asked, images, audio, row.source))


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _file(medium: Any, source: str) -> Path:
    """A medium's path, which pairs can name too."""
    if not isinstance(medium, Path):
        raise ValueError(f"{source}: its media lie within the table; pairs need media that are files")
    return medium


def _metric(answer: str) -> str:
    """How answers are compared with a known one: as yes or no, as one word, or word by word."""
    words = plain(answer).split()
    if words in (["yes"], ["no"]):
        return "yes_no"
    return "exact" if len(words) == 1 else "wer"

"""Preference rows for training: answers sampled from a model, the better one chosen over the worse one."""

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from mixlora.evaluation.metrics import METRICS
from mixlora.evaluation.tasks import EvalRow
from mixlora.rows import Row

Judge = Callable[[EvalRow, str], float]
"""How good an answer to a row is; 1 is faultless."""


class Sampling(Protocol):
    """What making pairs needs of a chat session."""

    def sample_batch(self, rows: list[Row], samples: int, temperature: float) -> list[list[str]]:
        """That many answers to each row."""


def truth(row: EvalRow, answer: str) -> float:
    """The judge of rows whose answers are known: 1 where it is right, less by its share of wrong words."""
    top, bottom = METRICS[row.metric](answer, row.answers)
    return 1 - top / bottom if row.metric == "wer" else float(top)


def load_judge(name: str) -> Judge:
    """A judge of the user's, named `module:function`; the working directory is searched for the module too.

    Raises:
        ValueError: no such function.
    """
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        judge: Judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no judge at {name!r}, expected module:function ({error})") from error
    return judge


def preferences(
    session: Sampling,
    rows: list[EvalRow],
    *,
    samples: int = 8,
    temperature: float = 1.0,
    judge: Judge = truth,
    batch_size: int = 8,
) -> Iterator[tuple[EvalRow, str, str]]:
    """Yields row, chosen and rejected answer of every row whose sampled answers differ in worth.

    The best sample is chosen, or the row's own answer where no sample is faultless by `truth`; the worst is rejected.

    Args:
        samples: answers drawn for a row.
        temperature: of the draws.
        judge: tells good answers from bad ones.

    Raises:
        ValueError: a judge that gives no finite number, with the answer and the row.
    """
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        drawn = session.sample_batch([row.question for row in batch], samples, temperature)
        for row, answers in zip(batch, drawn, strict=True):
            candidates = [*dict.fromkeys(answer for answer in answers if answer.strip())]
            if judge is truth:
                candidates.append(row.answers[0])
            if len(candidates) < 2:
                continue
            worth = {answer: _judged(judge, row, answer) for answer in candidates}
            chosen, rejected = max(candidates, key=worth.__getitem__), min(candidates, key=worth.__getitem__)
            if worth[chosen] > worth[rejected]:
                yield row, chosen, rejected


def _judged(judge: Judge, row: EvalRow, answer: str) -> float:
    """What a judge gives to an answer.

    Raises:
        ValueError: no finite number.
    """
    given = judge(row, answer)
    if not isinstance(given, int | float) or not math.isfinite(given):
        raise ValueError(
            f"the judge gave {given!r} to {answer!r:.80} ({row.question.where}), expected a finite number"
        )
    return given


def write_preferences(found: Iterable[tuple[EvalRow, str, str]], path: Path) -> int:
    """Writes rows for `objective: preference`, media paths from the file's folder; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row, chosen, rejected in found:
            record = {"prompt": [_turn(row.question, path.parent)], "chosen": chosen, "rejected": rejected}
            file.write(json.dumps({**record, "task": row.task}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _turn(row: Row, folder: Path) -> dict[str, Any]:
    """A question as a user's message that names its media files."""
    media = [("image", path) for path in row.images] + [("audio", path) for path in row.audio]
    parts = [{"type": kind, "path": os.path.relpath(path, folder)} for kind, path in media]
    return {"role": "user", "content": parts + ([{"type": "text", "text": row.text}] if row.text else [])}

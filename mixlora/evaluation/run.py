"""Measures a checkpoint: every row answered in batches, every task scored."""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mixlora.evaluation.metrics import METRICS, Interval, Score, interval, total
from mixlora.evaluation.tasks import EvalRow
from mixlora.rows import Row


class Answering(Protocol):
    """What a run needs of a chat session, or of a reference system."""

    def answer_batch(self, rows: list[Row]) -> list[Any]:
        """One answer with a `text` for each row."""


@dataclass(frozen=True)
class Graded:
    """A row, what was answered, and its score."""

    row: EvalRow
    answer: str
    score: Score


@dataclass(frozen=True)
class Result:
    """The figure of one task."""

    task: str
    n: int
    metric: str
    value: float
    interval: Interval
    """95 %."""
    seconds_per_row: float
    graded: tuple[Graded, ...]
    """The rows behind the figure, in the order of the file."""

    def record(self) -> dict[str, Any]:
        """What the JSON file holds."""
        names = ("task", "n", "metric", "value", "seconds_per_row")
        return {name: getattr(self, name) for name in names}


def evaluate(
    session: Answering, groups: dict[tuple[str, str], list[EvalRow]], batch_size: int = 16
) -> Iterable[Result]:
    """Yields the result of each task as soon as it is measured; says on stderr how far it is."""
    for (task, metric), rows in groups.items():
        graded: list[Graded] = []
        started = time.perf_counter()
        for first in range(0, len(rows), batch_size):
            batch = rows[first : first + batch_size]
            answers = session.answer_batch([row.question for row in batch])
            for row, answer in zip(batch, answers, strict=True):
                graded.append(Graded(row, answer.text, METRICS[metric](answer.text, row.answers)))
            _progress(f"{task}: {len(graded)} of {len(rows)} rows")
        seconds = (time.perf_counter() - started) / len(rows)
        _progress("")
        scores = [one.score for one in graded]
        yield Result(task, len(rows), metric, total(scores), interval(metric, scores), seconds, tuple(graded))


def _progress(message: str) -> None:
    """One line that overwrites itself, where somebody watches."""
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def heading() -> str:
    """The table's first line."""
    return f"{'task':<16} {'n':>6}  {'metric':<7} {'value':>7}   {'95 % interval':<16} {'s/row':>7}"


def line(result: Result) -> str:
    """The table's line of a result; values in percent."""
    low, high = (f"{100 * bound:.1f}" for bound in result.interval)
    return (
        f"{result.task:<16} {result.n:>6}  {result.metric:<7} {100 * result.value:>6.1f}%   "
        f"{low + ' to ' + high:<16} {result.seconds_per_row:>7.3f}"
    )


def printed(results: Iterable[Result]) -> list[Result]:
    """The results as a list; the table's line of each is printed when it is there."""
    shown = []
    for result in results:
        shown.append(result)
        print(line(result), flush=True)
    return shown


def write_results(results: Iterable[Result], path: Path) -> None:
    """A JSON list of `{"task", "n", "metric", "value", "seconds_per_row"}`; value is a share, not percent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([result.record() for result in results], indent=2) + "\n", encoding="utf-8")

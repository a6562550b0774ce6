"""A folder with a page of tables, plots and wrong answers: `index.html`, and what it shows under `report_files/`.

The page needs no network and no script. All that comes from rows and answers is escaped by the template; the names of
the files in the folder are counted, never taken from a row.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import soundfile
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mixlora.evaluation import plots
from mixlora.evaluation.breakdown import (
    Part,
    WordEdits,
    WrongAnswers,
    by_label,
    confusion,
    labels_of,
    word_edits,
    wrong_places,
    wrong_yes_no,
)
from mixlora.evaluation.metrics import is_right
from mixlora.evaluation.run import Result
from mixlora.modeling.audio_processing_mixlora import RATE, load_clip
from mixlora.modeling.image_processing_mixlora import load_picture

FILES = "report_files"
LARGEST = 224
"""Pixels of an example's longer side."""
MEASURES = {"wer": "word error rate", "exact": "right answers", "yes_no": "right yes and no"}


@dataclass(frozen=True)
class Breakdown:
    """A task's figures by one label."""

    label: str
    lines: list[tuple[Part, ...]]
    """For each value of the label, a part a system."""
    plot: str
    alt: str
    drawn: int


@dataclass(frozen=True)
class Task:
    """What the page shows of a task. Plots are named without `.light.svg`, counted from the page."""

    number: int
    name: str
    measure: str
    n: int
    results: dict[str, Result]
    """System -> result; ours first."""
    breakdowns: list[Breakdown]
    confusion: str | None
    yes_no: list[WrongAnswers]
    edits: WordEdits | None
    wrong: int
    examples: list[dict[str, Any]]


def check(folder: Path) -> None:
    """Called before anything is measured, so that no hour is lost.

    Raises:
        ValueError: matplotlib is missing, or the folder holds something that is no report.
    """
    plots.require()
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / FILES).is_dir())):
        raise ValueError(f"--report needs a new or empty folder, or one with an earlier report: {folder}")


def write(folder: Path, systems: Mapping[str, Sequence[Result]], skipped: Sequence[str], examples: int) -> Path:
    """Writes the folder, over an earlier report in it, and returns the page's path.

    Args:
        systems: name -> results; ours first, references after it with some of the tasks.
        skipped: a line for each reference that was not measured.
        examples: the most wrong answers to show of a task.
    """
    check(folder)
    shutil.rmtree(folder / FILES, ignore_errors=True)
    (folder / FILES).mkdir(parents=True)
    model, ours = next(iter(systems.items()))
    page = {
        "model": model,
        "date": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "rows": sum(result.n for result in ours),
        "seconds": sum(result.n * result.seconds_per_row for result in ours),
        "tasks": [_task(folder, number, _alike(systems, ours[number - 1]), examples) for number in _counted(ours)],
        "skipped": skipped,
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    path = folder / "index.html"
    # A JSON file may hold half a surrogate pair, which UTF-8 has no bytes for.
    text = environment.get_template("report.html.jinja").render(page)
    path.write_text(text, encoding="utf-8", errors="xmlcharrefreplace")
    return path


def _alike(systems: Mapping[str, Sequence[Result]], ours: Result) -> dict[str, Result]:
    """System -> its result on the same rows."""
    key = (ours.task, ours.metric)
    return {name: one for name, results in systems.items() for one in results if (one.task, one.metric) == key}


def _counted(results: Sequence[Result]) -> range:
    return range(1, len(results) + 1)


def _task(folder: Path, number: int, results: dict[str, Result], examples: int) -> Task:
    """Draws and copies what the page shows of one task."""
    ours = next(iter(results.values()))
    matrix = confusion(ours)
    if matrix:
        plots.matrix(folder / FILES / f"{number}-confusion", matrix)
    places = wrong_places(ours, len(ours.graded))
    return Task(
        number=number,
        name=ours.task,
        measure=MEASURES[ours.metric],
        n=ours.n,
        results=results,
        breakdowns=[_breakdown(folder, number, results, label) for label in labels_of(ours)],
        confusion=f"{FILES}/{number}-confusion" if matrix else None,
        yes_no=wrong_yes_no(ours),
        edits=word_edits(ours),
        wrong=len(places),
        examples=[_example(folder, f"{number}-{place}", results, place) for place in wrong_places(ours, examples)],
    )


def _breakdown(folder: Path, number: int, results: dict[str, Result], label: str) -> Breakdown:
    """The table and the plot of one label."""
    lines = by_label(list(results.values()), label)
    series = dict(zip(results, zip(*lines, strict=True), strict=True))
    stem = f"{FILES}/{number}-{label}"
    if label == "noise":
        kind, drawn = "Line", len(lines)
        plots.levels(folder / stem, series, label)
    else:
        kind, drawn = "Bar", min(len(lines), plots.MOST_BARS)
        plots.bars(folder / stem, series)
    measure = MEASURES[next(iter(results.values())).metric]
    return Breakdown(label, lines, stem, f"{kind} plot of {measure} by {label}; the table holds its figures", drawn)


def _example(folder: Path, name: str, results: dict[str, Result], place: int) -> dict[str, Any]:
    """A wrong answer, with the row's media beside it and what the references said."""
    graded = {system: result.graded[place] for system, result in results.items()}
    row = next(iter(graded.values())).row
    asked = row.question
    return {
        "prompt": asked.text,
        "expected": " / ".join(row.answers),
        "answers": [
            {"system": system, "text": one.answer, "right": is_right(row.metric, one.score)}
            for system, one in graded.items()
        ],
        "labels": row.labels,
        "files": ", ".join(path.name for path in (*asked.images, *asked.audio)) or Path(asked.where).name,
        "pictures": [_picture(folder, f"{FILES}/{name}-{i}.png", path) for i, path in enumerate(asked.images)],
        "clips": [_clip(folder, f"{FILES}/{name}-{i}", path) for i, path in enumerate(asked.audio)],
    }


def _picture(folder: Path, file: str, source: Path) -> dict[str, str]:
    """A copy of a picture, made small."""
    picture = load_picture(source, where=str(source))
    picture.thumbnail((LARGEST, LARGEST))
    picture.save(folder / file)
    return {"file": file, "name": source.name}


def _clip(folder: Path, stem: str, source: Path) -> dict[str, str]:
    """A copy of a clip as the model hears it, 16 kHz mono, and its plot."""
    samples = load_clip(source, where=str(source))
    soundfile.write(folder / f"{stem}.flac", samples, RATE)
    plots.clip(folder / stem, samples)
    return {"file": f"{stem}.flac", "plot": stem, "name": source.name}

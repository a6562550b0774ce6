"""`report.html`: the curves and settings of a training on one page without a network. Needs the extra `report`."""

import functools
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixlora.training.curves import can_draw, write_curves

NAME = "report.html"
SHOWN = ("objective", "train", "learning_rate", "schedule", "tokens_per_batch", "rows_per_batch", "max_length")
"""Settings of a stage that the page names; all of them are in `stage.json`."""
COLOURS = ("#0b68cb", "#c2410c", "#15803d", "#7e22ce", "#b45309", "#0e7490", "#be123c", "#4d7c0f")

Point = Mapping[str, Any]


def write_report(output: Path, folders: Sequence[Path]) -> None:
    """Draws the curves of finished stages, see `write_curves`, and one page of all of them.

    Where matplotlib or jinja2 is missing, a line says so, once, and nothing is drawn.

    Args:
        output: folder of the whole training.
        folders: its stages in order; those that are not finished are passed over.
    """
    finished = [folder for folder in folders if (folder / "log.json").is_file()]
    if not finished or not can_draw():
        return
    write_curves(output, folders)
    page = output / NAME
    if page.is_file() and page.stat().st_mtime >= max((folder / "log.json").stat().st_mtime for folder in finished):
        return
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    stages = [_stage(folder) for folder in finished]
    partial = page.with_suffix(".partial")
    partial.write_text(environment.get_template("report.html.jinja").render(stages=stages), encoding="utf-8")
    os.replace(partial, page)


def _stage(folder: Path) -> dict[str, Any]:
    """What the page shows of a stage."""
    log = (folder / "log.json").read_text("utf-8")
    points = _points(log)
    settings = json.loads((folder / "stage.json").read_text("utf-8")) if (folder / "stage.json").is_file() else {}
    done = json.loads((folder / "done.json").read_text("utf-8")) if (folder / "done.json").is_file() else {}
    return {
        "name": folder.name,
        "settings": {name: settings[name] for name in SHOWN if settings.get(name)},
        "steps": done.get("steps", points[-1]["step"] if points else 0),
        "broken": done.get("broken", {}),
        "first": points[0]["loss"] if points else None,
        "last": points[-1]["loss"] if points else None,
        "tokens": points[-1].get("tokens") if points else None,
        "plot": _plot(log) if points else "",
    }


def _points(log: str) -> list[Point]:
    return [point for point in json.loads(log) if "loss" in point]


@functools.lru_cache(maxsize=64)
def _plot(log: str) -> str:
    """The picture of a log, drawn once, though the page is written again after each stage."""
    return draw(panels(_points(log)))


def panels(points: Sequence[Point]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Title of a panel -> name of a curve -> its points, step and value."""
    titles = {
        "loss": ("loss", "all"),
        "loss/": ("loss by modality", ""),
        "loss/task/": ("loss by task", ""),
        "rewards/": ("rewards", ""),
        "grad_norm": ("gradient norm", "all"),
        "grad_norm/": ("gradient norm by group", ""),
        "learning_rate": ("learning rate", "all"),
        "learning_rate/": ("learning rate", ""),
    }
    found: dict[str, dict[str, list[tuple[int, float]]]] = {title: {} for title, _ in titles.values()}
    for point in points:
        for name, value in point.items():
            if name in ("step", "epoch", "tokens") or not isinstance(value, int | float):
                continue
            prefix = max((each for each in titles if name == each or (each[-1] == "/" and name.startswith(each))),
                         key=len, default="")  # fmt: skip
            title, label = titles.get(prefix, (name, name))
            label = label or name.removeprefix(prefix)
            found.setdefault(title, {}).setdefault(label, []).append((point["step"], value))
    return {title: curves for title, curves in found.items() if curves}


def draw(found: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> str:
    """The panels as SVG, three in a row."""
    import matplotlib
    from cycler import cycler
    from matplotlib.figure import Figure

    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    with matplotlib.rc_context(
        {"svg.hashsalt": "mixlora", "svg.fonttype": "none", "axes.prop_cycle": cycler(color=COLOURS)}
    ):
        figure = Figure(figsize=(4.4 * columns, 3.2 * rows), layout="constrained")
        for number, (title, curves) in enumerate(found.items(), start=1):
            axes = figure.add_subplot(rows, columns, number)
            for label, points in curves.items():
                steps, values = zip(*points, strict=True)
                axes.plot(steps, values, label=label, marker="." if len(points) < 50 else "", linewidth=1.2)
            axes.set_title(title, parse_math=False)
            axes.set_xlabel("step")
            axes.grid(alpha=0.3)
            if len(curves) > 1:
                for text in axes.legend(fontsize="small").get_texts():
                    text.set_parse_math(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().partition("-->")[2] or buffer.getvalue()

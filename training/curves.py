"""Loss and learning rate against steps, drawn of the logs that finished stages leave. Needs the extra `report`."""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "curves.png"
PANELS = {"loss": "loss", "learning_rate": "learning rate"}
COLOUR = "#0b68cb"
WIDTH, HEIGHT = 4.2, 4.8
"""Inches of a stage."""

Points = Sequence[Mapping[str, Any]]
"""What `log.json` holds: points of the curve, each with its `step`, and a summary without a `loss`."""


def write_curves(output: Path, folders: Sequence[Path]) -> None:
    """Draws `curves.png` beside each stage's `log.json`, and one of all those stages in `output`.

    What is there stays as it is. Where matplotlib is missing, a line says so, once, and nothing is drawn.

    Args:
        output: folder of the whole training.
        folders: its stages in order; those that have no log yet are passed over.
    """
    finished = [folder for folder in folders if (folder / "log.json").is_file()]
    missing = [folder for folder in finished if not (folder / NAME).is_file()]
    if not (missing or (finished and not (output / NAME).is_file())) or not can_draw():
        return
    logs = {folder: json.loads((folder / "log.json").read_text(encoding="utf-8")) for folder in finished}
    for folder in missing:
        draw_curves({folder.name: logs[folder]}, folder / NAME)
    draw_curves({folder.name: log for folder, log in logs.items()}, output / NAME)


def draw_curves(logs: Mapping[str, Points], path: Path) -> None:
    """A PNG with a column for each stage, its loss above its learning rate; each has scales of its own.

    Args:
        logs: title -> points, at least one.
        path: the picture, which is there whole or not at all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * len(logs), HEIGHT), layout="constrained")
    columns = figure.subplots(len(PANELS), len(logs), sharex="col", squeeze=False).T
    for (title, points), column in zip(logs.items(), columns, strict=True):
        curve = [point for point in points if "loss" in point]
        steps = [point["step"] for point in curve]
        for (key, label), axes in zip(PANELS.items(), column, strict=True):
            marker = "." if len(curve) < 50 else ""
            axes.plot(steps, [point[key] for point in curve], color=COLOUR, marker=marker, linewidth=1.2)
            axes.set_ylim(bottom=0)
            axes.set_ylabel(label)
            axes.grid(alpha=0.3)
        column[0].set_title(title, parse_math=False)
        column[-1].set_xlabel("step")
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, path)


@functools.cache
def can_draw() -> bool:
    """Whether matplotlib and jinja2 are there; if not, the first call says so."""
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print(f"  no {NAME} and report.html: these need pip install 'mixlora-multimodal[report]'")
        return False
    return True

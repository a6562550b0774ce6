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
    for folder in missing:
        draw_curves(folder.name, json.loads((folder / "log.json").read_text(encoding="utf-8")), folder / NAME)
    _put_together([folder / NAME for folder in finished], output / NAME)


def draw_curves(title: str, points: Points, path: Path) -> None:
    """A PNG of a stage, its loss above its learning rate.

    Args:
        path: the picture, which is there whole or not at all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    column = figure.subplots(len(PANELS), 1, sharex="col")
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


def _put_together(pictures: Sequence[Path], path: Path) -> None:
    """The pictures side by side: quicker than to draw all stages again whenever one more is finished."""
    from PIL import Image

    opened = [Image.open(picture).convert("RGB") for picture in pictures]
    whole = Image.new("RGB", (sum(each.width for each in opened), max(each.height for each in opened)), "white")
    left = 0
    for each in opened:
        whole.paste(each, (left, 0))
        left += each.width
    partial = path.with_suffix(".partial")
    whole.save(partial, format="png")
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

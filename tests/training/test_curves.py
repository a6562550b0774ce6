"""Curves as PNG: one beside each finished stage's log, one of all, and none where matplotlib is missing."""

import functools
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from mixlora.training import curves
from mixlora.training import train as entry
from tests.training.training_fixtures import make_start, write_recipe, write_rows

POINTS = [{"step": 10 * i, "loss": 3 / i, "learning_rate": 1e-3, "grad_norm": 1.0} for i in (1, 2, 3)]


def log(folder: Path) -> Path:
    """A finished stage."""
    folder.mkdir()
    (folder / "log.json").write_text(json.dumps([*POINTS, {"step": 30, "train_loss": 1.0}]))
    return folder


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_one_beside_each_log_and_one_of_all(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    stages = [log(tmp_path / "01-a"), log(tmp_path / "02-b$x$"), tmp_path / "03-later"]
    curves.write_curves(tmp_path, stages)
    width, height = size(stages[0] / "curves.png")
    assert size(tmp_path / "curves.png") == pytest.approx((2 * width, height), abs=2)
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert written == ["curves.png"] * 3 + ["log.json"] * 2  # nothing for the third, nothing half written

    before = (tmp_path / "curves.png").stat().st_mtime_ns
    curves.write_curves(tmp_path, stages)
    assert (tmp_path / "curves.png").stat().st_mtime_ns == before
    log(stages[2])
    curves.write_curves(tmp_path, stages)
    assert size(tmp_path / "curves.png")[0] == pytest.approx(3 * width, abs=2)


def test_a_stage_shorter_than_its_first_point_is_drawn_empty(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves.draw_curves("short", [{"step": 2, "train_loss": 1.0}], tmp_path / "curves.png")
    size(tmp_path / "curves.png")


def test_without_matplotlib_a_line_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(curves, "can_draw", functools.cache(curves.can_draw.__wrapped__))  # nothing learnt before
    stages = [log(tmp_path / "01-a"), log(tmp_path / "02-b")]
    for number in (1, 2):
        curves.write_curves(tmp_path, stages[:number])
    assert capsys.readouterr().out.count("mixlora-multimodal[report]") == 1
    assert list(tmp_path.rglob("*.png")) == []


def test_a_training_with_views_draws_its_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    start, rows = make_start(tmp_path / "start"), write_rows(tmp_path)
    settings = {"views": 3, "speed": [0.9, 1.1], "noise": ["white", "babble"], "rotation": 10, "clutter": 2}
    recipe = write_recipe(tmp_path, start, rows, ["adapter.vision", "adapter.speech"], augment=settings)
    entry.train(recipe, tmp_path / "out")
    printed = capsys.readouterr().out
    assert "18 further views" in printed
    assert size(tmp_path / "out/01-only/curves.png") == size(tmp_path / "out/curves.png")
    losses = [
        point["loss"] for point in json.loads((tmp_path / "out/01-only/log.json").read_text()) if "loss" in point
    ]
    assert len(losses) == 6

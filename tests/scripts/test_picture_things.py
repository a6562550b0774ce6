"""The cut-outs that picture rows are made of."""

from pathlib import Path

import picture_things
import pytest
from picture_things import CLIP_ART, clip_art, pixels_of
from PIL import Image


def test_pixels_are_counted_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "drawing.png"
    Image.new("1", (300, 20)).save(path)
    path.write_bytes(path.read_bytes()[:40])  # its header
    assert pixels_of(path) == 6000


def test_drawings_larger_than_posters_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CLIP_ART / "food"
    folder.mkdir(parents=True)
    for name, side in (("apple", 10), ("feast", 11)):
        Image.new("1", (side, side)).save(folder / f"{name}.png")
    monkeypatch.setattr(picture_things, "package", lambda name: tmp_path)
    monkeypatch.setattr(picture_things, "MOST_PIXELS", 100)
    assert [(thing.name, Path(thing.source).stem) for thing in clip_art()] == [("food", "apple")]

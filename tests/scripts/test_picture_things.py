"""The cut-outs that picture rows are made of."""

from pathlib import Path

import picture_things
import pytest
from picture_things import (
    CLIP_ART,
    HELD_OUT_STYLE,
    MORE_STYLES,
    TRAIN_STYLES,
    Thing,
    clip_art,
    emoji,
    named_drawings,
    pixels_of,
)
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


def test_a_style_that_writes_names_together_or_lacks_them(monkeypatch: pytest.MonkeyPatch) -> None:
    icons = {"whole": {"cat-face": {}, "dog": {}}, "part": {"catface": {}}}
    monkeypatch.setattr(picture_things, "icon_set", lambda style: {"icons": icons[style]})
    found = [(thing.name, thing.style, thing.source) for thing in emoji(["cat-face", "dog"], ("whole", "part"))]
    assert found == [("cat face", "whole", "cat-face"), ("cat face", "part", "catface"), ("dog", "whole", "dog")]


def test_drawings_go_by_the_longest_name_and_none_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / CLIP_ART / "food"
    folder.mkdir(parents=True)
    for name in ("hot_dog_01", "hot-plate", "dog_of_somebody", "dog_held", "my_dog"):
        Image.new("1", (10, 10)).save(folder / f"{name}.png")
    held = Thing("food", "food dog", "clip art", str((folder / "dog_held.png").resolve()))
    monkeypatch.setattr(picture_things, "package", lambda name: tmp_path)
    monkeypatch.setattr(picture_things, "clip_art_split", lambda: {"test": [held]})
    found = [(thing.name, Path(thing.source).stem) for thing in named_drawings({"dog", "hot dog"})]
    assert found == [("dog", "dog_of_somebody"), ("hot dog", "hot_dog_01")]
    monkeypatch.setattr(picture_things, "MOST_DRAWINGS", 0)
    assert named_drawings({"dog"}) == []


def test_the_held_out_style_is_in_no_training() -> None:
    assert HELD_OUT_STYLE not in (*TRAIN_STYLES, *MORE_STYLES)

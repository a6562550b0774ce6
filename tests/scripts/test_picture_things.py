"""The cut-outs that picture rows are made of."""

from pathlib import Path

from picture_things import pixels_of
from PIL import Image


def test_pixels_are_counted_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "drawing.png"
    Image.new("1", (300, 20)).save(path)
    path.write_bytes(path.read_bytes()[:40])  # its header
    assert pixels_of(path) == 6000

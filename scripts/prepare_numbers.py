"""Write rows of numbers of one to five handwritten digits on coloured, cluttered grounds, and small foreign digits.

Run: python scripts/prepare_numbers.py [SHARE]     (after scripts/fetch.py; SHARE, 0 to 1, writes a sample)
Pictures go to build/data/pictures/numbers_long/ and digits_small/, rows to build/data/numbers_long.jsonl and
build/data/eval/{numbers_long,digits_small}.jsonl. Digits are split as prepare_pictures.py splits them.
"""

from __future__ import annotations

import csv
import gzip
import random
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from common import (
    DATA,
    DIGIT_PICTURE_PROMPTS,
    EVAL,
    NUMBER_PICTURE_PROMPTS,
    SEED,
    chat_row,
    package,
    run_main,
    with_progress,
    write_jsonl,
)
from picture_files import (
    DIGIT_SIDE,
    SIDE,
    Colour,
    contrasting_background,
    eval_row,
    jitter,
    place,
    random_colour,
    read_digits,
    save_scene,
    split_digits,
)

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

ROWS = {"train": 9000, "test": 500}
LENGTHS = (1, 2, 3, 4, 5)
HEIGHT = (28, 110)
"""Height of a digit's frame, in pixels; longer numbers are lower, so that they fit."""
THICKNESS = (-1, 0, 0, 1, 2)
"""Steps by which strokes are made thinner or thicker."""
CLUTTER_SHARE = 0.5
SMALL_DIGITS = "usr/lib/python3/dist-packages/sklearn/datasets/data/digits.csv.gz"
SMALL_SIDE, SMALL_LEVELS, SMALL_SHOWN = 8, 16, 112
Pairs = list[tuple[int, int]]


def thickened(grey: Image.Image, steps: int) -> Image.Image:
    """Strokes thinner (steps below 0) or thicker; twice enlarged, a step is about half a pixel of the original."""
    from PIL import Image, ImageFilter

    large = grey.resize((2 * grey.width, 2 * grey.height), Image.Resampling.BICUBIC)
    for _ in range(abs(steps)):
        large = large.filter(ImageFilter.MaxFilter(3) if steps > 0 else ImageFilter.MinFilter(3))
    return large


def number_cut_out(parts: list[np.ndarray], colour: Colour, rng: random.Random) -> Image.Image:
    """Digits [28, 28] side by side in one colour, up to a fifth of a frame closer or further apart."""
    from PIL import Image, ImageChops

    steps, frame = rng.choice(THICKNESS), 2 * DIGIT_SIDE
    gaps = [rng.randint(-frame // 5, frame // 8) for _ in parts[1:]]
    mask = Image.new("L", (frame * len(parts) + sum(gaps), frame))
    left = 0
    for part, gap in zip(parts, [*gaps, 0], strict=True):
        digit = Image.new("L", mask.size)
        digit.paste(thickened(Image.fromarray(part), steps), (left, 0))
        mask = ImageChops.lighter(mask, digit)
        left += frame + gap
    cut_out = Image.new("RGBA", mask.size, (*colour, 0))
    cut_out.putalpha(mask)
    return cut_out


def clutter(scene: Image.Image, colour: Colour, rng: random.Random) -> None:
    """Thin lines and dots behind the number, in place; they stay paler than its strokes."""
    from PIL import ImageDraw

    draw = ImageDraw.Draw(scene)
    ground = scene.resize((1, 1)).getpixel((0, 0))
    faint = tuple(round(0.7 * back + 0.3 * front) for back, front in zip(ground, colour, strict=True))
    for _ in range(rng.randint(2, 7)):
        points = [(rng.randint(0, SIDE), rng.randint(0, SIDE)) for _ in range(2)]
        if rng.random() < 0.6:
            draw.line(points, fill=faint, width=rng.randint(1, 3))
        else:
            (x, y), radius = points[0], rng.randint(2, 9)
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=faint, width=2)


def number_picture(parts: list[np.ndarray], rng: random.Random) -> Image.Image:
    """A number somewhere in a scene."""
    colour = random_colour(rng)
    cut_out = number_cut_out(parts, colour, rng)
    widest = min(SIDE - 8, HEIGHT[1] * cut_out.width // cut_out.height)
    narrowest = min(widest, HEIGHT[0] * cut_out.width // cut_out.height)
    number = jitter(cut_out, rng.randint(narrowest, widest), rng, angle=8)
    scene = contrasting_background([number], rng, strokes=True)
    if rng.random() < CLUTTER_SHARE:
        clutter(scene, colour, rng)
    place(scene, number, rng)
    return scene


def numbers(digits: list[np.ndarray], pairs: Pairs, split: str, count: int) -> Iterator[tuple[str, Any]]:
    """(answer, file) of numbers made of one split's digits; all lengths are equally frequent."""
    rng = random.Random(f"{SEED} numbers {split}")
    for serial in with_progress(list(range(count)), f"numbers {split}"):
        chosen = [rng.choice(pairs) for _ in range(LENGTHS[serial % len(LENGTHS)])]
        scene = number_picture([digits[digit][index] for digit, index in chosen], rng)
        answer = "".join(str(digit) for digit, _ in chosen)
        yield answer, save_scene(scene, DATA / f"pictures/numbers_long/{split}/{serial:05d}_{answer}")


def small_digits(share: float) -> Iterator[dict[str, Any]]:
    """Scanned digits of another collection, 8 x 8 pixels in 17 levels, drawn large; the first share of them."""
    import numpy as np
    from PIL import Image

    with gzip.open(package("python3-sklearn") / SMALL_DIGITS, "rt") as lines:
        rows = [[int(float(value)) for value in row] for row in csv.reader(lines)]
    for serial, (*levels, digit) in enumerate(rows[: round(len(rows) * share)]):
        grey = np.asarray(levels, dtype=np.float32).reshape(SMALL_SIDE, SMALL_SIDE) * (255 / SMALL_LEVELS)
        shown = Image.fromarray(grey.round().astype(np.uint8)).resize(
            (SMALL_SHOWN, SMALL_SHOWN), Image.Resampling.BICUBIC
        )
        path = save_scene(shown, DATA / f"pictures/digits_small/{serial:04d}_{digit}")
        yield eval_row("digits_small", DIGIT_PICTURE_PROMPTS[0], path, [str(digit)], "exact")


def main() -> None:
    """Write both splits of the numbers, and the small digits."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    rng = random.Random(SEED)
    digits = read_digits()
    splits = split_digits(digits, rng)
    held = numbers(digits, splits["test"], "test", round(ROWS["test"] * share))
    prompt = NUMBER_PICTURE_PROMPTS[0]
    write_jsonl(
        EVAL / "numbers_long.jsonl", (eval_row("numbers_long", prompt, path, [a], "exact") for a, path in held)
    )
    write_jsonl(EVAL / "digits_small.jsonl", small_digits(share))
    rows = numbers(digits, splits["train"], "train", round(ROWS["train"] * share))
    train = (
        chat_row("numbers_long", answer, rng.choice(NUMBER_PICTURE_PROMPTS), images=[str(path.relative_to(DATA))])
        for answer, path in rows
    )
    write_jsonl(DATA / "numbers_long.jsonl", train)


if __name__ == "__main__":
    run_main(main)

"""Write mixlora/default/samples/: the rows that `make chat` answers, with media that may be shipped.

Run: python scripts/make_samples.py     (after scripts/fetch.py; needs ffmpeg on the PATH)
The pictures are drawn here, stroke by stroke; the clips are Asterisk's studio prompts (CC-BY-SA-3.0).
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ROOT, SEED, asterisk_transcripts, run_main, say

if TYPE_CHECKING:
    from PIL import Image

SAMPLES = ROOT / "mixlora" / "default" / "samples"
SIZE, SCALE = 112, 4
Point = tuple[float, float]
DIGIT_FIVE: list[list[Point]] = [
    [(0.66, 0.20), (0.38, 0.21), (0.35, 0.47)],
    [(0.35, 0.47), (0.47, 0.42), (0.60, 0.46), (0.66, 0.58), (0.61, 0.72), (0.48, 0.79), (0.33, 0.74)],
]
DIGIT_SEVEN: list[list[Point]] = [[(0.30, 0.24), (0.50, 0.22), (0.69, 0.23), (0.60, 0.42), (0.50, 0.62), (0.44, 0.80)]]
DIGIT_THREE: list[list[Point]] = [
    [(0.34, 0.27), (0.46, 0.20), (0.60, 0.24), (0.62, 0.36), (0.54, 0.45), (0.45, 0.48)],
    [(0.45, 0.48), (0.58, 0.51), (0.66, 0.62), (0.61, 0.75), (0.47, 0.80), (0.33, 0.74)],
]
PICTURES = {"five": DIGIT_FIVE, "seven": DIGIT_SEVEN, "three": DIGIT_THREE}
CLIPS = {"seven": "digits/7", "four": "digits/4", "hello-world": "hello-world"}
"""Sample -> the studio prompt it is made from."""
NAME = "I am MixLora, a small model that reads text, looks at pictures and listens to voices."
ROWS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"text": "Who are you?"},
        ["I am MixLora, a small model that reads text, looks at pictures and listens to voices."],
    ),
    ({"text": "What digit is this?", "images": ["five.png"]}, ["5"]),
    ({"text": "Which digit is spoken?", "audio": ["seven.flac"]}, ["7"]),
    ({"text": "Transcribe the audio.", "audio": ["hello-world.flac"]}, ["Hello world."]),
    ({"text": "Is this what I say?", "images": ["seven.png"], "audio": ["seven.flac"]}, ["yes"]),
    ({"text": "Is this what I say?", "images": ["three.png"], "audio": ["four.flac"]}, ["no"]),
]
ATTRIBUTION = """# Samples: origin and licences

- `*.png`: drawn by `scripts/make_samples.py`, under this project's licence (Apache-2.0).
- `*.flac`: from Asterisk Core Sounds (English, en_US_f_Allison), https://downloads.asterisk.org/pub/telephony/sounds/,
  recorded by Allison Smith, financed by Digium, Inc. Licence: Creative Commons Attribution-ShareAlike 3.0,
  https://creativecommons.org/licenses/by-sa/3.0/. Changes: decoded from G.722 to 16 kHz mono FLAC. The clips here
  are under that licence too. The model heard these clips in training: they show that it runs, not how well it does
  on voices that are new to it (see the model card for held-out figures).

"""


def curve(points: list[Point], rng: random.Random, steps: int = 12) -> list[Point]:
    """A smooth line through points (Catmull-Rom), with a hand's tremor."""
    ends = [points[0], *points, points[-1]]
    line: list[Point] = []
    for a, b, c, d in zip(ends, ends[1:], ends[2:], ends[3:], strict=False):
        for step in range(steps):
            t = step / steps
            at = [
                0.5 * (2 * q + (r - p) * t + (2 * p - 5 * q + 4 * r - s) * t**2 + (3 * q - p - 3 * r + s) * t**3)
                for p, q, r, s in zip(a, b, c, d, strict=True)
            ]
            line.append((at[0] + rng.gauss(0, 0.0015), at[1] + rng.gauss(0, 0.0015)))
    return [*line, points[-1]]


def draw(strokes: list[list[Point]], rng: random.Random) -> Image.Image:
    """A digit in white chalk on black, grey picture of SIZE pixels a side: a wavering pen, soft edges, grain."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFilter

    big = SIZE * SCALE
    canvas = Image.new("L", (big, big), 0)
    pen = ImageDraw.Draw(canvas)
    for stroke in strokes:
        for index, (x, y) in enumerate(curve(stroke, rng)):
            radius = big * (0.036 + 0.005 * math.sin(index / 5))
            pen.ellipse((x * big - radius, y * big - radius, x * big + radius, y * big + radius), fill=255)
    soft = canvas.filter(ImageFilter.GaussianBlur(big / 150)).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    pixels = np.asarray(soft, dtype=np.float32)
    grain = np.random.default_rng(rng.randrange(2**32)).normal(0, 9, pixels.shape)
    return Image.fromarray(np.where(pixels > 20, pixels + grain, pixels).clip(0, 255).astype(np.uint8))


def write_lines(path: Path, rows: list[Any]) -> None:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    """Draw the pictures, decode the clips, write rows, answers and the attribution."""
    from audio_files import studio_clip, write_clip

    SAMPLES.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)
    for name, strokes in PICTURES.items():
        draw(strokes, rng).save(SAMPLES / f"{name}.png", optimize=True)
    said = asterisk_transcripts()
    clips = {name: said[source] for name, source in CLIPS.items()}
    for name, source in CLIPS.items():
        write_clip(studio_clip(source), SAMPLES / f"{name}.flac")
    write_lines(SAMPLES / "rows.jsonl", [row for row, _ in ROWS])
    answers = json.dumps([answers for _, answers in ROWS], indent=1, ensure_ascii=False)
    (SAMPLES / "answers.json").write_text(answers + "\n", encoding="utf-8")
    lines = [f"- `{name}.flac` (`{CLIPS[name]}`): {text}\n" for name, text in clips.items()]
    (SAMPLES / "ATTRIBUTION.md").write_text(ATTRIBUTION + "".join(lines), encoding="utf-8")
    say(f"{SAMPLES.relative_to(ROOT)}: {len(ROWS)} rows, {len(PICTURES)} pictures, {len(CLIPS)} clips")


if __name__ == "__main__":
    run_main(main)

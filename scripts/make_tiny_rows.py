"""Draws the rows that the recipes `tiny` and `smoke` learn: shapes to name, tones to count, and both at once.

python scripts/make_tiny_rows.py [FOLDER]     # by default training/recipes/tiny, which is in git

All of it is drawn here, by seed, so that a training runs anywhere without other data.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from PIL import Image, ImageDraw

FOLDER = Path(__file__).resolve().parents[1] / "training" / "recipes" / "tiny"
SHAPES = ("circle", "square", "triangle")
COUNTS = ("one", "two", "three")
EACH = 6
"""Pictures of a shape, and clips of a count."""
SIDE, RATE = 64, 8000
SENTENCES = (
    "A circle is round and has no corner.",
    "A square has four corners and four sides.",
    "A triangle has three corners and three sides.",
    "One and two are three.",
)


def picture(shape: str, rng: np.random.Generator) -> Image.Image:
    """A filled shape somewhere on white."""
    image = Image.new("L", (SIDE, SIDE), 255)
    draw = ImageDraw.Draw(image)
    radius = int(rng.integers(12, 22))
    x, y = (int(value) for value in rng.integers(radius + 2, SIDE - radius - 2, 2))
    shade = int(rng.integers(0, 90))
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        draw.ellipse(box, fill=shade)
    elif shape == "square":
        draw.rectangle(box, fill=shade)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=shade)
    return image


def tones(count: int, rng: np.random.Generator) -> np.ndarray:
    """So many tones of one pitch with pauses between them."""
    pitch, length = rng.uniform(300, 900), int(rng.uniform(0.12, 0.18) * RATE)
    tone = 0.4 * np.sin(2 * np.pi * pitch * np.arange(length) / RATE) * np.hanning(length)
    pause = np.zeros(int(0.12 * RATE))
    samples = np.concatenate([pause] + [np.concatenate([tone, pause]) for _ in range(count)])
    return samples + rng.normal(0, 1e-4, len(samples))


def row(parts: list[dict[str, str]], question: str, answer: str, task: str) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}],
        "task": task,
    }


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    (folder / name).write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    seen, heard = [], []
    for number in range(EACH):
        for shape in SHAPES:
            path = f"{shape}-{number}.png"
            picture(shape, rng).save(folder / path, optimize=True)
            seen.append(({"type": "image", "path": path}, shape))
        for count, word in enumerate(COUNTS, start=1):
            path = f"{word}-{number}.flac"
            soundfile.write(folder / path, tones(count, rng), RATE, subtype="PCM_16")
            heard.append(({"type": "audio", "path": path}, word))
    write_rows(folder, "shapes.jsonl", [row([part], "Which shape is it?", shape, "shapes") for part, shape in seen])
    write_rows(folder, "tones.jsonl", [row([part], "How many tones?", word, "tones") for part, word in heard])
    both = [
        row([part, clip], "Which shape, and how many tones?", f"{shape}, {word}", "both")
        for (part, shape), (clip, word) in zip(seen, [*heard[4:], *heard[:4]], strict=True)
    ]
    write_rows(folder, "both.jsonl", both)
    write_rows(folder, "text.jsonl", [{"text": sentence, "task": "text"} for sentence in SENTENCES])
    pairs = []
    for (part, shape), other in zip(seen, rng.permutation(len(seen)), strict=True):
        rejected = seen[other][1] if seen[other][1] != shape else SHAPES[SHAPES.index(shape) - 1]
        prompt = row([part], "Which shape is it?", shape, "shapes")["messages"][:1]
        pairs.append({"prompt": prompt, "chosen": shape, "rejected": rejected, "task": "shapes"})
    write_rows(folder, "pairs.jsonl", pairs)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)

"""Write the picture rows: handwritten digits (MNIST), numbers composed of them, clothes (Fashion-MNIST).

Run: python scripts/prepare_pictures.py     (after scripts/fetch.py)
Pictures go to build/data/pictures/, rows to build/data/{digits,numbers,clothes}.jsonl and build/data/eval/.
"""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import (
    CLOTHES,
    CLOTHES_PROMPTS,
    DATA,
    DIGIT_PICTURE_PROMPTS,
    EVAL,
    NUMBER_PICTURE_PROMPTS,
    SEED,
    chat_row,
    package,
    run_main,
    write_jsonl,
)
from picture_files import DIGIT_SIDE, read_digits, split_digits

if TYPE_CHECKING:
    import numpy as np

NUMBERS = {"train": 3000, "test": 300}
CLOTHES_PER_CLASS = {"train": 1500, "test": 100}
Labelled = tuple[str, Path]


def save_picture(array: np.ndarray, path: Path, invert: bool = False) -> None:
    """Write a grey PNG, black on white where invert is set."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(255 - array if invert else array).save(path)


def compose(parts: list[np.ndarray], rng: random.Random) -> np.ndarray:
    """Digits side by side, 0 to 6 pixels closer than their frames: [28, width]."""
    import numpy as np

    closer = [0, *(rng.randint(0, 6) for _ in parts[1:])]
    canvas = np.zeros((DIGIT_SIDE, DIGIT_SIDE * len(parts) - sum(closer)), dtype=np.uint8)
    left = 0
    for part, gap in zip(parts, closer, strict=True):
        left -= gap
        view = canvas[:, left : left + DIGIT_SIDE]
        np.maximum(view, part, out=view)
        left += DIGIT_SIDE
    return canvas


def write_digits(
    digits: list[np.ndarray], splits: dict[str, list[tuple[int, int]]], rng: random.Random
) -> dict[str, list[Labelled]]:
    """Single digits, half of them black on white; returns (answer, path) of each split."""
    written: dict[str, list[Labelled]] = {}
    for split, pairs in splits.items():
        written[split] = []
        for digit, index in pairs:
            path = DATA / f"pictures/digits/{split}/{digit}_{index:04d}.png"
            save_picture(digits[digit][index], path, invert=rng.random() < 0.5)
            written[split].append((str(digit), path))
    return written


def write_numbers(
    name: str,
    digits: list[np.ndarray],
    splits: dict[str, list[tuple[int, int]]],
    length: Callable[[int], int],
    rng: random.Random,
) -> dict[str, list[Labelled]]:
    """Numbers of so many digits as `length` gives for each in turn, each split made of its own digits only."""
    written: dict[str, list[Labelled]] = {}
    for split, pairs in splits.items():
        written[split] = []
        for serial in range(NUMBERS[split]):
            chosen = [rng.choice(pairs) for _ in range(length(serial))]
            answer = "".join(str(digit) for digit, _ in chosen)
            path = DATA / f"pictures/{name}/{split}/{serial:04d}_{answer}.png"
            parts = [digits[digit][index] for digit, index in chosen]
            save_picture(compose(parts, rng), path, invert=rng.random() < 0.5)
            written[split].append((answer, path))
    return written


def read_idx(path: Path) -> np.ndarray:
    """An idx.gz file of bytes as an array: [count] labels or [count, 28, 28] pictures."""
    import numpy as np

    with gzip.open(path) as stream:
        data = stream.read()
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"{path}: header {data[:3]!r}, expected that of an idx file of bytes")
    shape = [int.from_bytes(data[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(data[3])]
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def write_clothes(rng: random.Random) -> dict[str, list[Labelled]]:
    """Fashion-MNIST: the first pictures of each class in the official splits."""
    folder = package("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    written: dict[str, list[Labelled]] = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz")
        pictures = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
        taken = [0] * len(CLOTHES)
        written[split] = []
        for index, label in enumerate(labels.tolist()):
            if taken[label] == CLOTHES_PER_CLASS[split]:
                continue
            taken[label] += 1
            path = DATA / f"pictures/clothes/{split}/{index:05d}.png"
            save_picture(pictures[index], path)
            written[split].append((CLOTHES[label], path))
        rng.shuffle(written[split])
    return written


def write_rows(task: str, written: dict[str, list[Labelled]], prompts: tuple[str, ...], rng: random.Random) -> None:
    """The training rows (a phrasing drawn for each) and the evaluation rows (the first phrasing)."""
    rows: list[dict[str, Any]] = [
        chat_row(task, answer, rng.choice(prompts), images=[str(path.relative_to(DATA))])
        for answer, path in written["train"]
    ]
    write_jsonl(DATA / f"{task}.jsonl", rows)
    held = [
        {
            "task": task,
            "prompt": prompts[0],
            "images": [f"../{path.relative_to(DATA)}"],
            "answers": [answer],
            "metric": "exact",
        }
        for answer, path in written["test"]
    ]
    write_jsonl(EVAL / f"{task}.jsonl", held)


def main() -> None:
    """Write all picture tasks."""
    rng = random.Random(SEED)
    digits = read_digits()
    splits = split_digits(digits, rng)
    write_rows("digits", write_digits(digits, splits, rng), DIGIT_PICTURE_PROMPTS, rng)
    numbers = write_numbers("numbers", digits, splits, lambda serial: rng.choice([2, 2, 3]), rng)
    write_rows("numbers", numbers, NUMBER_PICTURE_PROMPTS, rng)
    write_rows("clothes", write_clothes(rng), CLOTHES_PROMPTS, rng)
    up_to_four = write_numbers("numbers_to_four", digits, splits, lambda serial: 1 + serial % 4, rng)
    write_rows("numbers_to_four", up_to_four, NUMBER_PICTURE_PROMPTS, rng)


if __name__ == "__main__":
    run_main(main)

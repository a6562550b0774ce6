"""Write the pair rows: a voice says a digit beside a handwritten one; is it the same? "yes" or "no".

Run: python scripts/prepare_pairs.py     (after prepare_pictures.py and prepare_speech.py)
"""

from __future__ import annotations

import random
from typing import Any

from common import DATA, EVAL, PAIR_PROMPTS, SEED, chat_row, read_jsonl, run_main, write_jsonl

TRAIN_ROWS, TEST_ROWS = 6000, 400
TYPED_SHARE = 0.7
"""Rows with a typed question; in the others the voice alone stands beside the picture."""
Clips = dict[int, list[str]]


def clips_by_digit(part: str) -> Clips:
    """Digit -> clips of the training rows whose path contains part."""
    found: Clips = {digit: [] for digit in range(10)}
    for row in read_jsonl(DATA / "spoken_digit.jsonl"):
        path = row["messages"][0]["content"][0]["path"]
        if part in path:
            found[int(row["messages"][1]["content"])].append(path)
    if not all(found.values()):
        raise ValueError(f"no clip with {part!r} for digits {[d for d, paths in found.items() if not paths]}")
    return {digit: sorted(paths) for digit, paths in found.items()}


def other_than(digit: int, rng: random.Random) -> int:
    """Another digit."""
    return rng.choice([other for other in range(10) if other != digit])


def train_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Training pairs: half of them agree; human and synthetic clips, training pictures only."""
    clips = clips_by_digit("speech/digits/")
    pictures = read_jsonl(DATA / "digits.jsonl")
    rows = []
    for index, picture in enumerate(rng.sample(pictures, TRAIN_ROWS)):
        digit, agree = int(picture["messages"][1]["content"]), index % 2 == 0
        clip = rng.choice(clips[digit if agree else other_than(digit, rng)])
        question = rng.choice(PAIR_PROMPTS) if rng.random() < TYPED_SHARE else None
        image = picture["messages"][0]["content"][0]["path"]
        rows.append(chat_row("pairs", "yes" if agree else "no", question, images=[image], audio=[clip]))
    return rows


def test_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Held-out pairs: pictures never trained on beside the human voice at its own speed, half of them agree."""
    clips = clips_by_digit("speech/digits/studio/")
    human = {digit: [path for path in paths if path.endswith("_100.flac")] for digit, paths in clips.items()}
    rows = []
    for index, picture in enumerate(rng.sample(read_jsonl(EVAL / "digits.jsonl"), TEST_ROWS)):
        digit, agree = int(picture["answers"][0]), index % 2 == 0
        clip = rng.choice(human[digit if agree else other_than(digit, rng)])
        row = {"task": "pairs", "images": picture["images"], "audio": [f"../{clip}"]}
        if index % 4 < 2:
            row["prompt"] = PAIR_PROMPTS[0]
        rows.append({**row, "answers": ["yes" if agree else "no"], "metric": "yes_no"})
    return rows


def main() -> None:
    """Write both splits."""
    rng = random.Random(SEED)
    train, test = train_rows(rng), test_rows(rng)
    rng.shuffle(train)
    write_jsonl(DATA / "pairs.jsonl", train)
    write_jsonl(EVAL / "pairs.jsonl", test)


if __name__ == "__main__":
    run_main(main)

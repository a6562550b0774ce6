"""Write the rows about pictures in which nothing is written, for the part that reads and for the decoder.

Run: python scripts/prepare_reading.py     (after prepare_pictures.py and prepare_things.py)
Rows go to build/data/unwritten.jsonl, and with nothing to spell to build/data/blank.jsonl.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from common import DATA, SEED, chat_row, run_main, write_jsonl
from prepare_words import WORD_PROMPTS

SOURCES = {"things": 3500, "clothes": 1000}
"""Rows whose pictures are taken of each file; hardly any of them shows letters."""
NOTHING, ANSWER = ".", "Nothing is written there."


def pictures() -> Iterator[str]:
    """Drawn pictures of each source, in a seeded order."""
    rng = random.Random(f"{SEED} reading")
    for name, count in SOURCES.items():
        rows = [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
        for row in rng.sample(rows, min(count, len(rows))):
            yield next(part["path"] for part in row["messages"][0]["content"] if part["type"] == "image")


def rows(answer: str) -> Iterator[dict[str, Any]]:
    """The pictures, asked what is written there."""
    rng = random.Random(f"{SEED} reading prompts")
    for picture in dict.fromkeys(pictures()):
        yield chat_row("words", answer, rng.choice(WORD_PROMPTS), images=[picture])


def main() -> None:
    """Write both files."""
    write_jsonl(DATA / "blank.jsonl", rows(NOTHING))
    write_jsonl(DATA / "unwritten.jsonl", rows(ANSWER))


if __name__ == "__main__":
    run_main(main)

"""Count the words of the training texts: those that `speech_letters` knows.

Run: python scripts/count_words.py     (after prepare_text.py, prepare_speech.py and prepare_game.py)
Writes build/data/words.json, word -> count.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from common import DATA, read_jsonl, run_main, say

SOURCES = {"text": 1, "synthetic": 1, "transcribe": 5, "game": 5}
"""File -> how often each of its words counts: what people said more often than what they wrote."""
LEAST = 2
"""A word that counts less is left out."""


def texts_of(row: dict[str, Any]) -> list[str]:
    """What stands in a row, of all turns."""
    if "messages" not in row:
        return [row["text"]]
    contents = [turn["content"] for turn in row["messages"]]
    parts = [
        [content] if isinstance(content, str) else [part.get("text", "") for part in content] for content in contents
    ]
    return [text for each in parts for text in each]


def words_of(text: str) -> list[str]:
    """Its words in small letters, with the apostrophes inside them."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("\u2019", "'"))


def main() -> None:
    """Write the counts."""
    counts: Counter[str] = Counter()
    for name, times in SOURCES.items():
        for row in read_jsonl(DATA / f"{name}.jsonl"):
            for word in (word for text in texts_of(row) for word in words_of(text)):
                counts[word] += times
    kept = {word: count for word, count in sorted(counts.items()) if count >= LEAST}
    (DATA / "words.json").write_text(json.dumps(kept))
    say(f"build/data/words.json: {len(kept)} words")


if __name__ == "__main__":
    run_main(main)

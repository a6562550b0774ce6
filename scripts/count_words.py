"""Count the words of the training texts, beside a dictionary's: those that are known in what is heard and read.

Run: python scripts/count_words.py     (after prepare_text.py, prepare_speech.py, prepare_game.py and prepare_words.py)
Writes build/data/words.json, word -> count.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from common import DATA, package, read_jsonl, run_main, say

SOURCES = {"text": 1, "synthetic": 1, "words": 2, "transcribe": 5, "game": 5}
"""File -> how often each of its words counts: what people said more often than what they wrote, and words in pictures,
which are shown once, so often that they are kept."""
LEAST = 2
"""A word that counts less is left out, unless the dictionary has it."""
DICTIONARY = re.compile("[a-z]{3,12}")
"""The words of WordNet that are taken, as counting once."""


def texts_of(row: dict[str, Any]) -> list[str]:
    """What stands in a row, of all turns; of one about a picture the answers: its questions are always the same."""
    if "messages" not in row:
        return [row["text"]]
    turns = row["messages"]
    if any(part["type"] == "image" for turn in turns if isinstance(turn["content"], list) for part in turn["content"]):
        turns = [turn for turn in turns if turn["role"] == "assistant"]
    contents = [turn["content"] for turn in turns]
    parts = [
        [content] if isinstance(content, str) else [part.get("text", "") for part in content] for content in contents
    ]
    return [text for each in parts for text in each]


def words_of(text: str) -> list[str]:
    """Its words in small letters, with the apostrophes inside them."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("\u2019", "'"))


def dictionary() -> set[str]:
    """WordNet's single words: all of its index, where `wordnet_entries` gives the first of each synset."""
    folder = package("wordnet-base") / "usr/share/wordnet"
    lines = [
        line
        for part in ("noun", "verb", "adj", "adv")
        for line in (folder / f"index.{part}").read_text(encoding="latin-1").splitlines()
    ]
    return {word for word in (line.split(" ", 1)[0] for line in lines) if DICTIONARY.fullmatch(word)}


def main() -> None:
    """Write the counts."""
    counts: Counter[str] = Counter()
    for name, times in SOURCES.items():
        for row in read_jsonl(DATA / f"{name}.jsonl"):
            for word in (word for text in texts_of(row) for word in words_of(text)):
                counts[word] += times
    counted = {word: count for word, count in counts.items() if count >= LEAST}
    kept = dict(sorted((dict.fromkeys(dictionary(), 1) | counted).items()))
    (DATA / "words.json").write_text(json.dumps(kept))
    say(f"build/data/words.json: {len(kept)} words")


if __name__ == "__main__":
    run_main(main)

"""Write the rows about what is written in pictures and what is not, beside those that read words.

Run: python scripts/prepare_reading.py     (after prepare_pictures.py, prepare_things.py and prepare_words.py)
Rows about pictures in which nothing is written go to build/data/unwritten.jsonl, and with nothing to spell to
build/data/blank.jsonl; yes-or-no questions about pictures of words to build/data/word_questions.jsonl, and held-out
ones to build/data/eval/word_questions.jsonl.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from common import CLOTHES, DATA, EVAL, SEED, chat_row, run_main, write_jsonl
from picture_files import eval_row
from prepare_questions import clothes_question, digit_question, held_out_parts, training_parts
from prepare_words import WORD_PROMPTS

SOURCES = {"things": 2500, "kinds": 1000, "clothes": 1000}
"""Rows whose pictures are taken of each file; hardly any of them shows letters."""
NOTHING, ANSWER = ".", "Nothing is written there."
QUESTIONS, TEST_QUESTIONS = 3000, 200


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


def word_question(text: str, others: list[str], index: int, rng: random.Random) -> tuple[str, str]:
    """Question and answer about a picture in which `text` is written; half of them say yes.

    Every fourth asks whether it is a digit or a piece of clothing, every fourth for a word of `others`.
    """
    written = text.lower().split()
    if index % 2 == 0:
        return f'Does it say "{rng.choice(written)}"?', "yes"
    if index % 4 == 1:
        return f'Does it say "{rng.choice([word for word in others if word not in written])}"?', "no"
    make, label = rng.choice(((digit_question, str(rng.randrange(10))), (clothes_question, rng.choice(CLOTHES))))
    return make(label, 1, rng)[0], "no"


def word_questions() -> Iterator[dict[str, Any]]:
    """Questions of training."""
    rng = random.Random(f"{SEED} word questions")
    parts = training_parts("words")
    parts = rng.sample(parts, min(QUESTIONS, len(parts)))
    others = [word for _, text, _ in parts for word in text.split()]
    for index, (_, text, image) in enumerate(parts):
        question, answer = word_question(text, others, index, rng)
        yield chat_row("word_questions", answer, question, images=[image])


def held_out_questions() -> Iterator[dict[str, Any]]:
    """Questions about words in faces that are held out."""
    rng = random.Random(f"{SEED} held-out word questions")
    parts = held_out_parts("words_plain")
    parts = rng.sample(parts, min(TEST_QUESTIONS, len(parts)))
    others = [word.lower() for _, text, _ in parts for word in text.split()]
    for index, (_, text, image) in enumerate(parts):
        question, answer = word_question(text, others, index, rng)
        yield eval_row("word_questions", question, DATA / image, [answer], "yes_no")


def main() -> None:
    """Write all files."""
    write_jsonl(EVAL / "word_questions.jsonl", held_out_questions())
    write_jsonl(DATA / "word_questions.jsonl", word_questions())
    write_jsonl(DATA / "blank.jsonl", rows(NOTHING))
    write_jsonl(DATA / "unwritten.jsonl", rows(ANSWER))


if __name__ == "__main__":
    run_main(main)

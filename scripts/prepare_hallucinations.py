"""Write yes or no questions about what is in a picture or said in a clip, half of them about what is not.

Run: python scripts/prepare_hallucinations.py     (after prepare_pictures.py and prepare_speech.py)

Held-out rows go to build/data/eval/seen_objects.jsonl and heard_words.jsonl, for `mixlora eval --data FILE`; training
rows to build/data/hallucinations.jsonl, those about pictures also to seen_objects.jsonl, and to
hallucinations_preferred.jsonl the true answer over the other one.
"""

from __future__ import annotations

import random
from typing import Any

from common import CLOTHES, DATA, EVAL, SEED, chat_row, plain, read_jsonl, run_main, write_jsonl

TEST_ROWS, TRAIN_ROWS = 400, 2000
NEAR = {
    "t-shirt": "shirt", "shirt": "t-shirt", "pullover": "coat", "coat": "pullover", "dress": "shirt",
    "trousers": "dress", "sandal": "sneaker", "sneaker": "ankle boot", "ankle boot": "sneaker", "bag": "pullover",
}  # fmt: skip
"""A thing -> one that looks like it: every second question about what is not there asks for that."""
WORD_LENGTH = 4
"""Shorter words are not asked for: they are too alike."""


def object_question(label: str, index: int, rng: random.Random) -> tuple[str, str]:
    """Question and answer of the picture of a thing; of every four two say yes, one names a thing that looks alike."""
    if index % 2 == 0:
        return f"Is this in the picture: {label}?", "yes"
    other = NEAR[label] if index % 4 == 1 else rng.choice([each for each in CLOTHES if each != label])
    return f"Is this in the picture: {other}?", "no"


def word_question(text: str, index: int, others: list[str], rng: random.Random) -> tuple[str, str] | None:
    """Question and answer of a clip that says `text`; None where there is no word to ask for.

    A word that is not said is one of `others`, the words of all clips: as likely as it is there.
    """
    said = plain(text).split()
    long = [word for word in said if len(word) >= WORD_LENGTH]
    if not long:
        return None
    if index % 2 == 0:
        return f'Does the voice say "{rng.choice(long)}"?', "yes"
    unsaid = [word for word in others if word not in said]
    if not unsaid:
        return None
    return f'Does the voice say "{rng.choice(unsaid)}"?', "no"


def word_questions(texts: list[str], count: int, rng: random.Random) -> list[tuple[int, str, str]]:
    """`count` times the place of a text, a question and its answer; texts take turns."""
    others = [word for text in texts for word in plain(text).split() if len(word) >= WORD_LENGTH]
    found: list[tuple[int, str, str]] = []
    for place in [place for _ in range(count) for place in rng.sample(range(len(texts)), len(texts))]:
        asked = word_question(texts[place], len(found), others, rng)
        if asked is not None:
            found.append((place, *asked))
        if len(found) == count:
            return found
    raise ValueError(f"{len(texts)} transcripts hold too few words: {len(found)} questions of {count}")


def held_out(rng: random.Random) -> None:
    """Both test files."""
    pictures = rng.sample(read_jsonl(EVAL / "clothes.jsonl"), TEST_ROWS)
    rows = []
    for index, row in enumerate(pictures):
        prompt, answer = object_question(row["answers"][0], index, rng)
        rows.append({**row, "task": "seen_objects", "prompt": prompt, "answers": [answer], "metric": "yes_no"})
    write_jsonl(EVAL / "seen_objects.jsonl", rows)
    clips = [row for name in ("studio_prompts", "spoken_words") for row in read_jsonl(EVAL / f"{name}.jsonl")]
    asked = word_questions([row["answers"][0] for row in clips], min(TEST_ROWS, 4 * len(clips)), rng)
    kept = ("audio", "voice", "style", "noise")
    heard = [
        {key: value for key, value in clips[place].items() if key in kept}
        | {"task": "heard_words", "prompt": prompt, "answers": [answer], "metric": "yes_no"}
        for place, prompt, answer in asked
    ]
    write_jsonl(EVAL / "heard_words.jsonl", heard)


def training(rng: random.Random) -> list[dict[str, Any]]:
    """Training rows, of pictures and clips that are in no test."""
    rows = []
    for index, row in enumerate(rng.sample(read_jsonl(DATA / "clothes.jsonl"), TRAIN_ROWS)):
        user, answer = row["messages"]
        prompt, told = object_question(answer["content"], index, rng)
        rows.append(chat_row("seen_objects", told, prompt, images=[user["content"][0]["path"]]))
    clips = read_jsonl(DATA / "transcribe.jsonl")
    texts = [row["messages"][-1]["content"] for row in clips]
    for place, prompt, told in word_questions(texts, TRAIN_ROWS, rng):
        paths = [part["path"] for part in clips[place]["messages"][0]["content"] if part["type"] == "audio"]
        rows.append(chat_row("heard_words", told, prompt, audio=paths))
    rng.shuffle(rows)
    return rows


def preferred(row: dict[str, Any]) -> dict[str, Any]:
    """A training row as a preference."""
    *prompt, last = row["messages"]
    wrong = {"yes": "no", "no": "yes"}[last["content"]]
    return {"prompt": prompt, "chosen": last["content"], "rejected": wrong, "task": row["task"]}


def main() -> None:
    """Write all files."""
    rng = random.Random(SEED)
    held_out(rng)
    rows = training(rng)
    write_jsonl(DATA / "hallucinations.jsonl", rows)
    write_jsonl(DATA / "seen_objects.jsonl", [row for row in rows if row["task"] == "seen_objects"])
    write_jsonl(DATA / "hallucinations_preferred.jsonl", [preferred(row) for row in rows])


if __name__ == "__main__":
    run_main(main)

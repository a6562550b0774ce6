"""Rows and starting checkpoints of the study of distillation."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

from common import DATA, DIGIT_WORDS, EVAL, SEED, plain, read_jsonl
from prepare_hallucinations import object_question, preferred, word_questions

TASKS = ("clothes", "digits", "spoken_digit", "seen_objects", "heard_words")
MANY = {
    "pictures": {"clothes": 1500, "digits": 600, "seen_objects": 1500},
    "clips": {"spoken_digit": 180, "heard_digits": 360, "heard_words": 720},
}
"""Rows of the teacher."""
FEW = {"clothes": 80, "digits": 50, "seen_objects": 90, "spoken_digit": 30, "heard_digits": 40}
"""Rows of a student, the first of the teacher's."""
READY = {"clothes": 240, "digits": 160, "seen_objects": 900, "spoken_digit": 60, "heard_digits": 240}
"""Rows of a student that is to learn preferences."""
PAIRS = {"seen_objects": 560, "heard_digits": 80}
TESTED = {"clothes": 200, "digits": 150, "seen_objects": 200, "spoken_digit": 30}
ASKED = 4
"""Questions about each held-out clip of a digit: two about its word, two about others."""
WORD_QUESTIONS = 820
"""Drawn at once, of which the first are taken."""
CLIPS, FEWEST_SIGNS = 250, 8
"""Clips with words to ask for: those with the shortest texts, since a row costs what its clip is long."""
STEPS = (10, 20, 30, 60)
"""Of the parts of a long mimicry, in batches of `PART_ROWS`."""
PART_ROWS = {"clothes": 10, "digits": 6}
"""Of a batch there, on average."""
WEAK = {"clothes": 200, "digits": 120}
SIDE, TOKENS_PER_SIDE = 96, 3
"""Pictures are 96 pixels wide, and 9 tokens in place of 49: rows cost less than half."""
RANK = 4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def conversation(row: dict[str, Any], folder: Path, base: Path) -> dict[str, Any]:
    """A row, for training or of a test, as a conversation whose media paths count from `folder`."""
    if "messages" in row:
        user, answer = row["messages"]
        parts = [dict(part) for part in user["content"]]
        told = answer["content"]
    else:
        parts = [{"type": "image", "path": path} for path in row.get("images", [])]
        parts += [{"type": "audio", "path": path} for path in row.get("audio", [])]
        parts.append({"type": "text", "text": row["prompt"]})
        told = row["answers"][0]
    for part in parts:
        if "path" in part:
            part["path"] = os.path.relpath(base / part["path"], folder)
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": told}]
    return {"messages": turns, "task": row["task"]}


def asked(row: dict[str, Any], task: str, question: str, told: str) -> dict[str, Any]:
    """A training row with another question and answer about its media."""
    media = [part for part in row["messages"][0]["content"] if part["type"] != "text"]
    content = [*media, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": told}], "task": task}


def word_rows(rows: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Does the voice say this digit? A question about each clip of a digit, half of them about one that it says."""
    asked_for = []
    for index, row in enumerate(rng.sample(rows, len(rows))):
        said = DIGIT_WORDS[int(row["messages"][-1]["content"])]
        word = said if index % 2 == 0 else rng.choice([each for each in DIGIT_WORDS if each != said])
        asked_for.append(asked(row, "heard_digits", f'Does the voice say "{word}"?', "yes" if word == said else "no"))
    return asked_for


def training_rows() -> dict[str, list[dict[str, Any]]]:
    """Task -> rows of pictures and clips that are in no test, in an order that takes a fair few from the top."""
    rng = random.Random(SEED)
    clothes, digits, spoken = (read_jsonl(DATA / f"{name}.jsonl") for name in ("clothes", "digits", "spoken_digit"))
    for rows in (clothes, digits, spoken):
        rng.shuffle(rows)
    shown = [(row, *object_question(row["messages"][-1]["content"], i, rng)) for i, row in enumerate(clothes)]
    count = -(-(MANY["clips"]["heard_digits"] + PAIRS["heard_digits"]) // len(spoken))
    digits_heard = [row for _ in range(count) for row in word_rows(spoken, rng)]
    clips = [(plain(row["messages"][-1]["content"]), row) for row in read_jsonl(DATA / "transcribe.jsonl")]
    clips = sorted((each for each in clips if len(each[0]) >= FEWEST_SIGNS), key=lambda each: len(each[0]))[:CLIPS]
    questions = word_questions([text for text, _ in clips], WORD_QUESTIONS, rng)
    words_heard = [asked(clips[place][1], "heard_words", *question) for place, *question in questions]
    return {
        "clothes": clothes,
        "digits": digits,
        "spoken_digit": spoken,
        "seen_objects": [asked(row, "seen_objects", question, told) for row, question, told in shown],
        "heard_digits": digits_heard,
        "heard_words": words_heard,
    }


def put(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a file of rows, in an order that mixes tasks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mixed = random.Random(SEED).sample(rows, len(rows))
    path.write_text("".join(json.dumps(row) + "\n" for row in mixed), encoding="utf-8")


def write_all(folder: Path) -> None:
    """Writes the files of rows: of the teachers, students, pairs, the test, and the long mimicry."""
    rows = training_rows()

    def chosen(counts: dict[str, int], begin: dict[str, int] | None = None) -> list[dict[str, Any]]:
        starts = begin or dict.fromkeys(counts, 0)
        picked = [row for task, count in counts.items() for row in rows[task][starts[task] : starts[task] + count]]
        return [conversation(row, folder, DATA) for row in picked]

    for kind, counts in MANY.items():
        put(folder / f"many_{kind}.jsonl", chosen(counts))
    put(folder / "few.jsonl", chosen(FEW))
    put(folder / "ready.jsonl", chosen(READY))
    after = MANY["clips"] | {"seen_objects": MANY["pictures"]["seen_objects"] - PAIRS["seen_objects"]}
    put(folder / "pairs.jsonl", [preferred(row) for row in chosen(PAIRS, after)])
    tested = [
        conversation(row, folder, EVAL)
        for task, count in TESTED.items()
        for row in read_jsonl(EVAL / f"{task}.jsonl")[:count]
    ]
    spoken = [row for row in tested if row["task"] == "spoken_digit"]
    rng = random.Random(SEED)
    put(folder / "test.jsonl", tested + [row for _ in range(ASKED) for row in word_rows(spoken, rng)])
    place = dict.fromkeys(PART_ROWS, 0)
    for number, steps in enumerate(STEPS):
        counts = {task: steps * share for task, share in PART_ROWS.items()}
        put(folder / f"fresh_{number + 1}.jsonl", chosen(counts, place))
        if number == 0:
            put(folder / "fixed.jsonl", chosen(counts, place))
        place = {task: place[task] + counts[task] for task in place}
    put(folder / "weak.jsonl", chosen(WEAK, place))


def write_starts(folder: Path, seeds: range) -> None:
    """The embedded checkpoint with small pictures, and students with fresh adapters on its decoder and projectors."""
    import torch
    from peft import LoraConfig

    from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor, default_checkpoint

    processor = MixLoraProcessor.from_pretrained(default_checkpoint())
    processor.image_processor.size = SIDE
    processor.image_seq_length = TOKENS_PER_SIDE**2
    for name, seed in [("teacher", 0), *((f"student-{seed}", seed) for seed in seeds)]:
        if (folder / name / "config.json").is_file():
            continue
        model = MixLoraForConditionalGeneration.from_pretrained(default_checkpoint())
        model.config.vision_tokens_per_side = TOKENS_PER_SIDE
        if name != "teacher":
            torch.manual_seed(seed)
            adapters = list(model.config.adapters)
            model.delete_adapter(adapters)
            for adapter in adapters:
                model.add_adapter(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS), adapter)
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)

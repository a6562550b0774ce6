"""Write questions about pictures, typed and asked by voice: what is it, is it a seven, what is on the left?

Run: python scripts/prepare_questions.py     (after prepare_pictures.py and prepare_scenes.py; needs onnxruntime)

Training rows go to build/data/questions.jsonl, half of them asked by voice, to build/data/questions_spoken.jsonl, all
by voice and by more voices, and to build/data/yes_no.jsonl. The held-out ones are asked in both forms,
eval/typed_questions.jsonl and eval/spoken_questions.jsonl, by voices that training does not hear. Clips go to
build/data/speech/questions/.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from audio_files import Utterance, asking_voices, clip_name, held_out_voices, synthesise_all, training_voices
from common import CLOTHES, DATA, DIGIT_WORDS, EVAL, SEED, chat_row, read_jsonl, run_main, write_jsonl
from prepare_hallucinations import NEAR, object_question
from prepare_text import with_article

TRAIN_ROWS, SPOKEN_ROWS, TEST_ROWS, YES_NO_ROWS = 9000, 6000, 399, 10_000
CLOTHES_PICTURES = 5000
"""The first ones of the training file, which yes-or-no questions are about."""
DIGIT_QUESTIONS = ("What digit is this?", "Which digit do you see?", "What number is this?")
CLOTHES_QUESTIONS = ("What is this piece of clothing?", "What kind of clothing is this?", "Which garment is this?")
STRETCHES = (0.9, 1.0, 1.15)


class Question(NamedTuple):
    """A question about a picture."""

    text: str
    answer: str
    image: str
    """Path below the data folder."""


def digit_question(digit: str, index: int, rng: random.Random) -> tuple[str, str]:
    """Question and answer about a digit: which is it, or is it this one? As many yes as no."""
    if index % 2 == 0:
        return rng.choice(DIGIT_QUESTIONS), digit
    yes = index % 4 == 1
    asked = int(digit) if yes else rng.choice([other for other in range(10) if other != int(digit)])
    return f"Is this {'an' if asked == 8 else 'a'} {DIGIT_WORDS[asked]}?", "yes" if yes else "no"


def clothes_question(label: str, index: int, rng: random.Random) -> tuple[str, str]:
    """The same about a piece of clothing; every second "no" asks for one that looks alike."""
    if index % 2 == 0:
        return rng.choice(CLOTHES_QUESTIONS), label
    yes = index % 4 == 1
    other = NEAR[label] if index % 8 == 3 else rng.choice([each for each in CLOTHES if each != label])
    asked = label if yes else other
    return (
        f"Are these {asked}?" if asked == "trousers" else f"Is this {with_article(asked)}?"
    ), "yes" if yes else "no"


def questions(
    digits: Sequence[tuple[str, str]],
    clothes: Sequence[tuple[str, str]],
    scenes: list[Question],
    count: int,
    rng: random.Random,
) -> list[Question]:
    """A third of `count` about each kind of picture, given as (image, label) and as questions, in a drawn order."""
    third = count // 3
    asked = [
        Question(*make(label, index, rng), image)
        for make, pictures in ((digit_question, digits), (clothes_question, clothes))
        for index, (image, label) in enumerate(rng.sample(pictures, third))
    ]
    asked += rng.sample(scenes, third)
    rng.shuffle(asked)
    return asked


def spoken(asked: list[Question], voices: list[str], rng: random.Random) -> list[Utterance]:
    """Each question in the voice whose turn it is."""
    drawn = [(voices[index % len(voices)], each.text, rng.choice(STRETCHES)) for index, each in enumerate(asked)]
    return [
        (voice, text, stretch, DATA / "speech/questions" / clip_name(voice, text, stretch))
        for voice, text, stretch in drawn
    ]


def training_parts(name: str) -> list[tuple[str, str, str]]:
    """(question, answer, image) of each row of a training file."""
    rows = [row["messages"] for row in read_jsonl(DATA / f"{name}.jsonl")]
    return [(user["content"][1]["text"], told["content"], user["content"][0]["path"]) for user, told in rows]


def held_out_parts(name: str) -> list[tuple[str, str, str]]:
    """The same of a held-out file."""
    return [
        (row["prompt"], row["answers"][0], row["images"][0].removeprefix("../"))
        for row in read_jsonl(EVAL / f"{name}.jsonl")
    ]


def pictures(parts: list[tuple[str, str, str]]) -> list[tuple[str, str]]:
    """(image, label) of each part."""
    return [(image, answer) for _, answer, image in parts]


def drawn_questions(count: int, rng: random.Random) -> list[Question]:
    """So many questions about pictures of training."""
    scenes = [Question(*part) for part in training_parts("scenes")]
    return questions(pictures(training_parts("digits")), pictures(training_parts("clothes")), scenes, count, rng)


def voiced_rows(asked: list[Question], voices: list[str], rng: random.Random) -> list[dict[str, Any]]:
    """Training rows of questions that these voices ask in turn."""
    clips = spoken(asked, voices, rng)
    synthesise_all(list({clip[-1]: clip for clip in clips}.values()), "spoken questions")
    return [
        chat_row("questions", each.answer, images=[each.image], audio=[str(path.relative_to(DATA))])
        for each, (*_, path) in zip(asked, clips, strict=True)
    ]


def train_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Training rows: the voices of each engine take turns."""
    asked = drawn_questions(TRAIN_ROWS, rng)
    typed, voiced = asked[: TRAIN_ROWS // 2], asked[TRAIN_ROWS // 2 :]
    engines = list(training_voices().values())
    turns = [engine[turn % len(engine)] for turn in range(max(map(len, engines))) for engine in engines]
    rows = voiced_rows(voiced, turns, rng)
    rows = [chat_row("questions", each.answer, each.text, images=[each.image]) for each in typed] + rows
    rng.shuffle(rows)
    return rows


def yes_no_rows(rng: random.Random) -> list[dict[str, Any]]:
    """Typed questions that a yes or a no answers, half about clothes in two wordings, half about digits."""
    clothes, digits = pictures(training_parts("clothes"))[:CLOTHES_PICTURES], pictures(training_parts("digits"))
    rows = []
    for index, (image, label) in enumerate(rng.choices(clothes, k=YES_NO_ROWS // 2)):
        turn = index // 2
        asked = object_question(label, turn, rng) if index % 2 else clothes_question(label, 2 * turn + 1, rng)
        rows.append(chat_row("yes_no", asked[1], asked[0], images=[image]))
    for index, (image, digit) in enumerate(rng.choices(digits, k=YES_NO_ROWS // 2)):
        question, answer = digit_question(digit, 2 * index + 1, rng)
        rows.append(chat_row("yes_no", answer, question, images=[image]))
    rng.shuffle(rows)
    return rows


def write_held_out(rng: random.Random) -> None:
    """The held-out questions in both forms."""
    scenes = [Question(*part) for name in ("scenes", "scene_yes_no") for part in held_out_parts(name)]
    asked = questions(pictures(held_out_parts("digits")), pictures(held_out_parts("clothes")), scenes, TEST_ROWS, rng)
    clips = spoken(asked, held_out_voices(), rng)
    synthesise_all(clips, "held-out spoken questions")
    typed, voiced = [], []
    for each, (voice, *_, path) in zip(asked, clips, strict=True):
        row = {"images": [f"../{each.image}"], "answers": [each.answer], "metric": "exact"}
        typed.append({"task": "typed_questions", "prompt": each.text, **row})
        clip = f"../{path.relative_to(DATA)}"
        voiced.append({"task": "spoken_questions", "audio": [clip], **row, "voice": voice})
    write_jsonl(EVAL / "typed_questions.jsonl", typed)
    write_jsonl(EVAL / "spoken_questions.jsonl", voiced)


def main() -> None:
    """Write the held-out splits, then the training rows."""
    write_held_out(random.Random(f"{SEED} held out"))
    write_jsonl(DATA / "questions.jsonl", train_rows(random.Random(SEED)))
    rng = random.Random(f"{SEED} spoken")
    write_jsonl(DATA / "questions_spoken.jsonl", voiced_rows(drawn_questions(SPOKEN_ROWS, rng), asking_voices(), rng))
    write_jsonl(DATA / "yes_no.jsonl", yes_no_rows(random.Random(f"{SEED} yes or no")))


if __name__ == "__main__":
    run_main(main)

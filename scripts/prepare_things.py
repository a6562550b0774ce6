"""Write the rows that name things: stamps with captions, emoji in several styles, kinds of clip art.

Run: python scripts/prepare_things.py [SHARE]     (after scripts/fetch.py; SHARE, 0 to 1, writes a sample)
Pictures go to build/data/pictures/things/, rows to build/data/things.jsonl and build/data/eval/, and those that ask
for the kind of a drawing to build/data/kinds.jsonl. The emoji of training in more styles go to
build/data/things_more.jsonl, and drawings whose files are called like one of these things to
build/data/drawings.jsonl.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

from common import DATA, EVAL, SEED, chat_row, run_main, with_progress, write_jsonl
from picture_files import eval_row, picture_of, save_scene
from picture_things import (
    CLIP_ART_KINDS,
    HELD_OUT_STYLE,
    MORE_STYLES,
    TRAIN_STYLES,
    Thing,
    bare,
    clip_art_split,
    emoji,
    emoji_split,
    named_drawings,
    noun,
    plain_name,
    stamp_split,
)

EMOJI_DRAWS, MORE_DRAWS, STAMP_DRAWS, CLIP_ART_ROWS = 2, 2, 3, 4000
STYLE_ROWS = 500
STAMP_PROMPTS = ("What is this?", "What do you see?", "What does the picture show?", "What is in the picture?")
EMOJI_PROMPTS = ("Which emoji is this?", "Name this emoji.", "What does this emoji show?")
NAMES = DATA / "names.json"
"""The names of emoji and stamps that training shows, and the kinds."""
SYNONYMS = {
    "automobile": ("car",),
    "ballot box with ballot": ("ballot box",),
    "billed cap": ("cap", "baseball cap"),
    "closed umbrella": ("umbrella",),
    "couch and lamp": ("couch", "sofa"),
    "cut of meat": ("meat", "steak"),
    "deciduous tree": ("tree",),
    "doughnut": ("donut",),
    "dove": ("bird",),
    "e-mail": ("email",),
    "ear of corn": ("corn",),
    "eggplant": ("aubergine",),
    "evergreen tree": ("tree", "fir tree"),
    "french fries": ("fries", "chips"),
    "hamburger": ("burger",),
    "headphone": ("headphones",),
    "honeybee": ("bee",),
    "hot beverage": ("coffee", "tea", "cup of coffee"),
    "hot pepper": ("chili pepper", "chili"),
    "kiwi fruit": ("kiwi",),
    "lady beetle": ("ladybug", "ladybird"),
    "manual wheelchair": ("wheelchair",),
    "mobile phone": ("phone", "smartphone"),
    "necktie": ("tie",),
    "pile of poo": ("poo", "poop"),
    "red apple": ("apple",),
    "running shoe": ("shoe", "sneaker"),
    "soccer ball": ("football", "ball"),
    "spouting whale": ("whale",),
    "steaming bowl": ("bowl", "soup"),
    "t-rex": ("tyrannosaurus", "dinosaur"),
    "sauropod": ("dinosaur",),
    "tangerine": ("orange", "mandarin"),
    "telephone receiver": ("telephone", "phone"),
    "two hump camel": ("camel",),
    "wastebasket": ("bin", "trash can"),
    "wrapped gift": ("gift", "present"),
}
"""Other answers that are fair for an emoji."""


def emoji_answers(name: str, known: set[str]) -> list[str]:
    """The name and fair others; an animal and its face can hardly be told apart."""
    other = name.removesuffix(" face") if name.endswith(" face") else f"{name} face"
    return [name, *SYNONYMS.get(name, ()), *([other] if other in known else [])]


def stamp_answers(stamp: Thing) -> list[str]:
    """The caption, and the noun alone: "A pink flamingo." is also "flamingo"."""
    last = bare(stamp.name).lower().split(" of ")[-1]
    return list(dict.fromkeys([stamp.name, bare(stamp.name), last, last.split(" with ")[0].split()[-1]]))


def kind_question(kind: str, rng: random.Random, others: int | None = None) -> str:
    """ "Is this an animal, food or a tool?" with the right kind among `others` wrong ones, in any order."""
    wrong = [other for other in CLIP_ART_KINDS if other != kind]
    options = [kind, *rng.sample(wrong, others or rng.randint(2, len(wrong)))]
    rng.shuffle(options)
    return f"Is this {', '.join(options[:-1])} or {options[-1]}?"


def training_lines() -> list[str]:
    """The names and captions that training shows, a line each, for the decoder's text."""
    names = [plain_name(name) for name in emoji_split()["train"]]
    return sorted({stamp.name for stamp in stamp_split()["train"]}) + names


def training_draws(rng: random.Random) -> list[tuple[str, Thing]]:
    """(question, thing) of every training row, in a seeded order."""
    draws = [
        (rng.choice(EMOJI_PROMPTS), thing)
        for thing in emoji(emoji_split()["train"], TRAIN_STYLES)
        for _ in range(EMOJI_DRAWS)
    ]
    stamps = [replace(stamp, name=noun(stamp.name)) for stamp in stamp_split()["train"]]
    draws += [(rng.choice(STAMP_PROMPTS), stamp) for stamp in stamps for _ in range(STAMP_DRAWS)]
    by_kind = {kind: [t for t in clip_art_split()["train"] if t.name == kind] for kind in CLIP_ART_KINDS}
    for index in range(CLIP_ART_ROWS):
        kind = CLIP_ART_KINDS[index % len(CLIP_ART_KINDS)]  # each kind as often as the others
        draws.append((kind_question(kind, rng), rng.choice(by_kind[kind])))
    rng.shuffle(draws)
    return draws


def more_draws(rng: random.Random) -> list[tuple[str, Thing]]:
    """The same of the emoji in the styles that have a part of them."""
    things = emoji(emoji_split()["train"], MORE_STYLES)
    draws = [(rng.choice(EMOJI_PROMPTS), thing) for thing in things for _ in range(MORE_DRAWS)]
    rng.shuffle(draws)
    return draws


def shows_something(thing: Thing) -> bool:
    """Whether its cut-out is not empty: a few files are."""
    try:
        thing.picture()
    except ValueError:
        return False
    return True


def drawing_draws(names: Collection[str], rng: random.Random) -> list[tuple[str, Thing]]:
    """The same of drawings that have one of these names, but for those of kinds."""
    drawings = [drawing for drawing in named_drawings(set(names) - set(CLIP_ART_KINDS)) if shows_something(drawing)]
    draws = [(rng.choice(STAMP_PROMPTS), drawing) for drawing in drawings for _ in range(MORE_DRAWS)]
    rng.shuffle(draws)
    return draws


def train_rows(
    draws: list[tuple[str, Thing]], folder: str, rng: random.Random, share: float
) -> Iterator[dict[str, Any]]:
    """Draw and write the training pictures."""
    for serial, (prompt, thing) in enumerate(with_progress(draws[: round(len(draws) * share)], folder)):
        stem = DATA / f"pictures/things/{folder}/{thing.style.replace(' ', '_')}_{serial:05d}"
        path = save_scene(picture_of(thing.picture(), rng), stem)
        task = "kinds" if thing.name in CLIP_ART_KINDS else "things"
        yield chat_row(task, thing.name, prompt, images=[str(path.relative_to(DATA))])


def test_rows(task: str, rows: list[tuple[str, Thing, list[str]]], rng: random.Random) -> Iterator[dict[str, Any]]:
    """Draw and write the pictures of one held-out split, given as (question, thing, answers)."""
    for serial, (prompt, thing, answers) in enumerate(with_progress(rows, task)):
        path = save_scene(picture_of(thing.picture(), rng), DATA / f"pictures/things/{task}/{serial:04d}")
        yield eval_row(task, prompt, path, answers, "exact", style=thing.style)


def write_held_out(rng: random.Random, share: float) -> None:
    """Write the four held-out splits, or a share of each."""
    names = emoji_split()
    known = {plain_name(name) for part in names.values() for name in part}
    seen = emoji(sorted(rng.sample(names["train"], min(STYLE_ROWS, len(names["train"])))), (HELD_OUT_STYLE,))
    new = [emoji([name], (rng.choice(TRAIN_STYLES),))[0] for name in names["new"]]
    splits = {
        "emoji_style": [(EMOJI_PROMPTS[0], thing, emoji_answers(thing.name, known)) for thing in seen],
        "emoji_new": [(EMOJI_PROMPTS[0], thing, emoji_answers(thing.name, known)) for thing in new],
        "stamps": [(STAMP_PROMPTS[0], stamp, stamp_answers(stamp)) for stamp in stamp_split()["test"]],
        "clip_art": [(kind_question(t.name, rng, 4), t, [t.name]) for t in clip_art_split()["test"]],
    }
    for task, rows in splits.items():
        chosen = rng.sample(rows, round(len(rows) * share))
        write_jsonl(EVAL / f"{task}.jsonl", test_rows(task, chosen, rng))


def main() -> None:
    """Write the held-out splits, then the training rows."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    names = sorted({thing.name for _, thing in training_draws(random.Random(SEED))})
    NAMES.write_text(json.dumps(names, indent=0))
    write_held_out(random.Random(f"{SEED} held out"), share)
    rng = random.Random(SEED)
    rows = list(train_rows(training_draws(rng), "train", rng, share))
    for task in ("things", "kinds"):
        write_jsonl(DATA / f"{task}.jsonl", (row for row in rows if row["task"] == task))
    rng = random.Random(f"{SEED} more")
    write_jsonl(DATA / "things_more.jsonl", train_rows(more_draws(rng), "more", rng, share))
    rng = random.Random(f"{SEED} drawings")
    write_jsonl(DATA / "drawings.jsonl", train_rows(drawing_draws(names, rng), "drawings", rng, share))


if __name__ == "__main__":
    run_main(main)

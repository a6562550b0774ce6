"""Write the rows of rendered words: one to three words in many faces, cases, colours and sizes, on noisy grounds.

Run: python scripts/prepare_words.py [SHARE]     (after scripts/fetch.py; SHARE, 0 to 1, writes a sample)
Pictures go to build/data/pictures/words/, rows to build/data/words.jsonl and
build/data/eval/{words_plain,words_display}.jsonl. Whole families of faces are held out, and a part of the words.
"""

from __future__ import annotations

import functools
import random
import re
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import DATA, EVAL, SEED, chat_row, package, run_main, with_progress, wordnet_entries, write_jsonl
from picture_files import (
    SIDE,
    contrasting_background,
    eval_row,
    jitter,
    place,
    random_colour,
    save_scene,
)
from picture_sources import font_packages

if TYPE_CHECKING:
    from PIL import Image

ROWS = {"train": 16000, "letters": 8000, "words_plain": 400, "words_display": 400}
HELD_OUT_FAMILIES = {"plain": 20, "display": 80}
NEW_WORDS = 0.3
"""Share of the held-out rows whose words training never shows."""
HELD_OUT_WORDS = 0.1
WORD_PROMPTS = ("What is written here?", "Read the words.", "What does it say?", "Which words do you see?")
PLAIN_PACKAGES = (
    *("fonts-cantarell", "fonts-courier-prime", "fonts-crosextra-caladea", "fonts-crosextra-carlito"),
    *("fonts-dejavu-core", "fonts-ebgaramond", "fonts-freefont-ttf", "fonts-inconsolata", "fonts-lato"),
    *("fonts-liberation2", "fonts-linuxlibertine", "fonts-open-sans", "fonts-opendyslexic", "fonts-roboto-unhinted"),
    *("fonts-urw-base35", "fonts-vollkorn", "fonts-comic-neue"),
)
"""Packages of faces for running text; the faces of the others count as display faces."""
LEFT_OUT = re.compile(r"Keyboard|Initials|Symbols|D050000L|Dings?\b|Z003")
"""Families that have pictures at the places of letters."""
FONT_SIZE, PROBE_SIDE = 72, 12
ALIKE = 0.1
"""Share of the ink in which a small letter may differ from its capital and still be a small capital."""
LETTER_HEIGHT, TEXT_WIDTH = 20, 90
"""Least height of a line and length of a text, in pixels of the picture: what a reader can still make out."""
Family = tuple[str, str]
"""Kind (plain or display) and name."""


@dataclass(frozen=True)
class Face:
    """A font file of a family."""

    family: str
    path: Path
    one_case: bool
    """Small letters look like capitals; what it writes counts as capitals."""


def read_face(path: Path) -> Face | None:
    """The face in a font file; None where a letter is missing, is empty or the font is one of symbols."""
    from fontTools.ttLib import TTFont

    with TTFont(path, lazy=True) as font:
        family = str(font["name"].getDebugName(16) or font["name"].getDebugName(1))
        characters = font.getBestCmap() or {}
    if LEFT_OUT.search(family) or any(ord(letter) not in characters for letter in string.ascii_letters):
        return None
    shapes = letter_shapes(path)
    if not all(shapes.values()) or len({shapes[letter] for letter in string.ascii_uppercase}) < 20:
        return None
    same = sum(alike(shapes[letter], shapes[letter.upper()]) for letter in string.ascii_lowercase)
    return Face(family, path, one_case=same > len(string.ascii_lowercase) // 2)


def letter_shapes(path: Path) -> dict[str, bytes]:
    """Each letter drawn, cut out and squeezed into a small square of bytes; nothing where it draws nothing."""
    from PIL import Image, ImageDraw, ImageFont

    font, shapes = ImageFont.truetype(path, FONT_SIZE), {}
    for letter in string.ascii_letters:
        canvas = Image.new("L", (3 * FONT_SIZE, 3 * FONT_SIZE))
        ImageDraw.Draw(canvas).text((FONT_SIZE, FONT_SIZE), letter, 255, font)
        box = canvas.getbbox()
        shapes[letter] = canvas.crop(box).resize((PROBE_SIDE, PROBE_SIDE)).tobytes() if box else b""
    return shapes


def alike(first: bytes, second: bytes) -> bool:
    """Whether two letter shapes are the same but for their size."""
    return sum(abs(a - b) for a, b in zip(first, second, strict=True)) < ALIKE * 255 * len(first)


@functools.cache
def families() -> dict[Family, list[Face]]:
    """The faces by (kind, family). Families whose names begin alike are one: they share their drawing."""
    found: dict[Family, list[Face]] = {}
    for name in font_packages():
        kind = "plain" if name in PLAIN_PACKAGES else "display"
        for path in sorted(package(name).rglob("*.[to]tf")):
            face = None if path.is_symlink() else read_face(path)
            if face is not None:
                found.setdefault((kind, face.family), []).append(face)
    return dict(sorted(found.items()))


def root(family: str) -> str:
    """What families of one drawing have in common: the first word of two letters or more."""
    return next((word for word in re.findall(r"[^\W_]+", family) if len(word) > 1), family)


def family_split() -> dict[str, list[Face]]:
    """Faces for `train`, `words_plain` and `words_display`; relatives of a held-out family are held out with it."""
    splits: dict[str, list[Face]] = {"train": [], "words_plain": [], "words_display": []}
    for kind, wanted in HELD_OUT_FAMILIES.items():
        groups: dict[str, list[list[Face]]] = {}
        for (of_kind, family), faces in families().items():
            if of_kind == kind:
                groups.setdefault(root(family), []).append(faces)
        order = random.Random(f"{SEED} {kind}").sample(sorted(groups), len(groups))
        held = 0
        for name in order:
            fits = held + len(groups[name]) <= wanted
            held += len(groups[name]) * fits
            splits[f"words_{kind}" if fits else "train"] += [face for faces in groups[name] for face in faces]
    return splits


def word_split() -> dict[str, list[str]]:
    """WordNet's single words of three to nine letters: `train`, and `new`, which training never shows."""
    words = sorted({word for _, word, *_ in wordnet_entries() if re.fullmatch(r"[a-z]{3,9}", word)})
    new = set(random.Random(f"{SEED} words").sample(words, round(len(words) * HELD_OUT_WORDS)))
    return {"train": [word for word in words if word not in new], "new": sorted(new)}


def in_case(words: list[str], face: Face, rng: random.Random) -> list[str]:
    """The words as small letters, capitals or with a capital in front."""
    change = str.upper if face.one_case else rng.choice((str.lower, str.lower, str.title, str.upper))
    return [change(word) for word in words]


def in_lines(words: list[str], rng: random.Random) -> str:
    """The words on one line or one below the other."""
    return ("\n" if len(" ".join(words)) > 9 or rng.random() < 0.3 else " ").join(words)


def word_cut_out(text: str, face: Face, rng: random.Random) -> Image.Image:
    """A text in one colour."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(face.path, FONT_SIZE)
    box = ImageDraw.Draw(Image.new("L", (1, 1))).multiline_textbbox((0, 0), text, font, align="center")
    picture = Image.new("RGBA", (round(box[2] - box[0]) + 8, round(box[3] - box[1]) + 8), (*random_colour(rng), 0))
    mask = Image.new("L", picture.size)
    ImageDraw.Draw(mask).multiline_text((4 - box[0], 4 - box[1]), text, 255, font, align="center")
    picture.putalpha(mask)
    return picture


def word_picture(
    text: str, face: Face, rng: random.Random, sizes: tuple[int, int] = (TEXT_WIDTH, SIDE - 6)
) -> Image.Image:
    """A text at random size (its longer side, in pixels), place and slight rotation; a long one fills the picture."""
    cut_out = word_cut_out(text, face, rng)
    lines = max(1, round(cut_out.height / FONT_SIZE))
    least = LETTER_HEIGHT * lines * max(cut_out.size) // cut_out.height
    turned = jitter(cut_out, rng.randint(min(sizes[1], max(least, sizes[0])), sizes[1]), rng, angle=7)
    scene = contrasting_background([turned], rng, strokes=True)
    place(scene, turned, rng)
    return scene


def short_rows(share: float) -> Iterator[dict[str, Any]]:
    """One to three letters as large as those of words are: CTC finds out from them what a letter is."""
    rng = random.Random(f"{SEED} letters")
    faces = balanced(family_split()["train"])
    for serial in with_progress(list(range(round(ROWS["letters"] * share))), "letters"):
        face, count = rng.choice(faces), rng.choice((1, 1, 2, 3))
        text = in_case(["".join(rng.choices(string.ascii_lowercase, k=count))], face, rng)[0]
        side = round(LETTER_HEIGHT * (SIDE / LETTER_HEIGHT) ** rng.uniform(0.1, 0.95))
        scene = word_picture(text, face, rng, (side, side))
        path = save_scene(scene, DATA / f"pictures/words/letters/{serial:05d}")
        yield chat_row("words", text.lower(), rng.choice(WORD_PROMPTS), images=[str(path.relative_to(DATA))])


def draw(split: str, faces: list[Face], words: list[str], rng: random.Random, serial: int) -> tuple[str, Face, Path]:
    """Draw one picture of one to three words; returns (its lines, face, file)."""
    face = rng.choice(faces)
    chosen = in_case([rng.choice(words) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))], face, rng)
    text = in_lines(chosen, rng)
    path = save_scene(word_picture(text, face, rng), DATA / f"pictures/words/{split}/{serial:05d}")
    return text, face, path


def balanced(faces: list[Face]) -> list[Face]:
    """One face of each family as often as of any other: the files of a family are repeated to equal numbers."""
    by_family: dict[str, list[Face]] = {}
    for face in faces:
        by_family.setdefault(face.family, []).append(face)
    most = max(map(len, by_family.values()))
    return [of[index % len(of)] for of in by_family.values() for index in range(most)]


def train_rows(share: float) -> Iterator[dict[str, Any]]:
    """Training words in training faces."""
    rng = random.Random(SEED)
    faces, words = balanced(family_split()["train"]), word_split()["train"]
    for serial in with_progress(list(range(round(ROWS["train"] * share))), "words"):
        text, _, path = draw("train", faces, words, rng, serial)
        yield chat_row("words", text.lower(), rng.choice(WORD_PROMPTS), images=[str(path.relative_to(DATA))])


def test_rows(task: str, share: float) -> Iterator[dict[str, Any]]:
    """Words in held-out faces; a part of them are words that training never shows."""
    rng = random.Random(f"{SEED} {task}")
    faces, words = balanced(family_split()[task]), word_split()
    count = round(ROWS[task] * share)
    for serial in with_progress(list(range(count)), task):
        part = "new" if serial < count * NEW_WORDS else "train"
        text, face, path = draw(task, faces, words[part], rng, serial)
        yield eval_row(task, WORD_PROMPTS[0], path, [" ".join(text.split())], "exact", font=face.family)


def main() -> None:
    """Write the held-out splits, then the training rows."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    for task in ("words_plain", "words_display"):
        write_jsonl(EVAL / f"{task}.jsonl", test_rows(task, share))
    write_jsonl(DATA / "words.jsonl", train_rows(share))
    write_jsonl(DATA / "letters.jsonl", short_rows(share))


if __name__ == "__main__":
    run_main(main)

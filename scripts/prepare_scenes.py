"""Write the scene rows: several things in a picture; how many, which colour, what is where, is there a dog?

Run: python scripts/prepare_scenes.py [SHARE]     (after scripts/fetch.py; SHARE, 0 to 1, writes a sample)
Pictures go to build/data/pictures/scenes/, rows to build/data/scenes.jsonl and build/data/eval/.
Training scenes are made of emoji in the training styles, the held-out ones of the same things in the held-out style.
Scenes of emoji in all styles but that one go to build/data/scene_names.jsonl with the names of all that they show, a
line each, and to build/data/scene_there.jsonl with questions whether something is there.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import DATA, EVAL, SEED, chat_row, run_main, with_progress, write_jsonl
from picture_files import (
    Box,
    Colour,
    contrasting_background,
    distance,
    eval_row,
    grid,
    jitter,
    place,
    save_scene,
)
from picture_things import HELD_OUT_STYLE, MORE_STYLES, TRAIN_STYLES, emoji, emoji_split, plain_name

if TYPE_CHECKING:
    from PIL import Image

TRAIN_ROWS, NAMED_SCENES, TEST_SCENES, TEST_YES_NO = 6000, 3000, 450, 300
NAMED_PROMPT, QUESTIONS_EACH = "Which things do you see?", 6
MOST = 6
"""Things that are counted."""
FILL = (0.6, 0.95)
"""Longer side of a thing, as a share of its cell."""
SHAPE_SIDE = 160
GROUPS = (
    "cat dog elephant giraffe horse kangaroo camel monkey pig rabbit tiger zebra cow fox panda koala hedgehog",
    "owl duck flamingo penguin rooster swan turkey eagle peacock parrot",
    "bee butterfly crab dolphin fish frog octopus snail snake spider squid turtle whale shark scorpion",
    "banana cherries grapes lemon pineapple strawberry watermelon avocado carrot broccoli tomato mushroom pear mango",
    "hamburger pizza pretzel croissant doughnut cookie popcorn pancakes sandwich taco waffle egg cupcake",
    "airplane ambulance bicycle bus helicopter motorcycle rocket sailboat tractor taxi train canoe",
    "backpack bell book camera candle chair guitar hammer key ladder pencil scissors telephone umbrella violin broom",
    "anchor balloon basketball castle cloud fire house kite snowman star sun tent trophy volcano rainbow",
)
"""Clear things by likeness: what a "no" asks for comes from the group of something that is there."""
ICONS = {
    "airplane": "small-airplane",
    "bee": "honeybee",
    "book": "closed-book",
    "train": "locomotive",
}
"""Things whose icon has another name."""
SEVERAL = ("cherries", "grapes", "popcorn", "pancakes", "scissors", "broccoli")
"""Names of several things or of stuff: no article, and not counted."""
UNCOUNTED = (*SEVERAL, "fire", "fish", "squid", "rainbow")
COLOURS: dict[str, Colour] = {
    "red": (220, 30, 35),
    "orange": (250, 145, 20),
    "yellow": (250, 225, 40),
    "green": (40, 160, 60),
    "blue": (35, 80, 215),
    "purple": (130, 45, 175),
    "pink": (250, 150, 190),
    "brown": (120, 72, 35),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
    "grey": (135, 135, 135),
}
COLOUR_JITTER = 14
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
Question = tuple[str, str, "Image.Image"]
"""Question, answer and scene."""


def scene_things() -> dict[str, tuple[int, str]]:
    """Name -> group and icon of the things of GROUPS whose names training shows."""
    train = set(emoji_split()["train"])
    icons = {name: (index, ICONS.get(name, name)) for index, names in enumerate(GROUPS) for name in names.split()}
    return {name: (group, icon) for name, (group, icon) in icons.items() if icon in train}


def plural(name: str) -> str:
    """Several of a thing: "foxes", "butterflies", "snowmen"."""
    if name.endswith("y") and name[-2] not in "aeiou":
        return f"{name[:-1]}ies"
    if name.endswith("man"):
        return f"{name[:-3]}men"
    if name.endswith(("s", "x", "ch", "sh", "mango", "tomato", "volcano")):
        return f"{name}es"
    return f"{name}s"


def one(name: str) -> str:
    """A thing with its article; names of several things have none."""
    if name in SEVERAL:
        return name
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def there_question(name: str) -> str:
    """Whether there is one, or are several, of a name."""
    return f"{'Are' if name in SEVERAL and name.endswith('s') else 'Is'} there {one(name)}?"


def star(side: int) -> list[tuple[float, float]]:
    """The ten corners of a five-pointed star in a square of this side."""
    corners = []
    for index in range(10):
        radius, turn = side * (0.2 if index % 2 else 0.5), math.pi * index / 5
        corners.append((side / 2 + radius * math.sin(turn), side / 2 - radius * math.cos(turn)))
    return corners


def draw_shape(shape: str, colour: Colour) -> Image.Image:
    """A cut-out of one shape in one colour, drawn large for smooth edges."""
    from PIL import Image, ImageDraw

    side = SHAPE_SIDE
    picture = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(picture)
    third, half = side // 3, side // 2
    outlines = {
        "square": [(0, 0), (side, 0), (side, side), (0, side)],
        "triangle": [(half, 0), (side, side), (0, side)],
        "diamond": [(half, 0), (side, half), (half, side), (0, half)],
        "star": star(side),
    }
    if shape in outlines:
        draw.polygon(outlines[shape], fill=colour)
    elif shape == "circle":
        draw.ellipse((0, 0, side - 1, side - 1), fill=colour)
    elif shape == "ring":
        draw.ellipse((0, 0, side - 1, side - 1), outline=colour, width=side // 6)
    elif shape == "cross":
        draw.rectangle((third, 0, side - third, side), fill=colour)
        draw.rectangle((0, third, side, side - third), fill=colour)
    else:  # the heart: two lobes on a point
        draw.pieslice((0, 0, half + 5, half + 5), 135, 45, fill=colour)
        draw.pieslice((half - 5, 0, side, half + 5), 135, 45, fill=colour)
        draw.polygon([(8, 58), (side - 8, 58), (half, side - 4)], fill=colour)
    return picture


def compose(cut_outs: list[Image.Image], cells: list[Box], rng: random.Random) -> Image.Image:
    """A scene with each cut-out somewhere in its own cell."""
    fitted = [
        jitter(cut_out, round(rng.uniform(*FILL) * min(cell[2] - cell[0], cell[3] - cell[1])), rng)
        for cut_out, cell in zip(cut_outs, cells, strict=True)
    ]
    scene = contrasting_background(fitted, rng)
    for cut_out, cell in zip(fitted, cells, strict=True):
        place(scene, cut_out, rng, cell)
    return scene


def spots(count: int, rng: random.Random) -> list[Box]:
    """Cells for so many things, in no order."""
    sizes = [(2, 2), (3, 2), (2, 3), (3, 3)]
    columns, rows = rng.choice([size for size in sizes if size[0] * size[1] >= count])
    return rng.sample(grid(columns, rows), count)


class Scenes:
    """Draws questions about scenes from the things of some styles."""

    def __init__(self, styles: tuple[str, ...], rng: random.Random) -> None:
        self.styles, self.rng, self.things = styles, rng, scene_things()

    def picture(self, name: str) -> Image.Image:
        """A cut-out of a thing in one of the styles that have it."""
        return self.rng.choice(emoji([self.things[name][1]], self.styles)).picture()

    def names(self, count: int, but: str = "") -> list[str]:
        """Different things, none of them `but`."""
        return self.rng.sample([name for name in self.things if name != but], count)

    def how_many(self) -> Question:
        """One to MOST of a thing among up to two others."""
        name = self.rng.choice([name for name in self.things if name not in UNCOUNTED])
        count = self.rng.randint(1, MOST)
        shown = [name] * count + self.names(self.rng.randint(0, 2), name)
        scene = compose([self.picture(name) for name in shown], spots(len(shown), self.rng), self.rng)
        return f"How many {plural(name)} are there?", str(count), scene

    def colour(self) -> Question:
        """The colour of one of up to three shapes, or the shape of a colour."""
        count = self.rng.randint(1, 3)
        shapes, colours = self.rng.sample(SHAPES, count), self.rng.sample(sorted(COLOURS), count)
        cut_outs = [draw_shape(*pair) for pair in zip(shapes, map(self.shade, colours), strict=True)]
        scene = compose(cut_outs, spots(count, self.rng), self.rng)
        if self.rng.random() < 0.3:
            return f"Which shape is {colours[0]}?", shapes[0], scene
        return f"What colour is the {shapes[0]}?", colours[0], scene

    def shade(self, colour: str) -> Colour:
        """A shade of a named colour that is nearest to that name."""
        while True:
            red, green, blue = (part + self.rng.randint(-COLOUR_JITTER, COLOUR_JITTER) for part in COLOURS[colour])
            shade = tuple(min(255, max(0, part)) for part in (red, green, blue))
            if min(COLOURS, key=lambda name: distance(COLOURS[name], shade)) == colour:
                return shade

    def where(self) -> Question:
        """Two things, side by side or one above the other: which is where?"""
        first, second = self.names(2)
        across = self.rng.random() < 0.6
        near, far = ("left", "right") if across else ("top", "bottom")
        scene = compose([self.picture(first), self.picture(second)], grid(*((2, 1) if across else (1, 2))), self.rng)
        side, name, other = self.rng.choice([(near, first, second), (far, second, first)])
        if self.rng.random() < 0.5:
            return f"What is {'on' if across else 'at'} the {side}?", name, scene
        if across:
            return f"Is the {name} left or right of the {other}?", side, scene
        return f"Is the {name} above or below the {other}?", "above" if side == "top" else "below", scene

    def is_there(self, yes: bool) -> Question:
        """One to four things; a "no" asks for one that isn't there, out of the group of one that is."""
        shown = self.names(self.rng.randint(1, 4))
        question = there_question(self.asked_for(shown, yes))
        scene = compose([self.picture(name) for name in shown], spots(len(shown), self.rng), self.rng)
        return question, "yes" if yes else "no", scene

    def asked_for(self, shown: list[str], yes: bool) -> str:
        """One of these things, or one that is not there, out of the group of one that is."""
        asked = self.rng.choice(shown)
        if yes:
            return asked
        group = self.things[asked][0]
        return self.rng.choice([n for n, (of, _) in self.things.items() if of == group and n not in shown])

    def kinds(self) -> list[Callable[[], Question]]:
        """The questions whose answers are words and numbers."""
        return [self.how_many, self.colour, self.where]


def saved(scene: Image.Image, split: str, serial: int) -> Path:
    """Write a scene of a split."""
    return save_scene(scene, DATA / f"pictures/scenes/{split}/{serial:05d}")


def train_rows(share: float) -> Iterator[dict[str, Any]]:
    """Training scenes: each kind of question as often as the others, as many yes as no."""
    scenes = Scenes(TRAIN_STYLES, random.Random(SEED))
    kinds = scenes.kinds()
    for serial in with_progress(list(range(round(TRAIN_ROWS * share))), "scenes"):
        turn = serial % (len(kinds) + 1)
        asked = kinds[turn]() if turn < len(kinds) else scenes.is_there(serial // (len(kinds) + 1) % 2 == 0)
        question, answer, scene = asked
        path = saved(scene, "train", serial)
        yield chat_row("scenes", answer, question, images=[str(path.relative_to(DATA))])


def named_rows(share: float) -> Iterator[dict[str, Any]]:
    """Scenes with the names of all that they show, a line each; every other one has only [`scene_things`]."""
    rng = random.Random(f"{SEED} named")
    scenes, every = Scenes((*TRAIN_STYLES, *MORE_STYLES), rng), emoji_split()["train"]
    for serial in with_progress(list(range(round(NAMED_SCENES * share))), "named scenes"):
        count = rng.randint(1, 4)
        icons = (
            [scenes.things[name][1] for name in scenes.names(count)] if serial % 2 == 0 else rng.sample(every, count)
        )
        cut_outs = [rng.choice(emoji([icon], scenes.styles)).picture() for icon in icons]
        path = saved(compose(cut_outs, spots(count, rng), rng), "named", serial)
        names = "\n".join(map(plain_name, icons))
        yield chat_row("scene_names", names, NAMED_PROMPT, images=[str(path.relative_to(DATA))])


def there_rows(named: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """QUESTIONS_EACH questions about each of these rows' scenes, in two wordings, half of them about what is there."""
    rng = random.Random(f"{SEED} there")
    scenes, every = Scenes(TRAIN_STYLES, rng), [plain_name(name) for name in emoji_split()["train"]]
    known = {plain_name(icon): name for name, (_, icon) in scenes.things.items()}
    rows = []
    for row in named:
        (picture, _), shown = row["messages"][0]["content"], row["messages"][1]["content"].split("\n")
        for index in range(QUESTIONS_EACH):
            yes = index % 2 == 0
            if all(name in known for name in shown):
                asked = scenes.asked_for([known[name] for name in shown], yes)
            else:
                asked = rng.choice(shown) if yes else rng.choice([name for name in every if name not in shown])
            question = f"Is this in the picture: {asked}?" if index % 3 == 2 else there_question(asked)
            rows.append(chat_row("scene_there", "yes" if yes else "no", question, images=[picture["path"]]))
    rng.shuffle(rows)
    return rows


def test_rows(task: str, count: int) -> Iterator[dict[str, Any]]:
    """Held-out scenes of things drawn in a style that training never shows."""
    scenes = Scenes((HELD_OUT_STYLE,), random.Random(f"{SEED} {task}"))
    kinds = scenes.kinds()
    for serial in with_progress(list(range(count)), task):
        yes_no = task == "scene_yes_no"
        question, answer, scene = scenes.is_there(serial % 2 == 0) if yes_no else kinds[serial % len(kinds)]()
        path = saved(scene, task, serial)
        yield eval_row(task, question, path, [answer], "yes_no" if yes_no else "exact")


def main() -> None:
    """Write the held-out splits, then the training rows."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    write_jsonl(EVAL / "scenes.jsonl", test_rows("scenes", round(TEST_SCENES * share)))
    write_jsonl(EVAL / "scene_yes_no.jsonl", test_rows("scene_yes_no", round(TEST_YES_NO * share)))
    write_jsonl(DATA / "scenes.jsonl", train_rows(share))
    named = list(named_rows(share))
    write_jsonl(DATA / "scene_names.jsonl", named)
    write_jsonl(DATA / "scene_there.jsonl", there_rows(named))


if __name__ == "__main__":
    run_main(main)

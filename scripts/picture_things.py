"""The cut-outs that the picture scripts name and compose, and which of them are held out.

Stamps have captions, emoji have names and come in several styles, clip art lies in folders of one kind.
No sound of the stamps' package is ever opened: its spoken captions are left for tests.
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import SEED, package
from picture_files import draw_svg, trimmed

if TYPE_CHECKING:
    from PIL import Image

HELD_OUT_STAMPS, HELD_OUT_EMOJI, HELD_OUT_CLIP_ART = 150, 300, 300
MOST_DRAWINGS = 8
"""Of one name."""
TRAIN_STYLES = ("noto", "fluent-emoji", "fluent-emoji-flat")
HELD_OUT_STYLE = "twemoji"
MORE_STYLES = ("emojione", "emojione-v1", "fxemoji", "noto-v1", "openmoji")
"""Icon sets that lack a part of the names: for training too."""
ICON_SETS = (*TRAIN_STYLES, *MORE_STYLES, HELD_OUT_STYLE)
MOST_PIXELS = 20_000_000
"""Of a drawing."""
STAMPS = "usr/share/tuxpaint/stamps"
CLIP_ART = "usr/share/openclipart/png"
KINDS = {
    "animals": "an animal",
    "food": "food",
    "plants": "a plant",
    "people": "a person",
    "people/clothing": "clothes",
    "transportation/vehicles": "a vehicle",
    "transportation/boating": "a ship",
    "transportation/roadsigns": "a road sign",
    "buildings": "a building",
    "tools": "a tool",
    "recreation/music": "music",
    "animals/fantasy": None,
    "buildings/furniture": None,
    "people/bodypart": None,
    "people/smilies": None,
    "recreation/music/CD_Player": None,
    "tools/toys": None,
    "tools/weapons": None,
}
"""Folder of the clip art -> what the drawings in it and below it are; those of None are of any kind."""
CLIP_ART_KINDS = [kind for kind in KINDS.values() if kind is not None]
UNSEEN = re.compile(
    r"keycap-|japanese-.*button|blood-type|-(oclock|thirty)$|-facing-right$|^(man|woman|people)-|^(left|right)wards-"
    r"|(medium|small|large)-.*(square|diamond)|^wa[xn]ing-|-quarter-moon|^globe-showing|^input-"
    r"|^speaker-(low|medium)|^sun-behind-(large|small)|^pregnant-(man|person)|-with-yen$|^(middle-finger|love-hotel|mx-claus)$"
)
"""Emoji whose names a look at the picture can't tell apart, or that aren't for this model."""
KEEP_HYPHEN = ("t-shirt", "t-rex", "x-ray", "yo-yo", "e-mail", "jack-o-lantern")
EXPLAINS = "is|are|was|has|for|that|to|like|used|worn|lets|means|carries|pushes|covered|resembles|hatched|as"
"""Words that end the naming part of a caption."""
BEHIND = "of|with|in|inside|on|at|from|by|making|eating|playing|dancing"
"""Words that stand behind the noun of a caption."""
MEASURES = "pair|bunch|cluster|cup|glass|head|string|tube|quarter|couple|baby|model|plant"


@dataclass(frozen=True)
class Thing:
    """A cut-out and what it is called."""

    name: str
    """The answer."""
    subject: str
    """What the splits go by: all things of one subject lie on one side."""
    style: str
    """The icon set, `stamp` or `clip art`."""
    source: str
    """The icon's name, or the file."""

    def picture(self) -> Image.Image:
        """The cut-out, RGBA without its empty border; ValueError where it shows nothing."""
        from PIL import Image

        path = Path(self.source)
        if self.style not in ICON_SETS and path.suffix == ".png":
            return trimmed(Image.open(path))
        return draw_svg(path.read_text() if path.suffix == ".svg" else icon_svg(self.style, self.source))


@functools.cache
def icon_set(style: str) -> dict[str, Any]:
    """An icon set as its package has it: `icons` by name, and the size of their canvas."""
    icons: dict[str, Any] = json.loads((package(f"@iconify-json/{style}") / "package/icons.json").read_text())
    return icons


def icon_svg(style: str, name: str) -> str:
    """One icon as an SVG file."""
    icons = icon_set(style)
    icon = icons["icons"][name]
    width, height = icon.get("width", icons["width"]), icon.get("height", icons["height"])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="0 0 {width} '
    return f'{head}{height}" width="{width}" height="{height}">{icon["body"]}</svg>'


def emoji_names() -> list[str]:
    """Icon names that all four styles have and that a picture can tell."""
    shared = set.intersection(*(set(icon_set(style)["icons"]) for style in (*TRAIN_STYLES, HELD_OUT_STYLE)))
    return sorted(name for name in shared if not UNSEEN.search(name))


def plain_name(icon: str) -> str:
    """An icon's name as one says it: "womans-boot" is "woman's boot"."""
    if icon in KEEP_HYPHEN:
        return icon
    return re.sub(r"\b(man|woman|men|women)s\b", r"\1's", icon.replace("-", " "))


def emoji_split() -> dict[str, list[str]]:
    """Icon names: `train`, and `new`, which no style is trained on."""
    names = emoji_names()
    new = set(random.Random(f"{SEED} emoji").sample(names, HELD_OUT_EMOJI))
    return {"train": [name for name in names if name not in new], "new": sorted(new)}


def icon_in(style: str, name: str) -> str | None:
    """What a style calls the icon of this name, which it may write without hyphens; None where it has none."""
    return next((icon for icon in (name, name.replace("-", "")) if icon in icon_set(style)["icons"]), None)


def emoji(names: list[str], styles: tuple[str, ...]) -> list[Thing]:
    """The things of these icon names in those of these styles that have them."""
    found = [(name, style, icon_in(style, name)) for name in names for style in styles]
    return [Thing(plain_name(name), name, style, icon) for name, style, icon in found if icon is not None]


def stamp_caption(text: str) -> str | None:
    """The part of a stamp's first line that names it, "A pink flamingo."; None for slogans and explanations."""
    text = re.sub(r"\s*\(.*?\)", "", text).replace("’", "'")
    text = re.sub(r"[“”]|(?<!\w)'|'(?![\w-])", "", text)
    text = re.split(r"(?<=[.!?])\s|\s*[—–]|,(?= (?:from|also|sliced))| - ", text.strip())[0].strip()
    if re.match(r"(An?|The|Some|Two|Our) (?!important)", text):
        text = re.split(rf" (?:{EXPLAINS})\b", text)[0]
    elif text.endswith("!") or len(text.split()) > 2 or re.match(r"(It's|Another|Left|Right|Say|Eat)\b", text):
        return None
    text = text.rstrip(".!? ")
    return f"{text[:1].upper()}{text[1:]}." if re.fullmatch(r"[A-Za-z,' -]{3,40}", text) else None


def bare(caption: str) -> str:
    """A caption without its article and stop."""
    return re.sub(r"^(An?|The|Some|Two|Our) ", "", caption.rstrip("."))


def noun(caption: str) -> str:
    """The noun that a caption is about: "A white kitten." gives "kitten", "A pair of blue jeans." "jeans"."""
    words = re.sub(rf"^(.* )?({MEASURES})s? of (the |an? )?", "", bare(caption).lower())
    return re.split(rf" (?:{BEHIND})\b", words)[0].split()[-1].removesuffix("'s")


def subject(caption: str) -> str:
    """The same of one: "jean"."""
    return re.sub(r"(?<=[^s])s$", "", noun(caption))


def stamps() -> list[Thing]:
    """Every stamp whose caption names it; letters, digits, money and flags are left out."""
    root, found = package("tuxpaint-stamps-default") / STAMPS, []
    for text in sorted(root.rglob("*.txt")):
        folder = str(text.parent.relative_to(root))
        caption = stamp_caption(text.read_text(encoding="utf-8").split("\n", 1)[0])
        if caption is None or (folder.startswith("symbols") and folder != "symbols/shapes"):
            continue
        picture = next((p for p in (text.with_suffix(".png"), text.with_suffix(".svg")) if p.is_file()), None)
        if picture is not None:
            found.append(Thing(caption, subject(caption), "stamp", str(picture)))
    return found


def stamp_split() -> dict[str, list[Thing]]:
    """Stamps by split: whole subjects are held out until HELD_OUT_STAMPS are."""
    splits: dict[str, list[Thing]] = {"train": [], "test": []}
    found = stamps()
    subjects = sorted({stamp.subject for stamp in found})
    random.Random(f"{SEED} stamps").shuffle(subjects)
    for name in subjects:
        of_subject = [stamp for stamp in found if stamp.subject == name]
        fits = len(splits["test"]) + len(of_subject) <= HELD_OUT_STAMPS
        splits["test" if fits else "train"] += of_subject
    return splits


def pixels_of(path: Path) -> int:
    """How many a PNG file has, by its header."""
    with path.open("rb") as stream:
        return math.prod(struct.unpack(">II", stream.read(24)[16:]))


def clip_art() -> list[Thing]:
    """The drawings that lie in folders of one kind; drawings that differ by number or colour are one subject.

    A few are larger than posters and take minutes each; they are left out.
    """
    root = package("openclipart-png") / CLIP_ART
    kinds: dict[Path, set[str | None]] = {}
    for folder in sorted(KINDS, key=len):
        for path in (root / folder).rglob("*.png"):
            within = max((f for f in KINDS if path.is_relative_to(root / f)), key=len)
            kinds.setdefault(path.resolve(), set()).add(KINDS[within])  # a link files a drawing under two folders
    found = []
    for path, (kind, *others) in sorted((path, sorted(map(str, of))) for path, of in kinds.items()):
        if kind in KINDS.values() and not others and pixels_of(path) <= MOST_PIXELS:
            drawing = re.sub(r"(_(bw|r|s|colou?r|black|white|red|blue|green|simple|\d+))+_*$", "", path.stem)
            found.append(Thing(kind, f"{kind} {drawing.rstrip('_0123456789')}", "clip art", str(path)))
    return found


def clip_art_split() -> dict[str, list[Thing]]:
    """Clip art by split, about as many held out of each kind; the drawings of a subject stay together."""
    splits: dict[str, list[Thing]] = {"train": [], "test": []}
    found = clip_art()
    for kind in CLIP_ART_KINDS:
        subjects = sorted({drawing.subject for drawing in found if drawing.name == kind})
        random.Random(f"{SEED} {kind}").shuffle(subjects)
        of_kind = sum(drawing.name == kind for drawing in found)
        held, wanted = 0, min(HELD_OUT_CLIP_ART // len(CLIP_ART_KINDS), of_kind // 4)
        for name in subjects:
            of_subject = [drawing for drawing in found if drawing.subject == name]
            fits = held + len(of_subject) <= wanted
            held += len(of_subject) * fits
            splits["test" if fits else "train"] += of_subject
    return splits


def named_drawings(names: Collection[str]) -> list[Thing]:
    """The drawings whose files begin with one of these names, as the longest says; none that is held out."""
    root = package("openclipart-png") / CLIP_ART
    held_out = {drawing.source for drawing in clip_art_split()["test"]}
    found: dict[str, list[Thing]] = {}
    for path in sorted(root.rglob("*.png")):
        if path.is_symlink() or str(path.resolve()) in held_out or pixels_of(path) > MOST_PIXELS:
            continue
        words = re.sub(r"[^a-z]+", " ", path.stem.lower()).split()
        beginnings = [" ".join(words[:count]) for count in range(len(words), 0, -1)]
        if name := next((each for each in beginnings if each in names), None):
            found.setdefault(name, []).append(Thing(name, name, "clip art", str(path)))
    rng = random.Random(f"{SEED} drawings")
    return [
        drawing for name in sorted(found) for drawing in rng.sample(found[name], min(MOST_DRAWINGS, len(found[name])))
    ]

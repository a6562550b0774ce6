"""Reading the archive of the voiced adventure game: which clip says what, by whom, and the clip's MP3 bytes.

The file is a table of names over one block of bytes; all numbers are big-endian. Three kinds of text name their clips:
dialogues (*.DOG, a file a character), cut-scenes (*.CUT) and the hero's remarks (QUEEN2.JAS).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"QTBL"
HEADER = struct.Struct(">4s6s2sBH")
"""Magic, version, flags, compression, number of entries."""
ENTRY = struct.Struct(">12sBII")
"""Name, bundle, offset, size."""
MP3 = 1
PREFIX = 20
"""Bytes in front of a dialogue or a cut-scene."""
DIALOGUE_HEAD, LEVEL = 32, 96
HERO = "JOE"
REMARKS = "QUEEN2.JAS"
LATE_REMARKS, FIRST_LATE_LINE = 40, 1186
"""Remarks up to this number lie from this line on; the later ones start at the top of the file."""
COMMAND = re.compile(r"\*XY.{11}|\*[A-Z0-9]{2}", re.DOTALL)


@dataclass(frozen=True)
class Line:
    """What one clip says."""

    clip: str
    """Name of the clip, without its ending."""
    source: str
    """The file that holds the text, such as SPARKY6.DOG."""
    speaker: str
    """A character (SPARKY, in all of his dialogues), JOE, or a cut-scene (C101E), where nothing tells who speaks."""
    text: str


class GameArchive:
    """The table of the archive, and the texts and clips in it. ValueError where the file is not what it should be."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._bytes = path.read_bytes()
        self._table = self._read_table()
        self.clips = sorted(name[:-3] for name in self._table if name.endswith(".SB"))

    def _read_table(self) -> dict[str, tuple[int, int]]:
        """File name -> offset and size."""
        if len(self._bytes) < HEADER.size or not self._bytes.startswith(MAGIC):
            raise ValueError(
                f"{self.name}: not the game's archive: starts with {self._bytes[:4]!r}, expected {MAGIC!r}"
            )
        *_, compression, count = HEADER.unpack_from(self._bytes)
        if compression != MP3:
            raise ValueError(f"{self.name}: compression {compression}, expected {MP3} (MP3)")
        end = HEADER.size + count * ENTRY.size
        if end > len(self._bytes):
            raise ValueError(f"{self.name}: {len(self._bytes)} bytes, but its table of {count} entries ends at {end}")
        table = {}
        for name, _, offset, size in ENTRY.iter_unpack(self._bytes[HEADER.size : end]):
            name = name.rstrip(b"\0 ").decode("ascii", errors="replace")
            if offset + size > len(self._bytes):
                raise ValueError(f"{self.name}: {name} ends at {offset + size}, the file at {len(self._bytes)}")
            table[name] = (offset, size)
        return table

    def read(self, name: str) -> bytes:
        """The bytes of one file."""
        if name not in self._table:
            raise ValueError(f"{self.name}: no file {name!r}")
        offset, size = self._table[name]
        return self._bytes[offset : offset + size]

    def clip(self, line: Line) -> bytes:
        """The MP3 bytes that speak a line."""
        return self.read(f"{line.clip}.SB")

    def lines(self) -> list[Line]:
        """One line for each clip whose text is found, sorted by the clip's name."""
        found: dict[str, Line] = {}
        for source in sorted(self._table):
            for speaker, base, text in self._texts(source):
                for number, segment in enumerate(segments(text), start=1):
                    clip = f"{base}{number:X}"
                    if f"{clip}.SB" in self._table:
                        found.setdefault(clip, Line(clip, source, speaker, segment))
        return [found[clip] for clip in sorted(found)]

    def _texts(self, source: str) -> Iterator[tuple[str, str, str]]:
        """Speaker, first part of the clips' names and text of each string in a file."""
        stem, _, kind = source.partition(".")
        try:
            if kind == "DOG":
                yield from dialogue_texts(stem, self.read(source)[PREFIX:])
            elif kind == "CUT":
                yield from scene_texts(stem, self.read(source)[PREFIX:])
            elif source == REMARKS:
                yield from remark_texts(self.read(source))
        except (struct.error, IndexError) as error:
            raise ValueError(f"{self.name}: {source} ends early: a string or table runs past its end") from error


def segments(text: str) -> list[str]:
    """The parts between the stage commands (*03, *FL, *XY...); each is one clip."""
    return [part.strip() for part in COMMAND.split(text)]


def read_string(data: bytes, at: int, align: int) -> tuple[str, int]:
    """The string at a place (a length byte and as many letters), and the place behind its padding.

    An empty string takes one byte; others are padded so that the next thing lies at a multiple of align.
    """
    size = data[at]
    end = at + 1 + size
    if end > len(data):
        raise IndexError(at)
    text = data[at + 1 : end].decode("cp437")
    return text, end + -end % align if size else end


def dialogue_texts(stem: str, data: bytes) -> Iterator[tuple[str, str, str]]:
    """The hero's and the character's sentences of one dialogue, and the greetings at first and later meetings."""
    levels, _, key, hero_count, person_count = struct.unpack_from(">5h", data)
    person_at, _, greetings_at = struct.unpack_from(">3H", data, 22)
    person = stem.rstrip("0123456789")
    sides = ((HERO, "J", DIALOGUE_HEAD + LEVEL * abs(levels), hero_count), (person, "P", person_at, person_count))
    for speaker, letter, at, count in sides:
        for _ in range(count):
            (number,) = struct.unpack_from(">2xh", data, at)
            text, at = read_string(data, at + 4, align=4)
            first_meeting = number == 0 and speaker == HERO
            yield speaker, f"{key:02d}{'SSSS' if first_meeting else f'{number:04X}'}{letter}", text
    greeting, at = read_string(data, greetings_at, align=2)
    yield person, f"{key:02d}XXXXP", greeting
    yield HERO, f"{key:02d}XXXXJ", read_string(data, at, align=2)[0]


def scene_texts(stem: str, data: bytes) -> Iterator[tuple[str, str, str]]:
    """What is said in one cut-scene."""
    (count,) = struct.unpack_from(">h", data, 2)
    (at,) = struct.unpack_from(">H", data, 8)
    _, at = read_string(data, at, align=2)
    for number in range(1, abs(count) + 1):
        text, at = read_string(data, at, align=2)
        yield stem, f"{stem:_<5}{number:02d}", text


def remark_texts(data: bytes) -> Iterator[tuple[str, str, str]]:
    """The hero's remarks on things, one a line."""
    lines = data.decode("cp437").split("\r\n")
    for index, text in enumerate(lines):
        late = FIRST_LATE_LINE <= index <= FIRST_LATE_LINE + LATE_REMARKS
        number = index - FIRST_LATE_LINE if late else index + LATE_REMARKS + 1
        yield HERO, f"JOE{number:04d}", text

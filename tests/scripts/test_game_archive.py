"""The game's archive, read from small ones laid out by hand, byte by byte."""

import struct
from pathlib import Path

import pytest
from game_archive import GameArchive, Line, read_string, remark_texts, segments

PREFIX = b"AmBk" + bytes(16)


def string(text: str, at: int, align: int) -> bytes:
    """A length byte, the letters and the padding of a string that lies at a place; nothing but the byte if empty."""
    packed = bytes([len(text)]) + text.encode("ascii")
    return packed + bytes(-(at + len(packed)) % align) if text else packed


def dialogue(key: int, hero: dict[int, str], person: dict[int, str], greetings: tuple[str, str]) -> bytes:
    """A dialogue of one level."""
    body = bytearray(32 + 96)
    starts = []
    for side in (hero, person):
        starts.append(len(body))
        for number, text in side.items():
            body += struct.pack(">2xh", number)
            body += string(text, len(body), 4)
    starts.append(len(body))
    for text in greetings:
        body += string(text, len(body), 2)
    struct.pack_into(">5h", body, 0, -1, key, key, len(hero), len(person))
    struct.pack_into(">H", body, 22, starts[1])
    struct.pack_into(">H", body, 26, starts[2])
    return PREFIX + bytes(body)


def scene(entry: str, texts: list[str]) -> bytes:
    """A cut-scene with an object for each text."""
    body = bytearray(10)
    for text in (entry, *texts):
        body += string(text, len(body), 2)
    struct.pack_into(">h", body, 2, -len(texts))
    struct.pack_into(">H", body, 8, 10)
    return PREFIX + bytes(body)


def pack(files: dict[str, bytes], compression: int = 1) -> bytes:
    """The whole archive."""
    table, at = b"", 15 + 21 * len(files)
    for name, content in files.items():
        table += name.encode("ascii").ljust(12, b"\0") + struct.pack(">BII", 1, at, len(content))
        at += len(content)
    head = b"QTBL" + b"CEM10\0" + b"\0\0" + struct.pack(">BH", compression, len(files))
    return head + table + b"".join(files.values())


@pytest.fixture
def files() -> dict[str, bytes]:
    """A dialogue, a cut-scene and clips for most of what they say."""
    talk = dialogue(
        key=3,
        hero={0: "Who are you?*03", 10: "Hello.*FLBye now.", 11: "*XY123,45,6789No voice."},
        person={0: "", 10: "Never mind.", 171: "Ooh."},
        greetings=("You again?", "Me again.*04"),
    )
    clips = (
        "03SSSSJ1",
        "03000AJ1",
        "03000AJ2",
        "03000AP1",
        "0300ABP1",
        "03XXXXP1",
        "03XXXXJ1",
        "C1A__021",
        "C1A__022",
    )
    return {
        "APE2.DOG": talk,
        "C1A.CUT": scene("", ["*", "Holy cow!*03It's Ian!*14"]),
        **{f"{clip}.SB": f"sound of {clip}".encode() for clip in (*clips, "ROCKPAKS")},
    }


def write(folder: Path, content: bytes) -> Path:
    """The archive as a file."""
    path = folder / "queen.1c"
    path.write_bytes(content)
    return path


def test_lines_and_clips(tmp_path: Path, files: dict[str, bytes]) -> None:
    archive = GameArchive(write(tmp_path, pack(files)))
    lines = archive.lines()
    assert lines == [
        Line("03000AJ1", "APE2.DOG", "JOE", "Hello."),
        Line("03000AJ2", "APE2.DOG", "JOE", "Bye now."),
        Line("03000AP1", "APE2.DOG", "APE", "Never mind."),
        Line("0300ABP1", "APE2.DOG", "APE", "Ooh."),
        Line("03SSSSJ1", "APE2.DOG", "JOE", "Who are you?"),
        Line("03XXXXJ1", "APE2.DOG", "JOE", "Me again."),
        Line("03XXXXP1", "APE2.DOG", "APE", "You again?"),
        Line("C1A__021", "C1A.CUT", "C1A", "Holy cow!"),
        Line("C1A__022", "C1A.CUT", "C1A", "It's Ian!"),
    ]
    assert archive.clip(lines[-1]) == b"sound of C1A__022"
    assert "ROCKPAKS" in archive.clips and len(archive.clips) == 10, "a clip without a text is still listed"


def test_remarks_start_behind_the_early_ones() -> None:
    lines = [f"line {index}" for index in range(1230)]
    named = {base: text for _, base, text in remark_texts("\r\n".join(lines).encode())}
    assert [named[f"JOE{number:04d}"] for number in (0, 40, 41, 42)] == ["line 1186", "line 1226", "line 0", "line 1"]
    assert len(named) == len(lines), "no two lines share a name"


def test_segments_count_where_they_are_empty() -> None:
    assert segments("Yes.*04*03No.") == ["Yes.", "", "No."]
    assert segments("a*XY123,45,6789b") == ["a", "b"]


def test_strings_are_padded_from_the_start_but_empty_ones_are_not() -> None:
    assert read_string(b"\0\3abc\0\0\0next", 1, align=4) == ("abc", 8)
    assert read_string(b"\0\3abcnext", 1, align=1) == ("abc", 5)
    assert read_string(b"\0\0next", 1, align=4) == ("", 2)


def broken(files: dict[str, bytes], what: str) -> bytes:
    """The archive with one thing wrong."""
    if what == "dialogue":
        return pack(files | {"APE2.DOG": files["APE2.DOG"][:190]})
    if what == "compression":
        return pack(files, compression=2)
    whole = pack(files)
    return {"magic": b"RIFF" + whole[4:], "empty": b"", "table": whole[:60], "clip": whole[:-1]}[what]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("magic", "not the game's archive: starts with b'RIFF', expected b'QTBL'"),
        ("empty", "not the game's archive"),
        ("compression", r"compression 2, expected 1 \(MP3\)"),
        ("table", "60 bytes, but its table of 12 entries ends at 267"),
        ("clip", r"ROCKPAKS.SB ends at \d+, the file at \d+"),
        ("dialogue", "APE2.DOG ends early"),
    ],
)
def test_a_broken_archive_is_one_clear_error(tmp_path: Path, files: dict[str, bytes], what: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"queen.1c: {message}"):
        GameArchive(write(tmp_path, broken(files, what))).lines()


def test_an_unknown_file_is_named(tmp_path: Path, files: dict[str, bytes]) -> None:
    with pytest.raises(ValueError, match="no file 'NONE.SB'"):
        GameArchive(write(tmp_path, pack(files))).read("NONE.SB")

"""The page of a small run: what it shows, that nothing on it is markup, that all it names is there."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mixlora import cli
from mixlora.evaluation import tasks
from mixlora.evaluation.run import Result, evaluate
from mixlora.rows import Row
from tests.evaluation.test_run import write

pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
from mixlora.evaluation import plots, report

NASTY = '<script>alert("$\\frac{")</script>\ud800'
"""Markup, mathematics of matplotlib's that does not parse, and half a surrogate pair."""


class Stand:
    """A session that gives every row the same answer."""

    def __init__(self, text: str) -> None:
        self.text = text

    def answer_batch(self, rows: list[Row]) -> list[Any]:
        return [SimpleNamespace(text=self.text) for _ in rows]


class Page(HTMLParser):
    """The tags of a page, what they refer to, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.without_alt = 0
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.links += [named[key] or "" for key in ("src", "href", "srcset") if key in named]
        self.without_alt += tag == "img" and not named.get("alt")

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of each metric with a picture and a clip, labels, and a name that is markup."""
    Image.new("RGB", (600, 300), "red").save(tmp_path / "<b>red.png")
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(np.arange(8000) / 7), 8000)
    see = {"prompt": "What?", "images": ["<b>red.png"], "metric": "exact", "task": NASTY[:-1]}
    hear = {"audio": ["tone.wav"], "metric": "wer", "task": "hear"}
    return write(
        tmp_path / "rows.jsonl",
        see | {"answers": ["red"], "font": NASTY},
        see | {"answers": [f"blue {NASTY}"], "font": "Serif"},
        hear | {"answers": ["a low tone"], "noise": "20 dB", "voice": "Ann"},
        hear | {"answers": ["red"], "noise": "0 dB", "voice": "Bob"},
        {"prompt": "Is it?", "task": "ask", "metric": "yes_no", "answers": ["no"]},
    )


def results(data: Path, text: str) -> list[Result]:
    return list(evaluate(Stand(text), tasks.select(data, None, None)))


def test_page(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "page"
    ours = results(data, f"red {NASTY}")
    systems = {"tiny": ours, "Whisper base": [one for one in results(data, "red") if one.task == "hear"]}
    path = report.write(folder, systems, ["OCR skipped: <absent>"], examples=4)
    page = Page(path)

    assert not {"script", "b"} & set(page.tags) and page.without_alt == 0
    assert '<script>alert("$\\frac{")</script>' in page.text and "OCR skipped: <absent>" in page.text
    assert "<b>red.png" in page.text and "tiny" in page.text and "5 rows in" in page.text
    assert "Whisper base 75.0 %" in page.text, "three wrong words of one row, none of the other"
    assert {"table", "audio", "picture"} <= set(page.tags)

    local = {link for link in page.links if not link.startswith("#")}
    assert all(re.fullmatch(r"report_files/[\w.-]+", link) for link in local), local
    assert {f"report_files/{file.name}" for file in (folder / report.FILES).iterdir()} == local
    named = {link.rsplit("/")[-1] for link in local}
    assert {"1-confusion.dark.svg", "1-font.light.svg", "2-voice.light.svg", "2-noise.dark.svg"} <= named
    assert "3-confusion.light.svg" not in named


def test_examples_show_the_media_small_and_as_the_model_gets_them(data: Path, tmp_path: Path) -> None:
    report.write(tmp_path / "page", {"tiny": results(data, "green")}, [], examples=4)
    files = tmp_path / "page" / report.FILES
    with Image.open(files / "1-0-0.png") as picture:
        assert picture.size == (224, 112) and picture.getpixel((9, 9)) == (255, 0, 0)
    samples, rate = soundfile.read(files / "2-1-0.flac")
    assert rate == 16000 and len(samples) == 16000
    svg = (files / "2-1-0.light.svg").read_text()
    assert svg.count("<image") == 1, "the spectrogram"


def test_a_limit_on_examples_and_a_second_report(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    wrong = results(data, "green")
    assert Page(report.write(folder, {"tiny": wrong}, [], examples=4)).tags.count("audio") == 2
    page = Page(report.write(folder, {"tiny": wrong}, [], examples=1))
    assert page.tags.count("audio") == 1 and len(list((folder / report.FILES).glob("*.flac"))) == 1
    page = Page(report.write(folder, {"tiny": wrong}, [], examples=0))
    assert "audio" not in page.tags and "2 rows are not wholly right" in page.text


def test_the_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="--report needs a new or empty folder"):
        report.check(tmp_path)
    with pytest.raises(ValueError, match="--report needs a new or empty folder"):
        report.check(tmp_path / "mine.txt")


def test_many_values_and_systems_are_drawn(tmp_path: Path) -> None:
    parts = [plots.Part(f"{number} {'x' * 50}", 3, 1.0, (0.2, 0.999)) for number in range(40)]
    plots.bars(tmp_path / "bars", {"tiny": parts, "base": parts})
    for scheme, colours in plots.SCHEMES.items():
        svg = (tmp_path / f"bars.{scheme}.svg").read_text()
        assert svg.count(f"fill: {colours['hues'][1]}") == plots.MOST_BARS + 1, "bars and the legend's patch"
        assert colours["face"] in svg


def fails(*arguments: str) -> str:
    """The message of a command that fails."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(arguments))
    return str(ended.value.code)


def test_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    session: Any = Stand("red")
    monkeypatch.setattr("mixlora.commands.evaluation.load_session", lambda model, tokens: session)
    monkeypatch.delenv("MIXLORA_WHISPER", raising=False)
    monkeypatch.setattr("mixlora.evaluation.references.find_spec", lambda name: None)
    command = ["eval", "--data", str(data), "--model", str(tmp_path / "tiny"), "--report", str(tmp_path / "page")]
    assert fails(*command, "--beams", "3") == "0"
    assert session.num_beams == 3
    said = capsys.readouterr().out
    skipped = [line for line in said.splitlines() if "skipped" in line]
    assert [line.split()[0] for line in skipped] == ["Whisper", "PocketSphinx"], "nothing is to be read"
    page = Page(tmp_path / "page" / "index.html")
    assert all(line in page.text for line in skipped) and "tiny" in page.text
    assert fails(*command, "--no-references") == "0" and "skipped" not in capsys.readouterr().out
    assert "NAME=FOLDER" in fails(*command, "--whisper", "here")


def test_a_missing_extra_is_named_before_anything_is_loaded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("mixlora.commands.evaluation.load_session", lambda model, tokens: pytest.fail("loaded"))
    said = fails("eval", "--data", str(data), "--report", str(tmp_path / "page"))
    assert "--report needs matplotlib" in said and "mixlora-multimodal[report]" in said
    assert not (tmp_path / "page").exists()


def test_no_report_no_matplotlib(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("mixlora.commands.evaluation.load_session", lambda model, tokens: Stand("red"))
    assert fails("eval", "--data", str(data)) == "0"

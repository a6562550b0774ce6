"""A hundred broken rows of twenty kinds among good ones: each is named, and all the good ones are used."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mixlora.cli import main
from mixlora.training.data.rows import RowError
from mixlora.training.train import train
from tests.training.training_fixtures import write_recipe

GOOD, EACH = 40, 5


def chat(*parts: dict[str, Any] | str, answer: Any = "yes") -> dict[str, Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def image(name: Any) -> dict[str, Any]:
    return {"type": "image", "path": name}


def audio(name: Any) -> dict[str, Any]:
    return {"type": "audio", "path": name}


PAIR: dict[str, Any] = {"prompt": [{"role": "user", "content": "?"}], "chosen": "yes", "rejected": "yes"}
BROKEN: dict[str, tuple[Callable[[int], Any], str]] = {
    "half a line": (lambda i: '{"messages": [' * (i + 1), "not JSON"),
    "not UTF-8": (lambda i: b'{"text": "caf\xe9 %d"}' % i, "not JSON"),
    "a list": (lambda i: [i], "expected an object with one of"),
    "no known key": (lambda i: {"txt": f"{i}"}, "expected an object with one of"),
    "two kinds": (lambda i: {"text": "x", **chat("?")}, "expected an object with one of"),
    "empty text": (lambda i: {"text": " " * i}, "text must be a string that is not empty"),
    "half a character": (lambda i: json.dumps({"text": f"\ud83d {i}"}), "half a character"),
    "no messages": (lambda i: {"messages": []}, "must be a list that is not empty"),
    "an unknown role": (lambda i: {"messages": [{"role": "bot", "content": f"{i}"}]}, "expected a role of"),
    "content of numbers": (lambda i: {"messages": [{"role": "user", "content": i}]}, "content must be a string or"),
    "an unknown part": (lambda i: chat({"type": "video", "path": "0.png"}), "part 0: expected a text part"),
    "a part without its medium": (lambda i: chat("?", {"type": "image"}), "part 1: expected a text part"),
    "no such picture": (lambda i: chat(image(f"gone-{i}.png")), "no image file at .*gone"),
    "a folder for a clip": (lambda i: chat(audio("folder")), "no audio file at .*folder"),
    "a picture that is none": (lambda i: chat(image("none.png")), "picture .*none.png can't be read"),
    "half a picture": (lambda i: chat("?", image("half.png")), "picture .*half.png can't be read"),
    "a clip that is none": (lambda i: chat(audio("none.wav")), "clip .*none.wav can't be read"),
    "a clip of nothing": (lambda i: chat(audio("short.wav")), "clip .*short.wav can't be read.*25 ms"),
    "no answer": (lambda i: {"messages": [{"role": "user", "content": f"{i}"}]}, "no assistant message to learn from"),
    "two answers that are one": (lambda i: PAIR, "chosen and rejected are the same answer"),
}


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, dict[int, str]]:
    """A file of good and broken rows in random order, and by line what is wrong there."""
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    noise = Image.fromarray(rng.integers(0, 255, (40, 40), dtype=np.uint8))
    noise.save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:700])
    (tmp_path / "none.png").write_bytes(b"no picture")
    (tmp_path / "none.wav").write_bytes(b"no clip")
    soundfile.write(tmp_path / "short.wav", np.zeros(10), 16000)
    soundfile.write(tmp_path / "whole.wav", rng.normal(0, 0.1, 3000), 16000)
    good = [chat(*parts) for parts in (["hello"], [image("whole.png")], [audio("whole.wav")])]
    rows: list[tuple[Any, str]] = [(good[i % 3], "") for i in range(GOOD)]
    rows += [(make(i), message) for make, message in BROKEN.values() for i in range(EACH)]
    random.Random(0).shuffle(rows)
    path = tmp_path / "mixed: all.jsonl"  # errors have colons of their own
    lines = [
        row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
        for row, _ in rows
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, {line: message for line, (_, message) in enumerate(rows, start=1) if message}


def check_faults(said: str, path: Path, wrong: dict[int, str]) -> None:
    """Each broken row is named once, by file, line and reason, and no other is."""
    named = re.findall(rf"{re.escape(str(path))}:(\d+): (.*)", said)
    assert sorted(int(line) for line, _ in named) == sorted(wrong)
    for line, reason in named:
        assert re.search(wrong[int(line)], reason), (line, reason)


def test_data_check_names_each(mixed: tuple[Path, dict[int, str]], capsys: pytest.CaptureFixture[str]) -> None:
    path, wrong = mixed
    assert len(wrong) == len(BROKEN) * EACH == 100
    with pytest.raises(SystemExit, match="100 rows can't be used"):
        main(["data", "check", str(path), "--media"])
    check_faults(capsys.readouterr().out, path, wrong)


def test_a_stage_passes_them_over_and_uses_all_the_others(
    tmp_path: Path, start: str, mixed: tuple[Path, dict[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, wrong = mixed
    settings = {"rows_per_batch": 20, "tokens_per_batch": 0, "max_steps": 0, "epochs": 1, "max_broken": 100}
    recipe = write_recipe(tmp_path, start, path, ["adapter.vision", "adapter.speech"], **settings)
    train(recipe, tmp_path / "out")
    said = capsys.readouterr().out
    check_faults(said, path, wrong)
    assert f"{GOOD} examples" in said and "2 batches" in said
    done = json.loads((tmp_path / "out/01-only/done.json").read_text())
    assert done["steps"] == 2 and len(done["broken"]) == 100
    with pytest.raises(RowError, match="with this, 100 rows are broken, and max_broken is 99"):
        train(recipe, tmp_path / "other", ["only.max_broken=99"])
    with pytest.raises(RowError, match=re.escape(f"{path}:{min(wrong)}: ")):
        train(recipe, tmp_path / "third", ["only.max_broken=0"])


def test_a_stream_passes_them_over_too(
    tmp_path: Path, start: str, mixed: tuple[Path, dict[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """All rows come by within the steps that are asked for, again and again; each is named once."""
    path, wrong = mixed
    settings = {"rows_per_batch": 20, "tokens_per_batch": 0, "max_steps": 5, "max_broken": 100}
    settings |= {"streaming": True, "window": 70}
    train(write_recipe(tmp_path, start, path, ["adapter.vision"], **settings), tmp_path / "out")
    check_faults(capsys.readouterr().out, path, wrong)

"""Reading JSONL: what a row becomes, and faults with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from mixlora.training.data.rows import RowError, read_rows


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def chat(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "yes"}]}


def test_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    image, text = {"type": "image", "path": "a.png"}, {"type": "text", "text": "What?"}
    rows = read_rows(write(tmp_path, chat(image, text) | {"task": "digits"}, "", {"text": "plain"}))
    assert rows[0].images == (tmp_path / "a.png",) and rows[0].task == "digits" and rows[0].text is None
    assert rows[0].messages is not None and rows[0].messages[0]["content"] == [{"type": "image"}, text]
    assert rows[1].text == "plain" and rows[1].messages is None and rows[1].source.endswith("rows.jsonl:3")
    assert len(read_rows(tmp_path / "rows.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "rows.jsonl:2: not JSON"),
        ({"task": "x"}, "rows.jsonl:2: expected an object with either messages or text"),
        ({"text": " "}, "rows.jsonl:2: text must be"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "rows.jsonl:2: messages 0: expected a role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "rows.jsonl:2: no assistant message"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "rows.jsonl:2: messages 0: content must be"),
        (chat({"type": "video", "path": "x"}), "rows.jsonl:2: messages 0, part 0: expected a text part"),
        (chat({"type": "audio", "path": "gone.wav"}), "rows.jsonl:2: messages 0, part 0: no audio file at .*gone.wav"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_rows(write(tmp_path, {"text": "fine"}, row))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")

"""Reading JSONL: what a row becomes, and faults with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mixlora.training.data.check import check_file
from mixlora.training.data.rows import RowError, read_rows


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


PAIR: dict[str, Any] = {"prompt": [{"role": "user", "content": "?"}], "chosen": "yes", "rejected": "no"}


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
        ({"task": "x"}, "rows.jsonl:2: expected an object with one of messages, text, or prompt"),
        ({"text": " "}, "rows.jsonl:2: text must be"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "rows.jsonl:2: messages 0: expected a role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "rows.jsonl:2: no assistant message"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "rows.jsonl:2: messages 0: content must be"),
        (chat({"type": "video", "path": "x"}), "rows.jsonl:2: messages 0, part 0: expected a text part"),
        (chat({"type": "audio", "path": "gone.wav"}), "rows.jsonl:2: messages 0, part 0: no audio file at .*gone.wav"),
        (PAIR | {"messages": []}, "rows.jsonl:2: expected an object with one of"),
        (PAIR | {"prompt": []}, "rows.jsonl:2: prompt must be a list that is not empty"),
        (PAIR | {"rejected": ""}, "rows.jsonl:2: rejected: expected an answer"),
        (PAIR | {"chosen": [{"role": "user", "content": "x"}]}, "rows.jsonl:2: chosen: expected an answer"),
        (PAIR | {"chosen": "no"}, "rows.jsonl:2: chosen and rejected are the same answer"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read_rows(write(tmp_path, {"text": "fine"}, row))


def test_a_preference_is_two_conversations(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path, PAIR | {"chosen": [{"role": "assistant", "content": "yes"}]}))
    assert row.messages is not None and row.rejected is not None
    assert row.messages[:1] == row.rejected[:1] == PAIR["prompt"]
    assert [each[-1] for each in (row.messages, row.rejected)] == [
        {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"},
    ]  # fmt: skip


def test_every_fault_of_a_file_is_told(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    pictures = [chat({"type": "image", "path": name}) for name in ("a.png", "b.png")]
    path = write(tmp_path, *pictures, "{", {"text": "fine"}, {"text": 3})
    found = list(check_file(path))
    assert [fault is None for fault in found] == [True, True, False, True, False]
    assert "rows.jsonl:3: not JSON" in str(found[2]) and "rows.jsonl:5: text must be" in str(found[4])
    opened = list(check_file(path, media=True))
    assert opened[0] is None and "rows.jsonl:2: picture" in str(opened[1]) and "b.png can't be read" in str(opened[1])


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        read_rows(tmp_path / "nowhere.jsonl")

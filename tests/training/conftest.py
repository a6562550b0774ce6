"""A checkpoint to start from, its rows, and preferences of them."""

import json
from pathlib import Path

import pytest

from tests.training.training_fixtures import make_start, write_rows


@pytest.fixture
def start(tmp_path: Path) -> str:
    return make_start(tmp_path / "start")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path)


@pytest.fixture
def pairs(rows: Path) -> Path:
    """A preference of each conversation: text, picture, clip, and both."""
    path = rows.with_name("pairs.jsonl")
    chats = [json.loads(line)["messages"] for line in rows.read_text().splitlines()[1:]]
    lines = [{"prompt": chat[:1], "chosen": chat[1]["content"], "rejected": "never and never"} for chat in chats]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return path

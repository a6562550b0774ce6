"""Offline batches: the rows of `mixlora eval` in, answers out, over a local Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from mixlora.chat import ChatSession
from mixlora.rows import RowError
from mixlora.serving.offline import Answerer
from tests.serving.serving_fixtures import clip, model_and_processor, picture
from tests.test_docs import ROOT, blocks

ROWS: list[dict[str, Any]] = [
    {"prompt": "Who are you?", "answers": ["x"], "metric": "exact"},
    {"prompt": "What is it?", "images": ["a.png"], "answers": ["x"], "metric": "exact"},
    {"audio": ["a.wav"], "answers": ["x", "y"], "metric": "wer", "voice": "Ann"},
    {"prompt": "Is it?", "images": ["a.png"], "audio": ["a.wav"], "answers": ["no"], "metric": "yes_no"},
]
MODALITIES = ["text", "vision", "speech", "vision_speech"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, and rows with their files."""
    folder = tmp_path_factory.mktemp("offline")
    model, processor = model_and_processor()
    model.save_pretrained(folder / "checkpoint")
    processor.save_pretrained(folder / "checkpoint")
    picture().save(folder / "a.png")
    soundfile.write(folder / "a.wav", clip(), 16000, subtype="FLOAT")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def table(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("pyarrow", reason="needs the extra `ray`").Table.from_pylist(
        rows, pytest.importorskip("pyarrow.json").read_json(_file(rows)).schema
    )


def _file(rows: list[dict[str, Any]]) -> Any:
    import io

    return io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())


def test_rows_keep_their_columns_and_get_those_of_the_session(folder: Path) -> None:
    answerer = Answerer(folder / "checkpoint", folder, max_new_tokens=7)
    found = answerer(table(ROWS)).to_pylist()
    from mixlora.rows import Row

    asked = [
        Row(row.get("prompt"), *(tuple(folder / name for name in row.get(kind, ())) for kind in ("images", "audio")))
        for row in ROWS
    ]
    wanted = ChatSession.from_pretrained(folder / "checkpoint", 7).answer_batch(asked)
    assert [row["answer"] for row in found] == [one.text for one in wanted]
    assert [row["modality"] for row in found] == MODALITIES
    assert [row["adapter"] for row in found] == ["none", "vision", "speech", "vision"]
    assert [row["answers"] for row in found] == [row["answers"] for row in ROWS] and found[2]["voice"] == "Ann"
    assert answerer(table(ROWS)[:0]).num_rows == 0, "Ray asks with no rows for what comes out"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": " "}, r"row 1 of a batch .*nothing is asked"),
        ({"images": ["b.png"]}, r"row 1 of a batch .*no such file: .*b\.png"),
    ],
)
def test_a_row_that_is_wrong_is_named(folder: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError, match=words):
        Answerer(folder / "checkpoint", folder)(table([ROWS[0], row]))


def test_a_local_ray_answers_as_the_documents_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of docs/serving.md, run as it stands, gives every row the answer it gets here."""
    ray = pytest.importorskip("ray", reason="needs the extra `ray`")
    [shown] = [text for language, _, text in blocks(ROOT / "docs" / "serving.md") if "import ray" in text]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # the workers' processes are new ones
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        exec(compile(shown, "docs/serving.md", "exec"), {})
    finally:
        ray.shutdown()
    lines = [line for path in sorted((folder / "answers").glob("*.json")) for line in path.read_text().splitlines()]
    found = {json.loads(line)["modality"]: json.loads(line) for line in lines}
    wanted = Answerer(folder / "checkpoint", folder)(table(ROWS)).to_pylist()
    assert len(lines) == len(ROWS) and set(found) == set(MODALITIES)
    for row in wanted:
        assert found[row["modality"]]["answer"] == row["answer"]
        assert found[row["modality"]]["answers"] == row["answers"]

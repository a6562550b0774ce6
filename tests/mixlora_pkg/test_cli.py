"""The command line: light help, clear errors, and each command on a tiny checkpoint."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mixlora.cli import main
from mixlora.commands import questions
from mixlora.evaluation.metrics import exact
from mixlora.rows import read_questions
from tests.modeling.model_fixtures import tiny_model
from tests.modeling.processor_fixtures import tiny_processor

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "mixlora" / "default"
SAMPLES = DEFAULT / "samples"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with a picture and a clip."""
    Image.new("RGB", (9, 7), "red").save(tmp_path / "red.png")
    soundfile.write(tmp_path / "tone.wav", 0.3 * np.sin(np.arange(4000) / 7), 16000)
    return tmp_path


def write(folder: Path, *rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def run(*arguments: str) -> None:
    """Runs a command; typer leaves with status 0."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert not ended.value.code, ended.value.code


def error(*arguments: str) -> str:
    """The message of a command that fails."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, str) and ended.value.code.startswith("error: "), ended.value.code
    return ended.value.code


@pytest.mark.parametrize("command", [[], ["chat"], ["eval"], ["train"], ["data"], ["export"], ["export", "code"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    program = (
        "import sys\nfrom mixlora.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'jiwer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *command, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_batch_prints_one_json_line_a_row(checkpoint: str, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(
        media,
        {"text": "Hello"},
        {"text": "What?", "images": ["red.png"]},
        {"audio": [str(media / "tone.wav")]},
        "",
        {"text": "This?", "images": ["red.png"], "audio": ["tone.wav"]},
    )
    run("chat", "--model", checkpoint, "--batch", rows, "--json", "--max-new-tokens", "3")
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(answer) == {"text", "modality", "adapter"} for answer in answers)
    routes = [(answer["modality"], answer["adapter"]) for answer in answers]
    expected = [("text", None), ("vision", "vision"), ("speech", "speech"), ("vision_speech", "vision")]
    assert routes == expected
    run("chat", "--model", checkpoint, "--batch", rows, "--max-new-tokens", "3")
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 5 and table[2].startswith("vision ") and "[red.png] What?" in table[2]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"txt": "Hello"}, "unknown field txt"),
        ({"text": 3}, "text must be a string"),
        ({"text": " "}, "nothing is asked"),
        ({"images": "red.png"}, "images must be a list of paths"),
        ({"images": ["absent.png"]}, "no such file"),
        ({"images": ["tone.wav"]}, "can't be read as a picture"),
        ({"audio": ["red.png"]}, "can't be read as audio"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(checkpoint: str, media: Path, row: Any, message: str) -> None:
    rows = write(media, {"text": "Hello"}, "", row)
    said = error("chat", "--model", checkpoint, "--batch", rows)
    assert f"{rows}, line 3" in said and message in said


def test_questions_of_the_command_line(checkpoint: str, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ["chat", "--model", checkpoint, "--max-new-tokens", "3"]
    run(*model, "--image", str(media / "red.png"), "What?")
    run(*model, "--audio", str(media / "tone.wav"))
    assert len(capsys.readouterr().out.splitlines()) >= 2
    assert "no such file" in error(*model, "--image", "absent.png", "What?")
    assert "prompt is empty" in error(*model, " ")
    assert "--batch" in error(*model, "--json", "What?")
    assert "PROMPT" in error(*model, "--batch", "rows.jsonl", "What?")
    assert "no checkpoint" in error("chat", "--model", str(media), "What?")


def test_talking_turn_by_turn(
    checkpoint: str, media: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["Hello", f"/image {media / 'red.png'}", "What?", "/image absent.png", "What?", "/new", "Hello", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    run("chat", "--model", checkpoint, "--max-new-tokens", "2")
    assert next(said, None) is None
    assert "absent.png: no such file" in capsys.readouterr().err


def test_eval_writes_figures(checkpoint: str, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(
        media,
        {"task": "look", "prompt": "What?", "images": ["red.png"], "answers": ["red"], "metric": "exact"},
        {"task": "hear", "audio": ["tone.wav"], "answers": ["a tone"], "metric": "wer"},
        {"task": "look", "prompt": "What?", "images": ["red.png"], "answers": ["no"], "metric": "yes_no"},
    )
    out = media / "out" / "figures.json"
    run("eval", "--model", checkpoint, "--data", rows, "--json", str(out), "--max-new-tokens", "2")
    figures = json.loads(out.read_text())
    assert [(f["task"], f["metric"], f["n"]) for f in figures] == [
        ("look", "exact", 1), ("hear", "wer", 1), ("look", "yes_no", 1),
    ]  # fmt: skip
    assert all(set(f) == {"task", "n", "metric", "value", "seconds_per_row"} for f in figures)
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert "no row of task 'smell'" in error("eval", "--data", rows, "--task", "smell")


def test_data_prefer_writes_pairs(checkpoint: str, media: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write(media, {"task": "look", "prompt": "?", "images": ["red.png"], "answers": ["3"], "metric": "exact"})
    files = [media / f"pairs{number}.jsonl" for number in range(2)]
    for file in files:
        options = ["--model", checkpoint, "--data", rows, "--samples", "3", "--max-new-tokens", "3"]
        run("data", "prefer", str(file), *options)
    assert "wrote 1 pairs of 1 rows" in capsys.readouterr().out
    first, second = (file.read_text() for file in files)
    assert first == second  # the seed is the same
    pair = json.loads(first)
    assert pair["chosen"] == "3" and pair["rejected"] not in ("3", "")
    assert "temperature must be above 0" in error("data", "prefer", "x", "--data", rows, "--temperature", "0")


def test_data_prefer_asks_training_rows(
    checkpoint: str, media: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of them, or by default those that training was prepared from, and no held-out split."""

    def chat(user: Any, *answers: str) -> dict[str, Any]:
        turns = [{"role": "assistant", "content": answer} for answer in answers]
        return {"messages": [{"role": "user", "content": user}, *turns]}

    look = [{"type": "image", "path": "red.png"}, {"type": "text", "text": "?"}]
    rows = [chat(look, "3"), chat(look[::-1], "3"), chat("say", "a", "b"), {"text": "plain"}, chat("so?", "Yes.")]
    options = ["--model", checkpoint, "--samples", "2", "--max-new-tokens", "3"]
    run("data", "prefer", str(media / "pairs.jsonl"), "--data", write(media, *rows), *options)
    printed = capsys.readouterr()
    assert "3 rows that are not media, then text, then one answer are passed over" in printed.err
    assert "2 answers to each of 2 rows" in printed.err
    pairs = [json.loads(line) for line in (media / "pairs.jsonl").read_text().splitlines()]
    assert [pair["chosen"] for pair in pairs] == ["3", "Yes."]
    assert pairs[0]["prompt"][0]["content"] == look

    monkeypatch.setattr(questions, "prepared_folder", lambda: media / "data")
    message = error("data", "prefer", str(media / "more.jsonl"), *options)
    assert "the training rows of digits are missing" in message and "python scripts/prepare_pictures.py" in message
    (media / "data/eval").mkdir(parents=True)
    write(media / "data/eval", {"task": "digits", "prompt": "held out", "answers": ["1"], "metric": "exact"})
    for name in questions.PREPARED:
        (media / f"data/{name}.jsonl").write_text(json.dumps(chat(name, name)) + "\n")
    run("data", "prefer", str(media / "more.jsonl"), "--task", "game", *options)
    assert json.loads((media / "more.jsonl").read_text())["prompt"] == [
        {"role": "user", "content": [{"type": "text", "text": "game"}]}
    ]
    assert "no row of task 'games'" in error("data", "prefer", str(media / "x.jsonl"), "--task", "games", *options)


def test_samples_are_whole() -> None:
    """Rows of every kind, their media and an answer to each."""
    rows = read_questions(SAMPLES / "rows.jsonl")
    kinds = {(bool(row.images), bool(row.audio)) for row in rows}
    assert len(kinds) == 4
    assert all(row.turn() for row in rows)
    assert len(json.loads((SAMPLES / "answers.json").read_text())) == len(rows)
    attribution = (SAMPLES / "ATTRIBUTION.md").read_text()
    assert all(clip.name in attribution for clip in SAMPLES.glob("*.flac"))


def test_the_embedded_model_answers_the_samples(capsys: pytest.CaptureFixture[str]) -> None:
    run("chat", "--batch", str(SAMPLES / "rows.jsonl"), "--json")
    texts = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    answers = json.loads((SAMPLES / "answers.json").read_text())
    wrong = [(text, right) for text, right in zip(texts, answers, strict=True) if exact(text, right) != (1, 1)]
    assert wrong == []


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlora.commands.shared.find_spec", lambda name: None)
    assert "pip install 'mixlora-multimodal[serve]'" in error("serve")
    assert "gradio" in (told := error("demo")) and "mixlora-multimodal[demo]" in told


def test_what_is_wrong_with_a_page_is_said_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixlora.commands.shared.find_spec", lambda name: object())
    assert error("demo", "--auth", "anna", "--model", "nowhere") == "error: --auth is NAME:PASSWORD"

"""The documents are true to the code: links resolve, tables follow the dataclasses, and what is shown runs."""

import ast
import dataclasses
import inspect
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import typer
from PIL import Image

import mixlora
from mixlora.cli import app, main
from mixlora.training.stages import Augment, Experts, Mimic, Preference, Recipe, Source, Stage
from tests.training.training_fixtures import make_start

ROOT = Path(__file__).resolve().parents[1]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
RUN = [ROOT / "docs" / name for name in ("chat.md", "distillation.md", "long_context.md", "model.md", "training.md")]
COMMAND = ".venv/bin/mixlora"


def name_of(path: Path) -> str:
    """A document's path from the root."""
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """Language, title and text of each fenced block; a block with a title is the file of that name."""
    return re.findall(r"^```(\w+)(?: (\S+))?\n(.*?)^```$", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands(language: str, content: str) -> Iterator[list[str]]:
    """The arguments of every `mixlora` command in a block."""
    for line in content.replace("\\\n", " ").splitlines() if language == "bash" else ():
        words = shlex.split(line, comments=True)
        if words[:1] == [COMMAND]:
            yield words[1:]


def anchors(path: Path) -> set[str]:
    """The headings of a document as links name them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def field_table(kind: type) -> str:
    """The fields of a dataclass as a table: name, type, default, and the docstring under the field."""
    (definition,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(definition, ast.ClassDef)
    defaults = {entry.name: entry for entry in dataclasses.fields(kind)}
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), (
                f"{field.target.id}: no docstring"
            )
            entry = defaults.pop(field.target.id)
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            shown = "required" if default is dataclasses.MISSING else f"`{default!r}`"
            lines.append(f"| `{entry.name}` | `{ast.unparse(field.annotation)}` | {shown} | {text.value.value} |")
    assert not defaults
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_relative_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        linked = path.parent / file if file else path
        assert linked.exists(), f"{name_of(path)}: no file at {target}"
        assert not anchor or anchor in anchors(linked), f"{name_of(path)}: no heading at {target}"


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_python_blocks_parse(path: Path) -> None:
    for language, _, content in blocks(path):
        if language == "python":
            ast.parse(content, filename=name_of(path))


@pytest.mark.parametrize("path", DOCS, ids=name_of)
def test_commands_are_understood(path: Path) -> None:
    """Commands, options and the number of arguments, without running them."""
    group: Any = typer.main.get_command(app)
    for words in [words for language, _, content in blocks(path) for words in commands(language, content)]:
        command, context, rest = group, group.make_context("mixlora", ["--help"], resilient_parsing=True), words
        while hasattr(command, "resolve_command"):
            name, command, rest = command.resolve_command(context, rest)
            context = command.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize(
    "kind", [Recipe, Stage, Source, Mimic, Preference, Experts, Augment], ids=lambda kind: kind.__name__
)
def test_recipe_fields_are_those_of_the_code(kind: type) -> None:
    table = field_table(kind)
    shown = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert table in shown, f"docs/training.md: the table of {kind.__name__} must be\n{table}"


def test_every_page_and_public_name_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages and all(f"]({page})" in index for page in pages)
    missing = [name for name in mixlora.__all__ if f"`{name}`" not in index]
    assert missing == [], f"docs/README.md does not name {missing}"


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader's folder with the media and checkpoints that the documents name; the input ends at once."""
    start = make_start(tmp_path / "start")
    shutil.copytree(start, tmp_path / "checkpoint")
    Image.new("L", (28, 28), 255).save(tmp_path / "digit.png")
    soundfile.write(tmp_path / "question.wav", 0.3 * np.sin(np.arange(9600) / 7), 16000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mixlora, "default_checkpoint", lambda: start)

    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    return tmp_path


@pytest.mark.parametrize("path", [ROOT / "README.md", *RUN], ids=name_of)
def test_what_is_shown_runs(path: Path, reader: Path) -> None:
    """Titled files first, then code and commands in order; the README's Python alone, since it shows no rows."""
    for _, title, content in blocks(path):
        if title:
            (reader / title).write_text(content, encoding="utf-8")
    namespace: dict[str, Any] = {}
    ran = 0
    for language, _, content in blocks(path):
        if language == "python":
            exec(compile(content, name_of(path), "exec"), namespace)
            ran += 1
        for words in commands(language, content) if path in RUN else ():
            with pytest.raises(SystemExit) as ended:
                main(words)
            assert not ended.value.code, f"{name_of(path)}: {shlex.join(words)}: {ended.value.code}"
            ran += 1
    assert ran, f"{name_of(path)} shows nothing to run"

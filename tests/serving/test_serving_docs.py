"""What docs/serving.md shows of the engine runs."""

from pathlib import Path

from tests.test_docs import ROOT, blocks, reader

__all__ = ["reader"]  # the folder that documents speak of


def test_the_engine_as_shown(reader: Path) -> None:
    shown = [text for language, _, text in blocks(ROOT / "docs" / "serving.md") if "Engine(" in text]
    assert len(shown) == 1
    exec(compile(shown[0], "docs/serving.md", "exec"), {})


def test_the_options_as_listed() -> None:
    """Each option of the table is one of the command, and none is missing."""
    import re

    import typer

    from mixlora.cli import app

    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    table = text[text.index("| option |") : text.index("At SIGTERM")]
    listed = set(
        re.findall(r"`(--[\w-]+)`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    assert listed == {name for option in command.params for name in option.opts if name != "--help"}

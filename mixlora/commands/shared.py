"""What several commands share: the checkpoint that they load, and the extras that they need."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mixlora

if TYPE_CHECKING:
    from mixlora.chat import ChatSession

Model = Annotated[Path | None, typer.Option(help="Checkpoint folder; by default the one inside the package.")]
Tokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]


def load_session(model: Path | None, max_new_tokens: int) -> "ChatSession":
    """A session with the checkpoint, saying on stderr which one it is."""
    folder = model if model is not None else Path(mixlora.default_checkpoint())
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json")
    print(f"loading {folder}", file=sys.stderr)
    from transformers.utils import logging

    from mixlora.chat import ChatSession

    logging.disable_progress_bar()
    return ChatSession.from_pretrained(folder, max_new_tokens)


def check_extra(extra: str, *libraries: str) -> None:
    """Raises ValueError where a command's libraries are not installed."""
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise ValueError(
            f"{', '.join(missing)} not installed: this command needs the extra, "
            f"pip install 'mixlora-multimodal[{extra}]'"
        )

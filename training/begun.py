"""What a stage's folder says of it: the settings that it was begun with, and what it wrote at its end."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState

from mixlora.training.settings import RecipeError
from mixlora.training.stages import Stage


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Notes a stage's settings when it begins; they must be the same once it goes on from a checkpoint or has ended.

    Raises:
        RecipeError: they are not, and the differences are named; or the note can't be read.
    """
    file = folder / "stage.json"
    wanted = json.loads(json.dumps(settings))
    kept = (folder / "done.json").is_file() or any(folder.glob("checkpoints/checkpoint-*"))
    if not kept or not file.is_file():
        if PartialState().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(file, wanted)
        return
    try:
        before = _with_defaults(json.loads(file.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RecipeError(f"{file}: not JSON ({error}): remove {folder}, or name another output") from error
    changed = [f"{key}: {before.get(key)!r} -> {wanted[key]!r}" for key in wanted if before.get(key) != wanted[key]]
    if changed:
        raise RecipeError(
            f"{folder} was begun with other settings ({'; '.join(changed)}): remove it, or name another output"
        )


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that were noted before a field was there, which the stage then had at its default."""
    filled = dict(settings)
    for entry in dataclasses.fields(Stage):
        if entry.default_factory is dataclasses.MISSING:
            default = entry.default
        else:
            default = entry.default_factory()
        if dataclasses.is_dataclass(default):
            filled[entry.name] = dataclasses.asdict(default) | filled.get(entry.name, {})  # type: ignore[arg-type]
        elif default is not dataclasses.MISSING:
            filled.setdefault(entry.name, default)
    return filled


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)

"""A checkpoint whose adapters become experts."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mixlora.checkpoints.convert import convert, new_folder
from mixlora.modeling.configuration_mixlora import check_experts
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.phi4_config import is_phi4

OWN_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json")
"""What is written anew; other files of the checkpoint, its processor's, are copied."""


def convert_to_experts(
    source: str | Path,
    destination: str | Path,
    experts: int,
    top_k: int,
    adapters: Sequence[str] | None = None,
    seed: int = 0,
) -> list[str]:
    """Turns each adapter into copies of itself with fresh routers: what the model computes stays the same.

    Args:
        source: a folder, ours or of Phi-4-Multimodal in either layout.
        destination: a folder that is new or empty.
        experts: copies of each pair; top_k: how many of them a token takes.
        adapters: names of those to turn; all of them by default.
        seed: of the routers.

    Returns:
        Names of tensors of `source` that were not used.

    Raises:
        FileNotFoundError: `source` is no checkpoint.
        ValueError: `destination` holds files, numbers out of range, no adapter of a name, or one with experts already.
    """
    check_experts(experts, top_k, "--experts and --top-k")
    source, destination = new_folder(source, destination)
    if is_phi4(json.loads((source / "config.json").read_text(encoding="utf-8"))):
        with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
            unused = convert(source, folder)
            _split(Path(folder), destination, experts, top_k, adapters, seed)
        return unused
    _split(source, destination, experts, top_k, adapters, seed)
    return []


def _split(
    source: Path, destination: Path, experts: int, top_k: int, adapters: Sequence[str] | None, seed: int
) -> None:
    model = MixLoraForConditionalGeneration.from_pretrained(source, dtype="auto")
    names = sorted(model.config.adapters) if adapters is None else adapters
    if not names:
        raise ValueError(f"{source} holds no adapter")
    for name in names:
        model.split_adapter(name, experts, top_k, seed)
    model.save_pretrained(destination)
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in OWN_FILES):
            shutil.copy(path, destination / path.name)

"""Safetensors files moved tensor by tensor: names change, bytes do not, and no tensor is ever whole in memory."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixlora.modeling.base_checkpoint import weight_files

BLOCK = 1 << 22
SHARD = 5 * 10**9


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: `size` bytes of `file` from `start` on."""

    file: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, a few MiB at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            for at in range(0, self.size, BLOCK):
                yield file.read(min(BLOCK, self.size - at))

    def is_zero(self) -> bool:
        """Whether every byte is zero."""
        return not any(any(block) for block in self.blocks())


def read_file(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file by name; only its header is read."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Stored(path, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
        for name, entry in header.items()
        for begin, end in [entry["data_offsets"]]
    }


def read(folder: Path) -> dict[str, Stored]:
    """The tensors of all safetensors files of a folder.

    Raises:
        FileNotFoundError: there is none.
    """
    return {name: tensor for path in weight_files(folder) for name, tensor in read_file(path).items()}


def write_file(path: Path, tensors: dict[str, Stored]) -> None:
    """Writes a safetensors file. Wide types come first, so that every tensor is aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-_width(item[1]), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered:
        ends = [offset, offset + tensor.size]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": ends}
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.writelines(tensor.blocks())


def _width(tensor: Stored) -> int:
    """Bits of an element, as the name of its type tells (`BF16`, `F8_E4M3`, `BOOL`)."""
    digits = re.search(r"\d+", tensor.dtype)
    return int(digits.group()) if digits else 8


def write(folder: Path, tensors: dict[str, Stored], limit: int = SHARD) -> None:
    """Writes `model.safetensors`, or shards of at most `limit` bytes (one tensor at least) with their index."""
    shards: list[dict[str, Stored]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(each.size for each in shards[-1].values()) + tensor.size > limit:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        write_file(folder / "model.safetensors", tensors)
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(each.size for each in tensors.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

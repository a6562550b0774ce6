"""A checkpoint that holds no decoder: it names its base, pinned by revision and by the SHA-256 of its weights."""

import hashlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file

from .parts import decoder_key


def checkpoint_folder(name: str | Path, without: str | None = None, **hub: Any) -> Path:
    """The local folder of a checkpoint: itself, or the hub's snapshot of it.

    Args:
        without: a pattern of files that are not fetched.
        hub: options of `from_pretrained` such as `revision`, `token`, `cache_dir` and `subfolder`.
    """
    subfolder = hub.pop("subfolder", None) or ""
    if Path(name).is_dir():
        return Path(name) / subfolder
    wanted = ["*.safetensors", "*.json"]
    return Path(snapshot_download(str(name), allow_patterns=wanted, ignore_patterns=without, **hub)) / subfolder


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no *.safetensors")
    return files


def weights_sha256(folder: Path) -> str:
    """SHA-256 over the bytes of all weight files, in the order of their names."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def describe_base(name: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What `config.base_model` says of a base: its name, revision and the sum of its weights."""
    sha256 = weights_sha256(checkpoint_folder(name, revision=revision))
    return {"name_or_path": str(name), "revision": revision, "sha256": sha256}


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files.

    Raises:
        ValueError: a file is broken, such as one that was not fetched to its end.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read as safetensors ({error})") from error
    return tensors


def load_base(base: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The base's tensors under our names.

    Raises:
        ValueError: its weights are not those that the checkpoint was made with.
    """
    folder = checkpoint_folder(base["name_or_path"], revision=base.get("revision"))
    found = weights_sha256(folder)
    if found != base["sha256"]:
        raise ValueError(
            f"base_model {base['name_or_path']!r} has weights of SHA-256 {found}, expected {base['sha256']}: "
            "it is not the decoder that this checkpoint was trained with"
        )
    return {decoder_key(name): tensor for name, tensor in load_weights(folder).items()}


def is_base_tensor(name: str) -> bool:
    """Whether a tensor of ours belongs to the decoder itself, not to an adapter, tower or projector."""
    return name == "lm_head.weight" or (name.startswith("model.language_model.") and ".lora_" not in name)

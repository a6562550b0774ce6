"""Outputs of a frozen model on disk, computed once: safetensors shards, keyed by what they are the outputs of."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from mixlora.training.data.items import Item, Medium, View, content_key

SHARD_ITEMS = 1024
BATCH_ITEMS = 16


Encode = Callable[[Sequence[Item]], list[torch.Tensor]]


def fingerprint(tower: nn.Module, settings: dict[str, Any]) -> str:
    """A short name of what decides a feature besides the file: the tower's weights and the processor's settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class FeatureCache:
    """Features of media files and of views, `[tokens, width]` each, read lazily from memory-mapped shards.

    Shards are written whole and then renamed, so a killed run leaves no half shard and goes on where it was.

    Args:
        folder: of the shards.
        dtype: in which features are kept.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float16):
        self.folder, self.dtype = folder, dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._shards: dict[str, Any] = {}  # content key -> open shard
        self._keys: dict[Medium, str] = {}  # medium -> content key
        self._open_all()

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, item: Item) -> torch.Tensor:
        """Features of a file or view, `[tokens, width]` in fp32.

        Raises:
            KeyError: not computed yet.
        """
        key = self._key(item)
        return self._shards[key].get_tensor(key).float()

    def tokens(self, item: Item) -> int:
        """How many feature vectors a file or view has, without reading them."""
        key = self._key(item)
        return self._shards[key].get_slice(key).get_shape()[0]

    def __contains__(self, item: Item) -> bool:
        return self._key(item) in self._shards

    def fill(self, items: Sequence[Item], encode: Encode, what: str = "features") -> int:
        """Computes what is missing, without gradients, in batches; several processes share the work.

        Args:
            items: media files and views; the same content is computed once, and so is the same view of it.
            encode: features of each item of a batch, `[tokens, width]` each.
            what: for the progress bar.

        Returns:
            How many were computed.

        Raises:
            ValueError: features that the dtype can't hold, with the file; or processes that do not share the folder.
        """
        ranks = PartialState()
        ranks.wait_for_everyone()  # all have looked what is there before anything is added
        missing = {key: item for item in dict.fromkeys(items) if (key := self._key(item)) not in self._shards}
        keys = list(missing)
        mine = keys[ranks.process_index :: ranks.num_processes]
        with tqdm(total=len(mine), desc=what, unit="file", disable=not mine) as bar:
            for start in range(0, len(mine), SHARD_ITEMS):
                shard: dict[str, torch.Tensor] = {}
                chunk = mine[start : start + SHARD_ITEMS]
                for first in range(0, len(chunk), BATCH_ITEMS):
                    batch = chunk[first : first + BATCH_ITEMS]
                    shard |= self._encode(batch, [missing[key] for key in batch], encode)
                    bar.update(len(batch))
                self._write(shard)
        if ranks.num_processes > 1:
            ranks.wait_for_everyone()
            self._open_all()
            if lost := [key for key in keys if key not in self._shards]:
                raise ValueError(
                    f"{self.folder}: {len(lost)} features of other processes are not here; the recipe's cache, by "
                    "default in the output, must be one folder for all of them"
                )
        return len(keys)

    def _key(self, item: Item) -> str:
        """What the features are of: the content of a file, and the view of it."""
        if isinstance(item, View):
            return f"{self._key(item.path)}-{item.mark}-{item.number}"
        if item not in self._keys:
            self._keys[item] = content_key(item)
        return self._keys[item]

    def _write(self, shard: dict[str, torch.Tensor]) -> None:
        name = hashlib.sha256("".join(shard).encode()).hexdigest()[:16]
        partial = self.folder / f"{name}.partial"
        save_file(shard, partial)
        self._open(partial.rename(self.folder / f"{name}.safetensors"))

    def _open_all(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        shard = safe_open(path, framework="pt")
        self._shards |= dict.fromkeys(shard.keys(), shard)

    @torch.no_grad()
    def _encode(self, keys: list[str], items: list[Any], encode: Encode) -> dict[str, torch.Tensor]:
        """Features of one batch by key."""
        features = {}
        for key, item, tensor in zip(keys, items, encode(items), strict=True):
            features[key] = tensor.to(self.dtype).cpu().contiguous().clone()
            if not torch.isfinite(features[key]).all():
                raise ValueError(f"{item}: tower features are not finite in {self.dtype}")
        return features

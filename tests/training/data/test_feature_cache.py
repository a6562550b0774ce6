"""The feature cache: computed once by content, read back in fp16, whole after a kill."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mixlora.training.data.feature_cache import FeatureCache, fingerprint


def encode(paths: Sequence[Path]) -> list[torch.Tensor]:
    return [torch.arange(6.0).reshape(3, 2) + len(path.read_bytes()) for path in paths]


def files(folder: Path, *contents: str) -> list[Path]:
    paths = [folder / f"{i}.bin" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_text(content)
    return paths


def test_computed_once_by_content(tmp_path: Path) -> None:
    paths = files(tmp_path, "a", "bbb", "a")
    cache = FeatureCache(tmp_path / "cache")
    assert cache.fill(paths, encode) == 2 and len(cache) == 2
    again = FeatureCache(tmp_path / "cache")
    assert again.fill(paths, encode) == 0
    assert torch.equal(again[paths[1]], torch.arange(6.0).reshape(3, 2) + 3) and again.tokens(paths[1]) == 3
    paths[1].write_text("other")
    assert FeatureCache(tmp_path / "cache").fill(paths, encode) == 1


def test_a_half_written_shard_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x.partial").write_bytes(b"half")
    assert len(FeatureCache(tmp_path)) == 0


def test_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.bin.*float16"):
        FeatureCache(tmp_path / "cache").fill(files(tmp_path, "a"), lambda paths: [torch.full((1, 1), 1e6)])


def test_fingerprint_follows_weights_and_settings() -> None:
    tower = torch.nn.Linear(2, 2)
    before = fingerprint(tower, {"size": 1})
    assert before == fingerprint(tower, {"size": 1}) != fingerprint(tower, {"size": 2})
    with torch.no_grad():
        tower.weight[0, 0] += 1
    assert fingerprint(tower, {"size": 1}) != before

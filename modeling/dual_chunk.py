"""Dual chunk attention (Qwen2.5-1M, arXiv 2501.15383; An et al., arXiv 2402.17463): rows longer than training's.

A row is cut into chunks of `s = chunk_size - local_size` tokens. A key at position j is rotated at `j mod s`, once,
and cached so. A query at i takes a rotation for each kind of key that it meets:

| keys | rotation of the query | relative position |
|---|---|---|
| of the same chunk | `i mod s` | exact |
| of the chunk before | `min(i mod s + s, chunk_size)` | exact for the `local_size` nearest |
| of older chunks | `chunk_size` | from `local_size + 1` to `chunk_size` |

So no relative position leaves `[0, chunk_size]`, and up to `chunk_size + 1` tokens all of them are exact. The paper's
figure ends at `chunk_size - 1`; this is what the authors' code does.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch

from .configuration_mixlora import MixLoraTextConfig
from .rope import RotaryEmbedding

Rotation: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""cos and sin, each `[batch, length, rotary_dim]`."""


@dataclass(frozen=True)
class DualChunk:
    """The sizes, and the positions that follow from them.

    Attributes:
        chunk_size: the largest relative position; the length of training, or less.
        local_size: the distance up to which neighbours in two chunks keep their exact relative position.
        temperature: whether queries beyond chunk_size sharpen their softmax.
    """

    chunk_size: int
    local_size: int
    temperature: bool = False

    @classmethod
    def of(cls, config: MixLoraTextConfig) -> "DualChunk | None":
        """The decoder's settings, or None where it has none."""
        spec = config.long_context
        return None if spec is None else cls(spec["chunk_size"], spec["local_size"], spec["temperature"])

    @property
    def step(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size

    def successive(self, positions: torch.Tensor) -> torch.Tensor:
        """Where queries at `positions` stand for keys of the chunk before."""
        return (positions % self.step + self.step).clamp(max=self.chunk_size)

    def sharpness(self, positions: torch.Tensor) -> torch.Tensor | None:
        """The factor of a query's scores, of the shape of `positions`, fp32; None where all are 1.

        `(1 + 0.1 ln(i / chunk_size))^2` from position i = chunk_size on (YaRN, arXiv 2309.00071, section 3.4). It is
        the query's own position that counts, so that a cached token never has to be computed again.
        """
        if not self.temperature:
            return None
        return (1 + 0.1 * (positions / self.chunk_size).clamp(min=1).log()) ** 2


@dataclass(frozen=True)
class Rotations:
    """Rotations of one forward.

    Attributes:
        intra: of queries and keys within their chunk, or of all of a row that is not cut.
        successive: of queries for keys of the chunk before; None where rows are not cut.
        inter: of queries for older keys, the same for each, `[batch, 1, rotary_dim]`.
        sharpness: factor of each query's scores, `[batch, length]`, or None.
    """

    intra: Rotation
    successive: Rotation | None = None
    inter: Rotation | None = None
    sharpness: torch.Tensor | None = None

    @classmethod
    def make(
        cls,
        chunks: DualChunk | None,
        rotary: RotaryEmbedding,
        x: torch.Tensor,
        position_ids: torch.Tensor,
        row_lengths: torch.Tensor | None,
    ) -> "Rotations":
        """For queries and new keys at `position_ids` `[batch, length]`, in the dtype of `x`."""
        if chunks is None:
            return cls(rotary(x, position_ids, row_lengths))
        if row_lengths is None:
            row_lengths = position_ids.amax(dim=-1) + 1
        return cls(
            intra=rotary(x, position_ids % chunks.step, row_lengths),
            successive=rotary(x, chunks.successive(position_ids), row_lengths),
            inter=rotary(x, torch.full_like(position_ids[:, :1], chunks.chunk_size), row_lengths),
            sharpness=chunks.sharpness(position_ids),
        )

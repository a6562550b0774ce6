"""Projectors: tower features to the decoder's width."""

import torch
from torch import nn

CTC_SHARPNESS = 10.0
"""Products of embeddings of length about 1, ten times as large, tell tokens apart."""


class Projector(nn.Module):
    """LayerNorm, then a two-layer MLP with GELU (LLaVA-1.5, arXiv 2310.03744, section 3.1, with a norm in front)."""

    def __init__(self, feature_size: int, hidden_size: int, output_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.up = nn.Linear(feature_size, hidden_size)
        self.down = nn.Linear(hidden_size, output_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., feature_size]` -> `[..., output_size]`."""
        return self.down(nn.functional.gelu(self.up(self.norm(features))))


def stack_frames(features: torch.Tensor, stack: int) -> torch.Tensor:
    """Joins neighbours: `[frames, size]` -> `[ceil(frames / stack), stack * size]`, zeros after the last frame."""
    missing = -len(features) % stack
    return nn.functional.pad(features, (0, 0, 0, missing)).reshape(-1, stack * features.shape[-1])


def compress_by_ctc(tokens: torch.Tensor, embeddings: torch.Tensor, blank: int) -> torch.Tensor:
    """What CTC hears in a clip, as the decoder's own embeddings: repeats joined, silence taken out and put in front.

    Each token becomes the expected embedding under its distribution over the vocabulary; neighbours with the same most
    likely token are averaged (CTC-based compression: Gaido et al., EACL 2021). The number of tokens stays.

    Args:
        tokens: projected clip `[tokens, width]`.
        embeddings: the decoder's, `[vocabulary, width]`.
        blank: id of the token that stands for nothing heard.
    """
    table = embeddings.to(tokens.dtype)
    chances = (CTC_SHARPNESS * tokens @ table.T).softmax(-1)
    heard = chances.argmax(-1)
    starts = torch.ones_like(heard, dtype=torch.bool)
    starts[1:] = heard[1:] != heard[:-1]
    segment = starts.cumsum(0) - 1
    sums = tokens.new_zeros(int(starts.sum()), tokens.shape[1]).index_add(0, segment, chances @ table)
    said = (sums / segment.bincount().unsqueeze(1))[heard[starts] != blank]
    return torch.cat([table[blank].expand(len(tokens) - len(said), -1), said])


def project_each(projector: nn.Module, items: list[torch.Tensor]) -> list[torch.Tensor]:
    """Runs `projector` once over all items `[tokens, size]` and splits the result again."""
    if not items:
        return []
    sizes = [len(item) for item in items]
    return list(projector(torch.cat(items).to(next(projector.parameters()).dtype)).split(sizes))

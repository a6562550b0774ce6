"""Projectors: tower features to the decoder's width."""

import torch
from torch import nn


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


def project_each(projector: nn.Module, items: list[torch.Tensor]) -> list[torch.Tensor]:
    """Runs `projector` once over all items `[tokens, size]` and splits the result again."""
    if not items:
        return []
    sizes = [len(item) for item in items]
    return list(projector(torch.cat(items).to(next(projector.parameters()).dtype)).split(sizes))

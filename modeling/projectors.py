"""Projectors: tower features to the decoder's width."""

import torch
from torch import nn

CTC_SHARPNESS = 10.0
"""Products of embeddings of length about 1, ten times as large, tell tokens apart."""


class Projector(nn.Module):
    """A two-layer MLP with GELU (LLaVA-1.5, arXiv 2310.03744, section 3.1), with or without a LayerNorm in front."""

    def __init__(self, feature_size: int, hidden_size: int, output_size: int, norm: bool = True):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size) if norm else nn.Identity()
        self.up = nn.Linear(feature_size, hidden_size)
        self.down = nn.Linear(hidden_size, output_size)
        self.input_size = feature_size

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., feature_size]` -> `[..., output_size]`."""
        return self.down(nn.functional.gelu(self.up(self.norm(features))))


class SeparatorProjector(Projector):
    """Puts learned separators at flagged places, then projects (Phi-4-Multimodal).

    The last two columns of a feature are flags: the end of a row, and the border before the global view. The shapes of
    the separators are those of the released checkpoint.
    """

    def __init__(self, feature_size: int, hidden_size: int, output_size: int, norm: bool = True):
        super().__init__(feature_size, hidden_size, output_size, norm)
        self.input_size = feature_size + 2
        self.row_separator = nn.Parameter(torch.zeros(1, 1, 1, feature_size))
        self.global_separator = nn.Parameter(torch.zeros(1, 1, feature_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., feature_size + 2]` -> `[..., output_size]`."""
        separators = torch.stack([self.row_separator.flatten(), self.global_separator.flatten()])
        return super().forward(features[..., :-2] + features[..., -2:] @ separators)


class WhiteningProjector(nn.Module):
    """LayerNorm and a linear layer, read in a basis in which the decoder's embeddings spread evenly.

    A decoder's embeddings lie along few directions, and steps of CTC against them go wild there before the others
    move. In the basis of [`fit`] all directions count alike; it is no parameter, and an identity before.
    """

    basis: torch.Tensor

    def __init__(self, feature_size: int, output_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(feature_size)
        self.down = nn.Linear(feature_size, output_size)
        self.input_size = feature_size
        self.register_buffer("basis", torch.eye(output_size))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`[..., feature_size]` -> `[..., output_size]`."""
        return self.down(self.norm(features)) @ self.basis

    @torch.no_grad()
    def fit(self, embeddings: torch.Tensor) -> None:
        """Whitens `embeddings` `[vocabulary, output_size]` unless it has been fitted: products with them, times
        [`CTC_SHARPNESS`], are then those with rows of mean length 1."""
        if not torch.equal(self.basis, torch.eye(len(self.basis), device=self.basis.device)):
            return
        centred = (embeddings - embeddings.mean(0)).double()
        sizes, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        whitening = directions * sizes.clamp(min=1e-6 * sizes.max()).rsqrt() @ directions.T
        length = (centred @ whitening).norm(dim=-1).mean()
        self.basis.copy_(whitening / (CTC_SHARPNESS * length))


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

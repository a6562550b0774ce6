"""What a clip's tokens learn from their neighbours, between the speech tower and its projectors."""

import torch
from torch import nn

from .projectors import stack_frames


class DepthwiseConv(nn.Conv1d):
    """A convolution of each channel alone; its few inputs need wider first weights than other layers' 0.02."""

    def __init__(self, width: int, kernel_size: int):
        super().__init__(width, width, kernel_size, padding=kernel_size // 2, groups=width)


class ContextBlock(nn.Module):
    """Depthwise convolution over time and an MLP, as a residual (ConvNeXt: Liu et al., CVPR 2022, section 2.6)."""

    def __init__(self, width: int, kernel_size: int, intermediate_size: int, dropout: float):
        super().__init__()
        self.mix = DepthwiseConv(width, kernel_size)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, intermediate_size)
        self.down = nn.Linear(intermediate_size, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[clips, tokens, width]` -> the same shape."""
        mixed = self.norm(self.mix(tokens.transpose(1, 2)).transpose(1, 2))
        return tokens + self.dropout(self.down(nn.functional.gelu(self.up(mixed))))


class SpeechContext(nn.Module):
    """Brings stacked frames to a width and mixes neighbours.

    A tower says what sounds; which word it is, in few bits of data, takes a look at the sounds around.

    Args:
        feature_size: of a token of stacked frames.
        width: of what comes out.
        layers, kernel_size, intermediate_size, dropout, stride: see `config.speech_context`.
    """

    def __init__(
        self,
        feature_size: int,
        width: int,
        *,
        layers: int,
        kernel_size: int,
        intermediate_size: int,
        dropout: float,
        stride: int,
    ):
        super().__init__()
        self.stride = stride
        self.norm = nn.LayerNorm(feature_size)
        self.reduce = nn.Linear(feature_size, width)
        self.blocks = nn.ModuleList(
            ContextBlock(width, kernel_size, intermediate_size, dropout) for _ in range(layers)
        )

    def forward(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """`[tokens, feature_size]` of each clip -> `[tokens, width]`; a clip's end is zeros, as if it were alone."""
        if not clips:
            return []
        sizes = [len(clip) for clip in clips]
        tokens = self.reduce(self.norm(torch.cat(clips).to(self.reduce.weight.dtype)))
        padded = nn.utils.rnn.pad_sequence(list(tokens.split(sizes)), batch_first=True)
        lengths = torch.tensor(sizes, device=padded.device)
        real = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        for block in self.blocks:
            padded = block(padded) * real[..., None]
        return [clip[:size] for clip, size in zip(padded, sizes, strict=True)]

    def joined(self, clips: list[torch.Tensor]) -> list[torch.Tensor]:
        """`[tokens, width]` of each clip -> `[ceil(tokens / stride), stride * width]`, as projectors take them."""
        return [stack_frames(clip, self.stride) for clip in clips]

"""Rotary positions. Frequencies come from transformers' initialisers; a row's own length picks its factors."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_mixlora import MixLoraTextConfig


def default_frequencies(config: MixLoraTextConfig) -> torch.Tensor:
    """Inverse frequencies `[rotary_dim / 2]` of plain RoPE (RoFormer, arXiv 2104.09864)."""
    dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponent = torch.arange(0, dim, 2, dtype=torch.float) / dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponent)


class RotaryEmbedding(nn.Module):
    """cos and sin for each position of each row.

    LongRoPE has two sets of factors, and dynamic NTK scaling one for each length beyond the trained one. Row by row,
    they follow the row's real length, so a short row is not changed by a long neighbour nor by padding.
    """

    inv_freq: torch.Tensor
    long_inv_freq: torch.Tensor

    def __init__(self, config: MixLoraTextConfig):
        super().__init__()
        self.config = config
        parameters = config.rope_parameters
        self.rope_type = parameters["rope_type"]
        original = parameters.get("original_max_position_embeddings") if self.rope_type == "longrope" else None
        self.original_length = original or config.max_position_embeddings
        self.inv_freq = nn.Buffer(torch.empty(0), persistent=False)
        self.long_inv_freq = nn.Buffer(torch.empty(0), persistent=False)
        self.reset_buffers()

    def reset_buffers(self, device: torch.device | None = None) -> None:
        """Computes both sets of frequencies anew, in fp32."""
        short, self.attention_scaling = self._frequencies(self.original_length)
        long = self._frequencies(self.original_length + 1)[0] if self.rope_type == "longrope" else short.clone()
        self.inv_freq, self.long_inv_freq = short.to(device), long.to(device)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "RotaryEmbedding":
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:  # `.to(bfloat16)` must not round positions
            self.reset_buffers(self.inv_freq.device)
        return self

    def _frequencies(self, length: int) -> tuple[torch.Tensor, float]:
        if self.rope_type == "default":
            return default_frequencies(self.config), 1.0
        return ROPE_INIT_FUNCTIONS[self.rope_type](self.config, None, seq_len=length)

    @property
    def varies(self) -> bool:
        """Whether a row's factors change as it grows, so that what was cached before must be computed again."""
        return self.rope_type in ("longrope", "dynamic") and self.config.rope_mode != "fixed_long"

    def room(self, length: int) -> int | None:
        """Tokens that a row of `length` real ones may take in one pass and keep its factors; None: any number."""
        if not self.varies or (self.rope_type == "longrope" and length > self.original_length):
            return None
        return max(self.original_length - length, 0)

    def is_long(self, row_lengths: torch.Tensor) -> torch.Tensor:
        """BoolTensor `[batch]`: which rows are beyond the length that the decoder was first trained on.

        With `rope_mode="fixed_long"` all are treated so.
        """
        return row_lengths > (-1 if self.config.rope_mode == "fixed_long" else self.original_length)

    def _row_frequencies(self, row_lengths: torch.Tensor) -> torch.Tensor:
        """Inverse frequencies of each row, `[batch, 1, rotary_dim / 2]`, or `[1, 1, rotary_dim / 2]` of all."""
        short = self.inv_freq.float()[None, None]
        if self.rope_type == "longrope":
            is_long = self.is_long(row_lengths)[:, None, None]
            return torch.where(is_long, self.long_inv_freq.float()[None, None], short)
        if self.rope_type == "dynamic":
            lengths = row_lengths.clamp(min=self.original_length)[:, None, None]
            return ROPE_INIT_FUNCTIONS["dynamic"](self.config, lengths.device, seq_len=lengths)[0]
        return short

    @torch.no_grad()
    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, row_lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each `[batch, length, rotary_dim]`, in the dtype of `x`.

        Args:
            position_ids: `[batch, length]`.
            row_lengths: `[batch]`, real tokens of each row, by which LongRoPE and dynamic scaling go; those up to the
                last position by default.
        """
        if row_lengths is None:
            row_lengths = position_ids.amax(dim=-1) + 1
        freqs = position_ids[..., None].float() * self._row_frequencies(row_lengths)
        angles = torch.cat((freqs, freqs), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """`(a, b) -> (-b, a)` over the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the first `rotary_dim` dimensions of `x` `[batch, heads, length, head_dim]`; the rest stays."""
    dim = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if dim == x.shape[-1]:
        return x * cos + rotate_half(x) * sin
    head, tail = x[..., :dim], x[..., dim:]
    return torch.cat((head * cos + rotate_half(head) * sin, tail), dim=-1)

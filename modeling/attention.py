"""Grouped-query attention on transformers' attention backends, with the route as an argument."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mixlora import MixLoraTextConfig
from .long_attention import LongAttention
from .packing import Kept, Packing
from .rope import apply_rotary
from .routed_lora import Route, RoutedLinear
from .row_windows import Windows


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.to(torch.promote_types(x.dtype, torch.float32))
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)


def eager_attention(
    module: "RoutedAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reference attention: query `[batch, heads, length, dim]`, key and value with `num_key_value_heads` heads."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    # In fp32 at least. Below fp64, the mask of a row of padding would be -inf, and its gradient NaN.
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class RoutedAttention(nn.Module):
    """Causal self-attention; keys and values are cached after rotation."""

    def __init__(self, config: MixLoraTextConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        width, query = config.hidden_size, config.num_attention_heads * self.head_dim
        key_value = config.num_key_value_heads * self.head_dim
        self.split_sizes = (query, key_value, key_value)
        if config.fused_projections:
            self.qkv_proj = RoutedLinear(nn.Linear(width, sum(self.split_sizes), bias=config.attention_bias))
        else:
            self.q_proj = RoutedLinear(nn.Linear(width, query, bias=config.attention_bias))
            self.k_proj = RoutedLinear(nn.Linear(width, key_value, bias=config.attention_bias))
            self.v_proj = RoutedLinear(nn.Linear(width, key_value, bias=config.attention_bias))
        self.o_proj = RoutedLinear(nn.Linear(query, width, bias=config.attention_output_bias))
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def project(self, x: torch.Tensor, route: Route) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, each `[batch, heads, length, head_dim]`."""
        if self.config.fused_projections:
            parts = self.qkv_proj(x, route).split(self.split_sizes, dim=-1)
        else:
            parts = (self.q_proj(x, route), self.k_proj(x, route), self.v_proj(x, route))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        route: Route,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        long_attention: LongAttention | None = None,
        packing: Packing | None = None,
        kept: Kept | None = None,
        windows: Windows | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`hidden_states` `[batch, length, width]` -> the same shape, and the weights where the backend gives them.

        Where they are packed, `[tokens, 1, width]`, the cache is empty, and is filled with padding.

        Args:
            kept: packed tokens that are to come out; all by default.
            windows: columns of the cache that rows look at; `attention_mask` is `[batch, 1, length, cached]` then.
        """
        query, key, value = self.project(hidden_states, route)
        key = apply_rotary(key, *position_embeddings)
        if packing is not None:
            return self._packed(
                query, key, value, route, position_embeddings, past_key_values, packing, kept, **kwargs
            ), None
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if long_attention is not None:
            dropout = self.config.attention_dropout if self.training else 0.0
            output, weights = long_attention.attend(query, key, value, self.scaling, dropout, self.layer_idx)
            return self.o_proj(output.flatten(2), route), weights
        query = apply_rotary(query, *position_embeddings)
        if windows is not None and attention_mask is not None:
            parts = [
                self._attend(
                    query[rows],
                    key[rows, :, start:],
                    value[rows, :, start:],
                    None if is_whole else attention_mask[rows, ..., start:],
                    **kwargs,
                )[0]
                for rows, start, is_whole in windows
            ]
            return self.o_proj(torch.cat(parts).flatten(2), route), None
        output, weights = self._attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.flatten(2), route), weights

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output `[batch, length, heads, dim]` of the backend that the config names."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        return attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.config.sliding_window,  # the other backends read it from the mask
            **kwargs,
        )

    def _packed(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        route: Route,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None,
        packing: Packing,
        kept: Kept | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of each row by itself; all states are `[tokens, heads, 1, dim]`."""
        if past_key_values is not None:
            padded = (packing.unpack(state.transpose(1, 2)).transpose(1, 2) for state in (key, value))
            past_key_values.update(*padded, self.layer_idx)
        kwargs.pop("position_ids", None)  # those of the padded batch
        if kept is not None:
            cos, sin = (each.index_select(0, kept.places) for each in position_embeddings)
            query, route = apply_rotary(query.index_select(0, kept.places), cos, sin), kept.route
            output = kept.attend(lambda *states: self._attend(*states, **kwargs), query, key, value, packing.lengths)
            return self.o_proj(output.flatten(2), route)
        query = apply_rotary(query, *position_embeddings)
        output = packing.attend(lambda q, k, v: self._attend(q, k, v, None, **kwargs), query, key, value)
        return self.o_proj(output.flatten(2), route)

"""Quantized caches in which every token has scales of its own, so that no row is rounded by its neighbours.

transformers' fp8 layer has one scale for the whole batch, fixed by the prompt: a louder row makes the others coarser,
and a later key beyond the prompt's loudest overflows to NaN. Here each token of each head has its scale.

Of the integer backends, groups of numbers share a scale: they may lie within a head's vector only.
"""

from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import BaseQuantizedLayer, Cache, Fp8QuantizedLayer

WITHIN_ROWS = {"HQQQuantizedLayer": 1, "QuantoQuantizedLayer": 0}
"""The axis along which a backend's groups follow the last dimension."""
BACKENDS = {"hqq": "HQQQuantizedLayer", "quanto": "QuantoQuantizedLayer"}
GROUP = 64
"""transformers' default."""


class TokenFp8Layer(BaseQuantizedLayer):
    """Keys and values `[batch, heads, length, dim]` as float8, with scales `[batch, heads, length, 1]`."""

    _quantized_keys: Any
    _quantized_values: Any

    def _quantize(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = torch.finfo(torch.float8_e4m3fn)
        scale = (tensor.abs().amax(-1, keepdim=True).float() / numbers.max).clamp(min=torch.finfo(torch.float).tiny)
        return (tensor.float() / scale).clamp(numbers.min, numbers.max).to(torch.float8_e4m3fn), scale

    def _dequantize(self, q_tensor: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (q_tensor[0].float() * q_tensor[1]).to(self.keys.dtype)

    def _grown(self, kept: tuple[torch.Tensor, torch.Tensor] | None, new: torch.Tensor) -> Any:
        fresh = self._quantize(new)
        if kept is None:
            return fresh
        # a view of bytes: not every device joins float8
        numbers = torch.cat((kept[0].view(torch.uint8), fresh[0].view(torch.uint8)), dim=-2)
        return numbers.view(torch.float8_e4m3fn), torch.cat((kept[1], fresh[1]), dim=-2)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes new keys and values in, and gives all; the first ones as they came."""
        first = self._quantized_keys is None
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self._quantized_keys = self._grown(self._quantized_keys, key_states)
        self._quantized_values = self._grown(self._quantized_values, value_states)
        if first:
            return key_states, value_states
        return self._dequantize(self._quantized_keys), self._dequantize(self._quantized_values)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Takes the rows `beam_idx`."""
        for name in ("_quantized_keys", "_quantized_values"):
            kept = getattr(self, name)
            if kept is not None:
                rows = beam_idx.to(kept[0].device)
                numbers = kept[0].view(torch.uint8).index_select(0, rows).view(torch.float8_e4m3fn)
                setattr(self, name, (numbers, kept[1].index_select(0, rows)))


def settings_within_rows(settings: dict[str, Any] | None, head_dim: int) -> dict[str, Any] | None:
    """A `cache_config` for vectors of `head_dim` numbers; what it leaves open is chosen so that rows stay apart."""
    layer = BACKENDS.get((settings or {"backend": "quanto"}).get("backend", ""))
    if layer is None:
        return settings
    axis = WITHIN_ROWS[layer]
    group = GROUP if head_dim % GROUP == 0 else head_dim
    return {"backend": "quanto", "axis_key": axis, "axis_value": axis, "q_group_size": group} | (settings or {})


def keep_rows_apart(cache: Cache | None, head_dim: int) -> None:
    """Replaces what is still empty and would mix rows.

    Raises:
        ValueError: groups of numbers with one scale would reach over tokens or rows.
    """
    for index, layer in enumerate(() if cache is None else cache.layers):
        if type(layer) is Fp8QuantizedLayer and not layer.is_initialized:
            cache.layers[index] = TokenFp8Layer()
        elif isinstance(layer, cache_utils.QuantizedLayer):
            axis = WITHIN_ROWS.get(type(layer).__name__, layer.axis_key)
            if (layer.axis_key, layer.axis_value) != (axis, axis) or head_dim % layer.q_group_size:
                raise ValueError(
                    f"a quantized cache must not mix rows: with this backend pass axis_key={axis}, axis_value={axis} "
                    f"and a q_group_size that divides {head_dim}, got axis_key={layer.axis_key}, "
                    f"axis_value={layer.axis_value}, q_group_size={layer.q_group_size}"
                )

"""A cache that grows in place: transformers' default appends by copying all that it holds, at every step and layer."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

ROOM = 64
"""Tokens of room behind those that are held, at least; an eighth of them where that is more."""


class GrowingLayer(DynamicLayer):
    """As transformers' `DynamicLayer`: `keys` and `values` are what is held, `[batch, heads, tokens, dim]`.

    Both are views of tensors with room behind, as long as nobody puts others in their place.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._rooms: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends, and gives all; where gradients are wanted, or in compiled code, as transformers does."""
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and key_states.requires_grad):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_room, value_room = self._rooms
        self.keys, key_room = _appended(self.keys, key_room, key_states)
        self.values, value_room = _appended(self.values, value_room, value_states)
        self._rooms = key_room, value_room
        return self.keys, self.values

    def reset(self) -> None:
        super().reset()
        self._rooms = (None, None)


def _appended(held: torch.Tensor, room: torch.Tensor | None, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`held` and `new` behind it as one view, and the tensor that it is a view of: `room`, if it is still in use."""
    length = held.shape[-2] if held.numel() else 0
    stop = length + new.shape[-2]
    if room is None or not _is_start_of(held, room, new) or stop > room.shape[-2]:
        room = new.new_empty(*new.shape[:-2], stop + max(ROOM, stop // 8), new.shape[-1])
        if length:
            room[..., :length, :] = held
    room[..., length:stop, :] = new
    return room[..., :stop, :], room


def _is_start_of(held: torch.Tensor, room: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether `held` is a view of the first tokens of `room`, and `new` fits behind them."""
    return (
        held.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()
        and held.storage_offset() == 0
        and held.stride() == room.stride()
        and held.shape[:-2] == room.shape[:-2] == new.shape[:-2]
        and (held.dtype, held.device) == (new.dtype, new.device)
        and (torch.is_inference_mode_enabled() or not room.is_inference())
    )


def growing(cache: Cache) -> Cache:
    """The same cache; its empty layers of transformers' default kind grow in place from now on, unless it offloads."""
    if not cache.offloading:
        for i, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and not layer.is_initialized:
                cache.layers[i] = grown = GrowingLayer()
                grown.__dict__.update(layer.__dict__)
    return cache

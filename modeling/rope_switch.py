"""Cached tokens of a row whose rotary factors change with its length.

A row that passes LongRoPE's switch has a cache which was computed with the other factors. Rotating its keys anew would
be wrong behind the first layer: there, keys and values come from hidden states that attended with the old factors. So
the past of such a row is computed again, once. That needs its input embeddings, media included, which are kept in one
more layer of the cache: as "keys" of one head, with a flag in "values" that tells the factors in use. A cache's own
reordering, cropping, selecting and resetting thus apply to them. They take about 1/20 of Phi-4-Multimodal's cache.

Only rows whose factors changed are computed again, so a short row keeps its bits when a long neighbour switches.
"""

import torch
from transformers.cache_utils import BaseQuantizedLayer, Cache, CacheLayerMixin, StaticLayer

from .growing_cache import GrowingLayer


def kept_layer(cache: Cache, layers: int) -> CacheLayerMixin:
    """The layer behind the decoder's `layers` that keeps embeddings; it is added where it is missing."""
    if len(cache.layers) == layers:
        limit = cache.get_max_length()
        cache.layers.append(GrowingLayer() if limit < 0 else StaticLayer(limit))
    return cache.layers[layers]


def keep(cache: Cache, layers: int, embeds: torch.Tensor, is_long: torch.Tensor) -> None:
    """Keeps what was just cached: `embeds` `[batch, length, width]` and its rows' flags `[batch]`."""
    flags = is_long.to(embeds.dtype)[:, None, None, None].expand(-1, 1, embeds.shape[1], 1)
    kept_layer(cache, layers).update(embeds.detach().unsqueeze(1), flags)
    if cache.offloading:  # one layer too many stands between the last and the first, so that this one is not fetched
        cache.prefetch(0, cache.only_non_sliding)


def stale_rows(cache: Cache, layers: int, past: int, is_long: torch.Tensor, always: bool = False) -> torch.Tensor:
    """Indices of rows whose cached `past` tokens were computed with other factors than `is_long` `[batch]` asks for.

    Args:
        always: the factors change with each token of a long row.

    Raises:
        ValueError: the cache lacks embeddings, so that it was not filled by this model.
    """
    if len(cache.layers) <= layers or int(cache.layers[layers].get_seq_length()) != past:
        raise ValueError(f"the cache holds {past} tokens, but not their embeddings: it was not filled by this model")
    was_long = cache.layers[layers].values[:, 0, 0, 0].to(is_long.device) != 0
    return ((was_long != is_long) | (always & is_long)).nonzero().squeeze(1)


def must_rebuild_all(cache: Cache, layers: int) -> bool:
    """Whether single rows cannot be replaced: a quantized layer holds most of its tokens for all rows together."""
    return any(isinstance(layer, BaseQuantizedLayer) for layer in cache.layers[:layers])


def replace_rows(cache: Cache, fresh: Cache, layers: int, rows: torch.Tensor, is_long: torch.Tensor) -> None:
    """Puts the layers of `fresh`, a cache of `rows` alone, into `cache`, with their flags `is_long` `[rows]`."""
    if cache.offloading and torch.cuda.is_available():
        torch.cuda.synchronize()  # layers are on their way to the host and back
    past = int(fresh.get_seq_length())
    for layer, new in zip(cache.layers[:layers], fresh.layers, strict=False):
        if isinstance(layer, BaseQuantizedLayer):
            layer.reset()
            layer.update(new.keys, new.values)
        else:
            layer.keys = _with_rows(layer.keys, rows, new.keys, layer)
            layer.values = _with_rows(layer.values, rows, new.values, layer)
    kept = cache.layers[layers]
    flags = is_long.to(kept.values.dtype)[:, None, None, None].expand(-1, 1, past, 1)
    kept.values = _with_rows(kept.values, rows, flags, kept)


def _with_rows(old: torch.Tensor, rows: torch.Tensor, new: torch.Tensor, layer: CacheLayerMixin) -> torch.Tensor:
    rows, new = rows.to(old.device), new.to(old)
    if isinstance(layer, StaticLayer):  # in place: compiled code holds its address
        old[rows, :, : new.shape[2]] = new
        return old
    return old.index_copy(0, rows, new)

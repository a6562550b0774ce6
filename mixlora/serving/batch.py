"""Rows side by side in one cache: they join, grow by a token each, and leave.

Rows are padded on the left, so that the newest token of each is in the last column. The padding shrinks when the
longest row leaves. transformers' `DynamicCache` is used as it is; only its tensors are joined and indexed here.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from mixlora.serving.request import Request


class Batch:
    """Requests and their cached tokens.

    Attributes:
        requests: one a row.
        adapter_ids: `[rows]`, as the model takes them.
        mask: `[rows, cached]`, 1 at real tokens.
        cache: keys and values of the cached tokens, and under LongRoPE the embeddings that the model keeps there.
    """

    def __init__(self, requests: list[Request], mask: torch.Tensor, cache: DynamicCache | None = None) -> None:
        self.requests = requests
        self.adapter_ids = torch.tensor([request.prompt.adapter_id for request in requests], device=mask.device)
        self.mask = mask
        # without a config: layers that keep every token, also under a sliding window, which the mask then tells
        self.cache = DynamicCache() if cache is None else cache

    def forward(
        self, model: Any, embeds: torch.Tensor, new_mask: torch.Tensor, row_lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Runs the next columns, and gives the logits of the last one, `[rows, vocabulary]`.

        Args:
            embeds: `[rows, length, width]`.
            new_mask: `[rows, length]`, 1 at real tokens.
            row_lengths: `[rows]`, real tokens of whole prompts that are read in chunks.
        """
        mask = torch.cat([self.mask, new_mask], dim=-1)
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=self.cache,
            adapter_ids=self.adapter_ids,
            row_lengths=row_lengths,
            use_cache=True,
            logits_to_keep=1,
        )
        self.mask = mask
        return output.logits[:, -1]

    def step(self, model: Any) -> torch.Tensor:
        """Runs each row's newest token: logits `[rows, vocabulary]`."""
        tokens = torch.tensor([[request.tokens[-1]] for request in self.requests], device=self.mask.device)
        return self.forward(model, model.model.embed(tokens, {}), torch.ones_like(tokens))

    def join(self, other: "Batch") -> None:
        """Takes the rows of another batch, which is used up."""
        columns = max(self.mask.shape[1], other.mask.shape[1])
        self.mask, added = (torch.nn.functional.pad(m, (columns - m.shape[1], 0)) for m in (self.mask, other.mask))
        self.mask = torch.cat([self.mask, added])
        self.adapter_ids = torch.cat([self.adapter_ids, other.adapter_ids])
        self.requests = [*self.requests, *other.requests]
        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys = torch.cat([_padded(layer.keys, columns), _padded(more.keys, columns)])
            layer.values = torch.cat([_padded(layer.values, columns), _padded(more.values, columns)])

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows, and no more columns than the longest of them fills."""
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.adapter_ids, self.mask = self.adapter_ids[index], self.mask[index]
        columns = int(self.mask.sum(-1).max()) if rows else 0
        self.mask = self.mask[:, self.mask.shape[1] - columns :]
        for layer in self.cache.layers:
            layer.keys, layer.values = (_last(part[index], columns) for part in (layer.keys, layer.values))

    def cut(self, row: int) -> tuple[list[int], DynamicCache]:
        """The cached tokens of a row, and a cache of them alone."""
        length = int(self.mask[row].sum())
        cache = DynamicCache()
        for layer in self.cache.layers:
            alone = DynamicLayer()
            alone.lazy_initialization(layer.keys, layer.values)
            alone.keys, alone.values = (_last(part[row : row + 1], length) for part in (layer.keys, layer.values))
            cache.layers.append(alone)
        return self.requests[row].ids[:length], cache


def _padded(part: torch.Tensor, columns: int) -> torch.Tensor:
    """`[rows, heads, cached, dim]` with so many columns.

    The first column is repeated, since the layer that keeps embeddings tells a row's rotary factors there.
    """
    missing = columns - part.shape[2]
    return torch.cat([part[:, :, :1].expand(-1, -1, missing, -1), part], dim=2) if missing else part


def _last(part: torch.Tensor, columns: int) -> torch.Tensor:
    """The last columns as a tensor of its own, so that the others are freed."""
    return part[:, :, part.shape[2] - columns :].clone()

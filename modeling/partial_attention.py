"""Attention over a part of the keys with its log-sum-exp, so that parts can be merged into the whole softmax."""

from typing import TypeAlias

import torch

Partial: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Output `[batch, heads, queries, dim]`, and the scores' log-sum-exp `[batch, heads, queries]`, fp32 at least."""

SCORES_AT_ONCE = 2**24
HALF = (torch.float16, torch.bfloat16)


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Partial:
    """Softmax attention of every query over these keys alone.

    A fused kernel of torch where one gives the log-sum-exp, and plain torch elsewhere and for gradients (no kernel
    passes a gradient through the log-sum-exp).

    Args:
        query: `[batch, heads, queries, dim]`.
        key, value: `[batch, key_value_heads, keys, dim]`; heads of the query share them in groups.
        causal: query i sees the keys up to i; there are as many keys as queries then.
        mask: additive, broadcastable to `[batch, heads, queries, keys]`. Every query must see a key: the log-sum-exp
            of one that sees none is not defined.
    """
    if torch.is_grad_enabled() and any(each.requires_grad for each in (query, key, value)):
        return plain_part(query, key, value, scale, causal, mask)
    if query.device.type == "cpu" and query.dtype != torch.float16:
        # Private, but the only kernel on a CPU that gives the log-sum-exp without being compiled first.
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    if query.device.type == "cuda" and mask is None and query.dtype in HALF and query.shape[-1] % 8 == 0:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, causal, scale=scale)[:2]
    return plain_part(query, key, value, scale, causal, mask)


def plain_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Partial:
    """As [`attend_part`] in plain torch, some queries at a time, so that memory does not grow with their number."""
    batch, heads, queries, _ = query.shape
    shared, keys = key.shape[1], key.shape[2]
    at_once = max(SCORES_AT_ONCE // (batch * heads * keys), 1)
    outputs, sums = [], []
    for start in range(0, queries, at_once):
        some = query[:, :, start : start + at_once]
        scores = some.unflatten(1, (shared, -1)) @ key.unsqueeze(2).transpose(-1, -2) * scale
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if mask is not None:
            part = mask if mask.shape[-2] == 1 else mask[..., start : start + at_once, :]
            scores = scores + (part.unflatten(1, (shared, -1)) if part.shape[1] > 1 else part.unsqueeze(1))
        if causal:
            index = torch.arange(keys, device=query.device)
            future = index > index[start : start + at_once, None]
            scores = scores.masked_fill(future, -torch.inf)
        total = scores.logsumexp(-1)
        weights = (scores - total.unsqueeze(-1)).exp().to(value.dtype)
        outputs.append((weights @ value.unsqueeze(2)).flatten(1, 2))
        sums.append(total.flatten(1, 2))
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def merge(parts: list[Partial]) -> Partial:
    """The attention over the keys of all parts together: each weighs by its share of the whole sum of exponentials."""
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([each for _, each in parts]).logsumexp(0)
    merged = torch.zeros_like(parts[0][0], dtype=total.dtype)
    for output, each in parts:
        merged = torch.addcmul(merged, (each - total).exp().unsqueeze(-1), output.to(merged.dtype))
    return merged.to(parts[0][0].dtype), total

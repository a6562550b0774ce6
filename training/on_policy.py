"""Answers that a model gives itself, in place of the data's: it meets its own mistakes (GKD, arXiv 2306.13649)."""

from typing import Any

import torch

from mixlora.modeling.generation_mixlora import MEDIA
from mixlora.training.objectives import IGNORED
from mixlora.training.teacher import evaluating


def last_answers(labels: torch.Tensor) -> torch.Tensor:
    """Where the last run of labelled tokens of each row begins: LongTensor `[rows]` for `labels` `[rows, length]`."""
    labelled = labels != IGNORED
    begins = labelled & ~torch.nn.functional.pad(labelled[:, :-1], (1, 0))
    places = torch.arange(labels.shape[1], device=labels.device)
    return (begins * places).amax(dim=1)


def resample(model: Any, inputs: dict[str, Any], *, end: int, pad: int, max_new_tokens: int) -> dict[str, Any] | None:
    """A batch whose last answers `model` draws, at temperature 1; None where a row has no prompt (plain text).

    Args:
        inputs: `input_ids`, `attention_mask`, `labels` `[rows, length]`, padded on the right, and media.
        end: the token that ends an answer; pad: that of padding.
        max_new_tokens: an answer is cut here, without an end.

    Returns:
        The same with other answers; labels of earlier answers stay.
    """
    ids, labels, mask = inputs["input_ids"], inputs["labels"], inputs["attention_mask"]
    starts = last_answers(labels)
    if bool((starts < 2).any()):
        return None
    longest = int(starts.max())
    prompts, seen = torch.full((len(ids), longest), pad, device=ids.device), mask.new_zeros(len(ids), longest)
    for row, start in enumerate(starts.tolist()):
        prompts[row, longest - start :] = ids[row, :start]
        seen[row, longest - start :] = 1
    media = {name: value for name, value in inputs.items() if name in MEDIA}
    with evaluating(model):
        drawn = model.generate(
            input_ids=prompts, attention_mask=seen, **media, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=pad,
        )[:, longest:]  # fmt: skip
    rows = []
    for row, start in enumerate(starts.tolist()):
        ends = (drawn[row] == end).nonzero()
        answer = drawn[row, : int(ends[0]) + 1] if len(ends) else drawn[row]
        rows.append((ids[row, :start], labels[row, :start], answer))
    padded = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(before) + len(answer) for before, _, answer in rows], device=ids.device)
    new_ids = padded([torch.cat([before, answer]) for before, _, answer in rows], True, pad)
    new_labels = padded([torch.cat([kept, answer]) for _, kept, answer in rows], True, IGNORED)
    places = torch.arange(new_ids.shape[1], device=ids.device)
    new_mask = (places[None] < lengths[:, None]).to(mask.dtype)
    return {**inputs, "input_ids": new_ids, "attention_mask": new_mask, "labels": new_labels}

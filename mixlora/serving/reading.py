"""Prompts on their way into the batch: media encoded, then read in chunks."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from mixlora.modeling.media_encoding import MediaOutput
from mixlora.serving.batch import Batch
from mixlora.serving.kept import Item, Kept
from mixlora.serving.prompt import KINDS
from mixlora.serving.request import Request


class Prepared:
    """A request's embeddings from its first token on that no kept cache holds. It tells the request its items.

    Attributes:
        embeds: `[1, length, width]`.
        cache: the kept cache of what comes before, or None.
        past: tokens in it.
    """

    def __init__(self, model: Any, request: Request, kept: tuple[Kept, int] | None = None) -> None:
        """
        Raises:
            ValueError: placeholders and features disagree.
        """
        self.request = request
        self.cache: DynamicCache | None = None
        self.past = 0
        request.items = []
        if kept is not None:
            entry, self.past = kept
            self.cache = entry.cache
            request.items = [item for item in entry.items if item.stop <= self.past]
        ids = torch.tensor([request.ids])
        media: dict[str, MediaOutput] = {}
        # what is heard and told of media that are asked about is found anew, also where their tokens lie in the cache
        if model.follows(request.prompt.ids[0]) or len(request.items) < sum(map(len, request.prompt.digests.values())):
            inputs = {
                name: value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
                for name, value in request.prompt.media.items()
            }
            media = model.model.encode_media(ids, **inputs)
            request.items = _items(model, ids[0].tolist(), request.prompt.digests, media)
            assert request.chooser is not None
            guides = model.guides(request.prompt.ids, media, request.chooser.ends)
            if guides:
                request.chooser.follow(guides)
        if media:
            self.embeds = model.model.embed(ids.to(model.device), media)[:, self.past :]
        else:  # all media lie in the kept cache
            self.embeds = model.model.embed(ids[:, self.past :].to(model.device), {})
        self.length = self.embeds.shape[1]


def _items(model: Any, ids: list[int], digests: dict[str, list[bytes]], media: dict[str, MediaOutput]) -> list[Item]:
    """Where each picture and clip of a row stands."""
    items = []
    token_ids = {"image": model.config.image_token_id, "audio": model.config.audio_token_id}
    for kind in KINDS:
        places = [i for i, token in enumerate(ids) if token == token_ids[kind]]
        start = 0
        output = media[kind].pooler_output if kind in media else None
        for digest, features in zip(digests[kind], output or [], strict=True):
            stop = start + len(features)
            items.append(Item(kind, digest, places[start], places[stop - 1] + 1))
            start = stop
    return items


class Reading(Batch):
    """Prompts that are read: several short ones at once, or one in chunks or behind a kept cache."""

    def __init__(self, prepared: list[Prepared]) -> None:
        assert len(prepared) == 1 or all(one.cache is None for one in prepared)
        width = max(one.length for one in prepared)
        device = prepared[0].embeds.device
        past = prepared[0].past
        super().__init__(
            [one.request for one in prepared],
            torch.ones(len(prepared), past, dtype=torch.long, device=device),
            prepared[0].cache,
        )
        pad = torch.nn.functional.pad
        self.embeds = torch.cat([pad(one.embeds, (0, 0, width - one.length, 0)) for one in prepared])
        lengths = torch.tensor([one.length for one in prepared], device=device)
        self.new_mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
        self.row_lengths = lengths + past
        self._read = 0

    def read(self, model: Any, most: int) -> torch.Tensor | None:
        """Reads at most so many columns more; the logits after the last one, `[rows, vocabulary]`, else None."""
        end = min(self._read + most, self.embeds.shape[1])
        chunk = slice(self._read, end)
        logits = self.forward(model, self.embeds[:, chunk], self.new_mask[:, chunk], self.row_lengths)
        self._read = end
        return logits if end == self.embeds.shape[1] else None

    def keep(self, rows: list[int]) -> None:
        """Keeps these rows; what is still to be read too."""
        index = torch.tensor(rows, dtype=torch.long, device=self.mask.device)
        self.embeds, self.new_mask, self.row_lengths = (
            part[index] for part in (self.embeds, self.new_mask, self.row_lengths)
        )
        super().keep(rows)

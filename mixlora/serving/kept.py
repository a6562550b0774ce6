"""Caches of answered turns, kept for the next turn of the same conversation."""

import time
from dataclasses import dataclass

from transformers.cache_utils import DynamicCache

from mixlora.serving.prompt import KINDS, Prompt


@dataclass(frozen=True)
class Item:
    """A picture or clip at its placeholders."""

    kind: str
    """image or audio."""
    digest: bytes
    start: int
    """Its first placeholder's place in the row."""
    stop: int
    """One past its last."""


@dataclass
class Kept:
    """The cached tokens of one conversation."""

    user: str
    adapter_id: int
    modality: str
    ids: list[int]
    asked: int
    """How many of them are the prompt; the others are the answer."""
    items: list[Item]
    cache: DynamicCache
    used: float = 0.0


class KeptCaches:
    """At most so many tokens, the longest unused go first; none is kept longer than `seconds`.

    A cache is only ever found by the user whose request filled it, so nobody can tell from the time an answer takes
    what somebody else asked.
    """

    def __init__(self, most_tokens: int, seconds: float) -> None:
        self.most_tokens, self.seconds = most_tokens, seconds
        self._entries: list[Kept] = []  # the longest unused first

    @property
    def tokens(self) -> int:
        """Tokens in all caches."""
        return sum(len(entry.ids) for entry in self._entries)

    def put(self, entry: Kept) -> None:
        """Keeps a cache."""
        if 0 < len(entry.ids) <= self.most_tokens:
            entry.used = time.monotonic()
            self._entries.append(entry)
            self.drop_old()

    def drop_old(self) -> None:
        """Frees what is over the limits."""
        oldest = time.monotonic() - self.seconds
        self._entries = [entry for entry in self._entries if entry.used > oldest]
        while self.tokens > self.most_tokens:
            self._entries.pop(0)

    def clear(self) -> None:
        """Frees all."""
        self._entries = []

    def find(self, user: str, prompt: Prompt) -> tuple[Kept, int] | None:
        """The cache with the longest beginning of `prompt`, and how many of its tokens can be used.

        It holds at least half of what was asked then: any conversation shares its first few tokens with every other,
        and must not use that one up. At least one token of the prompt is left, since its logits are wanted.
        """
        ids = prompt.ids[0].tolist()
        best, length = None, 0
        for entry in self._entries:
            if (entry.user, entry.adapter_id, entry.modality) != (user, prompt.adapter_id, prompt.modality):
                continue
            shared = _shared(entry, ids[:-1], prompt.digests)
            if shared > length and 2 * shared >= entry.asked:
                best, length = entry, shared
        return None if best is None else (best, length)

    def take(self, entry: Kept, length: int) -> None:
        """Stops to keep a cache, whose first tokens are going to be used, and cuts it to them."""
        self._entries.remove(entry)
        entry.cache.crop(length - len(entry.ids))


def _shared(entry: Kept, ids: list[int], digests: dict[str, list[bytes]]) -> int:
    """Tokens that both begin with, whole items with equal digests included."""
    length = next((i for i, (a, b) in enumerate(zip(entry.ids, ids, strict=False)) if a != b), None)
    length = min(len(entry.ids), len(ids)) if length is None else length
    for kind in KINDS:
        items = [item for item in entry.items if item.kind == kind]
        for item, digest in zip(items, digests[kind], strict=False):
            if item.start < length and (item.stop > length or item.digest != digest):
                length = item.start
    return length

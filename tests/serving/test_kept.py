"""Kept caches: found by their longest beginning, freed by number of tokens and by age."""

import torch
from transformers.cache_utils import DynamicCache

from mixlora.serving.kept import Item, Kept, KeptCaches
from mixlora.serving.prompt import Prompt


def prompt(ids: list[int], digests: list[bytes] | None = None, adapter_id: int = -1) -> Prompt:
    return Prompt(torch.tensor([ids]), {}, {"image": digests or [], "audio": []}, "text", None, adapter_id)


def entry(ids: list[int], items: list[Item] | None = None, user: str = "anna", asked: int | None = None) -> Kept:
    cache = DynamicCache()
    cache.update(torch.arange(len(ids)).float()[None, None, :, None], torch.zeros(1, 1, len(ids), 1), 0)
    return Kept(user, -1, "text", ids, len(ids) if asked is None else asked, items or [], cache)


def found(kept: KeptCaches, *args: object) -> int:
    best = kept.find(*args)  # type: ignore[arg-type]
    return 0 if best is None else best[1]


def test_the_longest_beginning_is_found_and_cut() -> None:
    kept = KeptCaches(100, 60)
    for ids in ([5, 6, 7], [5, 6, 7, 8, 9], [4, 4]):
        kept.put(entry(ids))
    best = kept.find("anna", prompt([5, 6, 7, 8, 1, 2]))
    assert best is not None and best[0].ids == [5, 6, 7, 8, 9] and best[1] == 4
    kept.take(*best)
    assert best[0].cache.layers[0].keys.flatten().tolist() == [0, 1, 2, 3]
    assert kept.tokens == 5, "it is in use now"
    assert found(kept, "anna", prompt([5, 6, 7])) == 2, "one token is left to be read"
    assert found(kept, "bob", prompt([5, 6, 7, 8])) == 0
    assert found(kept, "anna", prompt([5, 6, 7, 8], adapter_id=1)) == 0


def test_a_few_shared_tokens_are_not_worth_another_conversation() -> None:
    kept = KeptCaches(100, 60)
    kept.put(entry([1, 2, 3, 4, 5, 6, 7, 8], asked=6))
    assert found(kept, "anna", prompt([1, 2, 9, 9])) == 0
    assert found(kept, "anna", prompt([1, 2, 3, 9])) == 3, "half of what was asked: the same question, told anew"


def test_items_must_be_equal_and_whole() -> None:
    kept = KeptCaches(100, 60)
    kept.put(entry([5, 1, 1, 1, 6, 1, 1, 7], [Item("image", b"a", 1, 4), Item("image", b"b", 5, 7)]))
    assert found(kept, "anna", prompt([5, 1, 1, 1, 6, 1, 1, 7, 8], [b"a", b"b"])) == 8
    assert found(kept, "anna", prompt([5, 1, 1, 1, 6, 1, 1, 7, 8], [b"a", b"c"])) == 5
    assert found(kept, "anna", prompt([5, 1, 1, 1, 6, 1, 8], [b"a", b"b"])) == 5, "the second has fewer places now"
    assert found(kept, "anna", prompt([5, 1, 1, 1, 6, 1, 1, 7, 8], [b"c", b"b"])) == 0


def test_limits() -> None:
    kept = KeptCaches(8, 60)
    for first in (1, 2, 3):
        kept.put(entry([first] * 3))
    assert kept.tokens == 6 and found(kept, "anna", prompt([1] * 4)) == 0 and found(kept, "anna", prompt([2] * 4)) == 3
    kept.put(entry([4] * 9))
    assert kept.tokens == 6, "too long to be kept"
    kept.seconds = 0.0
    kept.drop_old()
    assert kept.tokens == 0

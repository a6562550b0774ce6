"""Sparse blocks by `flex_attention`: the same pairs as the parts of plain torch read, and no tile left out."""

import pytest
import torch

from mixlora.modeling import sparse_flex, sparse_prefill
from mixlora.modeling.sparse_prefill import Budget, SparsePrefill, attend_sparsely, choose, exact, sparse_blocks
from tests.modeling.test_sparse_prefill import stretch

CASES = [(0, 40, 1), (3, 16, 1), (37, 21, 2), (48, 40, 3), (133, 60, 3)]
BUDGETS = [(0, 1), (3, 2), (6, 4), (1000, 1000)]
BLOCK = 4
SETTINGS = SparsePrefill(min_length=1, block_size=BLOCK, segment=60, sinks=2)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("first", "queries", "regions"), CASES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_it_is_what_the_parts_give(
    first: int, queries: int, regions: int, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    each = stretch(first, queries, regions, seed=first)
    (wanted, wanted_total), _ = attend_sparsely([each], budget, SETTINGS)
    monkeypatch.setattr(sparse_prefill, "goes_by_flex", lambda *args: True)
    (output, total), pairs = attend_sparsely([each], budget, SETTINGS)
    assert (output - wanted).abs().max() < 1e-5 and (total - wanted_total).abs().max() < 1e-5
    assert pairs > 0


@pytest.mark.parametrize("tile", [8, 16])
@pytest.mark.parametrize(("first", "queries", "regions"), CASES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_tiles_hold_every_pair(
    first: int, queries: int, regions: int, budget: Budget, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel skips tiles that are not visited: none of them may hold a pair that is seen."""
    monkeypatch.setattr(sparse_flex, "TILE", tile)
    each, blocks = stretch(first, queries, regions, seed=first), sparse_blocks(queries, BLOCK)
    end, forced = first + blocks * BLOCK, max(SETTINGS.sinks, first % BLOCK)
    columns, diagonals = choose(exact(each, blocks * BLOCK, end, BLOCK)[1], end, BLOCK, budget, forced)
    places = sparse_flex.key_places(each, columns, blocks, BLOCK, tile)
    assert len(places) % tile == 0
    for low, high, _ in each.queries:
        mask = sparse_flex.block_mask(each, places, diagonals, blocks, BLOCK, (low, high))
        query, place = torch.arange(blocks * BLOCK)[:, None], torch.arange(len(places))
        seen = mask.mask_mod(0, 0, query, place)
        rows = -len(query) % tile
        tiles = torch.nn.functional.pad(seen, (0, 0, 0, rows)).unflatten(0, (-1, tile)).unflatten(2, (-1, tile))
        needed, visited = tiles.any(3).any(1), mask.to_dense()[0, 0].bool()
        assert bool((visited | ~needed).all())

"""Sparse prefill: what is read is what was chosen, all of it gives dense attention, and short prompts stay dense."""

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from mixlora.modeling.configuration_mixlora import MixLoraTextConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.sparse_parts import Stretch
from mixlora.modeling.sparse_prefill import SparsePrefill, attend_sparsely, choose, exact, sparse_blocks
from tests.modeling.model_fixtures import batch_inputs, tiny_model
from tests.modeling.test_long_rows import SPEC, close, long_row
from tests.modeling.test_rope_switch import text_row

BLOCK, DIM = 4, 8
SETTINGS = SparsePrefill(min_length=1, block_size=BLOCK, segment=4 * BLOCK, sinks=2)
SIZES = {"min_length": 40, "block_size": BLOCK, "segment": 4 * BLOCK, "sinks": 2}
ALL, FEW = [1000, 1000], [3, 2]


def stretch(first: int, queries: int, regions: int = 1, seed: int = 0) -> Stretch:
    """Random queries for one to three regions of keys, the borders of which lie anywhere."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, first + queries, DIM, generator=generator, dtype=torch.double)
    borders = [0, *sorted(torch.randperm(first, generator=generator)[: regions - 1].tolist()), first + queries]
    turned = tuple(
        (low, high, torch.randn(queries, DIM, generator=generator, dtype=torch.double))
        for low, high in zip(borders, borders[1:], strict=False)
    )
    return Stretch(turned, key, value, first, 1.5)


def masked(each: Stretch, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the pairs `seen` `[queries, keys]`."""
    scores = torch.cat([query @ each.key[low:high].T for low, high, query in each.queries], -1) * each.scale
    scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ each.value, scores.logsumexp(-1)


def causal(each: Stretch) -> torch.Tensor:
    own = each.first + torch.arange(each.length)
    return torch.arange(each.last) <= own[:, None]


@pytest.mark.parametrize(
    ("first", "queries", "regions"),
    [(0, 23, 1), *((*sizes, regions) for sizes in [(3, 16), (37, 21), (48, 40), (21, 7)] for regions in (1, 2, 3))],
)
@pytest.mark.parametrize("budget", [(0, 1), (3, 2), (6, 4), (1000, 1000), (0, 1000)])
def test_what_is_read_is_what_was_chosen(first: int, queries: int, regions: int, budget: tuple[int, int]) -> None:
    """Pair by pair: a column, a diagonal of blocks, or the end of the stretch."""
    each = stretch(first, queries, regions)
    seen = chosen_pairs([each], budget)[0]
    (output, total), pairs = attend_sparsely([each], budget, SETTINGS)
    wanted, wanted_total = masked(each, seen)
    assert (output - wanted).abs().max() < 1e-12 and (total - wanted_total).abs().max() < 1e-12
    assert pairs >= int(seen.sum())
    if budget == ALL or not sparse_blocks(queries, BLOCK):
        assert bool((seen == causal(each)).all())


def chosen_pairs(stretches: list[Stretch], budget: tuple[int, int]) -> list[torch.Tensor]:
    """For each stretch, which of its pairs are read."""
    first, last = stretches[0].first, stretches[-1].last
    end = first + sparse_blocks(last - first, BLOCK) * BLOCK
    looked = torch.zeros(2, last, dtype=torch.double)
    for each in stretches:
        weights = exact(each, 0, end, BLOCK)[1]
        looked[:, : each.last] += weights
    blocks = [max(min(each.last, end) - each.first, 0) // BLOCK for each in stretches]
    forced = max(SETTINGS.sinks, *(each.first % BLOCK for each in stretches))
    found = [causal(each) for each in stretches]
    if not any(blocks):
        return found
    columns, diagonals = choose(looked, end, BLOCK, budget, forced)
    for each, count, seen in zip(stretches, blocks, found, strict=True):
        for i in range(count * BLOCK):
            for j in range(each.first + i + 1):
                apart = i // BLOCK - (j - each.first) // BLOCK
                in_block = j >= each.first % BLOCK and bool(diagonals[apart])
                seen[i, j] = in_block or (j in columns.tolist() and apart >= 1)
    return found


@pytest.mark.parametrize("first", [0, 37, 48])
@pytest.mark.parametrize("sizes", [(16, 16, 12), (5, 30, 21), (20, 24, 2), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("budget", [(0, 1), (3, 2), (6, 4), (1000, 1000)])
def test_a_segment_reads_what_its_end_chose_in_every_chunk(
    first: int, sizes: tuple[int, ...], budget: tuple[int, int]
) -> None:
    """Borders of chunks lie anywhere; each chunk has its own regions and rotations."""
    stretches, key = [], stretch(first, sum(sizes)).key
    for seed, size in enumerate(sizes):
        turned = stretch(first, size, 1 + 2 * (first > 0), seed).queries
        stretches.append(
            Stretch(turned[:-1] + ((*turned[-1][:1], first + size, turned[-1][2]),), key, key, first, 1.5)
        )
        first += size
    (output, total), pairs = attend_sparsely(stretches, budget, SETTINGS)
    seen = chosen_pairs(stretches, budget)
    parts = [masked(each_up_to(each), mine) for each, mine in zip(stretches, seen, strict=True)]
    assert (output - torch.cat([each for each, _ in parts])).abs().max() < 1e-12
    assert (total - torch.cat([each for _, each in parts])).abs().max() < 1e-12
    assert pairs >= sum(int(each.sum()) for each in seen)
    if budget == ALL:
        assert all(bool((mine == causal(each)).all()) for each, mine in zip(stretches, seen, strict=True))


def test_the_most_looked_at_is_chosen() -> None:
    blocks = 5
    weights = torch.full((BLOCK, 64), 1e-4)
    weights[:, 17] = 0.3  # a column
    for i in range(BLOCK):
        weights[i, 40 + blocks * BLOCK + i - 3 * BLOCK] = 0.2  # a diagonal
    columns, diagonals = choose(weights.sum(0).repeat(2, 1), 40 + blocks * BLOCK, BLOCK, (1, 3), 2)
    assert columns.tolist() == [0, 1, 17]
    assert diagonals.nonzero().flatten().tolist() == [0, 1, 3]


def test_a_head_with_few_columns_keeps_its_attention_at_little_cost() -> None:
    """Keys that all look at, and the nearest ones, among many that nobody looks at."""
    generator = torch.Generator().manual_seed(0)
    length, spec = 2048, SparsePrefill(1, 64, 512, 4)
    place = torch.eye(DIM, dtype=torch.double)[0]
    key = 0.05 * torch.randn(length, DIM, generator=generator, dtype=torch.double)
    key[[1, 700, 701, 1300]] += 3 * place
    query = 0.05 * torch.randn(length, DIM, generator=generator, dtype=torch.double) + 4 * place
    share = 0
    for first in range(0, length, 512):
        last = first + 512
        each = Stretch(((0, last, query[first:last]),), key, key, first, 1.0)
        (_, total), pairs = attend_sparsely([each], (8, 2), spec)
        recall = (total - masked(each_up_to(each), causal(each))[1]).exp()
        assert recall.min() > 0.97
        share += pairs
    assert share < 0.25 * length**2 / 2 + length * 128


def each_up_to(each: Stretch) -> Stretch:
    """Without the keys behind its last query."""
    return Stretch(each.queries, each.key[: each.last], each.value[: each.last], each.first, each.scale)


def sparse_model(budget: Any, chunked: bool = False, **changes: Any) -> MixLoraForConditionalGeneration:
    model = tiny_model()
    spec = SIZES | {"budgets": [[budget] * 4] * 2} | changes
    model.config.set_long_context(sparse_prefill=spec, long_context=SPEC if chunked else None)
    return model


def long_batch(side: str = "left") -> dict[str, torch.Tensor]:
    """Text, a picture and two clips; one row is too short to be read sparsely."""
    return batch_inputs([text_row(97), long_row("image", 75), long_row("two_clips", 60), text_row(33)], side)


@torch.no_grad()
@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "dual chunk"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("budget", [ALL, None], ids=["all keys", "dense heads"])
def test_reading_everything_is_dense(budget: Any, side: str, chunked: bool) -> None:
    batch = {name: each.double() if each.is_floating_point() else each for name, each in long_batch(side).items()}
    real = batch["attention_mask"].bool()
    dense = sparse_model(budget, chunked, min_length=1000).double()(**batch).logits[real]
    found = sparse_model(budget, chunked).double()(**batch).logits[real]
    assert (found - dense).abs().max() < 1e-11 * dense.std()


@torch.no_grad()
@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "dual chunk"])
def test_a_row_is_read_as_if_alone(chunked: bool) -> None:
    """Keys are chosen by the row's own queries, whatever its neighbours and its padding."""
    model, batch = sparse_model(FEW, chunked), long_batch()
    found = model(**batch).logits
    dense = sparse_model(FEW, chunked, min_length=1000)(**batch).logits
    alone = [text_row(97), long_row("image", 75), long_row("two_clips", 60), text_row(33)]
    for i, row in enumerate(alone):
        real = batch["attention_mask"][i].bool()
        assert close(found[i][real], model(**batch_inputs([row])).logits[0]), i
        assert close(found[i][real], dense[i][real]) == (i == 3), i  # the others are sparse indeed


@torch.no_grad()
def test_short_prompts_and_steps_keep_their_bits() -> None:
    plain, model = tiny_model(), sparse_model(FEW)
    batch = batch_inputs([text_row(39), text_row(12)])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    assert torch.equal(model.generate(**batch, **options), plain.generate(**batch, **options))
    long = batch_inputs([text_row(80)])
    model.set_attn_implementation({"text_config": "eager"})
    plain.set_attn_implementation({"text_config": "eager"})
    assert torch.equal(model(**long).logits, plain(**long).logits)


def test_gradients_are_dense() -> None:
    plain, model = tiny_model(), sparse_model(FEW)
    batch = batch_inputs([text_row(80)])
    assert torch.equal(model(**batch).logits, plain(**batch).logits)


@torch.no_grad()
@pytest.mark.parametrize("chunked", [False, True], ids=["plain", "dual chunk"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 30}, {"cache_implementation": "static"}], ids=str)
def test_generation_with_every_key_is_dense(options: dict[str, Any], chunked: bool) -> None:
    shared = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    dense = sparse_model(ALL, chunked, min_length=1000)
    assert torch.equal(
        sparse_model(ALL, chunked).generate(**long_batch(), **shared, **options),
        dense.generate(**long_batch(), **shared),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segment": 6}, r"segment \(6\) is not a multiple of block_size \(4\)"),
        ({"min_length": 0}, "min_length must be an integer of at least 1"),
        ({"budgets": [[None] * 4]}, "budgets must be a list of 2 layers, each a list of 4 heads"),
        (
            {"budgets": [[None] * 4, [None, [1], None, None]]},
            r"budgets\[1\]\[1\] must be \[columns, diagonals\] or null",
        ),
        ({"budgets": [[None] * 4, [[5, 0]] * 4]}, r"budgets\[1\]\[0\]\[1\] must be an integer of at least 1"),
        ({"top_k": 3}, r"unknown \['top_k'\]"),
    ],
)
def test_wrong_settings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    spec = SIZES | {"budgets": [[None] * 4] * 2} | change
    with pytest.raises(StrictDataclassError, match=message):
        MixLoraTextConfig(num_hidden_layers=2, num_attention_heads=4, sparse_prefill=spec)

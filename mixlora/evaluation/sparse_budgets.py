"""How many columns and diagonals each head of a long prompt needs: the search for the budgets of sparse prefill."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mixlora.modeling.long_context_config import SPARSE_PREFILL
from mixlora.modeling.sparse_parts import Stretch
from mixlora.modeling.sparse_prefill import Budget, SparsePrefill, attend_sparsely, sparse_blocks

COLUMNS = (64, 256, 1024, 4096)
DIAGONALS = (2, 8, 32, 128)


@dataclass
class Tried:
    """What a budget gave to one head.

    Attributes:
        recalls: for each block of queries, the share of its attention that falls on the keys read.
        pairs: scores that were computed.
    """

    recalls: list[float] = field(default_factory=list)
    pairs: int = 0

    @property
    def recall(self) -> float:
        """The mean over blocks of queries."""
        return sum(self.recalls) / len(self.recalls)


class BudgetProbe:
    """Tries budgets on every head while a prompt is read densely.

    Args:
        spec: the sizes.
        budgets: those to try on each head; by default its own in `spec`, and none on a dense head.
    """

    def __init__(self, spec: SparsePrefill, budgets: Sequence[Budget] | None = None):
        self.spec, self.budgets = spec, budgets
        self.heads: dict[tuple[int, int], dict[Budget, Tried]] = {}
        self.dense: dict[tuple[int, int], int] = {}

    def __call__(self, layer: int, head: int, stretches: list[Stretch], total: torch.Tensor) -> None:
        """`total` `[queries]`: the log-sum-exp of the queries over all keys that they see."""
        own = self.budgets if self.budgets is not None else [each for each in [self.spec.budgets[layer][head]] if each]
        tried = self.heads.setdefault((layer, head), {budget: Tried() for budget in own})
        visible = len(total) * stretches[0].first + len(total) * (len(total) + 1) // 2
        self.dense[layer, head] = self.dense.get((layer, head), 0) + visible
        block = self.spec.block_size
        for budget, found in tried.items():
            (_, sparse), pairs = attend_sparsely(stretches, budget, self.spec)
            found.pairs += pairs
            shares = (sparse - total).exp().clamp(max=1)[: sparse_blocks(len(total), block) * block]
            found.recalls += shares.unflatten(0, (-1, block)).mean(-1).tolist()


@dataclass(frozen=True)
class HeadBudget:
    """The outcome for one head.

    Attributes:
        budget: None where it stays dense.
        recalls: by block of queries; 1 where it stays dense.
        share: scores that are computed, of those that a causal mask leaves.
    """

    layer: int
    head: int
    budget: Budget | None
    recalls: list[float]
    share: float


@torch.no_grad()
def measure(model: Any, batch: dict[str, Any]) -> list[HeadBudget]:
    """What the budgets of a model's `sparse_prefill` give on other prompts than those that they were found on.

    Args:
        batch: inputs as for `generate`.

    Raises:
        ValueError: the model has no budgets, or its attention is eager.
    """
    spec = SparsePrefill.of(model.config.text_config)
    if spec is None:
        raise ValueError("measure: config.text_config.sparse_prefill is not set")
    probe = _probed(model, [batch], BudgetProbe(spec))
    found = []
    for (layer, head), tried in sorted(probe.heads.items()):
        dense = probe.dense[layer, head]
        budget, own = next(iter(tried.items()), (None, Tried([1.0], dense)))
        found.append(HeadBudget(layer, head, budget, own.recalls, own.pairs / dense))
    return found


def _probed(model: Any, batches: Iterable[dict[str, Any]], probe: BudgetProbe) -> BudgetProbe:
    if model.config.text_config._attn_implementation == "eager":
        raise ValueError("eager attention is never sparse: load the model with attn_implementation='sdpa'")
    for batch in batches:
        model(**batch, use_cache=False, logits_to_keep=1, probe=probe)
    return probe


def choose_budget(
    layer: int, head: int, tried: dict[Budget, Tried], dense: int, recall: float, most: float
) -> HeadBudget:
    """The cheapest budget that reaches the recall with at most this share of the scores, or a dense head."""
    enough = [(each.pairs, budget) for budget, each in tried.items() if each.recalls and each.recall >= recall]
    pairs, best = min(enough, default=(dense, None))
    if best is None or pairs > most * dense:
        return HeadBudget(layer, head, None, [1.0], 1.0)
    return HeadBudget(layer, head, best, tried[best].recalls, pairs / dense)


@torch.no_grad()
def calibrate(
    model: Any,
    batches: Iterable[dict[str, Any]],
    recall: float = 0.95,
    most: float = 0.25,
    columns: Sequence[int] = COLUMNS,
    diagonals: Sequence[int] = DIAGONALS,
    **sizes: int,
) -> tuple[dict[str, Any], list[HeadBudget]]:
    """Budgets that keep `recall` of each head's attention on long prompts.

    The recall of a query is `exp(lse_sparse - lse_full)`: the share of its attention that falls on the keys read
    (Qwen2.5-1M, arXiv 2501.15383, section 4.3). A head that can't reach it under the share `most` stays dense.

    Args:
        model: a `MixLoraForConditionalGeneration`; any attention but eager.
        batches: inputs as for `generate`, of prompts as long as those to come.
        recall: mean over the blocks of queries that are read sparsely.
        most: the largest share of the scores that a sparse head may compute.
        columns, diagonals: budgets to try, each with each.
        sizes: `min_length`, `block_size`, `segment`, `sinks`, see [`SparsePrefill`].

    Returns:
        `sparse_prefill` for the config (`model.config.set_long_context(sparse_prefill=...)`), which `save_pretrained`
        keeps; and what was found for each head.

    Raises:
        ValueError: the attention is eager, or no prompt is long enough to be read sparsely.
    """
    config = model.config.text_config
    full = SPARSE_PREFILL | sizes
    spec = SparsePrefill(full["min_length"], full["block_size"], full["segment"], full["sinks"])
    tries = [(column, diagonal) for column in columns for diagonal in diagonals]
    probe = _probed(model, batches, BudgetProbe(spec, tries))
    if not any(each.recalls for tried in probe.heads.values() for each in tried.values()):
        raise ValueError(
            f"calibrate: no prompt of at least {spec.min_length} tokens and {2 * spec.block_size} new ones"
        )
    heads = [
        choose_budget(layer, head, tried, probe.dense[layer, head], recall, most)
        for (layer, head), tried in sorted(probe.heads.items())
    ]
    budgets: list[list[list[int] | None]] = [[] for _ in range(config.num_hidden_layers)]
    for each in heads:
        budgets[each.layer].append(None if each.budget is None else list(each.budget))
    return full | {"budgets": budgets}, heads

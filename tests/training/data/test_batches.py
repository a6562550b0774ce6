"""Batch plans: budgets, weights, epochs, and the same plan for the same seed."""

from collections import Counter

from mixlora.training.data.batches import plan_batches

LENGTHS = [3 + (i * 7) % 40 for i in range(100)]
ONES = [1.0] * 100


def test_budget_holds_and_every_row_is_seen_once() -> None:
    plan = plan_batches(LENGTHS, ONES, tokens_per_batch=128, epochs=1)
    assert sorted(i for batch in plan for i in batch) == list(range(100))
    assert all(len(batch) * max(LENGTHS[i] for i in batch) <= 128 for batch in plan)
    padded = sum(len(batch) * max(LENGTHS[i] for i in batch) for batch in plan)
    assert padded < 1.15 * sum(LENGTHS)


def test_a_row_over_the_budget_is_alone() -> None:
    assert list(plan_batches([10, 500], [1, 1], tokens_per_batch=64, epochs=1, seed=0)) in ([[0], [1]], [[1], [0]])


def test_same_seed_same_plan_and_epochs_differ() -> None:
    plan = plan_batches(LENGTHS, ONES, rows_per_batch=10, epochs=2, seed=3)
    assert plan.batches == plan_batches(LENGTHS, ONES, rows_per_batch=10, epochs=2, seed=3).batches
    assert plan.batches != plan_batches(LENGTHS, ONES, rows_per_batch=10, epochs=2, seed=4).batches
    assert len(plan) == 20 and plan.batches[:10] != plan.batches[10:]


def test_weights_and_partial_epochs() -> None:
    weights = [2.0] * 50 + [0.5] * 50
    seen = Counter(i for batch in plan_batches(LENGTHS, weights, rows_per_batch=5, epochs=20) for i in batch)
    assert all(seen[i] == 40 for i in range(50))
    assert 400 < sum(seen[i] for i in range(50, 100)) < 600
    assert len(plan_batches(LENGTHS, ONES, rows_per_batch=10, epochs=1.5)) == 15


def test_number_of_batches() -> None:
    assert len(plan_batches(LENGTHS, ONES, rows_per_batch=10, num_batches=23)) == 23

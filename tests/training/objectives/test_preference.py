"""Preference losses against hand-worked numbers."""

import math
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from mixlora.training.objectives import PREFERENCES, chunks, preference_loss, sequence_log_probs

# Two pairs; over the reference the chosen answers gained 2 and -1, the rejected ones -1 and 3: margins 3 and -4.
CHOSEN, REJECTED = torch.tensor([-8.0, -11.0]), torch.tensor([-13.0, -5.0])
REFERENCE_CHOSEN, REFERENCE_REJECTED = torch.tensor([-10.0, -10.0]), torch.tensor([-12.0, -8.0])
REFERENCE = REFERENCE_CHOSEN, REFERENCE_REJECTED


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("sigmoid", {}, (-math.log(sigmoid(0.3)) - math.log(sigmoid(-0.4))) / 2),
        (
            "sigmoid",
            {"label_smoothing": 0.1},
            -0.45 * (math.log(sigmoid(0.3)) + math.log(sigmoid(-0.4)))
            - 0.05 * (math.log(sigmoid(-0.3)) + math.log(sigmoid(0.4))),
        ),
        ("hinge", {}, (0.7 + 1.4) / 2),
        ("hinge", {"beta": 1.0}, (0.0 + 5.0) / 2),
        ("ipo", {}, ((3 - 5) ** 2 + (-4 - 5) ** 2) / 2),
        # The means are 0.5 and 1.
        ("kto_pair", {}, 1 - (sigmoid(0.1) + sigmoid(-0.2) + sigmoid(0.15) + sigmoid(-0.25)) / 4),
    ],
)
def test_losses_are_those_worked_by_hand(kind: str, options: dict, expected: float) -> None:
    loss = preference_loss(CHOSEN, REJECTED, *REFERENCE, kind=kind, **options)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in PREFERENCES if kind != "kto_pair"])
def test_shares_of_the_pairs_add_up(kind: str) -> None:
    """Those of ranks with one pair, another one, and none; of kto_pair see below."""
    whole = preference_loss(CHOSEN, REJECTED, *REFERENCE, kind=kind)
    parts = [[x[part] for x in (CHOSEN, REJECTED, *REFERENCE)] for part in (slice(0, 1), slice(1, 2), slice(0, 0))]
    shares = [preference_loss(*part, kind=kind, num_pairs=torch.tensor(2)) for part in parts]
    torch.testing.assert_close(sum(shares), whole)
    assert shares[2] == 0


@pytest.mark.parametrize("kind", PREFERENCES)
def test_without_a_reference_all_references_are_alike(kind: str) -> None:
    zeros = torch.zeros(2)
    expected = preference_loss(CHOSEN, REJECTED, zeros, zeros, kind=kind)
    assert preference_loss(CHOSEN, REJECTED, kind=kind) == expected


def gradient(**options: bool) -> torch.Tensor:
    chosen = CHOSEN.clone().requires_grad_()
    preference_loss(chosen, REJECTED, *REFERENCE, kind="kto_pair", **options).backward()
    assert chosen.grad is not None
    return chosen.grad


def test_the_baseline_of_kto_has_no_gradient_but_in_the_released_form() -> None:
    def slope(x: float) -> float:
        return 0.1 * sigmoid(x) * (1 - sigmoid(x)) / 4

    own = torch.tensor([-slope(0.1), -slope(-0.2)])
    torch.testing.assert_close(gradient(), own)
    through_baseline = -(slope(0.15) + slope(-0.25)) / 2
    torch.testing.assert_close(gradient(llavamod_compat=True), own + through_baseline)


def _one_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    pairs = slice(0, 1) if rank == 0 else slice(1, 3)
    values = [torch.cat([x, x[:1] + 1])[pairs] for x in (CHOSEN, REJECTED, *REFERENCE)]
    torch.save(preference_loss(*values, kind="kto_pair", num_pairs=3), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_baseline_of_kto_is_that_of_all_ranks(tmp_path: Path) -> None:
    """One pair on a rank and two on the other give what the three give in one process."""
    multiprocessing.spawn(_one_rank, args=(str(tmp_path),), nprocs=2)
    total = sum(torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    whole = [torch.cat([x, x[:1] + 1]) for x in (CHOSEN, REJECTED, *REFERENCE)]
    torch.testing.assert_close(total, preference_loss(*whole, kind="kto_pair"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dpo"}, "kind 'dpo' is not one of sigmoid"),
        ({"beta": 0.0}, "beta must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "for ipo"),
        ({"reference_rejected": None}, "give both"),
        ({"reference_rejected": torch.zeros(3)}, "same shape"),
        ({"policy_chosen": torch.zeros(2, 1)}, "same shape"),
    ],
)
def test_wrong_input_is_named(change: dict, message: str) -> None:
    given = {"policy_chosen": CHOSEN, "policy_rejected": REJECTED}
    given |= {"reference_chosen": REFERENCE_CHOSEN, "reference_rejected": REFERENCE_REJECTED}
    with pytest.raises(ValueError, match=message):
        preference_loss(**(given | change))


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_log_probabilities_are_summed_by_row(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk * 13 * 8)
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    head = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    targets, rows = torch.randint(13, (9,)), torch.tensor([0, 0, 2, 2, 2, 0, 1, 1, 2])
    each = (hidden @ head.T).log_softmax(-1)[torch.arange(9), targets]
    expected = torch.stack([each[rows == row].sum() for row in range(4)])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    wanted = torch.autograd.grad(expected @ weights, [hidden, head])
    found = sequence_log_probs(hidden, head, targets, rows, 4)
    (found @ weights).backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((hidden.grad, head.grad), wanted)

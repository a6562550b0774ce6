"""Objectives on small literal tensors."""

import pytest
import torch

from mixlora.training.objectives import next_token_loss, supervised_positions


def test_positions_are_those_before_a_label() -> None:
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, -100, -100, -100, 7]])
    positions, targets = supervised_positions(labels)
    assert positions.tolist() == [1, 2, 3]
    assert targets.tolist() == [[5, 6, -100], [-100, -100, 7]]


def test_loss_is_normalised_by_the_tokens_of_the_step() -> None:
    logits, targets = torch.randn(2, 3, 11), torch.tensor([[5, 6, -100], [-100, -100, 7]])
    log_probabilities = logits.log_softmax(-1)
    expected = -(log_probabilities[0, 0, 5] + log_probabilities[0, 1, 6] + log_probabilities[1, 2, 7])
    torch.testing.assert_close(next_token_loss(logits, targets), expected / 3)
    torch.testing.assert_close(next_token_loss(logits, targets, 12), expected / 12)


def test_no_target_gives_zero_and_no_gradient() -> None:
    logits = torch.randn(1, 2, 5, requires_grad=True)
    loss = next_token_loss(logits, torch.full((1, 2), -100))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        next_token_loss(torch.randn(1, 2, 5), torch.zeros(1, 3, dtype=torch.long))

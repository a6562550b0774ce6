"""Projectors and what is done to their tokens."""

import torch

from mixlora.modeling.projectors import compress_by_ctc

BLANK = 0


def embeddings() -> torch.Tensor:
    """Six tokens, each its own direction."""
    return torch.eye(6)


def heard(*tokens: int) -> torch.Tensor:
    """Projected tokens that are heard as these, beyond doubt."""
    return 20 * embeddings()[list(tokens)]


def test_repeats_are_joined_and_silence_goes_to_the_front() -> None:
    clip = heard(BLANK, 3, 3, BLANK, 3, 1, BLANK, BLANK, 5)
    expected = embeddings()[[BLANK] * 5 + [3, 3, 1, 5]]
    torch.testing.assert_close(compress_by_ctc(clip, embeddings(), BLANK), expected)


def test_doubt_is_kept_as_an_expectation() -> None:
    doubtful = torch.tensor([[0.0, 0, 0, 0.02, 0.01, 0]])
    chances = (10 * doubtful @ embeddings().T).softmax(-1)
    torch.testing.assert_close(compress_by_ctc(doubtful, embeddings(), BLANK), chances)


def test_silence_alone_and_no_token_at_all() -> None:
    silent = compress_by_ctc(heard(BLANK, BLANK), embeddings(), BLANK)
    torch.testing.assert_close(silent, embeddings()[[BLANK, BLANK]])
    assert compress_by_ctc(torch.zeros(0, 6), embeddings(), BLANK).shape == (0, 6)


def test_the_projector_still_learns() -> None:
    clip = torch.randn(7, 6, requires_grad=True)
    (compress_by_ctc(clip, torch.randn(6, 6), BLANK) ** 2).sum().backward()
    assert clip.grad is not None and clip.grad.abs().sum() > 0

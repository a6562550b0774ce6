"""Projectors and what is done to their tokens."""

import torch

from mixlora.modeling.projectors import CTC_SHARPNESS, WhiteningProjector, compress_by_ctc

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


def test_a_fitted_basis_spreads_the_embeddings_evenly() -> None:
    torch.manual_seed(0)
    table = torch.randn(500, 6) * torch.tensor([30.0, 3, 1, 1, 0.3, 0.1]) + 5  # few directions hold nearly all
    projector = WhiteningProjector(4, 6)
    projector.fit(table)
    rows = CTC_SHARPNESS * (table - table.mean(0)) @ projector.basis.T
    torch.testing.assert_close(rows.norm(dim=-1).mean(), torch.tensor(1.0))
    covariance = rows.T @ rows / len(rows)
    torch.testing.assert_close(covariance, torch.eye(6) * covariance.diagonal().mean(), atol=1e-4, rtol=1e-4)
    before = projector.basis.clone()
    projector.fit(2 * table)  # once only: what was learnt since would mean something else
    assert torch.equal(projector.basis, before)

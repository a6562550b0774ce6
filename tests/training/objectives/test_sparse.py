"""Losses from a few tokens of a teacher's distribution, against the whole distribution."""

import pytest
import torch

from mixlora.training.objectives import known_tokens, mimic_loss, sparse_mimic_loss

TOKENS, WIDTH, VOCABULARY = 5, 4, 11


@pytest.fixture
def parts() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "student_hidden": draw(TOKENS, WIDTH).requires_grad_(),
        "student_head": draw(VOCABULARY, WIDTH).requires_grad_(),
        "teacher_hidden": draw(TOKENS, 6),
        "teacher_head": draw(VOCABULARY, 6),
    }


def student(parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return parts["student_hidden"], parts["student_head"]


def gradients(loss: torch.Tensor, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, student(parts))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_likeliest_tokens_and_a_tail_by_hand(
    parts: dict[str, torch.Tensor], temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mixlora.training.objectives.chunks.CHUNK_BYTES", 2 * VOCABULARY * 8)  # two tokens a chunk
    ids, log_q = known_tokens(parts["teacher_hidden"], parts["teacher_head"], 3, temperature=temperature)
    q = (parts["teacher_hidden"] @ parts["teacher_head"].T / temperature).softmax(-1)
    p = (parts["student_hidden"] @ parts["student_head"].T / temperature).softmax(-1)
    expected = p.new_zeros(())
    for token in range(TOKENS):
        best = q[token].argsort(descending=True)[:3]
        assert ids[token].tolist() == best.tolist()
        buckets = [torch.cat([each[token][best], 1 - each[token][best].sum()[None]]) for each in (q, p)]
        expected = expected + (buckets[0] * (buckets[0] / buckets[1]).log()).sum()
    loss = sparse_mimic_loss(*student(parts), ids, log_q, temperature=temperature)
    torch.testing.assert_close(loss, expected / TOKENS, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(gradients(loss, parts), gradients(expected / TOKENS, parts), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_the_likeliest_tokens_tell_no_more_than_the_whole(parts: dict[str, torch.Tensor]) -> None:
    whole = mimic_loss(*student(parts), parts["teacher_hidden"], parts["teacher_head"], torch.ones(TOKENS))
    losses = []
    for count in (1, 4, VOCABULARY - 1):
        known = known_tokens(parts["teacher_hidden"], parts["teacher_head"], count)
        losses.append(sparse_mimic_loss(*student(parts), *known))
    assert losses[0] < losses[1] < whole
    torch.testing.assert_close(losses[2], whole, rtol=1e-9, atol=1e-9)  # a tail of one token is known too


def test_drawn_tokens_are_unbiased_in_value_and_gradient(parts: dict[str, torch.Tensor]) -> None:
    whole = mimic_loss(*student(parts), parts["teacher_hidden"], parts["teacher_head"], torch.ones(TOKENS))
    count = 200_000
    known = known_tokens(
        parts["teacher_hidden"],
        parts["teacher_head"],
        count,
        kind="sample",
        generator=torch.Generator().manual_seed(1),
    )
    loss = sparse_mimic_loss(*student(parts), *known, kind="sample")
    torch.testing.assert_close(loss, whole, rtol=0.02, atol=0)
    for found, wanted in zip(gradients(loss, parts), gradients(whole, parts), strict=True):
        assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_draws_follow_the_distribution() -> None:
    ids, log_q = known_tokens(torch.ones(1, 1), torch.tensor([[0.7], [0.2], [0.1]]).log(), 100_000, kind="sample")
    shares = ids[0].bincount(minlength=3) / 100_000
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=0.01)
    torch.testing.assert_close(log_q[0].exp(), torch.tensor([0.7, 0.2, 0.1])[ids[0]], rtol=1e-5, atol=1e-5)


def test_equal_models_and_no_tokens_cost_nothing(parts: dict[str, torch.Tensor]) -> None:
    hidden, head = student(parts)
    known = known_tokens(hidden, head, 3)
    loss = sparse_mimic_loss(hidden, head, *known)
    assert abs(loss.item()) < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients(loss, parts))
    assert sparse_mimic_loss(hidden[:0], head, known[0][:0], known[1][:0]) == 0


def test_what_does_not_fit_is_named(parts: dict[str, torch.Tensor]) -> None:
    ids, log_q = known_tokens(parts["teacher_hidden"], parts["teacher_head"], 3)
    with pytest.raises(ValueError, match="kind 'best' is not one of top, sample"):
        sparse_mimic_loss(*student(parts), ids, log_q, kind="best")
    with pytest.raises(ValueError, match=r"expected \[tokens, k\]"):
        sparse_mimic_loss(*student(parts), ids[:2], log_q)
    whole = known_tokens(parts["teacher_hidden"], parts["teacher_head"], VOCABULARY)
    with pytest.raises(ValueError, match="leave no tail"):
        sparse_mimic_loss(*student(parts), *whole)

"""Mimicking against plain computations in double precision."""

import pytest
import torch

from mixlora.training.objectives import DIVERGENCES, chunks, mimic_loss, response_mask

VOCABULARY, STUDENT, TEACHER = 37, 6, 9


def naive(p: torch.Tensor, q: torch.Tensor, divergence: str, beta: float) -> torch.Tensor:
    """The divergence of each position, by its definition in probabilities."""
    m = {"jsd": beta * q + (1 - beta) * p, "skew_kl": beta * q + (1 - beta) * p}.get(divergence, p)
    kl = {
        "forward_kl": q * (q / p).log(),
        "reverse_kl": p * (p / q).log(),
        "jsd": beta * q * (q / m).log() + (1 - beta) * p * (p / m).log(),
        "tv": (p - q).abs() / 2,
        "skew_kl": q * (q / m).log(),
    }
    return kl[divergence].sum(-1)


def tensors(tokens: int = 11, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (tokens, STUDENT), (VOCABULARY, STUDENT), (tokens, TEACHER), (VOCABULARY, TEACHER)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return *(tensor.requires_grad_() for tensor in made), torch.rand(tokens, generator=generator) < 0.6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_value_and_gradients_are_those_of_the_definition(
    divergence: str, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", chunk * VOCABULARY * 8)
    hidden, head, teacher_hidden, teacher_head, mask = tensors()
    p = (hidden @ head.T / temperature).softmax(-1)
    q = (teacher_hidden @ teacher_head.T / temperature).softmax(-1).detach()
    expected = naive(p, q, divergence, 0.3)[mask].mean() * temperature**2
    wanted = torch.autograd.grad(expected, [hidden, head])
    loss = mimic_loss(
        hidden, head, teacher_hidden, teacher_head, mask,
        divergence=divergence, temperature=temperature, beta=0.3, t_squared=True,
    )  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(hidden.grad, wanted[0], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(head.grad, wanted[1], rtol=1e-8, atol=1e-12)
    assert teacher_hidden.grad is None and teacher_head.grad is None


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_are_at_zero(divergence: str) -> None:
    hidden, head, _, _, mask = tensors()
    loss = mimic_loss(hidden, head, hidden, head, mask, divergence=divergence)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-8


def test_only_what_is_trained_gets_a_gradient() -> None:
    hidden, head, teacher_hidden, teacher_head, mask = tensors()
    mimic_loss(hidden, head.detach(), teacher_hidden, teacher_head, mask).backward()
    assert hidden.grad is not None and not hidden.grad[~mask].any() and head.grad is None


def test_nothing_masked_is_zero_and_can_be_trained_on() -> None:
    hidden, head, teacher_hidden, teacher_head, mask = tensors()
    loss = mimic_loss(hidden, head, teacher_hidden, teacher_head, torch.zeros_like(mask))
    loss.backward()
    assert loss.item() == 0 and hidden.grad is not None and not hidden.grad.any()


def test_half_precision_is_computed_in_single() -> None:
    *made, mask = tensors()
    halves = [tensor.detach().to(torch.bfloat16) for tensor in made]
    loss = mimic_loss(*halves, mask)
    singles = [tensor.float() for tensor in halves]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mimic_loss(*singles, mask), rtol=2e-2, atol=0)


def test_items_of_the_whole_step_divide() -> None:
    *made, mask = tensors()
    torch.testing.assert_close(mimic_loss(*made, mask, num_items=50) * 50, mimic_loss(*made, mask) * mask.sum())


def test_an_answer_is_predicted_one_place_before_it() -> None:
    """Tokens a b [c d e] f: c is predicted at b, and e at d. LLaVA-MoD's released mask never learns c."""
    labels = torch.tensor([[-100, -100, 5, 6, 7, -100]])
    assert response_mask(labels).nonzero()[:, 1].tolist() == [1, 2, 3]
    assert response_mask(labels, llavamod_compat=True).nonzero()[:, 1].tolist() == [2, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"divergence": "kl"}, "divergence 'kl' is not one of forward_kl"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"divergence": "jsd", "beta": 1.0}, "beta of jsd"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict, message: str) -> None:
    *made, mask = tensors()
    with pytest.raises(ValueError, match=message):
        mimic_loss(*made, mask, **change)


def test_shapes_that_do_not_fit_are_named() -> None:
    hidden, head, teacher_hidden, teacher_head, mask = tensors()
    with pytest.raises(ValueError, match="student has 36 tokens, the teacher 37"):
        mimic_loss(hidden, head[1:], teacher_hidden, teacher_head, mask)
    with pytest.raises(ValueError, match="teacher: hidden states"):
        mimic_loss(hidden, head, hidden, teacher_head, mask)
    with pytest.raises(ValueError, match="same number of tokens"):
        mimic_loss(hidden[1:], head, teacher_hidden, teacher_head, mask)

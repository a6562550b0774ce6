"""What of a teacher is kept on disk: sizes, exactness, and training from it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.collate import Collator, Example, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import read_rows
from mixlora.training.objectives import known_tokens, preference_loss
from mixlora.training.stages import Mimic, Preference, RecipeError, cache_form
from mixlora.training.steps import MimicStep, PreferenceStep
from mixlora.training.teacher import CheckpointTeacher, KeptTeacher
from mixlora.training.teacher_cache import Form, StateCache, TokenCache, cache_states
from mixlora.training.train import train
from tests.training.taught_fixtures import TRAINED, batch, load, log, louder, naive_log_probs
from tests.training.training_fixtures import write_recipe


class WideTeacher:
    """As wide as Phi-4-mini; its states are drawn."""

    def __init__(self, width: int = 3072, vocabulary: int = 300):
        self.config = torch.nn.Module()
        self.head = torch.randn(vocabulary, width)

    def hidden(self, inputs: dict[str, Any], teacher_inputs: Any = None) -> torch.Tensor:
        return torch.randn(*inputs["input_ids"].shape, self.head.shape[1])


@pytest.mark.parametrize(
    ("form", "bound"),
    [
        (Form("states", torch.bfloat16), 6.5 * 1024),
        (Form("top", torch.int16, 64), 512),
        (Form("sample", torch.int16, 16), 128),
        (Form("log_probs"), 24),
    ],
    ids=lambda value: value.kind if isinstance(value, Form) else None,
)
def test_bytes_a_token(tmp_path: Path, start: str, form: Form, bound: float) -> None:
    """Whole files, names and headers included, for answers of 100 tokens."""
    model = load(start)
    collator = Collator(Media(model, MixLoraProcessor.from_pretrained(start)), 0)
    examples = [Example(ids, ids.clone()) for ids in torch.randint(10, 200, (20, 101))]
    for example in examples:
        example.labels[0] = -100
    cache = cache_states(WideTeacher(), model, collator, examples, tmp_path, form)
    size = sum(path.stat().st_size for path in cache.folder.iterdir())
    assert bound / 2 < size / (20 * 100) <= bound or form.kind == "log_probs" and size / 2000 <= bound


def test_packed_tokens_come_back(tmp_path: Path) -> None:
    class Plain(TokenCache):
        def _key(self, item: Any) -> str:
            return str(item)

    ids = torch.randint(0, 200_064, (7, 5))
    log_probs = -20 * torch.rand(7, 5)
    log_probs[0, 0] = -1e9  # below what fp16 holds
    cache = Plain(tmp_path, torch.int16)
    cache.fill(["a"], lambda items: [TokenCache.pack(ids, log_probs)])  # type: ignore[list-item]
    found = Plain(tmp_path, torch.int16)._read("a")
    assert torch.equal(found[:, :5].long(), ids)
    torch.testing.assert_close(found[1:, 5:], log_probs[1:], rtol=1e-3, atol=0)
    assert found[0, 5] < -60000 and found.isfinite().all()


def kept(folder: str, path: Path, teacher: Any, form: Form, to: Path) -> dict[str, Any]:
    """All rows of a file in one batch with what is kept of the teacher."""
    processor, model = MixLoraProcessor.from_pretrained(folder), load(folder)
    media = Media(model, processor)
    examples = Tokenizer(processor, media, 512)(read_rows(path))
    collator = Collator(media, processor.tokenizer.pad_token_id)
    collator.states = cache_states(teacher, teacher.model, collator, examples, to, form)
    return collator(examples)


@pytest.mark.parametrize("kept_as", ["top9", "sample400"])
def test_a_student_learns_from_kept_tokens(tmp_path: Path, start: str, rows: Path, kept_as: str) -> None:
    student, teacher = load(start), CheckpointTeacher(load(louder(start, tmp_path / "teacher")))
    kind, count = cache_form(kept_as)
    settings = Mimic(temperature=1.5)
    inputs = kept(start, rows, teacher, Form(kind, torch.int16, count, 1.5), tmp_path / "cache")
    found, _ = MimicStep(KeptTeacher(teacher.head), settings, kept=kept_as)(student, inputs, None)
    whole, _ = MimicStep(teacher, settings)(student, batch(start, rows), None)
    if kind == "sample":
        assert found.item() == pytest.approx(whole.item(), rel=0.1)
    else:
        assert 0.2 * whole < found <= whole
    found.backward()


def test_reference_log_probs_are_kept(tmp_path: Path, start: str, pairs: Path) -> None:
    student, teacher = load(start), CheckpointTeacher(load(louder(start, tmp_path / "teacher")))
    inputs = kept(start, pairs, teacher, Form("log_probs"), tmp_path / "cache")
    assert all(states.shape[1] == 1 for states in inputs["teacher_states"])
    loss, _ = PreferenceStep(KeptTeacher(teacher.head), Preference(), kept="log_probs")(student, inputs, None)
    plain = batch(start, pairs)
    policy, reference = naive_log_probs(student, plain), naive_log_probs(teacher.model, plain)
    expected = preference_loss(*policy.chunk(2), *reference.chunk(2))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_row_without_labels_has_no_states(tmp_path: Path) -> None:
    for kind, width in ((StateCache, 7), (TokenCache, 16)):
        cache = kind(tmp_path / kind.__name__)
        cache.width = width
        assert cache[Example(torch.arange(3), torch.full((3,), -100))].shape == (0, width)  # type: ignore[index]


def test_draws_are_an_examples_own(tmp_path: Path, start: str, rows: Path) -> None:
    teacher = CheckpointTeacher(load(start))
    first, again = (
        kept(start, rows, teacher, Form("sample", torch.int16, 8), tmp_path / name)["teacher_states"]
        for name in ("one", "two")
    )
    assert all(torch.equal(a[:, :8], b[:, :8]) for a, b in zip(first, again, strict=True))
    assert len({tuple(states[0, :8].tolist()) for states in first}) > 1


def test_a_recipe_keeps_tokens(tmp_path: Path, start: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"objective": "mimic", "teacher": louder(start, tmp_path / "teacher"), "teacher_cache": "top8"}
    train(write_recipe(tmp_path, start, rows, TRAINED, max_steps=12, **changes), tmp_path / "out")
    losses = log(tmp_path / "out/01-only", "loss")
    assert sum(losses[-3:]) < sum(losses[:3])
    assert "answers, 13 computed now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher_cache": "top"}, "teacher_cache 'top' is not one of float32"),
        ({"teacher_cache": "top64", "mimic": {"divergence": "jsd"}}, "forward_kl alone"),
        ({"teacher_cache": "log_probs"}, "preference alone"),
        ({"teacher_cache": "float32", "mimic": {"on_policy": 0.5}}, "no teacher_cache"),
        ({"teacher": "self", "mimic": {"on_policy": 0.5, "sampled_by": "teacher"}}, "samples as the student"),
        ({"mimic": {"sampled_by": "judge"}}, "one of student, teacher"),
    ],
)
def test_forms_that_do_not_fit_are_refused(tmp_path: Path, start: str, rows: Path, change: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        train(
            write_recipe(tmp_path, start, rows, TRAINED, **({"objective": "mimic", "teacher": start} | change)),
            tmp_path / "out",
        )


def test_the_mean_of_many_draws_is_the_divergence() -> None:
    """The same at the size of a real vocabulary, where few tokens have all the mass: the draws stay in range."""
    hidden, head = torch.randn(2, 4), torch.randn(50_000, 4)
    ids, log_q = known_tokens(hidden, head, 64, kind="sample")
    assert ids.max() < 50_000 and log_q.max() <= 0 and log_q.isfinite().all()

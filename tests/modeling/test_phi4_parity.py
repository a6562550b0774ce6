"""Phi-4-Multimodal from a checkpoint in transformers' layout gives the logits of transformers' model, row by row."""

from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.phi4_fixtures import make_row, native_model, our_inputs, peer_inputs, use_adapter, write_native

SEEDS = (0, 1, 2)
ROWS: dict[str, dict[str, Any]] = {
    "text": {},
    "one picture": {"sizes": [(56, 56)]},
    "a padded picture of six crops": {"sizes": [(70, 130)]},
    "two pictures": {"sizes": [(56, 112), (40, 20)]},
    "one clip": {"frames": [61]},
    "two clips of one length": {"frames": [48, 48]},
    "a clip of 45 seconds": {"frames": [4500]},
    "picture and clip": {"sizes": [(90, 56)], "frames": [33]},
}
BEYOND_THE_SWITCH: dict[str, dict[str, Any]] = {
    "long text": {"words": 1040},
    "a picture in a long text": {"sizes": [(70, 130)], "words": 1040},
    "a clip in a long text": {"frames": [61], "words": 1040},
    "both in a long text": {"sizes": [(56, 56)], "frames": [33], "words": 1040},
}


@cache
def models(seed: int) -> tuple[Any, MixLoraForConditionalGeneration]:
    """Transformers' model with both adapters, and ours as loaded from its checkpoint."""
    peer = native_model(seed)
    with TemporaryDirectory() as folder:
        write_native(peer, Path(folder), seed)
        ours = MixLoraForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return peer, ours


def expected(peer: Any, row: dict[str, Any]) -> torch.Tensor:
    """The peer's logits with the adapter that the row's modality asks for."""
    use_adapter(peer, "vision" if row["pictures"] else "speech" if row["clips"] else None)
    with torch.no_grad():
        return peer(**peer_inputs(row), use_cache=False).logits[0]


def as_double(value: Any) -> Any:
    """A tensor of floats, or each one in a list, in double precision; anything else as it is."""
    if isinstance(value, list):
        return [as_double(item) for item in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal within 2e-4 of the spread of the logits."""
    assert wanted.std() > 0.5, "the weights are not loud"
    assert (found - wanted).abs().max() < 2e-4 * wanted.std()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ROWS | BEYOND_THE_SWITCH)
def test_logits_are_those_of_transformers(kind: str, seed: int) -> None:
    """In double precision: loud weights and long clips amplify the rounding of single precision past the bound."""
    peer, ours = (deepcopy(model).double() for model in models(seed))
    row = {name: as_double(value) for name, value in make_row(**(ROWS | BEYOND_THE_SWITCH)[kind], seed=seed).items()}
    with torch.no_grad():
        found = ours(**our_inputs([row])).logits[0]
    assert_same(found, expected(peer, row))


@pytest.mark.parametrize("kind", ["one picture", "one clip", "picture and clip"])
def test_the_adapter_changes_the_logits(kind: str) -> None:
    """Without it the comparison above would say nothing of routing."""
    _, ours = models(0)
    inputs = our_inputs([make_row(**ROWS[kind])])
    with torch.no_grad():
        routed, base = ours(**inputs).logits, ours(**inputs, adapter_ids=torch.tensor([-1])).logits
    assert (routed - base).abs().max() > 0.5 * base.std()


def test_loaded_model_is_in_eval_mode_throughout() -> None:
    """The speech adapter's dropout of 0.25 must not act."""
    assert not any(module.training for module in models(0)[1].modules())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_each_row_of_a_mixed_batch_is_as_transformers_has_it_alone(implementation: str) -> None:
    """Pictures of different crops, clips of different lengths, a clip beside and without a picture: one batch."""
    peer, ours = models(0)
    kinds = [kind for kind in ROWS if kind != "a clip of 45 seconds"]
    rows = [make_row(**ROWS[kind], seed=i) for i, kind in enumerate(kinds)]
    ours.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = ours(**our_inputs(rows)).logits
    ours.set_attn_implementation("eager")
    for row, found in zip(rows, logits, strict=True):
        assert_same(found[-len(row["ids"]) :], expected(peer, row))


def test_greedy_answers_of_a_mixed_batch_are_those_of_rows_alone() -> None:
    _, ours = models(1)
    rows = [make_row(**ROWS[kind], seed=i) for i, kind in enumerate(("text", "two pictures", "one clip"))]
    batch = our_inputs(rows)
    answers = ours.generate(**batch, max_new_tokens=5)[:, batch["input_ids"].shape[1] :]
    for row, answer in zip(rows, answers, strict=True):
        alone = ours.generate(**our_inputs([row]), max_new_tokens=5)[0, len(row["ids"]) :]
        assert answer[: len(alone)].tolist() == alone.tolist()


def test_beams_keep_each_row_s_pictures() -> None:
    _, ours = models(1)
    rows = [make_row(**ROWS[kind], seed=i) for i, kind in enumerate(("one clip", "two pictures"))]
    batch = our_inputs(rows)
    options = {"max_new_tokens": 4, "num_beams": 2, "num_return_sequences": 2}
    answers = ours.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    for i, row in enumerate(rows):
        alone = ours.generate(**our_inputs([row]), **options)[:, len(row["ids"]) :]
        for found, wanted in zip(answers[2 * i : 2 * i + 2], alone, strict=True):
            assert found[: len(wanted)].tolist() == wanted.tolist()

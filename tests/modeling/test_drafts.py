"""Assisted generation and prompt lookup give the tokens that greedy search gives, whatever the drafts are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from mixlora.modeling.generation_mixlora import DraftsUpToSwitch
from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.test_modeling_mixlora import llama_of
from tests.modeling.test_rope_switch import DYNAMIC, LONGROPE, SWITCH, long_model, text_row

GREEDY = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}


def drafting(model: Any) -> Any:
    """An assistant that drafts five tokens each time, however sure it is."""
    model.generation_config.num_assistant_tokens = 5
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@contextmanager
def passes(model: Any) -> Iterator[list[int]]:
    """Logits asked for in each pass of a model: one, and one for each draft."""
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    yield seen
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("draft", ["same", "other", "llama", "lookup"])
def test_drafts_change_no_token(kind: str, draft: str) -> None:
    model = tiny_model()
    row = row_inputs(kind)
    row["ids"] = row["ids"] + row["ids"][:2]  # a lookup finds what followed them before, a placeholder even
    batch = batch_inputs([row])
    assistants = {"same": tiny_model, "other": lambda: tiny_model(1), "llama": lambda: llama_of(model)}
    options = (
        {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": drafting(assistants[draft]())}
    )
    wanted = model.generate(**batch, **GREEDY)
    with passes(model) as seen:
        found = model.generate(**batch, **GREEDY, **options)
    assert torch.equal(found, wanted)
    if draft == "same":
        assert sum(seen) == GREEDY["max_new_tokens"] and len(seen) < sum(seen)  # none was drafted in vain
    elif draft == "other":
        assert max(seen) > 4


@torch.no_grad()
@pytest.mark.parametrize("again, drafted", [(0, 0), (6, 2)], ids=["before the picture", "behind it"])
def test_a_lookup_drafts_no_placeholder(again: int, drafted: int) -> None:
    """The prompt repeats two of its words; what followed them is a picture, or two more words."""
    model = tiny_model()
    row = row_inputs("image")
    row["ids"] = row["ids"] + row["ids"][again : again + 2]
    with passes(model) as seen:
        model.generate(**batch_inputs([row]), max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=2)
    assert seen[0] == 1 + drafted


def steps(model: Any, row: dict[str, Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the logits `[tokens, vocabulary]` that they were chosen by."""
    found = model.generate(**batch_inputs([row]), **GREEDY, **LOGITS, **options)
    return found.sequences, torch.cat(found.logits)


def beside_the_switch(kind: str, length: int) -> dict[str, Any]:
    """A row of `length` tokens, its last words the same as words before."""
    row = row_inputs("image") if kind == "image" else text_row(6)
    filler = text_row(length - len(row["ids"]) - 3, 7)["ids"]
    return row | {"ids": row["ids"] + filler[:3] + filler[3:] + filler[:3]}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["text", "image"])
@pytest.mark.parametrize("length", [SWITCH - 7, SWITCH - 1, SWITCH, SWITCH + 1])
@pytest.mark.parametrize("draft", ["same", "lookup"])
@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_drafts_across_the_switch(rope: dict[str, Any], draft: str, length: int, kind: str) -> None:
    """Each token is scored with the factors of its own length, though a pass scores several."""
    limit = {"max_position_embeddings": SWITCH if rope is DYNAMIC else 256}
    model = long_model(2, rope, **limit)
    row = beside_the_switch(kind, length)
    assert len(row["ids"]) == length
    options = (
        {"prompt_lookup_num_tokens": 4}
        if draft == "lookup"
        else {"assistant_model": drafting(long_model(2, rope, **limit))}
    )
    tokens, logits = steps(model, row, **options)
    wanted, expected = steps(model, row, use_cache=False)
    assert torch.equal(tokens, wanted)
    assert (logits - expected).abs().max() < 2e-4 * expected.std()


@torch.no_grad()
def test_drafts_that_span_the_switch_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncut(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.generator.get_candidates(input_ids, **kwargs)

    monkeypatch.setattr(DraftsUpToSwitch, "get_candidates", uncut)
    row = beside_the_switch("text", SWITCH - 7)
    _, logits = steps(long_model(2), row, assistant_model=drafting(long_model(2)))
    _, expected = steps(long_model(2), row, use_cache=False)
    # five drafts and one token more lead to one before the switch; the next pass goes beyond
    assert (logits[6] - expected[6]).abs().max() > 0.1 * expected.std()


@torch.no_grad()
def test_padding_does_not_move_the_switch_of_drafts() -> None:
    model = long_model(2)
    row = beside_the_switch("text", SWITCH - 4)
    batch = batch_inputs([row, text_row(SWITCH)])
    alone = {name: value[:1] for name, value in batch.items()}  # its left padding stays
    found = model.generate(**alone, **GREEDY, assistant_model=drafting(long_model(2)))
    assert torch.equal(found, model.generate(**alone, **GREEDY, use_cache=False))


@torch.no_grad()
def test_drafts_of_the_first_layers_are_refused() -> None:
    model, batch = tiny_model(), batch_inputs([row_inputs("image")])
    with pytest.raises(ValueError, match="assistant_early_exit drafts with a model's own first layers"):
        model.generate(**batch, **GREEDY, assistant_early_exit=1)
    with pytest.raises(ValueError, match="assistant_early_exit drafts with a model's own first layers"):
        model.generate(**batch, generation_config=GenerationConfig(**GREEDY, assistant_early_exit=1))


@torch.no_grad()
def test_sampling_with_drafts_passes_the_switch() -> None:
    model = long_model(2)
    inputs = batch_inputs([beside_the_switch("image", SWITCH - 3)])
    options = GREEDY | {"do_sample": True}
    found = model.generate(**inputs, **options, assistant_model=drafting(long_model(2)))
    assert found.shape[1] == SWITCH - 3 + 10 and not torch.isin(found[0, SWITCH - 3 :], torch.tensor([1, 2])).any()

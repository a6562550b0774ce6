"""Cases about rows that grow long: LongRoPE's switch, in batches, chunks and turns."""

from collections.abc import Callable
from typing import Any

import torch
from differences import Case, common_start, likeness
from tiny_models import (
    GREEDY,
    PLAIN,
    SWITCH,
    Row,
    our_logits,
    row_of_batch,
    their_logits,
    with_a_near_switch,
    without_a_switch,
)
from transformers.cache_utils import DynamicCache

from tests.modeling.phi4_fixtures import make_row, our_inputs


def across_the_switch(model: Any, others: list[Row], words: int) -> str:
    """A row's answer with a cache, in company, against its answer alone without one."""
    row = make_row(words=words, seed=3)
    batch = {name: our_inputs([row, *others])[name] for name in ("input_ids", "attention_mask")}
    alone = our_inputs([row])
    found = model.generate(**batch, **GREEDY)[0, -12:]
    return common_start(found, model.generate(**alone, **GREEDY, use_cache=False)[0, -12:])


def beside_a_long_row(call: Callable[..., torch.Tensor], model: Any) -> str:
    short, long = make_row(words=30, seed=3), make_row(words=SWITCH + 11, seed=4)
    return row_of_batch(lambda rows: call(rows, model), short, long)


def second_turn_across_the_switch(model: Any) -> str:
    """The cache of a first turn, kept; its second turn passes the switch."""
    whole = make_row(words=SWITCH + 6, seed=3)
    past = DynamicCache(config=getattr(model.config, "text_config", model.config))
    model(**our_inputs([whole | {"ids": whole["ids"][: SWITCH - 20]}]), past_key_values=past, use_cache=True)
    found = model.generate(**our_inputs([whole]), **GREEDY, past_key_values=past)[0, -12:]
    return common_start(found, model.generate(**our_inputs([whole]), **GREEDY, use_cache=False)[0, -12:])


def chunks_across_the_switch(model: Any) -> str:
    inputs = our_inputs([make_row(words=SWITCH + 11, seed=4)])
    found = model.generate(**inputs, **GREEDY, prefill_chunk_size=16)[0, -12:]
    return common_start(found, model.generate(**inputs, **GREEDY, use_cache=False)[0, -12:])


def two_parts(model: Any, **options: Any) -> str:
    """A text beyond the switch, read in two forwards with a cache."""
    inputs = our_inputs([make_row(words=SWITCH + 11, seed=4)])
    ids, past = inputs["input_ids"], DynamicCache(config=getattr(model.config, "text_config", model.config))
    model(ids[:, :40], past_key_values=past, use_cache=True)
    found = model(ids[:, 40:], past_key_values=past, use_cache=True, **options).logits
    return likeness(found[0, -1], model(**inputs).logits[0, -1])


def answer(model: Any) -> str:
    """With a cache, against the answer without one."""
    inputs = our_inputs([PLAIN])
    found, wanted = (model.generate(**inputs, **GREEDY, use_cache=cached)[0, -12:] for cached in (True, False))
    return common_start(found, wanted)


CASES = [
    Case(
        "answer across LongRoPE's switch, with a cache",
        "the tokens of no cache",
        lambda: across_the_switch(with_a_near_switch()[0], [], SWITCH - 4),
        lambda: across_the_switch(with_a_near_switch()[1], [], SWITCH - 4),
        "short or long factors are fixed once, by `max_model_len`",
    ),
    Case(
        "the same for a short row, padded beside a longer one",
        "the tokens of the row alone",
        lambda: across_the_switch(with_a_near_switch()[0], [make_row(words=SWITCH - 4)], 32),
        lambda: across_the_switch(with_a_near_switch()[1], [make_row(words=SWITCH - 4)], 32),
    ),
    Case(
        "a second turn that passes the switch, the cache kept",
        "the tokens of no cache",
        lambda: second_turn_across_the_switch(with_a_near_switch()[0]),
        lambda: second_turn_across_the_switch(with_a_near_switch()[1]),
    ),
    Case(
        "`prefill_chunk_size`, a prompt beyond the switch",
        "the tokens of no cache",
        lambda: chunks_across_the_switch(with_a_near_switch()[0]),
        lambda: chunks_across_the_switch(with_a_near_switch()[1]),
    ),
    Case(
        "`forward` on a text in two parts, across the switch",
        "the logits of one part",
        lambda: two_parts(with_a_near_switch()[0]),
        lambda: two_parts(with_a_near_switch()[1], adapter_ids=torch.tensor([-1])),
    ),
    Case(
        "a short row beside one beyond the switch",
        "the logits of the row alone",
        lambda: beside_a_long_row(their_logits, with_a_near_switch()[0]),
        lambda: beside_a_long_row(our_logits, with_a_near_switch()[1]),
    ),
    Case(
        "answer, with `original_max_position_embeddings=None` in the config and no scaling of RoPE",
        "the tokens of no cache",
        lambda: answer(without_a_switch()[0]),
        lambda: answer(without_a_switch()[1]),
    ),
]

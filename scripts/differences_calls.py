"""Cases about calls of all kinds: `generate`, outputs, types, a second turn, errors."""

import copy
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from differences import Case, common_start, likeness
from tiny_models import CLIP, GREEDY, PICTURE, Inputs, Row, for_generate, ours, their_inputs, theirs
from transformers import Phi4MultimodalForCausalLM
from transformers.cache_utils import DynamicCache

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.phi4_fixtures import AUDIO, IMAGE, make_row, native_model, our_inputs

LONG_TEXT = make_row(words=3000, seed=5)


def hidden_states_after_a_picture(model: Any, inputs: Inputs) -> str:
    """A call as usual, one that asks for hidden states, and one as usual again."""
    first = model(**inputs).logits
    model(**inputs, output_hidden_states=True)
    return likeness(model(**inputs).logits, first)


def would_say_a_placeholder(model: Any, inputs: Inputs) -> str:
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([AUDIO]), 50))
    try:
        new = model.generate(**inputs, **GREEDY)[0, -12:]
    finally:
        hook.remove()
    return "a placeholder is said" if torch.isin(new, torch.tensor([IMAGE, AUDIO])).any() else "other tokens"


def moved_to_bfloat16(kind: Any, model: Any, inputs: Inputs) -> str:
    """`.to(bfloat16)` against loading in bfloat16."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        moved, loaded = kind.from_pretrained(folder).to(torch.bfloat16), kind.from_pretrained(folder, dtype="bfloat16")
    return likeness(moved.eval()(**inputs).logits, loaded.eval()(**inputs).logits)


def media_beside_embeddings(model: Any, inputs: Inputs, **options: Any) -> str:
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with_media = model(inputs_embeds=embeds, **inputs, **options).logits
    without = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], **options).logits
    return "**the picture is ignored**" if torch.equal(with_media, without) else "the picture is seen"


def in_chunks(model: Any, inputs: Inputs) -> str:
    wanted = model.generate(**inputs, **GREEDY)[0, -12:]
    return common_start(model.generate(**inputs, **GREEDY, prefill_chunk_size=5)[0, -12:], wanted)


def second_turn(model: Any, prepare: Callable[[list[Row]], Inputs]) -> str:
    """A picture in the first turn, a clip in the second, its cache kept; against the whole without a cache."""
    whole = {key: PICTURE[key] + CLIP[key] for key in ("ids", "pictures", "clips")}
    past = DynamicCache(config=getattr(model.config, "text_config", model.config))
    model(**prepare([PICTURE]), past_key_values=past, use_cache=True)
    new = {name: value for name, value in prepare([CLIP]).items() if name not in ("input_ids", "attention_mask")}
    ids = {name: value for name, value in our_inputs([whole]).items() if name in ("input_ids", "attention_mask")}
    found = model.generate(**ids, **for_generate(new), **GREEDY, past_key_values=past)[0, -12:]
    wanted = model.generate(**for_generate(prepare([whole])), **GREEDY, use_cache=False)[0, -12:]
    return common_start(found, wanted)


def drafted(model: Any, inputs: Inputs) -> str:
    """With the model itself as its assistant."""
    wanted = model.generate(**inputs, **GREEDY)[0, -12:]
    return common_start(model.generate(**inputs, **GREEDY, assistant_model=copy.deepcopy(model))[0, -12:], wanted)


def placeholders_without_media(model: Any, inputs: Inputs) -> str:
    """What a tokenizer alone gives of a prompt with a picture."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return "**answers without the picture**, no message" if torch.isfinite(logits).all() else "NaN"


CASES = [
    Case(
        "`output_hidden_states=True` after a call with a picture",
        "works",
        lambda: hidden_states_after_a_picture(native_model(0), their_inputs([PICTURE])),  # it fails ever after
        lambda: hidden_states_after_a_picture(ours(), our_inputs([PICTURE])),
    ),
    Case(
        "the model would say a placeholder, after a clip",
        "an answer without placeholders",
        lambda: would_say_a_placeholder(theirs(), for_generate(their_inputs([CLIP]))),
        lambda: would_say_a_placeholder(ours(), our_inputs([CLIP])),
    ),
    Case(
        "assisted generation, a picture in the prompt",
        "the tokens of no assistant",
        lambda: drafted(theirs(), for_generate(their_inputs([PICTURE]))),
        lambda: drafted(ours(), our_inputs([PICTURE])),
    ),
    Case(
        "a picture's placeholders without its pixels",
        "an error",
        lambda: placeholders_without_media(theirs(), their_inputs([PICTURE])),
        lambda: placeholders_without_media(ours(), our_inputs([PICTURE])),
    ),
    Case(
        "`model.to(torch.bfloat16)`, 3,000 tokens",
        "the logits of `from_pretrained(dtype=...)`",
        lambda: moved_to_bfloat16(Phi4MultimodalForCausalLM, native_model(0), their_inputs([LONG_TEXT])),
        lambda: moved_to_bfloat16(MixLoraForConditionalGeneration, ours(), our_inputs([LONG_TEXT])),
    ),
    Case(
        "`inputs_embeds` with pixels",
        "the picture is seen, or an error",
        lambda: media_beside_embeddings(theirs(), their_inputs([PICTURE])),
        lambda: media_beside_embeddings(ours(), our_inputs([PICTURE]), adapter_ids=torch.tensor([0])),
    ),
    Case(
        "`prefill_chunk_size`, a clip in the prompt",
        "the tokens of one chunk",
        lambda: in_chunks(theirs(), for_generate(their_inputs([CLIP]))),
        lambda: in_chunks(ours(), our_inputs([CLIP])),
    ),
    Case(
        "a picture in turn 1, a clip in turn 2, the cache kept",
        "the tokens of no cache",
        lambda: second_turn(theirs(), their_inputs),
        lambda: second_turn(ours(), our_inputs),
    ),
]

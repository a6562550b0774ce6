"""Cases about the model: batches, adapters, the cache, errors. `tiny_models` has both models."""

import copy
from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import torch
from differences import Case, common_start, likeness
from tiny_models import (
    SWITCH,
    Inputs,
    Row,
    for_generate,
    our_logits,
    ours,
    peft_model,
    row_of_batch,
    their_inputs,
    their_logits,
    theirs,
    with_a_near_switch,
    with_adapters,
)
from transformers import Phi4MultimodalForCausalLM
from transformers.cache_utils import DynamicCache

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.phi4_fixtures import AUDIO, IMAGE, make_row, native_model, our_inputs

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
PLAIN = make_row()
PICTURE = make_row(sizes=[(56, 56)])
PADDED = make_row(sizes=[(70, 130)], seed=1)
CLIP = make_row(frames=[61])
LONGER_CLIP = make_row(frames=[200], seed=1)
BOTH = make_row(sizes=[(56, 56)], frames=[61], seed=2)


# ---------------------------------------------------------------------------------------------------- rows in batches


def in_company(what: str, row: Row, *others: Row, vllm: str = "") -> Case:
    return Case(
        what,
        "the logits of the row alone",
        lambda: row_of_batch(their_logits, row, *others),
        lambda: row_of_batch(our_logits, row, *others),
        vllm,
    )


def backends(model: Any, inputs: Inputs) -> str:
    """The default attention against eager attention."""
    found = model(**inputs).logits
    model.set_attn_implementation("eager")
    wanted = model(**inputs).logits
    model.set_attn_implementation("sdpa")
    return likeness(found, wanted)


# ---------------------------------------------------------------------------------------------------- LongRoPE


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


# ---------------------------------------------------------------------------------------------------- adapters


def loaded_adapters_on_text(model: Any, inputs: Inputs, base: torch.Tensor) -> str:
    return likeness(model(**inputs).logits, base)


def names_of_adapters(model: Any, inputs: Inputs) -> str:
    """PEFT's argument, once with a name that is none."""
    found = model(**inputs, adapter_names=["vision", "nonsense"]).logits
    return "**ignored**" if torch.equal(found, model(**inputs).logits) else "the logits change"


def after_a_failed_call(model: Any, mixed: Inputs, text: Inputs, layer: Any) -> str:
    """Text before and after a mixed call that fails in its last layer."""
    before, forward = model(**text).logits, layer.forward

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    layer.forward = fail
    try:
        model(**mixed)
    except RuntimeError:
        layer.forward = forward
    return likeness(model(**text).logits, before)


def their_failed_call() -> str:
    model, inputs = peft_model(), their_inputs([PLAIN, PLAIN])
    last = model.base_model.model.lm_head
    return after_a_failed_call(model, inputs | {"adapter_names": ["__base__", "vision"]}, their_inputs([PLAIN]), last)


def train_a_mixed_batch(model: Any, inputs: Inputs, **options: Any) -> str:
    """Whether both adapters get gradients from one batch."""
    model.train()
    try:
        with torch.enable_grad():
            model(**inputs, labels=inputs["input_ids"], **options).loss.backward()
        graded = {n.split(".")[-2] for n, p in model.named_parameters() if ".lora_B." in n and p.grad is not None}
        return f"gradients for {' and '.join(sorted(graded))}"
    finally:
        model.eval().zero_grad()


# ---------------------------------------------------------------------------------------------------- calls


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


def ids_as_labels(model: Any, inputs: Inputs) -> str:
    ids = inputs["input_ids"]
    text = ids.masked_fill((ids == IMAGE) | (ids == AUDIO), -100)
    found, wanted = (float(model(**inputs, labels=labels).loss) for labels in (ids, text))
    if abs(found - wanted) < 1e-6:
        return "the loss of the text alone"
    return f"**placeholders are targets**: the loss is {found:.2f}, of the text alone {wanted:.2f}"


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


def drafted(model: Any, inputs: Inputs) -> str:
    """With the model itself as its assistant."""
    wanted = model.generate(**inputs, **GREEDY)[0, -12:]
    return common_start(model.generate(**inputs, **GREEDY, assistant_model=copy.deepcopy(model))[0, -12:], wanted)


def placeholders_without_media(model: Any, inputs: Inputs) -> str:
    """What a tokenizer alone gives of a prompt with a picture."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return "**answers without the picture**, no message" if torch.isfinite(logits).all() else "NaN"


def several_samples(model: Any, inputs: Inputs, **options: Any) -> str:
    drawn = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
    return f"{len(model.generate(**inputs, **drawn, **options))} answers"


LONG_TEXT = make_row(words=3000, seed=5)
FORTY_FIVE_SECONDS = make_row(frames=[4500], seed=5)
PROJECTOR = (
    "one projector for all clips of a call, chosen by whether a picture comes before (code read, not run); a prompt "
    "with both gets no default adapter"
)
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
        "a picture without padding, default attention",
        "the logits of eager attention",
        lambda: backends(theirs(), their_inputs([PICTURE])),
        lambda: backends(ours(), our_inputs([PICTURE])),
    ),
    in_company("a picture without padding beside one with", PICTURE, PADDED),
    in_company("a clip beside a longer one", CLIP, LONGER_CLIP),
    in_company("a clip of 1 s beside one of 45 s", make_row(frames=[100]), FORTY_FIVE_SECONDS),
    in_company("a clip beside a row with a picture", CLIP, PICTURE, vllm=PROJECTOR),
    in_company("text beside a row with picture and clip", PLAIN, BOTH),
    Case(
        "text, after both adapters were loaded",
        "the decoder's own logits",
        lambda: loaded_adapters_on_text(with_adapters(), their_inputs([PLAIN]), their_logits([PLAIN])),
        lambda: loaded_adapters_on_text(
            ours(), our_inputs([PLAIN]), ours()(**our_inputs([PLAIN]), adapter_ids=torch.tensor([-1])).logits
        ),
        "each request names its adapter, or `default_mm_loras` picks one by modality",
    ),
    Case(
        "`forward(adapter_names=[...])` with an unknown name",
        "an error",
        lambda: names_of_adapters(with_adapters(), their_inputs([PLAIN, PLAIN])),
        lambda: names_of_adapters(ours(), our_inputs([PLAIN, PLAIN])),
    ),
    Case(
        "text, after a mixed call failed (theirs: a `PeftModel`)",
        "the logits of before",
        their_failed_call,
        lambda: after_a_failed_call(ours(), our_inputs([PLAIN, PICTURE]), our_inputs([PLAIN]), ours().lm_head),
    ),
    Case(
        "train on rows of two adapters in one batch (theirs: a `PeftModel`)",
        "gradients for both",
        lambda: train_a_mixed_batch(peft_model(), their_inputs([PLAIN, PLAIN]), adapter_names=["vision", "speech"]),
        lambda: train_a_mixed_batch(ours(), our_inputs([PICTURE, CLIP])),
    ),
    Case(
        "two samples a row, rows of two adapters (theirs: a `PeftModel`)",
        "4 answers",
        lambda: several_samples(
            peft_model(), for_generate(their_inputs([PLAIN, PLAIN])), adapter_names=["vision", "speech"]
        ),
        lambda: several_samples(ours(), our_inputs([PICTURE, CLIP])),
    ),
    Case(
        "ids as labels, for a picture and a clip",
        "placeholders teach nothing",
        lambda: ids_as_labels(theirs(), their_inputs([BOTH])),
        lambda: ids_as_labels(ours(), our_inputs([BOTH])),
    ),
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

"""Cases about adapters: which one acts on a row, and what they learn."""

from typing import Any

import torch
from differences import Case, likeness
from tiny_models import (
    BOTH,
    CLIP,
    PICTURE,
    PLAIN,
    Inputs,
    for_generate,
    ours,
    peft_model,
    their_inputs,
    their_logits,
    theirs,
    with_adapters,
)

from tests.modeling.phi4_fixtures import AUDIO, IMAGE, our_inputs


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


def several_samples(model: Any, inputs: Inputs, **options: Any) -> str:
    drawn = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
    return f"{len(model.generate(**inputs, **drawn, **options))} answers"


def ids_as_labels(model: Any, inputs: Inputs) -> str:
    ids = inputs["input_ids"]
    text = ids.masked_fill((ids == IMAGE) | (ids == AUDIO), -100)
    found, wanted = (float(model(**inputs, labels=labels).loss) for labels in (ids, text))
    if abs(found - wanted) < 1e-6:
        return "the loss of the text alone"
    return f"**placeholders are targets**: the loss is {found:.2f}, of the text alone {wanted:.2f}"


def projector_of_clips(model: Any, inputs: Inputs, name: str) -> str:
    """Whether a batch teaches the projector that a clip without a picture goes through."""
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    graded = any(name in each and p.grad is not None and p.grad.any() for each, p in model.named_parameters())
    model.zero_grad()
    return "the projector of clips learns" if graded else "**it gets no gradient**; that of clips beside pictures does"


CASES = [
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
        "train on a row with a clip beside one with a picture",
        "the projector of clips learns",
        lambda: projector_of_clips(theirs(), their_inputs([CLIP, PICTURE]), "_proj_for_speech"),
        lambda: projector_of_clips(ours(), our_inputs([CLIP, PICTURE]), ".speech_projector.speech."),
    ),
]

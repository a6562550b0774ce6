"""Cases about rows in a batch and about attention: a row must be what it is alone."""

from typing import Any

import torch
from differences import Case, likeness
from differences_ranks import processes
from tiny_models import (
    BOTH,
    CLIP,
    PICTURE,
    PLAIN,
    Inputs,
    Row,
    our_logits,
    ours,
    row_of_batch,
    their_inputs,
    their_logits,
    theirs,
)

from tests.modeling.phi4_fixtures import make_row, our_inputs
from tests.modeling.rank_fixtures import on_ranks

PADDED = make_row(sizes=[(70, 130)], seed=1)
LONGER_CLIP = make_row(frames=[200], seed=1)
FORTY_FIVE_SECONDS = make_row(frames=[4500], seed=5)
PROJECTOR = (
    "one projector for all clips of a call, chosen by whether a picture comes before (code read, not run); a prompt "
    "with both gets no default adapter"
)


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


def flex(model: Any, inputs: Inputs) -> str:
    """`flex_attention`, compiled as it is by default, against eager attention."""
    with torch.no_grad():
        model.set_attn_implementation("flex_attention")
        found = model(**inputs).logits
        model.set_attn_implementation("eager")
        return likeness(found, model(**inputs).logits)


def their_flex() -> str:
    return flex(theirs(), their_inputs([CLIP]))


def our_flex() -> str:
    return flex(ours(), our_inputs([CLIP]))


def in_a_process(work: Any) -> str:
    """What `work` says, done where it may abort."""
    with processes() as folder:
        return on_ranks(folder, work, ranks=1)[0]


CASES = [
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
        '`attn_implementation="flex_attention"`, compiled, a clip',
        "the logits of eager attention",
        lambda: in_a_process(their_flex),
        lambda: in_a_process(our_flex),
        slow=True,
    ),
]

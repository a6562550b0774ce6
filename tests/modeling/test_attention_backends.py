"""flash_attention_2 and flex_attention get what they expect: their functions in plain torch give our logits."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import modeling_flash_attention_utils as flash

from tests.modeling.model_fixtures import ROWS, batch_inputs, row_inputs, tiny_model
from tests.modeling.phi4_fixtures import make_row, our_inputs
from tests.modeling.test_phi4_parity import models
from tests.modeling.test_rope_switch import long_model, text_row

CALLS: list[str] = []


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    """One sequence: `q` `[queries, heads, dim]`, fewer heads in `k` and `v`; the last query sees the last key."""
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if causal:
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def flash_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> torch.Tensor:
    """`flash_attn_varlen_func`: sequences end to end, `[tokens, heads, dim]`, cut at `cu_seqlens`."""
    CALLS.append("varlen")
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == 0 and softmax_scale
    cuts_q, cuts_k = list(pairwise(cu_seqlens_q.tolist())), list(pairwise(cu_seqlens_k.tolist()))
    assert max_seqlen_q == max(b - a for a, b in cuts_q) and max_seqlen_k == max(b - a for a, b in cuts_k)
    parts = [
        attend(q[a:b], k[c:d], v[c:d], softmax_scale, causal) for (a, b), (c, d) in zip(cuts_q, cuts_k, strict=True)
    ]
    return torch.cat(parts)


def flash_padded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float, causal: bool, **options: Any
) -> torch.Tensor:
    """`flash_attn_func`: `[batch, length, heads, dim]`, no padding."""
    CALLS.append("padded")
    return torch.stack([attend(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])


def with_flash(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    CALLS.clear()
    for name, value in {
        "_loaded_implementation": "flash_attention_2",
        "_flash_fn": flash_padded,
        "_flash_varlen_fn": flash_varlen,
        "_pad_fn": flash._pad_input,
        "_unpad_fn": flash._unpad_input,
        "_process_flash_kwargs_fn": flash._lazy_define_process_function(flash_varlen),
        "_process_with_kvcache_kwargs_fn": dict,
    }.items():
        monkeypatch.setattr(flash, name, value)
    model.config.text_config._attn_implementation = "flash_attention_2"  # not asking whether it is installed
    return model


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_attention_gets_each_row_without_its_padding(side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_inputs([row_inputs(kind) for kind in ROWS], side)
    real = batch["attention_mask"].bool()
    wanted = tiny_model()(**batch).logits[real]
    found = with_flash(tiny_model(), monkeypatch)(**batch).logits[real]
    assert CALLS == ["varlen"] * 2
    assert (found - wanted).abs().max() < 2e-4 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("rows", [[12, 20, 29], [20]], ids=["padded", "alone"])
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 8}], ids=["whole", "in chunks"])
def test_flash_attention_decodes_from_a_cache(
    rows: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Across LongRoPE's switch too."""
    batch = batch_inputs([text_row(length, length) for length in rows])
    shared = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    wanted = long_model().generate(**batch, **shared, use_cache=False)
    found = with_flash(long_model(), monkeypatch).generate(**batch, **shared, **options)
    assert torch.equal(found, wanted)
    assert ("varlen" if len(rows) > 1 else "padded") in CALLS


@torch.no_grad()
def test_flash_attention_reads_a_left_padded_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its positions stand still on the padding; they must not be read as the starts of packed sequences."""
    batch = batch_inputs([row_inputs("image"), row_inputs("two_clips")])
    one = {name: batch[name][:1] for name in ("input_ids", "attention_mask", "pixel_values")}
    wanted = tiny_model()(**one).logits[one["attention_mask"].bool()]
    found = with_flash(tiny_model(), monkeypatch)(**one).logits[one["attention_mask"].bool()]
    assert (found - wanted).abs().max() < 2e-4 * wanted.std()


def uncompiled_flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets flex attention's functions run uncompiled: a compiler for them would take most of a minute."""

    def attention(query: Any, key: Any, value: Any, training: bool = False, **options: Any) -> Any:
        CALLS.append("flex")
        return flex_attention(query, key, value, **options)

    def block_mask(_compile: bool = False, **options: Any) -> Any:
        return create_block_mask(**options)

    CALLS.clear()
    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", attention)
    monkeypatch.setattr("transformers.masking_utils.create_block_mask", block_mask)


@torch.no_grad()
def test_flex_attention_gives_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    uncompiled_flex(monkeypatch)
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    real = batch["attention_mask"].bool()
    wanted = model(**batch).logits[real]
    model.set_attn_implementation({"text_config": "flex_attention"})
    found = model(**batch).logits[real]
    assert CALLS == ["flex"] * 2
    assert (found - wanted).abs().max() < 2e-4 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "picture", "both"])
def test_flex_attention_on_the_whole_of_phi4_hears_and_sees_alike(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' speech encoder then takes the bias of one head for all, and compiled, the process aborts."""
    uncompiled_flex(monkeypatch)
    media = {
        "clip": {"frames": [61]},
        "picture": {"sizes": [(70, 130)]},
        "both": {"sizes": [(56, 56)], "frames": [90]},
    }
    model = copy.deepcopy(models(0)[1])
    inputs = our_inputs([make_row(**media[kind])])
    wanted = model(**inputs).logits
    model.set_attn_implementation("flex_attention")
    assert model.model.speech_tower.encoder.config._attn_implementation == "sdpa"
    found = model(**inputs).logits
    assert "flex" in CALLS
    assert (found - wanted).abs().max() < 2e-4 * wanted.std()


@torch.no_grad()
@pytest.mark.parametrize("flash_is_used", [True, False], ids=["flash", "sdpa"])
def test_sequences_packed_into_a_row_do_not_see_each_other(
    flash_is_used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that begin anew tell them apart; the row's one route is theirs too."""
    rows = [row_inputs("text"), row_inputs("text", 1), row_inputs("text", 2)]
    route = torch.tensor([0])
    model = tiny_model()
    wanted = [model(**batch_inputs([row]), adapter_ids=route).logits[0] for row in rows]
    ids = torch.tensor([[token for row in rows for token in row["ids"]]])
    positions = torch.tensor([[place for row in rows for place in range(len(row["ids"]))]])
    CALLS.clear()
    model = with_flash(model, monkeypatch) if flash_is_used else model
    found = model(ids, position_ids=positions, adapter_ids=route, use_cache=False).logits[0]
    assert CALLS == ["varlen"] * 2 * flash_is_used
    assert (found - torch.cat(wanted)).abs().max() < 2e-4 * found.std()

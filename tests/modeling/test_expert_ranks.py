"""Ranks whose rows take other experts: their balance is that of all rows in one batch."""

from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import batch_inputs, row_inputs
from tests.modeling.rank_fixtures import on_ranks
from tests.modeling.test_lora_experts import sparse_model

ROWS = ((["image", "two_clips"], [True, True]), (["text", "image"], [True, False]))
"""Of each rank its rows, and which of them count; only the first has a clip."""


def trained_experts() -> MixLoraForConditionalGeneration:
    """In fp64, so that only errors show."""
    model = sparse_model().double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_experts" in name)
    return model.train()


def balanced(model: Any, kinds: list[str], counted: list[bool]) -> tuple[torch.Tensor, Any]:
    rows = batch_inputs([row_inputs(kind) for kind in kinds], side="right")
    outputs = model(**rows, use_cache=False, output_aux_loss=torch.tensor(counted))
    if outputs.aux_loss is not None:
        (outputs.aux_loss + 0 * outputs.logits.sum()).backward()
    return outputs.aux_loss, {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}


def of_rank() -> dict[str, Any]:
    rank = distributed.get_rank()
    model = DistributedDataParallel(trained_experts())
    aux_loss, gradients = balanced(model, *ROWS[rank])
    nothing, _ = balanced(model, ["text"], [True])
    counted_nowhere, _ = balanced(model, ["image"], [False])
    return {
        "aux_loss": aux_loss.detach(),
        "nothing": nothing is None and counted_nowhere is None,
        "gradients": {name: grad for name, grad in gradients.items() if grad is not None},
    }


def test_the_balance_of_two_ranks_is_that_of_all_rows(tmp_path: Path) -> None:
    first, second = on_ranks(tmp_path, of_rank)
    expected, gradients = balanced(trained_experts(), ["image", "two_clips", "text"], [True] * 3)
    torch.testing.assert_close((first["aux_loss"] + second["aux_loss"]) / 2, expected.detach(), rtol=1e-9, atol=0)
    assert first["nothing"] and second["nothing"]
    names = {name for name in gradients if "lora_experts" in name}
    assert first["gradients"].keys() == names
    for name in names:
        for each in (first, second):
            torch.testing.assert_close(each["gradients"][name], gradients[name], rtol=1e-9, atol=1e-15)

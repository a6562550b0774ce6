"""Ranks whose rows need other parts of the model: the gradients are those of one process with all rows."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mixlora.modeling.decoder import DecoderLayer
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.towers import build_speech_tower, build_vision_tower
from tests.modeling.model_fixtures import batch_inputs, row_inputs, tiny_config, tiny_model
from tests.modeling.rank_fixtures import on_ranks
from tests.modeling.test_phi4_towers import phi4_config
from tests.modeling.test_towers import MASKED, VISION, WINDOWED, vision_config

ADAPTERS = ["adapter.vision", "adapter.speech"]
PROJECTORS = ["vision_projector", "speech_projector.speech", "speech_projector.vision_speech"]
TOWERS = ["vision_tower", "speech_tower"]
TRAINED = {
    "adapters": ADAPTERS,
    "projectors": PROJECTORS,
    "towers": TOWERS,
    "all": [*ADAPTERS, *PROJECTORS, *TOWERS, "decoder"],
}
ROWS = {
    "picture and clip": (["image", "image"], ["speech", "two_clips"]),
    "text alone": (["text"], ["text", "text"]),
    "both beside text": (["text", "both"], ["text"]),
}
WRAPPINGS = ("ddp", "fsdp", "fsdp by part")


def trained_model(train: list[str]) -> MixLoraForConditionalGeneration:
    """In fp64, so that only errors show."""
    model = tiny_model().double()
    groups = model.parameter_groups()
    named = {name for group in train for name in groups[group]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in named)
    return model.train()


def wrapped(model: MixLoraForConditionalGeneration, wrapping: str) -> nn.Module:
    """`fsdp` shards layers, and the rest as one; `fsdp by part` also towers and projectors, frozen or not."""
    if wrapping == "ddp":
        return DistributedDataParallel(model)
    if wrapping == "fsdp by part":
        base = model.model
        for part in (base.vision_tower, base.speech_tower, base.vision_projector, *base.speech_projector.values()):
            fully_shard(part)
    for module in model.modules():
        if isinstance(module, DecoderLayer):
            fully_shard(module)
    fully_shard(model)
    return model


def labelled(kinds: list[str]) -> dict[str, torch.Tensor]:
    """A batch of rows whose text is learnt."""
    batch = batch_inputs([row_inputs(kind, seed) for seed, kind in enumerate(kinds)], side="right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def gradients(
    model: nn.Module, batch: dict[str, torch.Tensor], items: int, factor: int = 1
) -> dict[str, torch.Tensor]:
    """Of the loss over `items`, times `factor`, by name; of all ranks where they are sharded."""
    for parameter in model.parameters():
        parameter.grad = None
    (factor * model(**batch, num_items_in_batch=items).loss).backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            grad: Any = parameter.grad
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
    return found


def cases() -> Iterator[tuple[str, str]]:
    for train in TRAINED:
        for rows in ROWS:
            yield train, rows


def items_of(rows: tuple[list[str], list[str]]) -> int:
    return sum(int((labelled(kinds)["labels"][:, 1:] != -100).sum()) for kinds in rows)


def all_gradients(wrapping: str) -> dict[str, dict[str, torch.Tensor]]:
    """Of this rank's rows, in every case."""
    rank, ranks, found = distributed.get_rank(), distributed.get_world_size(), {}
    for train in TRAINED:
        model = wrapped(trained_model(TRAINED[train]), wrapping)
        for rows in ROWS:
            found[f"{train}: {rows}"] = gradients(model, labelled(ROWS[rows][rank]), items_of(ROWS[rows]), ranks)
    return found


@pytest.fixture(scope="module", params=WRAPPINGS)
def of_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(tmp_path_factory.mktemp("ranks"), all_gradients, request.param)


@pytest.mark.parametrize(("train", "rows"), list(cases()))
def test_gradients_of_two_ranks_are_those_of_one_process(
    of_ranks: list[dict[str, Any]], train: str, rows: str
) -> None:
    """In place of a hang, of DDP's "Expected to have finished reduction", or of FSDP's sizes that do not match."""
    model = trained_model(TRAINED[train])
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    expected = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
    for kinds in ROWS[rows]:
        model.zero_grad()
        model(**labelled(kinds), num_items_in_batch=items_of(ROWS[rows])).loss.requires_grad_().backward()
        for name in names:
            grad = model.get_parameter(name).grad
            expected[name] += 0 if grad is None else grad
    for found in of_ranks:
        assert found[f"{train}: {rows}"].keys() == set(names)
        for name, gradient in found[f"{train}: {rows}"].items():
            # the bias of keys changes no softmax: its gradient is rounding alone
            assert (gradient - expected[name]).norm() <= 1e-9 * expected[name].norm() + 1e-14, name


@pytest.mark.parametrize("kind", [*VISION, "phi4 vision", *WINDOWED, *MASKED, "phi4 speech"])
def test_every_tower_takes_its_blank(kind: str) -> None:
    if kind in VISION:
        tower = build_vision_tower(vision_config(kind))
    elif kind.startswith("phi4"):
        tower = (build_vision_tower if kind == "phi4 vision" else build_speech_tower)(phi4_config())
    else:
        tower = build_speech_tower(tiny_config(speech_config=(WINDOWED | MASKED)[kind]))
    (features,) = tower(*tower.blank())
    assert len(features) >= 1 and torch.isfinite(features).all()


def test_alone_nothing_is_added() -> None:
    model = trained_model(TRAINED["all"])
    model(**labelled(["text"])).loss.backward()
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "lora" in name)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "projector" in name)

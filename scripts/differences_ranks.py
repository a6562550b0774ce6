"""Cases about training on two processes, which meet over gloo. `tiny_models` has both models."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from differences import Case
from tiny_models import Inputs, Row, ours, their_inputs
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import ProcessExitedException
from torch.nn.parallel import DistributedDataParallel

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.phi4_fixtures import make_row, native_model, our_inputs
from tests.modeling.rank_fixtures import on_ranks

STEPS = 2
"""DDP says in a step what was missing in the one before. In the second step the ranks have changed their rows."""
NOISE = 1e-3
Gradients = dict[str, torch.Tensor]
Prepare = Callable[[list[Row]], Inputs]

PLAIN = make_row()
PICTURE = make_row(sizes=[(56, 56)])
CLIP = make_row(frames=[61])
BATCHES: dict[str, tuple[Row, Row]] = {
    "a picture here, a clip there": (PICTURE, CLIP),
    "text alone": (PLAIN, make_row(seed=1)),
}
"""The row of each rank in the last step."""


def ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def static_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, static_graph=True)


def fsdp(model: nn.Module) -> nn.Module:
    """Sharded as accelerate does by default: each layer that the model does not want to be split, then the rest."""
    whole: Any = model
    for module in model.modules():
        if type(module).__name__ in whole._no_split_modules:
            fully_shard(module)
    return fully_shard(model)


WRAPPINGS: dict[str, Callable[[nn.Module], nn.Module]] = {"ddp": ddp, "static ddp": static_ddp, "fsdp": fsdp}


def their_model() -> nn.Module:
    return native_model(0)


def our_model(folder: str) -> nn.Module:
    return MixLoraForConditionalGeneration.from_pretrained(folder).eval()


def gradients(model: nn.Module, inputs: Inputs) -> Gradients:
    """Of the loss on one row, by name, whole where they are sharded; without those that are zero everywhere."""
    model.zero_grad()
    with torch.enable_grad():
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad.clone()
            if grad.any():
                found[name.removeprefix("module.")] = grad
    return found


def on_a_rank(model: nn.Module, prepare: Prepare, wrapping: str, rows: str) -> Gradients:
    """The last step's gradients of this rank, the model in `eval` so that no dropout is drawn."""
    wrapped, found = WRAPPINGS[wrapping](model), {}
    for step in reversed(range(STEPS)):
        row = BATCHES[rows][(distributed.get_rank() + step) % 2]
        found = gradients(wrapped, prepare([row]))
    return found


def theirs_on_a_rank(wrapping: str, rows: str) -> Gradients:
    return on_a_rank(their_model(), their_inputs, wrapping, rows)


def ours_in_all_cases(folder: str) -> dict[str, Gradients]:
    """Of this rank, in one go: a process takes seconds to begin."""
    return {
        f"{wrapping}: {rows}": on_a_rank(our_model(folder), our_inputs, wrapping, rows)
        for wrapping, rows in CASES_OF_RANKS
    }


CASES_OF_RANKS = (
    ("ddp", "a picture here, a clip there"),
    ("ddp", "text alone"),
    ("static ddp", "a picture here, a clip there"),
    ("fsdp", "a picture here, a clip there"),
)


@contextmanager
def processes() -> Iterator[Path]:
    """A folder for two processes; what ended one of them becomes an error of one line."""
    with TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except ProcessExitedException as error:
            raise RuntimeError(f"the process is aborted ({error.signal_name or error.exit_code})") from error
        except torch.multiprocessing.ProcessRaisedException as error:
            said = [
                line.partition("Error: ")[2] for line in str(error).splitlines() if re.match(r"[\w.]*Error: ", line)
            ]
            raise RuntimeError(said[-1] if said else str(error)) from error


def alone(model: nn.Module, prepare: Prepare, rows: str) -> Gradients:
    """What one process gives: the mean over both rows."""
    parts = [gradients(model, prepare([row])) for row in BATCHES[rows]]
    return {name: sum(part[name] for part in parts if name in part) / 2 for name in parts[0] | parts[1]}


def compared(found: list[Gradients], wanted: Gradients) -> str:
    """The gradients of two ranks beside those of one process."""
    for of_rank in found:
        for name in wanted.keys() | of_rank.keys():
            if name not in of_rank or name not in wanted:
                return f"**other gradients**: of `{name}`"
            if (of_rank[name] - wanted[name]).norm() > NOISE * wanted[name].norm():
                return f"**other gradients**: of `{name}`"
    return "the same gradients"


def of_theirs(wrapping: str, rows: str) -> str:
    with processes() as folder:
        found = on_ranks(folder, theirs_on_a_rank, wrapping, rows)
    return compared(found, alone(their_model(), their_inputs, rows))


@cache
def our_ranks() -> list[dict[str, Gradients]]:
    with processes() as folder:
        ours().save_pretrained(folder / "model")
        return on_ranks(folder, ours_in_all_cases, str(folder / "model"))


def of_ours(wrapping: str, rows: str) -> str:
    found = [of_rank[f"{wrapping}: {rows}"] for of_rank in our_ranks()]
    return compared(found, alone(copy.deepcopy(ours()), our_inputs, rows))


def case(what: str, wrapping: str, rows: str) -> Case:
    assert (wrapping, rows) in CASES_OF_RANKS
    return Case(
        what,
        "the gradients of one process",
        lambda: of_theirs(wrapping, rows),
        lambda: of_ours(wrapping, rows),
    )


CASES = [
    case("train on two ranks (DDP), a picture on one, a clip on the other", *CASES_OF_RANKS[0]),
    case("train on two ranks (DDP), text on both", *CASES_OF_RANKS[1]),
    case("the same with a picture and a clip and `static_graph=True`", *CASES_OF_RANKS[2]),
    case("train on two ranks (FSDP2), a picture on one, a clip on the other", *CASES_OF_RANKS[3]),
]

"""What a step has no rows for stays still, on many ranks as in one process.

Alone, a parameter that no row of an optimizer step needs has no gradient, and AdamW passes it by: neither its moments
nor its weights change. On several ranks it gets a gradient of zeros, so that all ranks exchange the same. All of them
know the rows of all, and drop those gradients again before the optimizer acts.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import TrainerCallback

from mixlora.modeling.configuration_mixlora import MODALITIES
from mixlora.training.data.collate import Example
from mixlora.training.groups import NAMES, READER
from mixlora.training.stages import Stage


class StillGroups(TrainerCallback):
    """Drops the gradients of the parameter groups that no row of the step needs.

    Args:
        model: the trained model; its router tells the adapter of a row.
        batch: number of a batch -> its examples, those of all ranks.
        batches: how many there are.
    """

    def __init__(self, model: Any, stage: Stage, batch: Callable[[int], Sequence[Example]], batches: int):
        self.router, self.stage, self.batch, self.batches = model.router, stage, batch, batches
        self.names: dict[str, list[str]] = {
            group: names
            for group, names in model.parameter_groups().items()
            if any(model.get_parameter(name).requires_grad for name in names)
        }
        self.parameters: dict[str, nn.Parameter] = {}

    def needed(self, example: Example) -> set[str]:
        """The parameter groups that a row runs through."""
        seen, heard = bool(example.images), bool(example.audio)
        groups = {"decoder"} if self.stage.ctc_weight < 1 else set()
        (adapter,) = self.router.adapter_names([MODALITIES[seen + 2 * heard]])
        if adapter is not None and groups:
            groups.add(f"adapter.{adapter}")
        if seen:
            groups |= {READER} if self.stage.ctc_weight else set()
            groups |= {"vision_tower", "vision_projector", "vision_detail", NAMES}
        if heard:
            groups |= {"speech_letters"} if self.stage.ctc_weight else set()
            groups |= {"speech_tower", "speech_context", f"speech_projector.{'vision_' if seen else ''}speech"}
        return groups

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Notes the parameters, which are others once the model is sharded."""
        self.parameters = dict(model.named_parameters())

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drops gradients of zeros."""
        size = self.stage.gradient_accumulation
        first = state.global_step * size
        needed: set[str] = set()
        for number in range(first, min(first + size, self.batches)):
            of_batch = {group for row in self.batch(number) for group in self.needed(row)} & self.names.keys()
            if not of_batch:  # the trainer gives a batch that trains nothing zeros for all, in one process as well
                return
            needed |= of_batch
        for group in self.names.keys() - needed:
            for name in self.names[group]:
                self.parameters[name].grad = None

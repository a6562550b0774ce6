"""What a stage does with LoRA experts: adapters become experts, and their balance joins the loss."""

from typing import Any

import torch

from mixlora.modeling.ranks import sum_over_ranks
from mixlora.training.objectives import IGNORED
from mixlora.training.stages import RecipeError, Stage


def split_adapters(model: Any, stage: Stage, seed: int) -> None:
    """Turns the adapters that a stage trains into experts, where it says so; the function stays the same.

    Raises:
        RecipeError: it trains no adapter, or one that has another number of experts.
    """
    if not stage.experts.count:
        return
    groups = model.parameter_groups()
    names = [group.removeprefix("adapter.") for group in stage.train if group.startswith("adapter.")]
    names = [name for name in names if f"adapter.{name}" in groups]  # the others are named when the groups are chosen
    if not names:
        raise RecipeError(f"stage {stage.name!r}: experts, but it trains no adapter")
    for name in names:
        before = model.config.adapters[name].get("experts")
        if before is None:
            model.split_adapter(name, stage.experts.count, stage.experts.top_k, seed)
            print(
                f"  adapter {name} becomes {stage.experts.count} experts, of which a token takes {stage.experts.top_k}"
            )
        elif before != stage.experts.count:
            raise RecipeError(
                f"stage {stage.name!r}: experts of {stage.experts.count}, but adapter {name} has {before} already"
            )


class Balance:
    """Adds the balance of experts to the losses of batches.

    Args:
        weight: of the balance.
        accumulation: batches of an optimizer step, over which it is averaged.
    """

    def __init__(self, weight: float = 0.0, accumulation: int = 1):
        self.weight, self.accumulation = weight, accumulation

    def wanted(self, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model's forward is to be asked for; rows of `labels` `[rows, length]` without one do not count."""
        return {"output_aux_loss": (labels != IGNORED).any(dim=1)} if self.weight else {}

    def __call__(
        self, loss: torch.Tensor, outputs: Any, figures: dict[str, float]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The loss with the balance of a forward pass that was called with `wanted`, and the log's figures with it."""
        found = outputs.get("aux_loss")
        if found is None:
            return loss, figures
        ranks = sum_over_ranks(found.new_ones(()))  # their losses are added; what the model gives is to be averaged
        balance = (sum_over_ranks(found) / ranks).item()
        return loss + self.weight / (self.accumulation * ranks) * found, {**figures, "balance": balance}


def balance_of(model: Any, stage: Stage) -> Balance:
    """A stage's balance, which costs nothing where the model has no experts."""
    sparse = any(spec.get("experts") for spec in model.config.adapters.values())
    return Balance(stage.experts.balance_weight if sparse else 0.0, stage.gradient_accumulation)

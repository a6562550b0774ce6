"""The step of `objective: preference`."""

from typing import Any

import torch

from mixlora.modeling.ranks import in_process_group, sum_over_ranks
from mixlora.training.expert_adapters import Balance
from mixlora.training.objectives import IGNORED, mimic_loss, preference_loss, sequence_log_probs
from mixlora.training.stages import Preference
from mixlora.training.step_base import Inputs, NumItems, Outcome, TaughtStep
from mixlora.training.teacher import Teacher


class PreferenceStep(TaughtStep):
    """Preferences beside a reference, or without one; rows are all chosen answers, then all rejected ones.

    Batches of an optimizer step count alike, however many pairs they hold. `kept` is what of the reference is on disk.
    """

    def __init__(
        self,
        reference: Teacher | None,
        settings: Preference,
        accumulation: int = 1,
        balance: Balance | None = None,
        kept: str = "",
    ):
        super().__init__(reference, balance, kept)
        self.settings, self.accumulation = settings, accumulation

    def _outcome(self, model: Any, inputs: Inputs, num_items: NumItems) -> Outcome:
        """The loss averaged over the batch's pairs, and their rewards, margins and accuracies."""
        settings, rows = self.settings, len(inputs["labels"])
        states, theirs, places, outputs = self._states(model, inputs)
        targets = inputs["labels"][places[:, 0], places[:, 1] + 1]
        policy = sequence_log_probs(states, model.lm_head.weight, targets, places[:, 0], rows)
        reference = self._reference(policy, theirs, targets, places[:, 0])
        real = (inputs["labels"] != IGNORED).any(dim=1)[: rows // 2]  # all but what idle ranks run
        policies, references = ([half[real] for half in each.chunk(2)] for each in (policy, reference))
        answer = places[:, 0] < rows // 2
        pairs, tokens = sum_over_ranks(torch.stack([real.sum(), answer.sum()]))
        loss = preference_loss(
            *policies, *references, kind=settings.kind, beta=settings.beta, label_smoothing=settings.label_smoothing,
            llavamod_compat=settings.llavamod_compat, num_pairs=pairs if in_process_group() else None,
        )  # fmt: skip
        if settings.sft_weight:
            loss = loss - settings.sft_weight * policies[0].sum() / tokens
        if settings.mimic_weight:
            assert self.teacher is not None and theirs is not None
            apart = mimic_loss(states, self._head(model), theirs, self.teacher.head, answer, num_items=tokens)
            loss = loss + settings.mimic_weight * apart
        chosen, rejected = (
            settings.beta * (mine - other).detach() for mine, other in zip(policies, references, strict=True)
        )
        return self.balance(loss / self.accumulation, outputs, self._figures(chosen, rejected, pairs))

    def _reference(
        self, policy: torch.Tensor, theirs: torch.Tensor | None, targets: torch.Tensor, rows: torch.Tensor
    ) -> torch.Tensor:
        """The reference's log-probabilities, as `policy` `[rows]`: zeros where there is none.

        Args:
            theirs: its hidden states `[tokens, width]`, or its log-probabilities `[tokens, 1]` from disk.
            targets, rows: the tokens, and the row of each.
        """
        zeros = torch.zeros_like(policy)
        if theirs is None:
            return zeros
        if self.kind == "log_probs":
            return zeros.index_add(0, rows, theirs[:, 0].to(zeros.dtype))
        assert self.teacher is not None
        with torch.no_grad():
            return sequence_log_probs(theirs, self.teacher.head, targets, rows, len(policy))

    @staticmethod
    def _figures(chosen: torch.Tensor, rejected: torch.Tensor, pairs: torch.Tensor) -> dict[str, float]:
        """Means over the pairs of all ranks, from the rewards `[pairs]` of this one."""
        each = torch.stack([chosen, rejected, chosen - rejected, (chosen > rejected).to(chosen.dtype)])
        means = (sum_over_ranks(each.sum(dim=1)) / pairs).tolist()
        names = ("chosen", "rejected", "margins", "accuracies")
        return {f"rewards/{name}": mean for name, mean in zip(names, means, strict=True)}

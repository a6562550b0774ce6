"""The step of `objective: sft`."""

from collections.abc import Collection
from typing import Any

import torch

from mixlora.modeling.idle import whole_table
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.projectors import CTC_SHARPNESS
from mixlora.modeling.ranks import in_process_group, sum_over_ranks
from mixlora.modeling.routed_function import apply_linear
from mixlora.training.expert_adapters import Balance
from mixlora.training.groups import NAMES, READER
from mixlora.training.objectives import (
    IGNORED,
    ctc_loss,
    ctc_targets,
    letter_ctc_loss,
    line_ctc_loss,
    next_token_losses,
    place_loss,
    response_mask,
)
from mixlora.training.step_base import Inputs, NumItems, Outcome

SMOOTHING = 0.1
"""Share of a name's target that all names have (label smoothing: Szegedy et al., arXiv 1512.00567, section 7)."""


class SupervisedStep:
    """Cross entropy of the labelled tokens, or in part CTC of the clips, or of pictures whose letters are learnt.

    Args:
        ctc_weight: share of the loss that is CTC.
        train: names of the groups that learn.
        pad, end, line_break: ids of the tokens of padding, of the end of an answer and of the end of a line.
        accumulation: batches of an optimizer step; CTC is averaged over them.
        balance: of experts, added where the decoder runs.
    """

    def __init__(
        self,
        ctc_weight: float,
        pad: int,
        end: int,
        accumulation: int = 1,
        balance: Balance | None = None,
        train: Collection[str] = (),
        line_break: int = -1,
    ):
        self.ctc_weight, self.pad, self.end, self.accumulation = ctc_weight, pad, end, accumulation
        self.train, self.line_break = train, line_break
        self.balance = balance or Balance()

    def __call__(self, model: Any, inputs: Inputs, num_items: NumItems) -> Outcome:
        """Logits are made only where a token is labelled."""
        if NAMES in self.train:
            named: Outcome = model(within=lambda inner: (self._names(inner, inputs), {}))
            return named
        if self.ctc_weight:
            outcome: Outcome = model(within=lambda inner: self._with_ctc(inner, inputs, num_items))
        else:
            outcome = model(within=lambda inner: self._cross_entropy(inner, inputs, num_items, self.balance))
        return outcome

    @staticmethod
    def _cross_entropy(
        model: Any, inputs: Inputs, num_items: NumItems, balance: Balance, weight: float = 1.0
    ) -> Outcome:
        """`weight` times the cross entropy, and the balance. Each row has logits where it is labelled itself.

        `row_losses` has the sum of each row's losses, and their number.
        """
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        predicting = response_mask(labels)
        outputs = model.model(**rest, use_cache=False, wanted=predicting, **balance.wanted(labels))
        logits = apply_linear(model.lm_head, outputs.last_hidden_state[predicting][None])  # [1, labelled, vocabulary]
        losses = next_token_losses(logits, labels[:, 1:][predicting[:, :-1]][None])[0]
        loss = losses.sum() / (num_items if num_items is not None else max(len(losses), 1))
        counted = predicting.sum(1)
        sums = losses.new_zeros(len(labels)).index_add(0, predicting.nonzero()[:, 0], losses.detach())
        figures: dict[str, Any] = {"row_losses": torch.stack([sums, counted.to(sums.dtype)], dim=1)}
        return balance(weight * loss, outputs, figures)

    def _with_ctc(self, model: Any, inputs: Inputs, num_items: NumItems) -> Outcome:
        heard = self._ctc(model, inputs, inputs["labels"])
        alone = self.ctc_weight == 1
        if alone and not in_process_group():
            return heard, {}
        # Of several ranks each runs the decoder even where it counts for nothing, since its gradients are exchanged.
        balance = Balance() if alone else self.balance
        loss, figures = self._cross_entropy(model, inputs, num_items, balance, 1 - self.ctc_weight)
        return loss + self.ctc_weight * heard, figures

    def _names(self, model: MixLoraForConditionalGeneration, inputs: Inputs) -> torch.Tensor:
        """Cross entropy of the name of each row's picture, and how badly its places tell it; of several names, which
        are a line each, the second alone."""
        labels, classifier = inputs["labels"], model.model.vision_names
        features = inputs.get("mm_encoder_outputs", {}).get("image_features", [])
        if not features and "pixel_values" in inputs:
            features = model.model.encode_vision(inputs["pixel_values"])
        if len(features) != len(labels):
            raise ValueError(f"names need one picture in every row, got {len(features)} in {len(labels)} rows")
        taught = (labels != IGNORED).any(dim=1)
        rows = sum_over_ranks(taught.sum()).clamp(min=1) * self.accumulation
        stacked = torch.stack([each.to(model.device) for each in features])[taught]
        lines = [self._lines(target) for target in ctc_targets(labels[taught], self.end)]
        classes = classifier.classes_of([line for each in lines for line in each]).split([len(each) for each in lines])
        alone = torch.tensor([len(each) == 1 for each in lines], dtype=torch.bool, device=model.device)
        single = torch.tensor([int(each[0]) for each in classes], dtype=torch.long, device=model.device)[alone]
        logits = classifier(stacked[alone])
        whole = torch.nn.functional.cross_entropy(logits, single, reduction="sum", label_smoothing=SMOOTHING)
        return (whole + place_loss(classifier.at_places(stacked), classes)) / rows

    def _lines(self, target: torch.Tensor) -> list[torch.Tensor]:
        """The ids of each line of an answer."""
        breaks = (target == self.line_break).nonzero().squeeze(1).tolist()
        return [target[start:end] for start, end in zip([0, *(at + 1 for at in breaks)], [*breaks, None], strict=True)]

    def _ctc(self, model: MixLoraForConditionalGeneration, inputs: Inputs, labels: torch.Tensor) -> torch.Tensor:
        said = sum(len(target) for target in ctc_targets(labels, self.end))
        num_items = sum_over_ranks(torch.tensor(said, device=model.device)).clamp(min=1) * self.accumulation
        if READER in self.train:
            reader, pixels = model.model.vision_letters, inputs.get("pixel_values", labels[:0])
            read = reader(pixels) if len(pixels) else pixels
            return line_ctc_loss(read, labels, reader.lines_of, end=self.end, num_items=num_items)
        features = inputs.get("mm_encoder_outputs", {}).get("audio_features", [])
        if "input_features" in inputs:
            features = model.model.encode_speech(inputs["input_features"], inputs["input_features_mask"])
        blank = model.config.speech_blank_token_id
        stacked = model.model.stack_speech([clip.to(model.device) for clip in features])
        loss = ctc_loss(
            model.model.project_speech(stacked),
            labels,
            whole_table(model.model.language_model.embed_tokens),
            blank=self.pad if blank is None else blank,
            end=self.end,
            sharpness=CTC_SHARPNESS,
            num_items=num_items,
        )
        if model.config.speech_letters is None or not model.model.speech_letters.known:
            return loss
        letters = model.model.speech_letters
        spelled = letter_ctc_loss(letters(stacked), labels, letters.spell, end=self.end, num_items=num_items)
        return (loss + spelled) / 2

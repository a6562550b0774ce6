"""What a checkpoint of the study of distillation knows, and how near it is to its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor
from mixlora.evaluation.hallucination import YesNo
from mixlora.training.data.collate import Collator, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import read_rows
from mixlora.training.objectives import IGNORED, mimic_loss, response_mask

BATCH = 32
YES_NO = ("seen_objects", "heard_digits")


class Examination:
    """The rows of a test, read once, and what a teacher says to them.

    Args:
        rows: file of conversations of a question and its answer; tasks: of each row, in the same order.
        cache: folder of tower features. All checkpoints have the same towers and the same processor.
    """

    def __init__(self, rows: Path, tasks: Sequence[str], cache: Path, checkpoint: Path):
        self.model, processor = _load(checkpoint)
        media = Media(self.model, processor)
        found = read_rows(rows)
        images, audio = ([path for row in found for path in getattr(row, kind)] for kind in ("images", "audio"))
        media.cache(self.model, cache, images, audio)
        self.examples = Tokenizer(processor, media, 512)(found)
        self.tasks, self.tokenizer = list(tasks), processor.tokenizer
        self.collator = Collator(media, processor.tokenizer.pad_token_id)
        assert len(self.examples) == len(self.tasks)
        self.unsaid = torch.tensor([processor.image_token_id, processor.audio_token_id])  # `generate` never says them
        self.order = sorted(range(len(found)), key=lambda place: len(self.examples[place].ids))

    def states(self, model: Any) -> list[torch.Tensor]:
        """Of each row, the hidden states `[answer tokens, width]` that predict its answer."""
        result = [torch.empty(0)] * len(self.examples)
        for first in range(0, len(self.order), BATCH):
            places = self.order[first : first + BATCH]
            inputs = self.collator([self.examples[place] for place in places])
            masks = response_mask(inputs.pop("labels"))
            with torch.inference_mode():
                hidden = model.model(**inputs, use_cache=False).last_hidden_state
            for place, states, mask in zip(places, hidden, masks, strict=True):
                result[place] = states[mask]
        return result

    def measure(self, model: Any, teacher: tuple[list[torch.Tensor], torch.Tensor] | None = None) -> dict[str, Any]:
        """Figures of a model, each task -> figure.

        Args:
            teacher: its states of each row, and its head.

        Returns:
            `score`: share of rows that greedy decoding answers rightly, to the end token: it does so exactly where
            each token of the answer is the likeliest after those before. `truth`: nats of the right answer, a row.
            `yes_no`: figures of `YesNo`. With a teacher, a token of the answers: `kl` from it, and `agreement`, the
            share where both have the same likeliest one.
        """
        head, every = model.lm_head.weight.detach(), self.states(model)
        figures: dict[str, Any] = {}
        for task in dict.fromkeys(self.tasks):
            places = [place for place, each in enumerate(self.tasks) if each == task]
            targets = [label[label != IGNORED] for label in (self.examples[place].labels for place in places)]
            log_probs = [(every[place] @ head.T).log_softmax(-1) for place in places]
            likeliest = [each.index_fill(-1, self.unsaid, -torch.inf).argmax(-1) for each in log_probs]
            right = [torch.equal(said, told) for said, told in zip(likeliest, targets, strict=True)]
            nats = -sum(each.gather(1, told[:, None]).sum() for each, told in zip(log_probs, targets, strict=True))
            found = {"score": sum(right) / len(right), "truth": float(nats) / len(places)}
            if task in YES_NO:
                said = [self.tokenizer.decode(each[:1]) for each in likeliest]
                is_so = [self.tokenizer.decode(each[:1]) == "yes" for each in targets]
                found["yes_no"] = YesNo.count(zip(said, is_so, strict=True)).figures()
            if teacher is not None:
                mine, theirs = (torch.cat([states[place] for place in places]) for states in (every, teacher[0]))
                found["kl"] = mimic_loss(mine, head, theirs, teacher[1], torch.ones(len(mine))).item()
                told = (theirs @ teacher[1].T).index_fill(-1, self.unsaid, -torch.inf).argmax(-1)
                same = told == torch.cat(likeliest)
                found["agreement"] = same.float().mean().item()
            for name, value in found.items():
                figures.setdefault(name, {})[task] = value
        return figures

    def of(self, checkpoint: Path, teacher: Any = None) -> dict[str, Any]:
        """Figures of a checkpoint on disk."""
        return self.measure(_load(checkpoint)[0], teacher)

    def taught_by(self, checkpoint: Path) -> tuple[list[torch.Tensor], torch.Tensor]:
        """A teacher's states of each row, and its head."""
        model = _load(checkpoint)[0]
        return self.states(model), model.lm_head.weight.detach()


def _load(checkpoint: Path) -> tuple[Any, Any]:
    model = MixLoraForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval().requires_grad_(False), MixLoraProcessor.from_pretrained(checkpoint)

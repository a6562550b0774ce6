"""Digits that are seen or heard, as the embedded checkpoint's towers and projectors give them, one vector each.

The pictures are handwritten, the clips are spoken by people and by speech synthesis (see `prepare_pictures.py` and
`prepare_speech.py`). Those to test with are never trained on.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DATA, EVAL, read_jsonl
from safetensors.torch import load_file, save_file

from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor, default_checkpoint

SOURCES = {"picture": ("digits.jsonl", "image", "images"), "speech": ("spoken_digit.jsonl", "audio", "audio")}
PARTS = ("train", "test")
EACH = 400
"""Items of a digit, at most."""
AT_ONCE = 16
RIDGE = 0.1
Items = list[tuple[str, int]]


@dataclass(frozen=True)
class Media:
    """Vectors of items.

    Attributes:
        vectors: `[items, size]`.
        digits: `[items]`.
    """

    vectors: torch.Tensor
    digits: torch.Tensor

    def draw(self, digits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Vectors `[..., size]` of any items of these digits."""
        chosen = torch.empty_like(digits)
        for digit in range(10):
            mine, wanted = (self.digits == digit).nonzero().squeeze(1), digits == digit
            chosen[wanted] = mine[torch.randint(len(mine), (int(wanted.sum()),), generator=generator)]
        return self.vectors[chosen]


def items(task: str, test: bool) -> Items:
    """Paths and digits, at most `EACH` of a digit."""
    name, kind, field = SOURCES[task]
    if test:
        found = [(str(EVAL / row[field][0]), int(row["answers"][0])) for row in read_jsonl(EVAL / name)]
    else:
        turns = [row["messages"] for row in read_jsonl(DATA / name)]
        media = [next(part["path"] for part in ask["content"] if part["type"] == kind) for ask, _ in turns]
        found = [(str(DATA / path), int(tell["content"])) for path, (_, tell) in zip(media, turns, strict=True)]
    found = sorted(set(found))
    return [each for digit in range(10) for each in [item for item in found if item[1] == digit][:EACH]]


@torch.no_grad()
def encode(model: Any, task: str, paths: list[str]) -> torch.Tensor:
    """The mean of each item's projected tokens, and their maximum: `[items, 2 * width]`."""
    processor = MixLoraProcessor.from_pretrained(default_checkpoint())

    def read(some: list[str]) -> list[torch.Tensor]:
        if task == "picture":
            return model.get_image_features(**processor.image_processor(some)).pooler_output
        return model.model.project_speech(
            model.model.stack_speech(model.model.encode_speech(**processor.audio_processor(some)))
        )

    parts = [paths[start : start + AT_ONCE] for start in range(0, len(paths), AT_ONCE)]
    return torch.stack([torch.cat((each.mean(0), each.amax(0))) for part in parts for each in read(part)])


def digit_scores(train: Media) -> torch.Tensor:
    """Least squares from vectors to how much they show each digit, `[size, 10]`; a tenth is to be added to each."""
    ones, x = torch.nn.functional.one_hot(train.digits, 10).double(), train.vectors.double()
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.solve(x.T @ x + ridge, x.T @ (ones - 0.1))


def readable(train: Media, test: Media) -> Media:
    """Those to test with that least squares, fitted on those to train with, read right: the study is of retrieval."""
    right = (test.vectors.double() @ digit_scores(train)).argmax(-1) == test.digits
    return Media(test.vectors[right], test.digits[right])


def load_media(file: Path) -> dict[str, dict[str, Media]]:
    """Task -> `train` and `test`; encoded once, then kept in `file`."""
    if not file.is_file():
        model, kept = MixLoraForConditionalGeneration.from_pretrained(default_checkpoint()).eval(), {}
        for task in SOURCES:
            for part in PARTS:
                found = items(task, part == "test")
                kept[f"{task}/{part}/vectors"] = encode(model, task, [path for path, _ in found])
                kept[f"{task}/{part}/digits"] = torch.tensor([digit for _, digit in found])
            spread, mean = torch.std_mean(kept[f"{task}/train/vectors"], dim=0)
            for part in PARTS:
                kept[f"{task}/{part}/vectors"] = (kept[f"{task}/{part}/vectors"] - mean) / (spread + 1e-6)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in kept.items()}, file)
    kept, found = load_file(file), {}
    for task in SOURCES:
        train, test = (Media(*(kept[f"{task}/{part}/{what}"] for what in ("vectors", "digits"))) for part in PARTS)
        found[task] = {"train": train, "test": readable(train, test)}
        print(f"{task}: {len(train.digits)} items to train with, {len(test.digits)} others, of which", end=" ")
        print(f"{len(found[task]['test'].digits)} can be read", flush=True)
    return found

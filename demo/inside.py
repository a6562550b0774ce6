"""What happened to the last question, as pictures and tables."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from mixlora.serving.request import Request

SHADES = ("#0b0724", "#b5367a", "#fcfdbf")  # of the spectrogram: quiet, middle, loud


@dataclass(frozen=True)
class Inside:
    """The last answer looked at from inside."""

    pictures: list[tuple[Image.Image, str]]
    """What the towers got, each with its caption."""
    facts: list[list[str]]
    """The router's decision and the token counts: name, value."""
    places: list[list[str]]
    """Where text, pictures and clips stand in the row: tokens, what."""
    seconds: list[list[str]]
    """Time of each stage: stage, seconds."""


def look_inside(request: Request, model: Any, processor: Any) -> Inside:
    """What `request`, which has ended, went through."""
    prompt = request.prompt
    pictures = [
        *_pictures(prompt.media.get("pixel_values"), processor.image_processor),
        *_spectrograms(prompt.media.get("input_features"), prompt.media.get("input_features_mask")),
    ]
    kinds = {model.config.image_token_id: "picture", model.config.audio_token_id: "clip"}
    ids = prompt.ids[0].tolist()
    count = {kind: sum(kinds.get(token) == kind for token in ids) for kind in ("picture", "clip")}
    facts = [
        ["the question holds", prompt.modality.replace("_", " and ")],
        ["adapter", prompt.adapter or "none: the decoder alone"],
        *([f"{seen.replace('_', ' and ')} goes to", name or "none"] for seen, name in model.config.routing.items()),
        ["tokens of the question", str(prompt.length)],
        ["of these pictures / clips / text", f"{count['picture']} / {count['clip']} / "
         f"{prompt.length - count['picture'] - count['clip']}"],
        ["taken from the last turn", str(request.reused)],
        ["tokens of the answer", str(len(request.tokens))],
        ["it ended by", str(request.reason)],
    ]  # fmt: skip
    timing = request.timing
    seconds = {
        "decoding files, tokenizing": timing.prepared,
        "waiting for a place": timing.queued,
        "towers and projectors": timing.encoded,
        "reading the question": timing.read,
        "answering": timing.answered,
    }
    return Inside(pictures, facts, _places(ids, kinds), [[name, f"{value:.3f}"] for name, value in seconds.items()])


def badge(request: Request) -> str:
    """One line about an answer: what was seen, the adapter, tokens, seconds."""
    prompt, timing = request.prompt, request.timing
    adapter = f"adapter {prompt.adapter}" if prompt.adapter else "no adapter"
    seconds = timing.first_token + timing.answered
    ended = {"timeout": " · out of time", "length": " · cut at its longest"}.get(str(request.reason), "")
    seen = prompt.modality.replace("_", " and ")
    return f"{seen} · {adapter} · {len(request.tokens)} tokens · {seconds:.1f} s{ended}"


def _pictures(pixels: torch.Tensor | None, settings: Any) -> list[tuple[Image.Image, str]]:
    """Each crop that the vision tower got, `[crops, 3, height, width]`, with its normalisation undone."""
    if pixels is None:
        return []
    mean, std = (torch.tensor(getattr(settings, name, [0.5] * 3)) for name in ("image_mean", "image_std"))
    values = pixels.float().cpu() * std[:, None, None] + mean[:, None, None]
    arrays = (values.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = arrays.shape[1:3]
    return [(Image.fromarray(one), f"crop {i}, {width} x {height} pixels") for i, one in enumerate(arrays, start=1)]


def _spectrograms(mels: torch.Tensor | None, mask: torch.Tensor | None) -> list[tuple[Image.Image, str]]:
    """The mel frames `[clips, frames, mels]` that the speech tower got: time to the right, pitch upwards."""
    if mels is None:
        return []
    result = []
    for number, clip in enumerate(mels.float().cpu(), start=1):
        real = clip if mask is None else clip[mask[number - 1].bool().cpu()]
        values = real.T.flip(0).numpy()
        low, high = values.min(), values.max()
        grey = ((values - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
        black, mid, white = SHADES
        coloured = ImageOps.colorize(Image.fromarray(grey), black, white, mid)
        shown = coloured.resize((min(max(coloured.width, 320), 1600), coloured.height * 3), Image.Resampling.NEAREST)
        result.append((shown, f"clip {number}, {real.shape[0]} x {real.shape[1]} mels"))
    return result


def _places(ids: list[int], kinds: dict[int, str]) -> list[list[str]]:
    """Runs of text, pictures and clips in a row."""
    runs: list[tuple[int, int, str]] = []
    for place, token in enumerate(ids):
        kind = kinds.get(token, "text")
        if runs and runs[-1][2] == kind:
            runs[-1] = (runs[-1][0], place, kind)
        else:
            runs.append((place, place, kind))
    return [[f"{first}–{last}", kind] for first, last, kind in runs]

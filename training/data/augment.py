"""Views of media files: clips at another speed, in rooms and noise; pictures turned, cluttered, blurred, inverted.

View 0 is the file itself. View k is drawn from the seed, the file's content and k, so it is the same in every epoch
and run: features of it can be cached, and a resumed training meets what the killed one would have met.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchaudio import functional as audio_ops
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as picture_ops

from mixlora.modeling.audio_processing_mixlora import RATE, SHORTEST, load_clip
from mixlora.modeling.image_processing_mixlora import load_picture
from mixlora.training.data.items import Item, Medium, View, content_key, readable
from mixlora.training.data.rows import Row
from mixlora.training.data.settings import Augment
from mixlora.training.settings import RecipeError

DRAWING = 1
"""Raise it when a view comes out differently than before: cached features of the old one are then not read."""
VOICES = 4
"""Clips that babble together."""
MARGIN = 1 / 6
"""Depth of the border in which clutter lies, as a share of a picture's side."""
REVERBERANT = (-10.0, 0.0)
"""Energy of a room's tail over that of the direct sound, in dB: from close by to where both are equally loud."""


class Augmenter:
    """Makes the views of a stage's media.

    Args:
        augment: what is done; by default nothing, each file has its plain view alone.
        clips: the stage's clips, of which babble is made.

    Raises:
        RecipeError: babble is asked for, and there are clips, but no two different ones.
    """

    def __init__(self, augment: Augment | None = None, clips: Sequence[Medium] = ()):
        self.augment = augment or Augment()
        self.babblers: dict[str, Medium] = {}  # in order of content, so that views do not depend on the order of rows
        if "babble" in self.augment.noise:
            self.babblers = dict(sorted({content_key(path): path for path in dict.fromkeys(clips)}.items()))
            if len(self.babblers) == 1:
                raise RecipeError("augment: babble is made of other clips, and the stage has a single one")
        self._marks = {kind: self._mark(kind) for kind in ("image", "audio") if self.augment.operations(kind)}

    def count(self, row: Row) -> int:
        """How many views a row has: one where nothing is done to its media."""
        touched = ("image" in self._marks and row.images) or ("audio" in self._marks and row.audio)
        return self.augment.views if touched else 1

    def media(self, row: Row, number: int) -> tuple[tuple[Item, ...], tuple[Item, ...]]:
        """Pictures and clips of view `number` of a row, in order of appearance."""
        return self._views("image", row.images, number), self._views("audio", row.audio, number)

    def picture(self, item: Item) -> Image.Image:
        """A picture as RGB, as it is or as the view has it, of the same size."""
        if not isinstance(item, View):
            return load_picture(readable(item))
        rng, settings, picture = self._rng(item), self.augment, load_picture(readable(item.path))
        if (settings.rotation or settings.shift or settings.scale) and self._acts(rng):
            picture = _place(picture, settings, rng)
        if settings.clutter and self._acts(rng):
            picture = clutter(picture, int(rng.integers(1, settings.clutter + 1)), rng)
        if settings.blur and self._acts(rng):
            radius = rng.uniform(0, settings.blur) * max(picture.size)
            picture = picture.filter(ImageFilter.GaussianBlur(radius))
        if settings.polarity and self._acts(rng) and rng.random() < settings.polarity:
            picture = ImageOps.invert(picture)
        return picture

    def clip(self, item: Item) -> np.ndarray:
        """A clip as float32 mono samples at 16 kHz, as it is or as the view has it; only speed changes its length."""
        if not isinstance(item, View):
            return load_clip(readable(item))
        rng, settings = self._rng(item), self.augment
        samples = torch.from_numpy(load_clip(readable(item.path)))
        if settings.speed and self._acts(rng):
            samples = change_speed(samples, _between(settings.speed, rng))
        if settings.room and self._acts(rng):
            samples = reverberate(samples, _between(settings.room, rng), rng)
        if settings.noise and self._acts(rng):
            noise = self._noise(str(rng.choice(settings.noise)), item, len(samples), rng)
            if noise.any():  # silent clips make no babble
                samples = audio_ops.add_noise(samples, noise, torch.tensor(_between(settings.snr, rng)))
        return (samples / samples.abs().max().clamp(min=1)).float().numpy()

    def _views(self, kind: str, files: Sequence[Medium], number: int) -> tuple[Item, ...]:
        if number == 0 or kind not in self._marks:
            return tuple(files)
        return tuple(View(file, number, self._marks[kind]) for file in files)

    def _mark(self, kind: str) -> str:
        """Names all that decides a view but the file and the number; how many views there are does not."""
        settings: dict[str, Any] = {"drawing": DRAWING, "seed": self.augment.seed, "chance": self.augment.chance}
        settings |= self.augment.operations(kind)
        if "noise" in settings:
            settings |= {"snr": self.augment.snr, "babblers": list(self.babblers)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def _rng(self, view: View) -> np.random.Generator:
        name = f"{self.augment.seed}/{content_key(view.path)}/{view.number}"
        return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()))

    def _acts(self, rng: np.random.Generator) -> bool:
        return rng.random() < self.augment.chance

    def _noise(self, kind: str, view: View, length: int, rng: np.random.Generator) -> torch.Tensor:
        if kind != "babble":
            return coloured_noise(kind, length, rng)
        keys, own = list(self.babblers), content_key(view.path)
        drawn = rng.choice(len(keys), min(VOICES + 1, len(keys)), replace=False)
        others = [self.babblers[keys[index]] for index in drawn if keys[index] != own][:VOICES]
        return babble([torch.from_numpy(load_clip(readable(clip))) for clip in others], length, rng)


def change_speed(samples: torch.Tensor, factor: float) -> torch.Tensor:
    """`[samples]` played `factor` times as fast, in hundredths; a clip that would get too short stays as it is."""
    percent = round(100 * factor)  # the filter of an odd ratio would be huge
    if len(samples) * 100 // percent < SHORTEST:
        return samples
    return audio_ops.resample(samples, percent, 100)


def reverberate(samples: torch.Tensor, seconds: float, rng: np.random.Generator) -> torch.Tensor:
    """`[samples]` as heard in a room: the same length and energy, and an echo 60 dB down after `seconds`.

    The room's response is the direct sound and Gaussian noise that decays exponentially (J. D. Polack's model, 1988).
    """
    time = torch.arange(max(2, round(seconds * RATE))) / RATE
    tail = torch.from_numpy(rng.standard_normal(len(time))).float() * 10 ** (-3 * time / seconds)
    response = tail * 10 ** (rng.uniform(*REVERBERANT) / 20) / tail.norm()
    response[0] = 1
    heard = audio_ops.fftconvolve(samples, response)[: len(samples)]
    return heard * (samples.norm() / heard.norm().clamp(min=1e-9))


def coloured_noise(kind: str, length: int, rng: np.random.Generator) -> torch.Tensor:
    """Gaussian noise `[length]`: white, or pink, whose power falls with the frequency."""
    white = torch.from_numpy(rng.standard_normal(length)).float()
    if kind == "white":
        return white
    spectrum = torch.fft.rfft(white)
    spectrum /= torch.arange(len(spectrum)).clamp(min=1).sqrt()
    return torch.fft.irfft(spectrum, n=length)


def babble(voices: Sequence[torch.Tensor], length: int, rng: np.random.Generator) -> torch.Tensor:
    """Several clips `[samples]` at once, equally loud, each repeated to `length` from a random place on."""
    total = torch.zeros(length)
    for voice in voices:
        places = (torch.arange(length) + int(rng.integers(len(voice)))) % len(voice)
        total += voice[places] / voice.norm().clamp(min=1e-9)
    return total


def border_colour(picture: Image.Image) -> tuple[int, int, int]:
    """The median colour of an RGB picture's outermost pixels."""
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (int(value) for value in np.median(border, axis=0))
    return red, green, blue


def clutter(picture: Image.Image, pieces: int, rng: np.random.Generator) -> Image.Image:
    """A copy with thin lines and blobs of any colour along its sides, in the outer sixth."""
    picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    thin = max(1, max(picture.size) // 60)
    for _ in range(pieces):
        side, is_line = int(rng.integers(4)), rng.random() < 0.5
        start, end = rng.random(2)
        near, far = rng.uniform(0, MARGIN * 0.8, 2)  # what a line's width or a blob's radius adds stays in the margin
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        x, y = _on_side(picture, side, start, near)
        if is_line:
            draw.line([(x, y), _on_side(picture, side, end, far)], fill=colour, width=thin)
        else:
            radius = rng.uniform(0.3, 1) * min(picture.size) * MARGIN * 0.2
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    return picture


def _on_side(picture: Image.Image, side: int, along: float, depth: float) -> tuple[float, float]:
    """The point `along` one of four sides and `depth` into the picture, both as shares, in pixels."""
    x, y = ((along, depth), (along, 1 - depth), (depth, along), (1 - depth, along))[side]
    return x * (picture.width - 1), y * (picture.height - 1)


def _between(bounds: Sequence[float], rng: np.random.Generator) -> float:
    low, high = bounds
    return rng.uniform(low, high)


def _place(picture: Image.Image, settings: Augment, rng: np.random.Generator) -> Image.Image:
    """Turns, moves and scales about the middle; what comes into view takes the border's colour."""
    width, height = (round(side * rng.uniform(-settings.shift, settings.shift)) for side in picture.size)
    return picture_ops.affine(
        picture,
        angle=rng.uniform(-settings.rotation, settings.rotation),
        translate=[width, height],
        scale=_between(settings.scale, rng) if settings.scale else 1.0,
        shear=[0.0],
        interpolation=InterpolationMode.BILINEAR,
        fill=list(border_colour(picture)),
    )

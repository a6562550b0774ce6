"""Pictures: whatever a user hands over, as one normalised square crop."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

SLACK = 1e-3  # float pixels may overshoot 0..1 by so much, as resizing makes them
SETTINGS = (
    *("do_convert_rgb", "do_resize", "do_rescale", "do_normalize", "do_center_crop", "size", "crop_size", "resample"),
    *("rescale_factor", "image_mean", "image_std", "dynamic_hd"),
)
"""What transformers' picture processors may be told for one call."""


def load_picture(source: Any, where: str = "picture") -> Image.Image:
    """A picture as RGB: EXIF orientation applied, alpha laid on white, 16-bit scaled to 8.

    Args:
        source: a PIL image, a path, encoded bytes, or an array or tensor `[h, w]`, `[h, w, c]` or `[c, h, w]`, uint8
            or uint16, or float in 0..1.
        where: how errors call it.

    Raises:
        ValueError: something else, an empty or undecodable picture, NaN, or floats outside 0..1.
    """
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source, where))
    if isinstance(source, str) and source.split(":", 1)[0].lower() in ("http", "https", "data"):
        raise ValueError(f"{where}: addresses are not fetched; pass a path, bytes, an array or a PIL image")
    if not isinstance(source, str | Path | bytes | Image.Image):
        raise ValueError(f"{where}: expected a PIL image, an array, a path or bytes, got {type(source).__name__}")
    try:
        if not isinstance(source, Image.Image):
            source = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        source.load()
    except Exception as error:  # decoders raise errors of any kind
        raise ValueError(f"{where}: can't be read as a picture ({error})") from error
    if 0 in source.size:
        raise ValueError(f"{where}: a picture of {source.width} x {source.height} pixels is empty")
    picture = ImageOps.exif_transpose(source)
    if picture.mode.startswith("I") or picture.mode == "F":
        picture = _from_array(_deep_pixels(picture), where)
    return _to_rgb(picture)


def _deep_pixels(picture: Image.Image) -> np.ndarray:
    """Pixels of more than 8 bits. Pillow's mode "I" may hold 8 or 16 bits, and is read as the fewest that fit."""
    pixels = np.asarray(picture)
    is_wide = picture.mode == "I" and pixels.min() >= 0 and 255 < pixels.max() <= 65535
    return pixels.astype(np.uint16) if is_wide else pixels


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"{where}: an array of shape {array.shape} is not [h, w], [h, w, 3 or 4] or [3 or 4, h, w]")
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{where}: pixels of type {array.dtype} are neither integers nor floats")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < -SLACK or array.max() > 1 + SLACK:
            raise ValueError(f"{where}: float pixels must be finite and in 0..1, or pass uint8 in 0..255")
        array = (array * 255).round().clip(0, 255)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = (array / 257).round()
    elif array.dtype.kind == "b":
        array = array * np.uint8(255)
    elif array.min() < 0 or array.max() > 255:
        raise ValueError(f"{where}: integer pixels must be in 0..255, got {array.min()}..{array.max()}")
    return Image.fromarray(array.astype(np.uint8))


def refuse_other_settings(options: dict[str, Any]) -> None:
    """Raises ValueError where a call asks for what it cannot have, such as `do_rescale=False` or another `size`.

    The steps belong together: pictures of any kind become 8-bit RGB, and each is fitted, scaled and normalised.
    """
    for name, value in options.items():
        if name in SETTINGS and value is not None and value is not True:
            raise ValueError(
                f"images: {name}={value!r} can't be set for one call; pass pictures as they are, integers in 0..255 "
                "or floats in 0..1, and make a processor for another size or mean"
            )


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


class MixLoraImageProcessor(BaseImageProcessor):
    """Fits a picture into a square, keeping its aspect, and normalises it.

    The rest of the square takes the median colour of the picture's own border, so that no edge appears.

    Args:
        size: side of the square.
        image_mean, image_std: per channel, for pixels in 0..1. The defaults are EfficientNet-Lite's.
    """

    model_input_names = ["pixel_values", "image_sizes"]

    def __init__(
        self,
        size: int = 224,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = size
        self.image_mean = image_mean or [127 / 255] * 3
        self.image_std = image_std or [128 / 255] * 3

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """`pixel_values` `[images, 3, size, size]` and `image_sizes` `[images, 2]` (height, width)."""
        refuse_other_settings(kwargs)
        images = images if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("images: at least one is needed")
        pictures = [load_picture(image, f"picture {i}") for i, image in enumerate(images)]
        pixels = np.stack([self._crop(picture) for picture in pictures])
        sizes = np.array([(picture.height, picture.width) for picture in pictures])
        return BatchFeature({"pixel_values": pixels, "image_sizes": sizes}, tensor_type=return_tensors)

    def _crop(self, picture: Image.Image) -> np.ndarray:
        scale = self.size / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        pixels = np.asarray(picture)
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        canvas = Image.new("RGB", (self.size, self.size), tuple(int(c) for c in np.median(border, axis=0)))
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(resized, ((self.size - width) // 2, (self.size - height) // 2))
        values = np.asarray(canvas, dtype=np.float32) / 255
        normalised = (values - np.array(self.image_mean, np.float32)) / np.array(self.image_std, np.float32)
        return normalised.transpose(2, 0, 1)

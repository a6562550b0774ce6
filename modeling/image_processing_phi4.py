"""Phi-4-Multimodal's pictures: a global view and a grid of crops that follows the picture's shape (dynamic HD)."""

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .image_processing_mixlora import load_picture, refuse_other_settings

THINNEST = 10  # pixels of the resized picture's shorter side; the model was trained on nothing thinner


def crop_grid(width: int, height: int, side: int, most: int) -> tuple[int, int]:
    """Columns and rows of crops of `side` pixels.

    They cover the picture at its own size where `most` crops suffice. Else it is the grid of at most `most` crops
    whose aspect is nearest; of grids of one aspect the largest that the picture fills by half.
    """
    columns, rows = math.ceil(width / side), math.ceil(height / side)
    if columns * rows <= most:
        return columns, rows
    grids = sorted(
        ((c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)), key=lambda grid: grid[0] * grid[1]
    )
    differences = [abs(width / height - c / r) for c, r in grids]
    nearest = [grid for grid, difference in zip(grids, differences, strict=True) if difference == min(differences)]
    filled = [(c, r) for c, r in nearest if width * height > 0.5 * side * side * c * r]
    return (filled or nearest[:1])[-1]


class Phi4ImageProcessor(BaseImageProcessor):
    """Crops, masks and token counts as Phi-4-Multimodal was trained with.

    A picture is resized into its grid, keeping its aspect; the rest of the grid, right or below, is white and masked
    by patches. The global view is the whole grid in one crop. Each crop gives `side ** 2` tokens, of which those of
    masked patches are left out; a separator ends each row of tokens, and one stands before the global view's.

    Args:
        size: side of a crop, or `{"height", "width"}` with equal values.
        patch_size: side of a patch of the vision tower; two by two patches give a token.
        dynamic_hd: most crops of a picture, the global view not counted.
        image_mean, image_std: per channel, for pixels in 0..1.

    Raises:
        ValueError: a size that is not square or not a multiple of the patch size.
    """

    model_input_names = ["pixel_values", "image_sizes", "image_attention_mask"]

    def __init__(
        self,
        size: int | dict[str, int] = 448,
        patch_size: int = 14,
        dynamic_hd: int = 36,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        sides = [size] if isinstance(size, int) else [size["height"], size["width"]]
        if len(set(sides)) != 1 or sides[0] % patch_size:
            raise ValueError(f"size: crops must be square and a multiple of patch_size {patch_size}, got {size}")
        self.size, self.patch_size, self.dynamic_hd = sides[0], patch_size, dynamic_hd
        self.image_mean = image_mean or [0.5] * 3
        self.image_std = image_std or [0.5] * 3

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Crops of all pictures in order of appearance, one after another: none is padded for a larger neighbour.

        Args:
            images: one picture or several, of any kind that [`load_picture`] takes.

        Returns:
            `pixel_values` `[crops, 3, size, size]`, of each picture the global view, then its grid row by row;
            `image_attention_mask` `[crops, patches, patches]`, 0 at white patches; `image_sizes` `[images, 2]`, height
            and width of the grids; `num_img_tokens` `[images]`.

        Raises:
            ValueError: no picture, one that can't be read, one so long that it becomes too thin, or a setting for
                this call alone.
        """
        refuse_other_settings(kwargs)
        images = images if isinstance(images, list | tuple) else [images]
        if not images:
            raise ValueError("images: at least one is needed")
        side, patches = self.size, self.size // self.patch_size
        pictures = [load_picture(image, f"picture {i}") for i, image in enumerate(images)]
        grids = [crop_grid(*picture.size, side, self.dynamic_hd)[::-1] for picture in pictures]
        views = [1 + rows * columns for rows, columns in grids]
        pixels = torch.empty(sum(views), 3, side, side)  # written to once, picture by picture
        masks = torch.empty(sum(views), patches, patches)
        parts = zip(pictures, grids, pixels.split(views), masks.split(views), strict=True)
        counts = [self._crops(*part, f"picture {i}") for i, part in enumerate(parts)]
        data = {
            "pixel_values": pixels,
            "image_sizes": torch.tensor([(rows * side, columns * side) for rows, columns in grids]),
            "image_attention_mask": masks,
            "num_img_tokens": torch.tensor(counts),
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def _crops(
        self, picture: Image.Image, grid: tuple[int, int], pixels: torch.Tensor, masks: torch.Tensor, where: str
    ) -> int:
        """Writes a picture's views into `pixels` `[1 + crops, 3, side, side]` and `masks`; gives its number of tokens.

        Args:
            grid: rows and columns of crops.
        """
        side, (rows, columns) = self.size, grid
        width, height = self._fit(picture.size, (columns * side, rows * side), where)
        values = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
        values = tv.resize(values, [height, width])
        values = tv.pad(values, [0, 0, columns * side - width, rows * side - height], [255])
        # The global view is made of pixels as they are: resizing and normalising may change places.
        pixels[0] = tv.resize(values.float(), [side, side], interpolation=InterpolationMode.BICUBIC, antialias=False)
        tiles = values.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).permute(1, 3, 0, 2, 4)
        pixels[1:].unflatten(0, grid).copy_(tiles)
        mean, std = (torch.tensor(each)[:, None, None] * 255 for each in (self.image_mean, self.image_std))
        pixels.sub_(mean).div_(std)
        mask = torch.zeros(rows * side // self.patch_size, columns * side // self.patch_size)
        mask[: -(-height // self.patch_size), : -(-width // self.patch_size)] = 1
        masks[0] = 1
        masks[1:] = _tiles(mask[None], rows, columns)[:, 0]
        return self._count(mask, rows, columns)

    @staticmethod
    def _fit(size: tuple[int, int], target: tuple[int, int], where: str) -> tuple[int, int]:
        """Width and height of a picture of `size` when it is resized to just fit into `target`."""
        across, down = target[0] / size[0], target[1] / size[1]
        fitted = (target[0], int(size[1] * across)) if across < down else (int(size[0] * down), target[1])
        if min(fitted) < THINNEST:
            raise ValueError(
                f"{where}: {size[0]} x {size[1]} pixels are too long and thin; resized, {min(fitted)} pixels would be "
                f"left of the shorter side, of at least {THINNEST}"
            )
        return fitted

    def _count(self, mask: torch.Tensor, rows: int, columns: int) -> int:
        """Tokens of a picture whose real patches are 1 in `mask`, separators included."""
        side = -(-self.size // self.patch_size // 2)
        tokens = _tiles(mask[None], rows, columns)[:, 0, ::2, ::2].reshape(rows, columns, side, side)
        height, width = int(tokens[:, 0, :, 0].sum()), int(tokens[0, :, 0].sum())
        return height * (width + 1) + 1 + side * (side + 1)


def _tiles(values: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """`[channels, height, width]` -> `[rows * columns, channels, height / rows, width / columns]`."""
    tiles = values.unflatten(2, (columns, -1)).unflatten(1, (rows, -1))  # [channels, rows, y, columns, x]
    return tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)

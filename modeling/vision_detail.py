"""What a frozen tower does not tell of a picture, such as the strokes of small letters."""

from typing import Any

import torch
from torch import nn

from .towers import fold_map


class DetailHead(nn.Linear):
    """Zero until it learns, so that a fresh branch leaves pictures as they were."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class VisionDetail(nn.Module):
    """A small ConvNeXt (Liu et al., CVPR 2022) beside a tower, added to the projected tokens at their places.

    Args:
        side: a picture's tokens lie on a grid of this side.
        output_size: width of a token.
        widths, layers, patch_size, cells: see `config.vision_detail`.
    """

    def __init__(
        self, side: int, output_size: int, *, widths: list[int], layers: int, patch_size: int, cells: int
    ) -> None:
        from timm.layers import LayerNorm, LayerNorm2d  # timm takes a while to import, and few models have this part
        from timm.models.convnext import ConvNeXtStage

        super().__init__()
        self.side = side
        self.picture_size = side * cells * patch_size * 2 ** (len(widths) - 1)
        self.stem = nn.Conv2d(3, widths[0], patch_size, stride=patch_size)
        self.norm = LayerNorm2d(widths[0])
        options: Any = {"depth": layers, "ls_init_value": None, "norm_layer": LayerNorm2d, "norm_layer_cl": LayerNorm}
        self.stages = nn.ModuleList(
            ConvNeXtStage(before, width, stride=2 if i else 1, **options)
            for i, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False))
        )
        self.head = DetailHead(cells**2 * widths[-1], output_size)

    def blank(self) -> torch.Tensor:
        """`pixel_values` of one black picture."""
        return torch.zeros(1, 3, self.picture_size, self.picture_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[pictures, 3, size, size]` -> `[pictures, tokens, output_size]`.

        Raises:
            ValueError: pictures of another size than the grid of tokens takes.
        """
        if tuple(pixel_values.shape[-2:]) != (self.picture_size, self.picture_size):
            raise ValueError(
                f"pixel_values of {list(pixel_values.shape)}: vision_detail takes pictures of "
                f"{self.picture_size} x {self.picture_size} pixels"
            )
        maps = self.norm(self.stem(pixel_values.to(self.stem.weight.dtype)))
        for stage in self.stages:
            maps = stage(maps)
        tokens: torch.Tensor = self.head(fold_map(maps, self.side))
        return tokens

"""Phi-4-Multimodal's towers on transformers' modules, right where its forward passes are not.

The modules, and so the names of all tensors, are those of transformers' `phi4_multimodal`. The passes are ours:
attention over patches looks both ways under every backend, no layer behind the feature layer is computed, and a clip's
features do not depend on the clips beside it.
"""

from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import (
    Phi4MultimodalAudioModel,
    Phi4MultimodalVisionAttention,
    Phi4MultimodalVisionModel,
)

from .configuration_mixlora import MixLoraConfig

BLOCK = 500
"""Subsampled frames (40 s) that the speech encoder sees at once; a longer clip is encoded in blocks of that size."""


class OwnBackends:
    """A tower that takes another attention than it is asked for where that would leave out what it needs.

    transformers asks in two ways: when a model is built, and in `set_attn_implementation` of a whole model.
    """

    def own_backend(self, asked: str | None) -> str | None:
        """What it takes where `asked` is asked for."""
        raise NotImplementedError

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        parent: Any = super()
        return parent._check_and_adjust_attn_implementation(self.own_backend(attn_implementation), *args, **kwargs)

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        parent: Any = super()
        return parent.get_correct_attn_implementation(self.own_backend(requested_attention), *args, **kwargs)


class PatchEncoder(OwnBackends, Phi4MultimodalVisionModel):
    """The SigLIP-like encoder with positions by the real extent of a crop, up to a feature layer."""

    def __init__(self, config: Any):
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, Phi4MultimodalVisionAttention):
                module.is_causal = False  # sdpa would take the flag where no patch is masked

    def own_backend(self, asked: str | None) -> str | None:
        """No flash attention, which leaves patches of padding out: at an odd edge they are averaged with real ones."""
        return "sdpa" if asked is not None and "flash" in asked else asked

    def features(self, pixel_values: torch.Tensor, mask: torch.Tensor, layers: list[int]) -> torch.Tensor:
        """Hidden states after `layers` layers, joined.

        Args:
            pixel_values: `[crops, 3, height, width]`.
            mask: BoolTensor `[crops, patches_h, patches_w]`, False at patches of padding.
            layers: numbers of layers to have passed, 0 for the embeddings.

        Returns:
            `[crops, patches_h, patches_w, size * len(layers)]`.
        """
        states = [self.embeddings(pixel_values=pixel_values, patch_attention_mask=mask)]
        attention_mask = create_bidirectional_mask(
            config=self.config, inputs_embeds=states[0], attention_mask=mask.flatten(1)
        )
        for layer in self.encoder.layers[: max(layers)]:
            states.append(layer(states[-1], attention_mask))
        return torch.cat([states[i] for i in layers], dim=-1).unflatten(1, mask.shape[1:])


class Phi4VisionTower(nn.Module):
    """Crops of pictures to one sequence a picture: the crops' rows, then the global view.

    A feature is twice two patches, averaged. Two flag columns behind it mark where the projector puts its learned
    separators, so that features may be kept in a cache while separators are trained.
    """

    separators = 2
    tokens = None  # the shape of a picture decides: see `token_counts`

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        vision: Any = config.vision_config
        self.encoder = PatchEncoder(vision)
        self.layers = [range(vision.num_hidden_layers + 1)[i] for i in config.vision_layers]
        self.crop_size, self.patch_size = vision.crop_size, vision.patch_size
        self.side = config.vision_tokens_per_side
        self.feature_size = vision.hidden_size * len(self.layers)

    def unused(self) -> tuple[str, ...]:
        """Prefixes of parameters that are in the checkpoint, yet never act: all behind the feature layer."""
        behind = range(max(self.layers), len(self.encoder.encoder.layers))
        layers = tuple(f"encoder.encoder.layers.{i}." for i in behind)
        return (*layers, "encoder.post_layernorm.", "encoder.head.")

    def blank(self) -> tuple[torch.Tensor, ...]:
        """Arguments of `forward` for one black picture of a single crop, beside its global view."""
        size, patches = self.crop_size, self.crop_size // self.patch_size
        return torch.zeros(2, 3, size, size), torch.tensor([[size, size]]), torch.ones(2, patches, patches)

    def token_counts(self, image_sizes: torch.Tensor, image_attention_mask: torch.Tensor) -> list[int]:
        """Tokens of each picture, separators included; arguments as in [`forward`]."""
        grids = self._grids(image_sizes)
        masks = image_attention_mask.bool()[:, ::2, ::2].split([1 + rows * columns for rows, columns in grids])
        counts = []
        for real, grid in zip(masks, grids, strict=True):
            height, width = self._extent(real, grid)
            counts.append(height * (width + 1) + 1 + self.side * (self.side + 1))
        return counts

    def _grids(self, image_sizes: torch.Tensor) -> list[tuple[int, int]]:
        """Rows and columns of crops of each picture.

        Raises:
            ValueError: a height or width is no multiple of the crop size.
        """
        for i, size in enumerate(image_sizes.tolist()):
            if any(side <= 0 or side % self.crop_size for side in size):
                raise ValueError(f"picture {i}: image_sizes {size} must be multiples of the crops' {self.crop_size}")
        return [(int(h) // self.crop_size, int(w) // self.crop_size) for h, w in image_sizes.tolist()]

    def _extent(self, real: torch.Tensor, grid: tuple[int, int]) -> tuple[int, int]:
        """Height and width in tokens; `real` tells of each view `[1 + crops, side, side]`, the global one first."""
        whole = real[1:].unflatten(0, grid).transpose(1, 2).reshape(grid[0] * self.side, grid[1] * self.side)
        return int(whole[:, 0].sum()), int(whole[0].sum())

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Encodes pictures.

        Args:
            pixel_values: `[crops, 3, height, width]`: of each picture the global view, then its crops row by row.
            image_sizes: `[images, 2]`, height and width of the padded pictures, multiples of the crop size.
            image_attention_mask: `[crops, patches_h, patches_w]`, 0 at patches of padding; all real by default.

        Returns:
            For each picture `[tokens, feature_size + 2]`.

        Raises:
            ValueError: no sizes, or they ask for another number of crops than there are; a mask of another shape.
        """
        crops, _, height, width = pixel_values.shape
        patches = (crops, height // self.patch_size, width // self.patch_size)
        if image_attention_mask is None:
            image_attention_mask = torch.ones(patches, device=pixel_values.device)
        if image_attention_mask.shape != patches:
            raise ValueError(f"image_attention_mask: expected {patches}, got {tuple(image_attention_mask.shape)}")
        if image_sizes is None:
            raise ValueError("pixel_values of several crops a picture need image_sizes")
        grids = self._grids(image_sizes)
        if (wanted := sum(1 + rows * columns for rows, columns in grids)) != crops:
            raise ValueError(
                f"image_sizes of {len(grids)} pictures ask for {wanted} crops of {self.crop_size} pixels, global "
                f"views included, but pixel_values holds {crops}"
            )
        mask = image_attention_mask.to(pixel_values.device).bool()
        dtype = self.encoder.embeddings.patch_embedding.weight.dtype
        states = self._pool(self.encoder.features(pixel_values.to(dtype), mask, self.layers))
        sizes = [1 + rows * columns for rows, columns in grids]
        return [
            self._sequence(view, real, grid)
            for view, real, grid in zip(states.split(sizes), mask[:, ::2, ::2].split(sizes), grids, strict=True)
        ]

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        """Means of two by two patches: `[crops, h, w, size]` -> `[crops, side, side, size]`."""
        states = states.permute(0, 3, 1, 2)
        odd = states.shape[-1] % 2
        if odd:
            states = nn.functional.pad(states, (0, 1, 0, 1), mode="reflect")
        return nn.functional.avg_pool2d(states, 2).permute(0, 2, 3, 1)

    def _sequence(self, states: torch.Tensor, real: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """One picture's tokens from its views `[1 + rows * columns, side, side, size]` and their mask."""
        rows, columns = grid
        crops = states[1:].unflatten(0, grid).transpose(1, 2)  # [rows, side, columns, side, size]
        picture = crops.reshape(rows * self.side, columns * self.side, -1)
        height, width = self._extent(real, grid)
        picture = picture[:height, :width]
        middle = self._separator(states, column=1)
        return torch.cat([self._with_row_ends(picture), middle, self._with_row_ends(states[0])])

    def _separator(self, states: torch.Tensor, column: int) -> torch.Tensor:
        """`[1, size + 2]`: zeros with one flag set."""
        token = states.new_zeros(1, self.feature_size + self.separators)
        token[0, self.feature_size + column] = 1
        return token

    def _with_row_ends(self, grid: torch.Tensor) -> torch.Tensor:
        """`[h, w, size]` -> `[h * (w + 1), size + 2]`, each row ended by a separator."""
        ends = self._separator(grid, column=0).expand(len(grid), 1, -1)
        return torch.cat([nn.functional.pad(grid, (0, self.separators)), ends], dim=1).flatten(0, 1)


class ConformerEncoder(OwnBackends, Phi4MultimodalAudioModel):
    """The conformer with a true mask: in attention as minus infinity, in the convolutions as zeros."""

    def own_backend(self, asked: str | None) -> str:
        """Eager or sdpa: flash attention takes no bias of relative positions, flex attention one head's for all."""
        return "eager" if asked == "eager" else "sdpa"

    def subsample(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[clips, frames, mels]` -> `[clips, ceil(frames / 8), size]`, and what `lengths` `[clips]` become."""
        x = self.encoder_embedding(features).unsqueeze(1)
        for layer in self.embed.conv:
            strided = isinstance(layer, nn.Conv2d) and layer.stride[0] > 1
            if strided:  # it looks one frame ahead, so what is behind a clip's end must be its own zero padding
                behind = torch.arange(x.shape[2], device=x.device) >= lengths[:, None]
                x = x.masked_fill(behind[:, None, :, None], 0)
                lengths = (lengths + 1) // 2
            x = layer(x)
        x = self.embed.out(x.transpose(1, 2).flatten(2))
        behind = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        return x.masked_fill(behind[..., None], 0), lengths

    def attention_bias(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """What is added to the scores `[blocks, heads, frames, frames]`, for `x` and `real`, both `[blocks, frames]`.

        Where the config names a chunk size, a frame sees its chunk and `left_chunk` chunks before it.
        """
        visible = real[:, None, None]
        if self.config.chunk_size > 0:
            chunk = torch.arange(x.shape[1], device=x.device) // self.config.chunk_size
            back = chunk[:, None] - chunk
            visible = visible & (back >= 0) & (back <= self.config.left_chunk)
        bias = self.relative_attention_bias_layer(x)
        return bias.masked_fill(~visible, torch.finfo(bias.dtype).min)

    def encode(self, blocks: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Conformer layers over `[blocks, frames, size]`; frames outside `real` `[blocks, frames]` are not seen."""
        bias = self.attention_bias(blocks, real)
        for layer in self.encoders:
            if self.gradient_checkpointing and self.training:
                blocks = self._gradient_checkpointing_func(layer.__call__, blocks, bias)
            else:
                blocks = layer(blocks, bias)
        return blocks


class Phi4SpeechTower(nn.Module):
    """The conformer on clips of any lengths, 80 ms a feature.

    A clip of more than 500 features (40 s) is encoded in blocks of 500. Its last block is filled with zeros that
    attention sees, as the released model does with a clip alone.
    """

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        speech: Any = config.speech_config
        self.encoder = ConformerEncoder(speech)
        self.feature_size = speech.hidden_size

    def token_count(self, frames: int) -> int:
        """Features of a clip of `frames` mel frames."""
        return -(-frames // 8)

    def blank(self) -> tuple[torch.Tensor, ...]:
        """Arguments of `forward` for one silent clip."""
        return torch.zeros(1, 64, self.encoder.config.input_size), torch.ones(1, 64, dtype=torch.long)

    def forward(self, input_features: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Encodes clips.

        Args:
            input_features: log-mel frames `[clips, frames, mels]`.
            mask: `[clips, frames]`, 1 at real frames, which come first.

        Returns:
            For each clip `[ceil(real frames / 8), feature_size]`.
        """
        dtype = self.encoder.embed.out.weight.dtype
        x, lengths = self.encoder.subsample(input_features.to(dtype), mask.sum(-1).to(input_features.device))
        size = min(x.shape[1], BLOCK)
        x = nn.functional.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
        start = torch.arange(x.shape[1], device=x.device) * size
        used = start < lengths[:, None]  # [clips, blocks]
        seen = torch.where(lengths > BLOCK, BLOCK, lengths)[:, None, None].expand(*used.shape, 1)
        real = torch.arange(size, device=x.device) < seen
        encoded = self.encoder.encode(x[used], real[used])
        clips = encoded.split(used.sum(-1).tolist())
        return [clip.flatten(0, 1)[:length] for clip, length in zip(clips, lengths.tolist(), strict=True)]

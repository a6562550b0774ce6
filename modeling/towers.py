"""Vision and speech towers: any transformers encoder named by its config, and what the projectors read of it."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .configuration_mixlora import MixLoraConfig
from .towers_phi4 import Phi4SpeechTower, Phi4VisionTower


def fold_map(features: torch.Tensor, side: int) -> torch.Tensor:
    """A feature map `[crops, channels, h, w]` as `[crops, side * side, channels * (h / side)^2]`, nothing averaged.

    Raises:
        ValueError: the map's side is not a multiple of `side`.
    """
    height, width = features.shape[-2:]
    if height % side or width % side:
        raise ValueError(f"a {height} x {width} feature map does not fold into {side} x {side} tokens")
    return nn.functional.pixel_unshuffle(features, height // side).flatten(2).transpose(1, 2)


TAIL = ("post_layernorm", "layernorm", "norm", "head", "pooler")
"""What patch encoders of transformers have behind their layers; no feature layer lies there."""


BLANK_FRAMES = 64
"""Frames of a silent clip: more than any encoder here joins."""


def prune(encoder: Any, layers: int) -> None:
    """Takes out of a patch encoder what lies behind its first `layers` layers: it is neither computed nor kept."""
    for module in list(encoder.modules()):
        if isinstance(module, nn.ModuleList) and len(module) == encoder.config.num_hidden_layers:
            if isinstance(module[0], GradientCheckpointingLayer):
                del module[max(layers, 1) :]  # one layer at least tells transformers what goes into it
    for name in TAIL:
        if isinstance(getattr(encoder, name, None), nn.Module):
            setattr(encoder, name, nn.Identity())


def layer_numbers(indices: list[int], layers: int) -> list[int]:
    """Indices into `hidden_states` as numbers of layers to have passed, 0 for the embeddings.

    Raises:
        ValueError: there is no such layer.
    """
    if wrong := [i for i in indices if not -layers - 1 <= i <= layers]:
        raise ValueError(f"vision_layers: {wrong} are not among the encoder's, {-layers - 1} to {layers}")
    return [range(layers + 1)[i] for i in indices]


class VisionTower(nn.Module):
    """A frozen-able image encoder that gives one feature vector a token: any of transformers, or of timm.

    What lies behind the last feature layer is taken out, so that it is not computed.
    """

    separators = 0

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        vision: Any = config.vision_config
        self.layers = list(config.vision_layers)
        self.side = config.vision_tokens_per_side
        self.tokens = self.side**2  # of every picture
        self.encoder = AutoModel.from_config(vision)
        self.is_timm = vision.model_type == "timm_wrapper"
        if self.is_timm:
            self.encoder.timm_model.prune_intermediate_layers(self.layers, prune_norm=True, prune_head=True)
        else:
            if not all(hasattr(vision, name) for name in ("hidden_size", "num_hidden_layers", "patch_size")):
                raise ValueError(
                    f"vision_config: {vision.model_type!r} is no patch encoder; timm_wrapper takes its like"
                )
            self.patch_size = vision.patch_size
            self.layers = layer_numbers(self.layers, vision.num_hidden_layers)
            prune(self.encoder, max(self.layers))
        self.feature_size = config.vision_feature_size or self._feature_size(vision)

    def _feature_size(self, config: PreTrainedConfig) -> int:
        if not self.is_timm:
            return config.hidden_size * len(self.layers)
        info = self.encoder.timm_model.feature_info
        last = max(info[i]["reduction"] for i in self.layers)
        return sum(info[i]["num_chs"] * (last // info[i]["reduction"]) ** 2 for i in self.layers)

    def unused(self) -> tuple[str, ...]:
        """Prefixes of parameters that never act: the embedding of masked patches."""
        return () if self.is_timm else ("encoder.embeddings.mask_token",)

    def blank(self) -> tuple[torch.Tensor, ...]:
        """Arguments of `forward` for one black picture of the smallest size."""
        if self.is_timm:
            info = self.encoder.timm_model.feature_info
            embed = getattr(self.encoder.timm_model, "patch_embed", None)
            size = getattr(embed, "img_size", None) or self.side * max(info[i]["reduction"] for i in self.layers)
        else:
            size = self.side * self.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        return (torch.zeros(1, 3, height, width),)

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`pixel_values` `[crops, 3, height, width]` -> `[crops, tokens, feature_size]`; a picture is one crop.

        Raises:
            ValueError: the crops have another number of patches or places than `vision_tokens_per_side` squared.
        """
        pixel_values = pixel_values.to(next(self.parameters()).dtype)
        if self.is_timm:
            maps = self.encoder.timm_model.forward_intermediates(
                pixel_values, indices=self.layers, intermediates_only=True, stop_early=True
            )
            return torch.cat([fold_map(each, self.side) for each in maps], dim=-1)
        height, width = (size // self.patch_size for size in pixel_values.shape[-2:])
        if height * width != self.side**2:
            raise ValueError(
                f"pixel_values of {list(pixel_values.shape)} are {height} x {width} patches, "
                f"but vision_tokens_per_side is {self.side}"
            )
        states = self.encoder(pixel_values, output_hidden_states=True).hidden_states
        features = torch.cat([states[i] for i in self.layers], dim=-1)
        return features[:, -(self.side**2) :]  # without the class token


class SpeechTower(nn.Module):
    """Whisper's encoder, or one of its kind, on windows of a fixed length; a longer clip takes several windows.

    The window is `2 * max_source_positions` mel frames of the config, so it may be shorter than Whisper's 30 s.
    Windows of padding alone are not computed.
    """

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        speech: Any = config.speech_config
        self.encoder = WhisperEncoder(speech) if speech.model_type == "whisper" else AutoModel.from_config(speech)
        self.window = 2 * speech.max_source_positions
        self.stride = 4 if speech.model_type == "qwen2_audio_encoder" else 2  # Qwen2-Audio pools
        self.feature_size = speech.d_model

    def token_count(self, frames: int) -> int:
        """Features of a clip of `frames` mel frames."""
        return -(-frames // self.stride)

    def blank(self) -> tuple[torch.Tensor, ...]:
        """Arguments of `forward` for one silent clip."""
        mels = self.encoder.conv1.in_channels
        return torch.zeros(1, self.window, mels), torch.ones(1, self.window, dtype=torch.long)

    def forward(self, input_features: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Encodes clips.

        Args:
            input_features: log-mel frames `[clips, frames, mels]`, `frames` a multiple of the window.
            mask: `[clips, frames]`, 1 at real frames, which come first.

        Returns:
            For each clip `[ceil(real frames / stride), feature_size]`; the stride is 2, or 4 where the encoder pools.

        Raises:
            ValueError: `frames` is not a multiple of the window.
        """
        clips, frames, mels = input_features.shape
        if frames % self.window:
            raise ValueError(
                f"input_features has {frames} frames, not a multiple of the tower's window, {self.window}"
            )
        windows = input_features.reshape(-1, self.window, mels)
        real = mask.reshape(-1, self.window).any(dim=-1)
        dtype = self.encoder.conv1.weight.dtype
        encoded = self.encoder(windows[real].transpose(1, 2).to(dtype)).last_hidden_state
        features = encoded.new_zeros(len(windows), encoded.shape[1], self.feature_size)
        features = features.index_put((real.nonzero().squeeze(1),), encoded).reshape(clips, -1, self.feature_size)
        counts = [self.token_count(real_frames) for real_frames in mask.sum(dim=-1).tolist()]
        return [clip[:count] for clip, count in zip(features, counts, strict=True)]


class MaskedSpeechTower(nn.Module):
    """An encoder with a mask, such as Wav2Vec2-BERT's conformer: clips of any lengths, however they are padded."""

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        speech: Any = config.speech_config
        if getattr(speech, "add_adapter", False):
            raise ValueError("speech_config: add_adapter is not supported; speech_stack shortens a clip here")
        if hasattr(speech, "apply_spec_augment"):
            speech.apply_spec_augment = False  # it fails on short clips; a recipe's `mask_time` does it
        self.encoder = AutoModel.from_config(speech)
        self.feature_size = speech.hidden_size

    def token_count(self, frames: int) -> int:
        """Features of a clip of `frames` mel frames."""
        joined = getattr(self.encoder, "_get_subsampling_output_length", None)  # Parakeet's
        return frames if joined is None else int(joined(torch.tensor(frames)))

    def unused(self) -> tuple[str, ...]:
        """Prefixes of parameters that never act: the embedding of masked frames."""
        return ("encoder.masked_spec_embed",)

    def blank(self) -> tuple[torch.Tensor, ...]:
        """Arguments of `forward` for one silent clip."""
        config = self.encoder.config
        mels = getattr(config, "feature_projection_input_dim", None) or config.num_mel_bins
        return torch.zeros(1, BLANK_FRAMES, mels), torch.ones(1, BLANK_FRAMES, dtype=torch.long)

    def forward(self, input_features: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Encodes clips.

        Args:
            input_features: frames `[clips, frames, mels]`.
            mask: `[clips, frames]`, 1 at real frames, which come first.

        Returns:
            For each clip `[features, feature_size]`, one a frame unless the encoder joins frames.
        """
        features = input_features.to(next(self.parameters()).dtype)
        clean = features * mask.unsqueeze(-1)  # a convolution sees what is behind a clip's end
        output = self.encoder(clean, attention_mask=mask)
        joined = getattr(output, "attention_mask", None)
        counts = (mask if joined is None else joined).sum(-1)
        return [clip[:count] for clip, count in zip(output.last_hidden_state, counts.tolist(), strict=True)]


VISION_TOWERS: dict[str, type[nn.Module]] = {"phi4_multimodal_vision": Phi4VisionTower}
"""Model types with a tower of their own; all others are a [`VisionTower`]."""
SPEECH_TOWERS: dict[str, type[nn.Module]] = {
    "whisper": SpeechTower,
    "qwen2_audio_encoder": SpeechTower,
    "voxtral_encoder": SpeechTower,
    "wav2vec2-bert": MaskedSpeechTower,
    "parakeet_encoder": MaskedSpeechTower,
    "phi4_multimodal_audio": Phi4SpeechTower,
}


def build_vision_tower(config: MixLoraConfig) -> Any:
    """The vision tower that `config.vision_config` asks for."""
    return VISION_TOWERS.get(config.vision_config.model_type, VisionTower)(config)


def build_speech_tower(config: MixLoraConfig) -> Any:
    """The speech tower that `config.speech_config` asks for.

    Raises:
        ValueError: a model type without a tower here.
    """
    kind = config.speech_config.model_type
    if kind not in SPEECH_TOWERS:
        raise ValueError(f"speech_config: model type {kind!r} is not supported; expected one of {list(SPEECH_TOWERS)}")
    return SPEECH_TOWERS[kind](config)

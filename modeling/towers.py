"""Vision and speech towers: any transformers encoder named by its config, and what the projectors read of it."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.configuration_utils import PreTrainedConfig
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


class VisionTower(nn.Module):
    """A frozen-able image encoder that gives one feature vector a token: any of transformers, or of timm."""

    separators = 0

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        self.layers = list(config.vision_layers)
        self.side = config.vision_tokens_per_side
        self.tokens = self.side**2  # of every picture
        self.encoder = AutoModel.from_config(config.vision_config)
        self.is_timm = config.vision_config.model_type == "timm_wrapper"
        if self.is_timm:  # nothing after the last feature layer is kept, so nothing after it is computed
            self.encoder.timm_model.prune_intermediate_layers(self.layers, prune_norm=True, prune_head=True)
        self.feature_size = config.vision_feature_size or self._feature_size(config.vision_config)

    def _feature_size(self, config: PreTrainedConfig) -> int:
        if not self.is_timm:
            return config.hidden_size * len(self.layers)
        info = self.encoder.timm_model.feature_info
        last = max(info[i]["reduction"] for i in self.layers)
        return sum(info[i]["num_chs"] * (last // info[i]["reduction"]) ** 2 for i in self.layers)

    def unused(self) -> tuple[str, ...]:
        """Prefixes of parameters that never act; none is kept on purpose."""
        return ()

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`pixel_values` `[crops, 3, height, width]` -> `[crops, tokens, feature_size]`; a picture is one crop."""
        pixel_values = pixel_values.to(next(self.parameters()).dtype)
        if self.is_timm:
            maps = self.encoder.timm_model.forward_intermediates(
                pixel_values, indices=self.layers, intermediates_only=True, stop_early=True
            )
            return torch.cat([fold_map(each, self.side) for each in maps], dim=-1)
        states = self.encoder(pixel_values, output_hidden_states=True).hidden_states
        features = torch.cat([states[i] for i in self.layers], dim=-1)
        return features[:, -(self.side**2) :]  # without the class token


class SpeechTower(nn.Module):
    """Whisper's encoder on windows of a fixed length; a longer clip takes several windows.

    The window is `2 * max_source_positions` mel frames of the config, so it may be shorter than Whisper's 30 s.
    Windows of padding alone are not computed.
    """

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        self.encoder = WhisperEncoder(config.speech_config)
        self.window = 2 * config.speech_config.max_source_positions
        self.feature_size = config.speech_config.d_model

    def token_count(self, frames: int) -> int:
        """Features of a clip of `frames` mel frames."""
        return -(-frames // 2)

    def forward(self, input_features: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """Encodes clips.

        Args:
            input_features: log-mel frames `[clips, frames, mels]`, `frames` a multiple of the window.
            mask: `[clips, frames]`, 1 at real frames.

        Returns:
            For each clip `[ceil(real frames / 2), feature_size]`.

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
        features = encoded.new_zeros(len(windows), self.window // 2, self.feature_size)
        features = features.index_put((real.nonzero().squeeze(1),), encoded).reshape(clips, -1, self.feature_size)
        counts = [self.token_count(real_frames) for real_frames in mask.sum(dim=-1).tolist()]
        return [clip[:count] for clip, count in zip(features, counts, strict=True)]


class MaskedSpeechTower(nn.Module):
    """Wav2Vec2-BERT's conformer: an encoder with a mask, one feature a frame, clips of any lengths."""

    def __init__(self, config: MixLoraConfig):
        super().__init__()
        speech: Any = config.speech_config
        if speech.add_adapter:
            raise ValueError("speech_config: add_adapter is not supported; speech_stack shortens a clip here")
        self.encoder = AutoModel.from_config(speech)
        self.feature_size = speech.hidden_size

    def token_count(self, frames: int) -> int:
        """Features of a clip of `frames` mel frames."""
        return frames

    def forward(self, input_features: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
        """`[clips, frames, mels]`, real where `mask` `[clips, frames]` is 1 -> for each clip `[frames, size]`."""
        dtype = self.encoder.feature_projection.projection.weight.dtype
        states = self.encoder(input_features.to(dtype), attention_mask=mask).last_hidden_state
        return [clip[:count] for clip, count in zip(states, mask.sum(-1).tolist(), strict=True)]


VISION_TOWERS: dict[str, type[nn.Module]] = {"phi4_multimodal_vision": Phi4VisionTower}
"""Model types with a tower of their own; all others are a [`VisionTower`]."""
SPEECH_TOWERS: dict[str, type[nn.Module]] = {
    "whisper": SpeechTower,
    "wav2vec2-bert": MaskedSpeechTower,
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

"""Pictures and clips as model inputs: cached features where the tower is frozen, else tensors made of the file."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mixlora.modeling.audio_processing_mixlora import RATE, MixLoraAudioProcessor
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.training.data.augment import Augmenter
from mixlora.training.data.feature_cache import Encode, FeatureCache, fingerprint
from mixlora.training.data.items import Item, View

LONGEST_SPAN = 12
"""Tower frames (of 20 ms with Whisper), or bands, in a masked span."""
MEL_FRAMES = 2
"""Mel frames of the length of a tower frame, with Whisper."""


def mask_spans(
    features: torch.Tensor, share: float, generator: torch.Generator | None = None, longest: int = LONGEST_SPAN
) -> torch.Tensor:
    """A copy with spans of frames set to zero, about `share` of all (SpecAugment's masks, arXiv 1904.08779).

    Args:
        features: `[frames, width]` of a clip; turned, `[bands, frames]`, for masks of bands.
        share: expected share of masked frames.
        generator: of the draws; torch's own by default.
        longest: frames of the longest span.
    """
    masked = features.clone()
    spans = share * len(features) / ((1 + longest) / 2) + torch.rand((), generator=generator).item()
    for _ in range(int(spans)):
        start = int(torch.randint(len(features), (), generator=generator))
        masked[start : start + int(torch.randint(1, longest + 1, (), generator=generator))] = 0
    return masked


class Media:
    """The media of a stage.

    Attributes:
        caches: modality (`image`, `audio`) -> its feature cache; a modality without one is read from its files.
        augmenter: makes the views of files; none by default.
    """

    def __init__(
        self,
        model: MixLoraForConditionalGeneration,
        processor: Any,
        mask_time: float = 0.0,
        mask_bands: float = 0.0,
    ):
        self.processor, self.mask_time, self.mask_bands = processor, mask_time, mask_bands
        self.vision_tower = getattr(model.model, "vision_tower", None)
        self.speech_tower = getattr(model.model, "speech_tower", None)
        self.speech_stack = model.config.speech_stack
        self.picture_tokens = model.model.picture_tokens
        self.sees_pixels = model.config.vision_detail is not None or model.config.vision_letters is not None
        self.caches: dict[str, FeatureCache] = {}
        self._counts: dict[tuple[str, Item], int] = {}
        self.augmenter = Augmenter()

    def cache(
        self, model: MixLoraForConditionalGeneration, folder: Path, images: Sequence[Item], audio: Sequence[Item]
    ) -> None:
        """Computes and keeps the features of every file and view whose tower no gradient reaches."""
        encoders: dict[str, tuple[str, Sequence[Item], Encode]] = {
            "image": ("vision_tower", images, lambda files: self._see(model, files)),
            "audio": ("speech_tower", audio, lambda files: self._hear(model, files)),
        }
        self.open_caches(model, folder, [kind for kind, (_, files, _) in encoders.items() if files])
        for kind, cache in self.caches.items():
            name, files, encode = encoders[kind]
            if not files:
                continue
            convolutions = self.vision_tower if kind == "image" else None
            if convolutions is not None:
                convolutions.to(memory_format=torch.channels_last)  # halves their time on a CPU
            done = cache.fill(files, encode, f"{name} features")
            if convolutions is not None:
                convolutions.to(memory_format=torch.contiguous_format)
            print(
                f"  {name}: {len(set(files)):,} files and views, {done:,} computed now, the others read from {folder}"
            )

    def open_caches(self, model: MixLoraForConditionalGeneration, folder: Path, kinds: Sequence[str]) -> None:
        """Opens what is kept of the frozen towers of `kinds` (image, audio), as it is."""
        processors = {
            "image": ("vision_tower", self.processor.image_processor),
            "audio": ("speech_tower", self.processor.audio_processor),
        }
        for kind in kinds:
            name, settings = processors[kind]
            tower = getattr(model.model, name, None)
            if kind in self.caches or tower is None or any(part.requires_grad for part in tower.parameters()):
                continue
            tower.eval()
            mark = fingerprint(tower, {"processor": settings.to_dict(), "layers": model.config.vision_layers})
            self.caches[kind] = FeatureCache(folder / f"{kind}-{mark}")

    def known(self, kind: str, item: Item) -> bool:
        """Whether its features are kept, so that it was read before."""
        return kind in self.caches and item in self.caches[kind]

    def same_features(self, other: "Media") -> bool:
        """Whether both read the same cached features, so that one's serve for the other."""
        folders = [{kind: cache.folder for kind, cache in media.caches.items()} for media in (self, other)]
        return folders[0] == folders[1]

    def count(self, images: Sequence[Item], audio: Sequence[Item]) -> None:
        """Counts the placeholders of a row's media, so that to make examples reads no file.

        Files read and small tensors kept in turn would leave the heap full of holes as large as the files.
        """
        for item in images:
            self.image_tokens(item)
        for item in audio:
            self.audio_tokens(item)

    def image_tokens(self, item: Item) -> int:
        """Placeholders of a picture. Its file is read only where its shape decides."""
        tower = _required(self.vision_tower, item, "vision_tower")

        def count() -> int:
            inputs = self.pictures([item])
            return tower.token_counts(inputs["image_sizes"], inputs["image_attention_mask"])[0]

        return self._count("image", item, count) if self.picture_tokens is None else self.picture_tokens

    def audio_tokens(self, item: Item) -> int:
        """Placeholders of a clip."""
        tower = _required(self.speech_tower, item, "speech_tower")
        if isinstance(item, View) and "audio" not in self.caches and not self.augmenter.augment.speed:
            item = item.path  # only speed changes a clip's length
        return -(-self._count("audio", item, lambda: tower.token_count(self._frames(item))) // self.speech_stack)

    def _frames(self, item: Item) -> int:
        """Mel frames of a clip; where its samples tell, no spectrum is taken."""
        processor = self.processor.audio_processor
        if isinstance(processor, MixLoraAudioProcessor):
            return processor.real_frames(len(self.augmenter.clip(item)))
        return int(self.clips([item])["input_features_mask"].sum())

    def _count(self, kind: str, item: Item, count: Callable[[], int]) -> int:
        """Tower features of an item, asked for once; `count` tells where they are not cached."""
        if (kind, item) not in self._counts:
            self._counts[kind, item] = self.caches[kind].tokens(item) if kind in self.caches else count()
        return self._counts[kind, item]

    def inputs(self, images: Sequence[Item], audio: Sequence[Item], draws: Sequence[int] = ()) -> dict[str, Any]:
        """Model inputs for the media of a batch, in order of appearance.

        Args:
            draws: seeds of the masks of the clips; torch's own generator draws by default.
        """
        inputs: dict[str, Any] = {}
        features: dict[str, list[torch.Tensor]] = {}
        for kind, files, read in (("image", images, self.pictures), ("audio", audio, self.clips)):
            if files and kind in self.caches:
                features[f"{kind}_features"] = [self.caches[kind][file] for file in files]
            if files and (kind not in self.caches or (kind == "image" and self.sees_pixels)):
                inputs |= read(files)
        generators: list[Any] = [torch.Generator().manual_seed(draw) for draw in draws] or [None] * len(audio)
        if self.mask_time and "audio_features" in features:
            features["audio_features"] = [
                mask_spans(clip, self.mask_time, generator)
                for clip, generator in zip(features["audio_features"], generators, strict=True)
            ]
        elif "input_features" in inputs:
            for clip, real, generator in zip(
                inputs["input_features"], inputs["input_features_mask"].sum(-1).tolist(), generators, strict=True
            ):
                clip[:real] = self._masked(clip[:real], generator)
        return inputs | ({"mm_encoder_outputs": features} if features else {})

    def _masked(self, mels: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """`[frames, mels]` of a clip that a tower in training is to hear, in part."""
        if self.mask_time:
            mels = mask_spans(mels, self.mask_time, generator, MEL_FRAMES * LONGEST_SPAN)
        return mask_spans(mels.T, self.mask_bands, generator).T if self.mask_bands else mels

    def pictures(self, files: Sequence[Item]) -> dict[str, torch.Tensor]:
        """What a vision tower takes: `pixel_values` `[crops, 3, height, width]`, `image_sizes`, of Phi-4 masks too."""
        pictures = [self.augmenter.picture(file) for file in files]
        processor = self.processor.image_processor
        inputs = processor(pictures, return_tensors="pt")
        return {name: inputs[name] for name in processor.model_input_names}

    def clips(self, files: Sequence[Item]) -> dict[str, torch.Tensor]:
        """`input_features` `[clips, frames, mels]` and `input_features_mask` `[clips, frames]`."""
        clips = [self.augmenter.clip(file) for file in files]
        return dict(self.processor.audio_processor(clips, sampling_rate=RATE, return_tensors="pt"))

    def _see(self, model: MixLoraForConditionalGeneration, files: Sequence[Item]) -> list[torch.Tensor]:
        return model.model.encode_vision(**_on(model.device, self.pictures(files)))

    def _hear(self, model: MixLoraForConditionalGeneration, files: Sequence[Item]) -> list[torch.Tensor]:
        return model.model.encode_speech(**_on(model.device, self.clips(files)))


def _on(device: torch.device, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _required(tower: Any, item: Item, name: str) -> Any:
    if tower is None:
        raise ValueError(f"{item}: this model has no {name}")
    return tower

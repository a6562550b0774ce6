"""Media become embeddings at their placeholders: towers, projectors, and which row owns an item."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .configuration_mixlora import MixLoraConfig
from .decoder import RoutedDecoder
from .idle import Idle, whole_table
from .input_checks import check_clips, check_pictures
from .projectors import compress_by_ctc, project_each, stack_frames
from .router import ModalityRouter
from .splicing import cut_by_rows, owner_rows, splice
from .vision_names import SEEN, Named
from .word_search import Words


@dataclass
class Heard:
    """What CTC is to read of a clip.

    Attributes:
        tokens: as they were projected, `[tokens, width]`.
        letters: log-probabilities of letters, `[finer tokens, letters]`; None where the model hears none.
        beside_picture: whether its row holds a picture; it does not reach the decoder as words then.
    """

    tokens: torch.Tensor
    letters: torch.Tensor | None = None
    beside_picture: bool = False


@dataclass
class Told:
    """What is said of a picture beside its features, the likeliest first, with log-probabilities.

    Attributes:
        names: ids of the names that it may have, () of none.
        seen: those of several things that it shows, in the order of their places; empty where it shows one, or nothing
            that has a name, or is rather called by one of its names as a whole.
        whole: logits of what the whole picture is called, `[1 + known]`, of kinds of things too; None without a list.
        somewhere: probability that each thing of the list is at some place, `[1 + known]`; None without a list.
        texts: what may be written in it, "" where nothing is.
    """

    names: Named = field(default_factory=list)
    seen: Named = field(default_factory=list)
    whole: torch.Tensor | None = None
    somewhere: torch.Tensor | None = None
    texts: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class MediaOutput(ModelOutput):
    """Embeddings of the items of one modality.

    Attributes:
        pooler_output: for each item, in order of appearance, `[tokens, width]`.
        rows: for each item the row that owns it.
        heard: of each clip what CTC is to read.
        told: what is said of each picture.
    """

    pooler_output: list[torch.Tensor] | None = None
    rows: list[int] | None = None
    heard: list[Heard] | None = None
    told: list[Told] | None = None


class MediaEncoding:
    """The part of [`MixLoraModel`] that encodes pictures and clips and puts them in their places."""

    config: MixLoraConfig
    device: torch.device
    router: ModalityRouter
    language_model: RoutedDecoder
    vision_tower: Any
    speech_tower: Any
    vision_projector: nn.Module
    speech_projector: nn.ModuleDict
    speech_context: Any
    speech_letters: Any
    vision_detail: Any
    vision_letters: Any
    vision_names: Any

    @property
    def picture_tokens(self) -> int | None:
        """Tokens of every picture; None without a tower, or where the shape of a picture decides."""
        tokens: int | None = getattr(getattr(self, "vision_tower", None), "tokens", None)
        if tokens is None:
            return None
        named, read = self.config.vision_names, self.config.vision_letters
        return tokens + (named["longest"] if named else 0) + (read["tokens"] if read else 0)

    def encode_vision(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Tower features of each picture, `[tokens, size]`, from `pixel_values` `[crops, 3, height, width]`.

        `image_sizes` `[images, 2]` and `image_attention_mask` `[crops, patches_h, patches_w]` are for towers that take
        several crops a picture.
        """
        self._require("vision_tower", "pixel_values")
        check_pictures(pixel_values, image_sizes, image_attention_mask)
        return list(self.vision_tower(pixel_values, image_sizes, image_attention_mask))

    def encode_speech(
        self, input_features: torch.Tensor, input_features_mask: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Tower features of each clip, `[frames, size]`, from mel frames `[clips, frames, mels]` and their mask."""
        self._require("speech_tower", "input_features")
        if input_features_mask is None:
            input_features_mask = torch.ones_like(input_features[..., 0], dtype=torch.long)
        with torch.device("meta"):
            mels = self.speech_tower.blank()[0].shape[-1]
        check_clips(input_features, input_features_mask, mels)
        return self.speech_tower(input_features, input_features_mask)

    def _require(self, tower: str, argument: str) -> None:
        if not hasattr(self, tower):
            raise ValueError(f"{argument} is given, but this model has no {tower}")

    def get_image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        features: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> MediaOutput:
        """`pooler_output`: for each picture its embeddings `[tokens, width]`.

        Args:
            pixel_values, image_sizes, image_attention_mask: see [`encode_vision`].
            features: tower features of each picture in place of `pixel_values`, which only `vision_detail` and
                `vision_letters` read then.

        Raises:
            ValueError: this model has a part that reads pixels, and no `pixel_values` are given.
        """
        if features is None:
            features = self.encode_vision(pixel_values, image_sizes, image_attention_mask)
        tokens = project_each(self.vision_projector, features)
        for name in ("vision_detail", "vision_letters"):
            if getattr(self.config, name) is not None and pixel_values is None:
                raise ValueError(f"this model's {name} needs pixel_values beside the tower's features")
        if self.config.vision_detail is not None:
            tokens = [each + fine for each, fine in zip(tokens, self.vision_detail(pixel_values), strict=True)]
        told = self.told(pixel_values, features)
        said = self.told_ids(told)
        if said.shape[1]:
            spoken = self.language_model.embed_tokens(said)
            tokens = [torch.cat([each, text.to(each)]) for each, text in zip(tokens, spoken, strict=True)]
        return MediaOutput(pooler_output=tokens, told=told)

    def told(self, pixel_values: torch.Tensor | None, features: list[torch.Tensor]) -> list[Told]:
        """What `vision_names` and `vision_letters` make of each picture."""
        told = [Told() for _ in features]
        if self.config.vision_names is not None:
            stacked = torch.stack(features)
            with torch.no_grad():
                logits = self.vision_names(stacked).cpu()  # read back once for all pictures
            things = self.vision_names.things_at(stacked).cpu()
            found = zip(
                logits,
                self.vision_names.somewhere(things),
                self.vision_names.likely_names(logits),
                self.vision_names.seen_names(things),
                strict=True,
            )
            for each, (whole, somewhere, names, seen) in zip(told, found, strict=True):
                each.whole, each.somewhere = whole, somewhere
                alone = len(seen) < 2 or names[0][1] > math.log(SEEN)
                each.names, each.seen = names, [] if alone else seen
        if self.config.vision_letters is not None:
            words = self.speech_letters.known_words if self.config.speech_letters is not None else Words({})
            for each, texts in zip(told, self.vision_letters.likely_texts(pixel_values, words), strict=True):
                each.texts = texts
        return told

    def told_ids(self, told: list[Told]) -> torch.Tensor:
        """Ids of the likeliest name and text of each picture in turn, `[pictures, tokens]`, padding in front of each;
        of a long text the beginning. Of several things that are seen all names, with padding between them."""
        nothing = self.config.text_config.pad_token_id or 0

        def padded(ids: Sequence[int], room: int) -> list[int]:
            return [nothing] * (room - len(ids)) + list(ids[:room])

        rows: list[list[int]] = [[] for _ in told]
        for row, each in zip(rows, told, strict=True):
            if each.names:
                seen = [token for name, _ in each.seen for token in (nothing, *name)][1:]
                row += padded(seen or each.names[0][0], self.config.vision_names["longest"])
            if each.texts:
                row += padded(self.vision_letters.tokens_of(each.texts[0][0]), self.vision_letters.tokens)
        return torch.tensor(rows, dtype=torch.long, device=self.device).reshape(len(told), -1)

    def get_audio_features(
        self,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        beside_picture: list[bool] | None = None,
        features: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> MediaOutput:
        """`pooler_output`: for each clip its embeddings `[tokens, width]`.

        Args:
            input_features: `[clips, frames, mels]`; input_features_mask: `[clips, frames]`.
            beside_picture: for each clip, whether its row holds a picture: it then takes the vision-speech projector.
            features: tower features of each clip in place of `input_features`.
        """
        if features is None:
            features = self.encode_speech(input_features, input_features_mask)
        stacked = self.stack_speech(features)
        tokens = self.project_speech(stacked, beside_picture)
        blank = self.config.speech_blank_token_id
        if blank is None:
            return MediaOutput(pooler_output=tokens)
        table = whole_table(self.language_model.embed_tokens)
        known = self.config.speech_letters is not None and self.speech_letters.known
        spelled = self.speech_letters(stacked) if known else [None] * len(tokens)
        heard = [
            Heard(clip, letters, beside)
            for clip, letters, beside in zip(tokens, spelled, beside_picture or [False] * len(tokens), strict=True)
        ]
        tokens = [
            said.tokens if said.beside_picture else compress_by_ctc(said.tokens, table.to(said.tokens.device), blank)
            for said in heard
        ]
        return MediaOutput(pooler_output=tokens, heard=heard)

    def stack_speech(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        """What is heard in each clip, from its tower features `[frames, size]`: frames joined and, where there is a
        `speech_context`, mixed; `[tokens, ...]`."""
        if self.config.speech_context is None:
            return [stack_frames(clip, self.config.speech_stack) for clip in features]
        frames = self.config.speech_stack // self.speech_context.stride
        mixed: list[torch.Tensor] = self.speech_context([stack_frames(clip, frames) for clip in features])
        return mixed

    def project_speech(
        self, stacked: list[torch.Tensor], beside_picture: list[bool] | None = None
    ) -> list[torch.Tensor]:
        """Projected tokens `[tokens, width]` of each clip from what [`stack_speech`] gives, not compressed."""
        if self.config.speech_context is not None:
            stacked = self.speech_context.joined(stacked)
        beside_picture = beside_picture or [False] * len(stacked)
        result: list[torch.Tensor] = list(stacked)
        idle = Idle(self, self.device)
        for flag, name in ((False, "speech"), (True, "vision_speech")):
            mine = [i for i, beside in enumerate(beside_picture) if beside == flag]
            if stacked and not mine:
                idle.projector(self.speech_projector[name], stacked[0][:0])
            for i, projected in zip(
                mine, project_each(self.speech_projector[name], [stacked[i] for i in mine]), strict=True
            ):
                result[i] = projected
        return [idle.added_to(clip) for clip in result]

    def encode_media(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        image_attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        conversation_ids: torch.Tensor | None = None,
        idle: Idle | None = None,
    ) -> dict[str, MediaOutput]:
        """Embeddings of all media of a batch: `{"image": ..., "audio": ...}`, each with a `pooler_output` list.

        `mm_encoder_outputs` may hold finished embeddings (`image`, `audio`) or tower features (`image_features`,
        `audio_features`, one `[tokens, size]` an item).

        Where `input_ids` are the last turns of conversations, `conversation_ids` are the whole: a clip is also beside
        the picture of an earlier turn.

        `idle` runs the towers and projectors that other ranks of a training may need and these rows do not.

        Raises:
            ValueError: placeholders and features disagree in a row.
        """
        given = mm_encoder_outputs or {}
        if pixel_values is None and input_features is None and not given and torch.compiler.is_compiling():
            self._refuse_placeholders(input_ids)
            return {}
        result: dict[str, MediaOutput] = {}
        image = self._finished(given.get("image"), input_ids, self.config.image_token_id)
        idle = Idle(self, input_ids.device) if idle is None else idle
        idle.layers_behind()
        features = given.get("image_features")
        nothing = idle.tower("vision") if pixel_values is None or features else None
        if pixel_values is not None or features:
            image = self.get_image_features(pixel_values, image_sizes, image_attention_mask, features)
        else:
            idle.projector(getattr(self, "vision_projector", None), nothing)
            for name in ("vision_detail", "vision_letters"):
                idle.pixels(getattr(self, name, None))
        sizes = [len(item) for item in image.pooler_output] if image else []
        image_rows = owner_rows(self._placeholders(input_ids, self.config.image_token_id), sizes, "image")
        if image:
            result["image"] = MediaOutput(pooler_output=image.pooler_output, rows=image_rows, told=image.told)
        audio, clips = given.get("audio"), given.get("audio_features")
        audio = self._finished(audio, input_ids, self.config.audio_token_id)
        nothing = idle.tower("speech") if input_features is None else None
        if input_features is not None:
            clips = self.encode_speech(input_features, input_features_mask)
        if clips:
            sizes = [-(-len(clip) // self.config.speech_stack) for clip in clips]
        else:
            sizes = [len(item) for item in audio.pooler_output] if audio else []
        audio_rows = owner_rows(self._placeholders(input_ids, self.config.audio_token_id), sizes, "audio")
        if clips:
            whole = input_ids if conversation_ids is None else conversation_ids
            has_picture = self.router.contains(whole, self.config.image_token_id)
            audio = self.get_audio_features(features=clips, beside_picture=[has_picture[row] for row in audio_rows])
        else:
            stacked = None if nothing is None else stack_frames(nothing, self.config.speech_stack)
            stacked = idle.context(getattr(self, "speech_context", None), stacked)
            for projector in getattr(self, "speech_projector", {}).values():
                idle.projector(projector, stacked)
            if self.config.speech_blank_token_id is not None:
                whole_table(self.language_model.embed_tokens)  # gathered beside the ranks that have clips
        if audio:
            result["audio"] = MediaOutput(pooler_output=audio.pooler_output, rows=audio_rows, heard=audio.heard)
        return result

    def _finished(
        self, output: MediaOutput | None, input_ids: torch.Tensor, token_id: int | None
    ) -> MediaOutput | None:
        """Embeddings made before, as items of rows."""
        if not output:
            return None
        return MediaOutput(pooler_output=cut_by_rows(self._placeholders(input_ids, token_id), output.pooler_output))

    def _refuse_placeholders(self, input_ids: torch.Tensor) -> None:
        """As `encode_media` without media, but nothing is read back, so that a step of decoding compiles whole."""
        for token_id in (self.config.image_token_id, self.config.audio_token_id):
            if token_id is not None:
                message = f"input_ids hold placeholders ({token_id}), but no media are given"
                torch._assert_async((input_ids != token_id).all(), message)

    @staticmethod
    def _placeholders(input_ids: torch.Tensor, token_id: int | None) -> list[int]:
        return [0] * len(input_ids) if token_id is None else (input_ids == token_id).sum(-1).tolist()

    def embed(self, input_ids: torch.Tensor, media: dict[str, MediaOutput]) -> torch.Tensor:
        """Token embeddings `[batch, length, width]` with media features at their placeholders."""
        embeds = self.language_model.embed_tokens(input_ids)
        for name, token_id in (("image", self.config.image_token_id), ("audio", self.config.audio_token_id)):
            if name in media and media[name].pooler_output:
                features = torch.cat(list(media[name].pooler_output)).to(embeds.device)
                embeds = splice(embeds, input_ids == token_id, features)
        return embeds

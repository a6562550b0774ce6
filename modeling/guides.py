"""What shares in the choice of an answer's tokens: what CTC hears in a clip, and what is told of a picture."""

import math
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import torch
from transformers.generation import GenerationConfig

from .configuration_mixlora import MixLoraConfig
from .ctc_prefix import CtcGuide, CtcPrefixScorer, TextScorer
from .media_encoding import Heard, MediaOutput, Told
from .told_guide import NameScorer, Teller, ToldGuide
from .vision_names import Named

Some = TypeVar("Some")


class GuidedAnswers:
    """The part of [`RoutedGenerationMixin`] that finds what guides an answer."""

    config: MixLoraConfig
    generation_config: GenerationConfig
    model: Any
    get_input_embeddings: Any

    def guides(
        self,
        input_ids: torch.Tensor,
        media: dict[str, MediaOutput],
        ends: Collection[int],
        ctc_weight: float | None = None,
        told_weight: float | None = None,
    ) -> list[CtcGuide | ToldGuide]:
        """What shares in the choice of each token of answers to clips and about pictures of the last turns.

        Args:
            input_ids: the whole prompt `[rows, length]`.
            media: what `encode_media` gives, for all or for the last of each row.
            ends: ids of the tokens that end an answer.
            ctc_weight, told_weight: see [`generate`].
        """
        weight = self.config.speech_ctc_weight if ctc_weight is None else ctc_weight
        clips = self._ctc_guide(input_ids, media.get("audio"), weight, ends)
        weight = self.config.vision_told_weight if told_weight is None else told_weight
        pictures = self._told_guide(input_ids, media.get("image"), weight, ends)
        return [guide for guide in (clips, pictures) if guide is not None]

    def _ctc_guide(
        self, input_ids: torch.Tensor, audio: MediaOutput | None, weight: float, ends: Collection[int]
    ) -> CtcGuide | None:
        """Follows what CTC hears in each row whose last turn holds one clip, and no turn a picture."""
        if not weight or audio is None or not audio.heard:
            return None
        table, blank = self.get_input_embeddings().weight, self.config.speech_blank_token_id

        def scorer(clip: Heard | None) -> CtcPrefixScorer | TextScorer | None:
            if clip is None:
                return None
            if clip.letters is None:
                return CtcPrefixScorer(clip.tokens, table.to(clip.tokens.device), blank)
            letters = self.model.speech_letters
            return TextScorer(letters.likely_texts(clip.letters), letters.spellings)

        asked = self._of_last_turn(input_ids, audio, audio.heard, self.config.audio_token_id)
        scorers = [scorer(clips[0]) if len(clips) == 1 else None for clips in asked]
        return CtcGuide(scorers, weight, input_ids.shape[1], ends) if any(scorers) else None

    def _told_guide(
        self, input_ids: torch.Tensor, image: MediaOutput | None, weight: float, ends: Collection[int]
    ) -> ToldGuide | None:
        """Knows the name and the text of the picture in each row whose last turn holds one."""
        if not weight or image is None or not image.told:
            return None

        def tellers(told: Told) -> list[Teller]:
            result: list[Teller] = []
            names, chance = _names_of(told)
            if names:
                result.append((NameScorer(names), chance))
            texts, chance = _something(told.texts)
            if texts:
                result.append((TextScorer(texts, self.model.vision_letters.spellings), chance))
            return result

        asked = self._of_last_turn(input_ids, image, image.told, self.config.image_token_id)
        rows = [tellers(pictures[0]) if len(pictures) == 1 else [] for pictures in asked]
        return ToldGuide(rows, weight, input_ids.shape[1], ends) if any(rows) else None

    def _of_last_turn(
        self, input_ids: torch.Tensor, output: MediaOutput, things: Sequence[Any], token_id: int
    ) -> list[list[Any]]:
        """Of `things`, one for each item of `output`, those whose item stands in the last turn of each row."""
        assert output.rows is not None and output.pooler_output is not None
        found: list[list[Any]] = [[] for _ in input_ids]
        places = [(row == token_id).nonzero().squeeze(1).tolist() for row in input_ids]
        for row, thing, read in reversed(list(zip(output.rows, things, output.pooler_output, strict=True))):
            last = places[row][-1]
            del places[row][-len(read) :]
            if self._in_last_turn(input_ids[row], last):
                found[row].append(thing)
        return found

    def follows(self, ids: torch.Tensor) -> bool:
        """Whether [`guides`] may be found for a row `[length]`, so that its media are needed anew."""
        for weight, token_id in (
            (self.config.speech_ctc_weight, self.config.audio_token_id),
            (self.config.vision_told_weight, self.config.image_token_id),
        ):
            places: list[int] = (ids == token_id).nonzero().squeeze(1).tolist() if weight else []
            if places and self._in_last_turn(ids, places[-1]):
                return True
        return False

    def _in_last_turn(self, ids: torch.Tensor, place: int) -> bool:
        """Whether no answer came since: behind `place` ends that turn alone, by a token that ends answers too."""
        return sum(int((ids[place:] == end).sum()) for end in self._ends({}, None)) <= 1

    def _ends(self, kwargs: dict[str, Any], config: GenerationConfig | None) -> list[int]:
        """Tokens that end an answer: those given to one call, else the model's own."""
        given = (kwargs.get("eos_token_id"), config and config.eos_token_id, self.generation_config.eos_token_id)
        ends: int | list[int] = next((one for one in given if one is not None), [])
        return torch.as_tensor(ends).flatten().tolist()


def _names_of(told: Told) -> tuple[Named, float]:
    """Names that a picture may be called, and of several things that are seen each as well as another; and the
    probability that there is one."""
    names, chance = _something(told.names)
    if not told.seen:
        return names, chance
    scores = dict.fromkeys((name for name, _ in told.seen), -math.log(len(told.seen)))
    for name, score in names:
        scores[name] = max(score, scores.get(name, -math.inf))
    return list(scores.items()), 1.0


def _something(likely: list[tuple[Some, float]]) -> tuple[list[tuple[Some, float]], float]:
    """Of what may be told, all but nothing, and the probability that it is something."""
    return [each for each in likely if each[0]], 1 - sum(math.exp(score) for thing, score in likely if not thing)

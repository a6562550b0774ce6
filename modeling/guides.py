"""What shares in the choice of an answer's tokens: what CTC hears in a clip, and what is told of a picture."""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
from transformers.generation import GenerationConfig

from .closed_questions import asked_thing, offered_things, spoken_verdict, things_heard, verdict
from .configuration_mixlora import MixLoraConfig
from .ctc_prefix import CtcGuide, CtcPrefixScorer, TextScorer
from .media_encoding import Heard, MediaOutput, Told
from .told_guide import NameScorer, Teller, ToldGuide
from .vision_names import UNNAMED, Named

CLOSED = 2
"""How much what answers a closed question counts, to 1 of a name or a text: the decoder did not learn to ask it."""

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
        """What shares in the choice of each token of answers to clips of the last turns and about the last pictures.

        Args:
            input_ids: the whole prompt `[rows, length]`.
            media: what `encode_media` gives, for all or for the last of each row.
            ends: ids of the tokens that end an answer.
            ctc_weight, told_weight: see [`generate`].
        """
        weight = self.config.speech_ctc_weight if ctc_weight is None else ctc_weight
        clips = self._ctc_guide(input_ids, media.get("audio"), weight, ends)
        weight = self.config.vision_told_weight if told_weight is None else told_weight
        pictures = self._told_guide(input_ids, media, weight, ends)
        return [guide for guide in (clips, pictures) if guide is not None]

    def _ctc_guide(
        self, input_ids: torch.Tensor, audio: MediaOutput | None, weight: float, ends: Collection[int]
    ) -> CtcGuide | None:
        """Follows what CTC hears in each row whose last turn holds one clip, and no turn a picture."""
        if not weight or audio is None or not audio.heard:
            return None
        table, blank = self.get_input_embeddings().weight, self.config.speech_blank_token_id

        def scorer(clip: Heard) -> CtcPrefixScorer | TextScorer | None:
            if clip.beside_picture:
                return None
            if clip.letters is None:
                return CtcPrefixScorer(clip.tokens, table.to(clip.tokens.device), blank)
            letters = self.model.speech_letters
            return TextScorer(letters.likely_texts(clip.letters), letters.spellings)

        asked = self._items(input_ids, audio, audio.heard, self.config.audio_token_id, self._in_last_turn)
        scorers = [scorer(clips[0]) if len(clips) == 1 else None for clips in asked]
        return CtcGuide(scorers, weight, input_ids.shape[1], ends) if any(scorers) else None

    def _told_guide(
        self, input_ids: torch.Tensor, media: dict[str, MediaOutput], weight: float, ends: Collection[int]
    ) -> ToldGuide | None:
        """Knows the name and the text of the picture in each row whose last turn with pictures holds one, and what
        answers a closed question about it."""
        image, audio = media.get("image"), media.get("audio")
        if not weight or image is None or not image.told:
            return None
        pictures = self._items(input_ids, image, image.told, self.config.image_token_id, self._of_last_pictures)
        clips: list[list[Heard]] = [[] for _ in pictures]
        if audio is not None and audio.heard:
            clips = self._items(input_ids, audio, audio.heard, self.config.audio_token_id, self._in_last_turn)
        rows = [
            self._tellers(told[0], self._last_turn(ids), asked) if len(told) == 1 else []
            for ids, told, asked in zip(input_ids, pictures, clips, strict=True)
        ]
        return ToldGuide(rows, weight, input_ids.shape[1], ends) if any(rows) else None

    def _tellers(self, told: Told, turn: torch.Tensor, clips: list[Heard]) -> list[Teller]:
        """Of a picture, in whose turn `[tokens]` are these clips."""
        result: list[Teller] = []
        names, chance = _names_of(told)
        if names:
            result.append((NameScorer(names), chance))
        texts, chance = _something(told.texts)
        if texts:
            result.append((TextScorer(texts, self.model.vision_letters.spellings), chance))
        if told.whole is not None and self.config.vision_letters is not None:
            result += self._closed(told, turn, clips)
        return result

    def _closed(self, told: Told, turn: torch.Tensor, clips: list[Heard]) -> list[Teller]:
        """What answers a closed question, which a turn or its one clip asks about things of the list."""
        spellings, listed = self.model.vision_letters.spellings, self.model.vision_names.listed()
        things = {spellings.text(ids).strip(): number for ids, number in listed.items()}
        things.pop("", None)  # of signs alone
        question = spellings.text(turn.tolist()).strip()
        offered = offered_things(question, things)
        if offered:
            ids = {number: ids for ids, number in listed.items()}
            likely = told.whole[offered].log_softmax(-1).tolist()
            names = [(ids[number], each) for number, each in zip(offered, likely, strict=True)]
            known = 1 - float(told.whole.softmax(-1)[UNNAMED])  # with kinds
            return [(NameScorer(names, offered=True), CLOSED * known)]
        kinds = self.model.vision_names.kinds.tolist()
        yes = self._chance_of_yes(told, question, {name: i for name, i in things.items() if not kinds[i - 1]}, clips)
        if yes is None:
            return []
        answers = [("yes", math.log(yes)), ("no", math.log(1 - yes))]
        return [(TextScorer(answers, spellings), CLOSED * _something(told.names)[1])]

    def _chance_of_yes(self, told: Told, question: str, things: dict[str, int], clips: list[Heard]) -> float | None:
        """Probability that the picture shows the one of `things` that a question asks for, or a clip where nothing is
        written; None where they ask for none."""
        if question:
            thing = asked_thing(question, things)
            return None if thing is None else float(verdict(told.somewhere[thing]))
        if len(clips) != 1 or clips[0].letters is None:
            return None
        heard = things_heard(clips[0].letters, things, self.model.speech_letters.letters_of)
        return spoken_verdict(heard, told.somewhere[list(things.values())])

    def _last_turn(self, ids: torch.Tensor) -> torch.Tensor:
        """Of a row `[length]`, what stands behind the last but one token that ends turns."""
        ends = self._end_places(ids)
        return ids[ends[-2] + 1 :] if len(ends) > 1 else ids

    def _items(
        self,
        input_ids: torch.Tensor,
        output: MediaOutput,
        things: Sequence[Some],
        token_id: int,
        asked: Callable[[torch.Tensor, int], bool],
    ) -> list[list[Some]]:
        """Of `things`, one for each item of `output`, those of each row that are `asked` about, by the place of the
        item's last token."""
        assert output.rows is not None and output.pooler_output is not None
        found: list[list[Some]] = [[] for _ in input_ids]
        places = [(row == token_id).nonzero().squeeze(1).tolist() for row in input_ids]
        for row, thing, read in reversed(list(zip(output.rows, things, output.pooler_output, strict=True))):
            last = places[row][-1]
            del places[row][-len(read) :]
            if asked(input_ids[row], last):
                found[row].append(thing)
        return found

    def follows(self, ids: torch.Tensor) -> bool:
        """Whether [`guides`] may be found for a row `[length]`, so that its media are needed anew."""
        if self.config.vision_told_weight and bool((ids == self.config.image_token_id).any()):
            return True
        clips = (
            (ids == self.config.audio_token_id).nonzero().squeeze(1).tolist() if self.config.speech_ctc_weight else []
        )
        return bool(clips) and self._in_last_turn(ids, clips[-1])

    def _in_last_turn(self, ids: torch.Tensor, place: int) -> bool:
        """Whether no answer came since: behind `place` ends that turn alone, by a token that ends answers too."""
        return len(self._end_places(ids[place:])) <= 1

    def _of_last_pictures(self, ids: torch.Tensor, place: int) -> bool:
        """Whether no turn ends between `place` and the last picture."""
        return not self._end_places(ids[place : int((ids == self.config.image_token_id).nonzero()[-1])])

    def _end_places(self, ids: torch.Tensor) -> list[int]:
        """Where turns end in a part of a row `[length]`."""
        ends = torch.tensor(self._ends({}, None), dtype=ids.dtype, device=ids.device)
        places: list[int] = torch.isin(ids, ends).nonzero().squeeze(1).tolist()
        return places

    def _ends(self, kwargs: dict[str, Any], config: GenerationConfig | None) -> list[int]:
        """Tokens that end an answer: those given to one call, else the model's own."""
        given = (kwargs.get("eos_token_id"), config and config.eos_token_id, self.generation_config.eos_token_id)
        ends: int | list[int] = next((one for one in given if one is not None), [])
        return torch.as_tensor(ends).flatten().tolist()


def _names_of(told: Told) -> tuple[Named, float]:
    """Names that a picture may be called, and the probability that there is one.

    Where several things are seen, each is as likely as another, in so far as none is what the whole picture is called.
    """
    names, chance = _something(told.names)
    if not told.seen:
        return names, chance
    share = (1 - math.exp(max((score for _, score in names), default=-math.inf))) / len(told.seen)
    chances = {name: math.exp(score) for name, score in names}
    for name, _ in told.seen:
        chances[name] = chances.get(name, 0.0) + share
    return [(name, math.log(each)) for name, each in chances.items()], 1.0


def _something(likely: list[tuple[Some, float]]) -> tuple[list[tuple[Some, float]], float]:
    """Of what may be told, all but nothing, and the probability that it is something."""
    return [each for each in likely if each[0]], 1 - sum(math.exp(score) for thing, score in likely if not thing)

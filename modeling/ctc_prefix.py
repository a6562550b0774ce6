"""Answers that the decoder and CTC find likely together (Watanabe et al. 2017, section II-C: joint decoding)."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessor

from .projectors import CTC_SHARPNESS
from .spelling import Spellings

Prefix = tuple[int, ...]
State = tuple[torch.Tensor, torch.Tensor, int]
"""Of a beginning: log-probabilities `[tokens]` to have said just that, ending in its last unit and in silence;
and that unit, -1 where there is none."""
UNHEARD = -30.0
"""Log-probability of what CTC does not hear at all: low, but no veto."""
AUDIBLE = 1e-5
"""A token is followed up where CTC gives it this much in some place of the clip."""
REMEMBERED = 32
"""Beginnings are forgotten that are shorter than the newest by more: a draft may go back some tokens."""


@dataclass(frozen=True)
class Expected:
    """What may come next in a clip, after a beginning.

    Attributes:
        tokens: ids of those that are heard; all others are not.
        chances: their log-probabilities.
        end: the log-probability that the clip is over.
        silent: ids of tokens that nobody hears, such as a comma, which the decoder alone chooses here.
    """

    tokens: torch.Tensor
    chances: torch.Tensor
    end: float
    silent: torch.Tensor | None = None

    @classmethod
    def of_shares(
        cls, chances: Mapping[int, float], end: float, total: float, silent: torch.Tensor | None = None
    ) -> "Expected":
        """From the probabilities of tokens and of the end, all of which together have `total`."""
        logs = torch.tensor([chance / total for chance in chances.values()], dtype=torch.double).log()
        return cls(
            torch.tensor(list(chances), dtype=torch.long),
            logs.clamp(min=UNHEARD),
            math.log(end / total) if end else UNHEARD,
            silent,
        )


class CtcPrefixScorer:
    """What CTC over tokens expects to come next in a clip, after what was said so far.

    The probability of a beginning is summed over all the ways to place it in the clip (Graves 2008, section 7.5.3),
    for all candidates at once.

    Args:
        tokens: the clip as it was projected, `[tokens, width]`.
        embeddings: the decoder's, `[vocabulary, width]`.
        blank: id of the token that stands for nothing heard.
    """

    def __init__(self, tokens: torch.Tensor, embeddings: torch.Tensor, blank: int):
        scores = (CTC_SHARPNESS * tokens.float() @ embeddings.float().T).log_softmax(-1).detach().double().cpu().T
        heard = scores.exp().amax(dim=1) > AUDIBLE
        heard[blank] = False
        self.candidates = heard.nonzero().squeeze(1)  # [candidates]
        self._chances, self._silence = scores[self.candidates], scores[blank]  # [candidates, tokens], [tokens]
        self._places = {token: i for i, token in enumerate(self.candidates.tolist())}
        never = torch.full_like(self._silence, -torch.inf)
        self._states: dict[Prefix, State | None] = {(): (never, self._silence.cumsum(0), -1)}

    def __call__(self, prefix: Prefix) -> Expected | None:
        """None where `prefix` cannot have been said."""
        state = self._state(prefix)
        if state is None:
            return None
        begins = self._begins(state)
        end = torch.logaddexp(state[0][-1], state[1][-1])
        whole = torch.logaddexp(begins.logsumexp(0), end)
        if not torch.isfinite(whole):
            return None
        return Expected(self.candidates, (begins - whole).clamp(min=UNHEARD), float((end - whole).clamp(min=UNHEARD)))

    def _state(self, prefix: Prefix) -> State | None:
        """The state of a beginning, from that of the longest one before it that is remembered."""
        known = len(prefix)
        while prefix[:known] not in self._states:
            known -= 1
        for length in range(known, len(prefix)):
            state = self._states[prefix[:length]]
            self._states[prefix[: length + 1]] = None if state is None else self._followed(state, prefix[length])
        for old in [one for one in self._states if 0 < len(one) < len(prefix) - REMEMBERED]:
            del self._states[old]
        return self._states[prefix]

    def _begins(self, state: State) -> torch.Tensor:
        """Log-probability of each candidate to come next, wherever; the same one follows only after silence."""
        says, silent, last = state
        before = torch.where((self.candidates == last)[:, None], silent, torch.logaddexp(says, silent))
        later = (before[:, :-1] + self._chances[:, 1:]).logsumexp(-1)
        return torch.logaddexp(later, self._chances[:, 0]) if last < 0 else later

    def _followed(self, state: State, token: int) -> State | None:
        """The state of a beginning and one token more; None where that cannot be."""
        place = self._places.get(token)
        if place is None:
            return None
        says, silent, last = state
        chances = self._chances[place]
        said = _carried(silent if token == last else torch.logaddexp(says, silent), chances)
        if last < 0:
            said = torch.logaddexp(said, chances.cumsum(0))
        return said, _carried(said, self._silence), token


class TextScorer:
    """Tokens that spell on one of the likeliest texts of a clip.

    Args:
        texts: with their log-probabilities, as `likely_texts` gives them.
        spellings: of each token of the decoder, with a space in front of a word; "" of those that are not heard.
    """

    def __init__(self, texts: Sequence[tuple[str, float]], spellings: Spellings):
        self._texts = [(text, math.exp(score)) for text, score in texts]
        self._spellings = spellings

    def __call__(self, prefix: Prefix) -> Expected | None:
        """None where `prefix` begins no text. Signs stand between words, where the decoder wants them."""
        said = self._spellings.text(prefix).lstrip()
        rest = [(text[len(said) :], chance) for text, chance in self._texts if text.startswith(said)]
        total = sum(chance for _, chance in rest)
        if not total:
            return None
        chances: dict[int, float] = {}
        for text, chance in rest:
            for token in self._spellings.starting(text, first=not said):
                chances[token] = chances.get(token, 0.0) + chance
        end = sum(chance for text, chance in rest if not text.strip())
        between = not said or said.endswith(" ") or any(not text or text.startswith(" ") for text, _ in rest)
        return Expected.of_shares(chances, end, total, self._spellings.silent if between else None)


def _carried(source: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """`x[t] = logaddexp(x[t - 1], source[t - 1]) + rate[t]`, nothing before the first place; all `[..., tokens]`."""
    summed = rate.cumsum(-1)
    carried = (source - summed)[..., :-1].logcumsumexp(-1) + summed[..., 1:]
    return torch.cat([torch.full_like(carried[..., :1], -torch.inf), carried], dim=-1)


def mixed(wanted: torch.Tensor, expected: Expected, weight: float, ends: Sequence[int]) -> torch.Tensor:
    """The decoder's log-probabilities `[vocabulary]` and what is expected, of that `weight`, together; what is silent
    stays as wanted. `ends` are ids of the tokens that end an answer."""
    heard = torch.full_like(wanted, UNHEARD)
    heard[expected.tokens.to(wanted.device)] = expected.chances.to(wanted)
    heard[ends] = expected.end
    both = (1 - weight) * wanted + weight * heard
    if expected.silent is None:
        return both
    spoken = torch.ones_like(both, dtype=torch.bool)
    spoken[expected.silent.to(wanted.device)], spoken[ends] = False, True
    share = wanted[spoken].logsumexp(-1) - both[spoken].logsumexp(-1)
    return torch.where(spoken, both + share, wanted)


class CtcGuide(LogitsProcessor):
    """Mixes what the decoder expects with what CTC hears, in the rows that say something.

    Args:
        scorers: of each row of the prompt, None where no clip is to be followed.
        weight: share of CTC in the log-probabilities.
        prompt_length: tokens of the prompt, padding included.
        ends: ids of the tokens that end an answer.
    """

    def __init__(
        self,
        scorers: Sequence[CtcPrefixScorer | TextScorer | None],
        weight: float,
        prompt_length: int,
        ends: Collection[int],
    ):
        self.scorers, self.weight, self.prompt_length = scorers, weight, prompt_length
        self.ends = sorted(ends)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[rows, vocabulary]` after `input_ids` `[rows, length]`; each row of the prompt may have beams."""
        copies = len(input_ids) // len(self.scorers)
        scores = scores.clone()
        for row, said in enumerate(input_ids[:, self.prompt_length :].tolist()):
            scorer = self.scorers[row // copies]
            expected = None if scorer is None else scorer(tuple(said))
            if expected is not None:
                scores[row] = mixed(scores[row].log_softmax(-1), expected, self.weight, self.ends)
        return scores

"""Answers that the decoder and CTC find likely together (Watanabe et al. 2017, section II-C: joint decoding)."""

from collections.abc import Collection, Sequence

import torch
from transformers.generation import LogitsProcessor

from .projectors import CTC_SHARPNESS

Prefix = tuple[int, ...]
State = tuple[torch.Tensor, torch.Tensor]
UNHEARD = -30.0
"""Log-probability of what CTC does not hear at all: low, but no veto."""
AUDIBLE = 1e-5
"""A token is followed up where CTC gives it this much in some place of the clip."""
REMEMBERED = 32
"""Beginnings are forgotten that are shorter than the newest by more: a draft may go back some tokens."""


class CtcPrefixScorer:
    """What CTC expects to come next in a clip, after what was said so far.

    The probability of a beginning is summed over all the ways to place it in the clip (Graves 2008, section 7.5.3),
    for all candidates at once.

    Args:
        tokens: the clip as it was projected, `[tokens, width]`.
        embeddings: the decoder's, `[vocabulary, width]`.
        blank: id of the token that stands for nothing heard.
    """

    def __init__(self, tokens: torch.Tensor, embeddings: torch.Tensor, blank: int):
        scores = (CTC_SHARPNESS * tokens.float() @ embeddings.float().T).log_softmax(-1).double().cpu()
        heard = scores.exp().amax(dim=0) > AUDIBLE
        heard[blank] = False
        self.candidates = heard.nonzero().squeeze(1)  # [candidates]
        self._places = {token: i for i, token in enumerate(self.candidates.tolist())}
        self._chances, self._silence = scores[:, self.candidates], scores[:, blank]
        # Of each beginning: log-probabilities `[tokens]` to have said just that, ending in its token and in silence.
        never = torch.full_like(self._silence, -torch.inf)
        self._states: dict[Prefix, State | None] = {(): (never, self._silence.cumsum(0))}

    def __call__(self, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Log-probabilities of each of `candidates` to come next `[candidates]`, and of the end.

        None where `prefix` cannot have been said.
        """
        state = self._state(prefix)
        if state is None:
            return None
        either = torch.logaddexp(*state)
        before = either[:-1, None].expand(-1, len(self.candidates)).clone()
        if prefix:  # a token is said twice only with silence between
            before[:, self._places[prefix[-1]]] = state[1][:-1]
        chances = (before + self._chances[1:]).logsumexp(0)
        if not prefix:
            chances = torch.logaddexp(self._chances[0], chances)
        end = either[-1]
        whole = torch.logaddexp(chances.logsumexp(0), end)
        if not torch.isfinite(whole):
            return None
        return (chances - whole).clamp(min=UNHEARD), (end - whole).clamp(min=UNHEARD)

    def _state(self, prefix: Prefix) -> State | None:
        """The state of a beginning, from that of the longest one before it that is remembered."""
        known = len(prefix)
        while prefix[:known] not in self._states:
            known -= 1
        for length in range(known, len(prefix)):
            self._states[prefix[: length + 1]] = self._next(prefix[:length], prefix[length])
        for old in [one for one in self._states if 0 < len(one) < len(prefix) - REMEMBERED]:
            del self._states[old]
        return self._states[prefix]

    def _next(self, prefix: Prefix, token: int) -> State | None:
        """The state of `prefix` and one token more, both sums of Graves' recursion over all of the clip at once."""
        state, place = self._states[prefix], self._places.get(token)
        if state is None or place is None:
            return None
        before = state[1] if prefix and prefix[-1] == token else torch.logaddexp(*state)
        says = _carried(before, self._chances[:, place])
        if not prefix:  # it may be the first thing in the clip
            says = torch.logaddexp(says, self._chances[:, place].cumsum(0))
        return says, _carried(says, self._silence)


def _carried(source: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """`x[t] = logaddexp(x[t - 1], source[t - 1]) + rate[t]`, with nothing before the first place; all `[tokens]`."""
    summed = rate.cumsum(0)
    carried = (source - summed)[:-1].logcumsumexp(0) + summed[1:]
    return torch.cat([torch.full_like(rate[:1], -torch.inf), carried])


class CtcGuide(LogitsProcessor):
    """Mixes what the decoder expects with what CTC hears, in the rows that say something.

    Args:
        scorers: of each row of the prompt, None where no clip is to be followed.
        weight: share of CTC in the log-probabilities.
        prompt_length: tokens of the prompt, padding included.
        ends: ids of the tokens that end an answer.
    """

    def __init__(
        self, scorers: Sequence[CtcPrefixScorer | None], weight: float, prompt_length: int, ends: Collection[int]
    ):
        self.scorers, self.weight, self.prompt_length = scorers, weight, prompt_length
        self.ends = sorted(ends)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[rows, vocabulary]` after `input_ids` `[rows, length]`; each row of the prompt may have beams."""
        copies = len(input_ids) // len(self.scorers)
        scores = scores.clone()
        for row, said in enumerate(input_ids[:, self.prompt_length :].tolist()):
            scorer = self.scorers[row // copies]
            found = None if scorer is None else scorer(tuple(said))
            if scorer is None or found is None:
                continue
            heard = torch.full_like(scores[row], UNHEARD)
            heard[scorer.candidates.to(scores.device)] = found[0].to(scores)
            heard[self.ends] = found[1].to(scores)
            scores[row] = (1 - self.weight) * scores[row].log_softmax(-1) + self.weight * heard
        return scores

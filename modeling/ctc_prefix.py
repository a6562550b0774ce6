"""Answers that the decoder and CTC find likely together (Watanabe et al. 2017, section II-C: joint decoding)."""

from collections.abc import Collection, Sequence

import torch
from transformers.generation import LogitsProcessor

from .projectors import CTC_SHARPNESS
from .speech_letters import BLANK, SpeechLetters

Prefix = tuple[int, ...]
State = tuple[torch.Tensor, torch.Tensor, int]
"""Of a beginning: log-probabilities `[tokens]` to have said just that, ending in its last unit and in silence;
and that unit, -1 where there is none."""
UNHEARD = -30.0
"""Log-probability of what CTC does not hear at all: low, but no veto."""
AUDIBLE = 1e-5
"""A token is followed up where CTC gives it this much in some place of the clip."""
SELDOM = -12.0
"""Log-probability of what tokens do not hear, where letters may."""
LEAST = -12.0
"""Log-probability of letters below which no token that begins with them is followed up."""
REMEMBERED = 32
"""Beginnings are forgotten that are shorter than the newest by more: a draft may go back some tokens."""


class PrefixScorer:
    """What CTC expects to come next in a clip, after what was said so far.

    The probability of a beginning is summed over all the ways to place it in the clip (Graves 2008, section 7.5.3),
    for all candidates at once.

    Args:
        silence: log-probabilities that nothing is said, `[tokens]`.

    Attributes:
        candidates: ids of the tokens that calls give log-probabilities of.
        silent: ids of tokens that are not heard, such as a comma where letters are; the decoder alone chooses them.
    """

    candidates: torch.Tensor
    silent: torch.Tensor

    def __init__(self, silence: torch.Tensor):
        self._silence = silence
        never = torch.full_like(silence, -torch.inf)
        self._states: dict[Prefix, State | None] = {(): (never, silence.cumsum(0), -1)}

    def __call__(self, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Log-probabilities of each of `candidates` to come next `[candidates]`, and of the end.

        None where `prefix` cannot have been said.
        """
        state = self._state(prefix)
        return None if state is None else self._next_to(state)

    def _next_to(self, state: State) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a call gives after a beginning with this state."""
        raise NotImplementedError

    def _followed(self, state: State, token: int) -> State | None:
        """The state of a beginning and one token more; None where that cannot be."""
        raise NotImplementedError

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

    def _whole(self, state: State, units: torch.Tensor, chances: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """Log-probabilities of each of `units` `[n]`, which have `chances` `[n, tokens]`, and of the end to come next,
        and the sum that both are shares of; None where nothing can."""
        begins = self._begins(self._before(*state, units), chances, state[2] < 0)
        end = torch.logaddexp(state[0][-1], state[1][-1])
        whole = torch.logaddexp(begins.logsumexp(0), end)
        return (begins - whole, end - whole, whole) if torch.isfinite(whole) else None

    @staticmethod
    def _before(
        says: torch.Tensor, silent: torch.Tensor, last: int | torch.Tensor, units: torch.Tensor
    ) -> torch.Tensor:
        """Where each of `units` `[n]` may follow at the next place, `[n, tokens]`: the same one only after silence.

        The state is that of one beginning, or of one for each unit.
        """
        return torch.where((units == last)[:, None], silent, torch.logaddexp(says, silent))

    @staticmethod
    def _begins(before: torch.Tensor, chances: torch.Tensor, first: bool) -> torch.Tensor:
        """Log-probability that a unit comes next, wherever `[...]`; `first` may be the first thing in the clip."""
        later = (before[..., :-1] + chances[..., 1:]).logsumexp(-1)
        return torch.logaddexp(later, chances[..., 0]) if first else later

    def _says(self, before: torch.Tensor, chances: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sums of Graves' recursion for a unit that follows, over all of the clip at once."""
        says = _carried(before, chances)
        if first:
            says = torch.logaddexp(says, chances.cumsum(-1))
        return says, _carried(says, self._silence.expand_as(says))


class CtcPrefixScorer(PrefixScorer):
    """Tokens that CTC hears by themselves.

    Args:
        tokens: the clip as it was projected, `[tokens, width]`.
        embeddings: the decoder's, `[vocabulary, width]`.
        blank: id of the token that stands for nothing heard.
    """

    def __init__(self, tokens: torch.Tensor, embeddings: torch.Tensor, blank: int):
        scores = (CTC_SHARPNESS * tokens.float() @ embeddings.float().T).log_softmax(-1).double().cpu().T
        super().__init__(scores[blank])
        heard = scores.exp().amax(dim=1) > AUDIBLE
        heard[blank] = False
        self.candidates = heard.nonzero().squeeze(1)  # [candidates]
        self.silent = self.candidates[:0]
        self._chances = scores[self.candidates]  # [candidates, tokens]
        self._places = {token: i for i, token in enumerate(self.candidates.tolist())}

    def _next_to(self, state: State) -> tuple[torch.Tensor, torch.Tensor] | None:
        found = self._whole(state, self.candidates, self._chances)
        return None if found is None else (found[0].clamp(min=UNHEARD), found[1].clamp(min=UNHEARD))

    def _followed(self, state: State, token: int) -> State | None:
        place = self._places.get(token)
        if place is None:
            return None
        before = self._before(*state, torch.tensor([token]))[0]
        return *self._says(before, self._chances[place], state[2] < 0), token


class LetterPrefixScorer(PrefixScorer):
    """Tokens by their letters, where CTC hears letters: all tokens are candidates, and one may begin another.

    Args:
        heard: log-probabilities of letters, `[tokens, letters]`.
        letters: knows the spelling of each token.
    """

    def __init__(self, heard: torch.Tensor, letters: SpeechLetters):
        self._chances = heard.double().cpu().T.contiguous()  # [letters, tokens]
        super().__init__(self._chances[BLANK])
        self._spelling, self._trie = letters.spelling.cpu(), letters.trie
        self.candidates, self.silent = torch.arange(len(self._spelling)), self._trie.silent

    def _next_to(self, state: State) -> tuple[torch.Tensor, torch.Tensor] | None:
        letters = self._whole(state, torch.arange(1, len(self._chances)), self._chances[1:])
        if letters is None:
            return None
        _, end, whole = letters
        return self._spelled(state, whole), end.clamp(min=UNHEARD)

    def _spelled(self, state: State, whole: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token's letters, a share of `whole`: down the trie, where it is likely enough."""
        found = torch.full((len(self._spelling),), UNHEARD, dtype=whole.dtype)
        says, silent, last = state[0][None], state[1][None], torch.tensor([state[2]])
        alive, size = torch.zeros(1, dtype=torch.long), 1  # places of the beginnings that are followed up, of so many
        for depth, (parents, letters, (tokens, places)) in enumerate(
            zip(self._trie.parents, self._trie.letters, self._trie.tokens, strict=True)
        ):
            row = torch.full((size,), -1)
            row[alive] = torch.arange(len(alive))
            nodes = (row[parents] >= 0).nonzero().squeeze(1)
            above, units = row[parents[nodes]], letters[nodes]
            before = self._before(says[above], silent[above], last[above], units)
            first = depth == 0 and state[2] < 0
            likely = self._begins(before, self._chances[units], first) - whole
            at = torch.full((len(parents),), UNHEARD, dtype=whole.dtype)
            at[nodes] = likely
            found[tokens] = at[places]
            heard = likely > LEAST
            alive, last, size = nodes[heard], units[heard], len(parents)
            if not len(alive):
                break
            says, silent = self._says(before[heard], self._chances[last], first)
        return found.clamp(min=UNHEARD)

    def _followed(self, state: State, token: int) -> State | None:
        for letter in self._spelling[token].tolist() if 0 <= token < len(self._spelling) else ():
            if letter == BLANK:
                break
            before = self._before(*state, torch.tensor([letter]))[0]
            state = *self._says(before, self._chances[letter], state[2] < 0), letter
        return state


class JointPrefixScorer:
    """Letters and tokens in equal parts: tokens know words, letters also those of which training said too few.

    Args:
        letters, tokens: what CTC hears of both kinds in one clip.
    """

    def __init__(self, letters: LetterPrefixScorer, tokens: CtcPrefixScorer):
        self.letters, self.tokens = letters, tokens
        self.candidates, self.silent = letters.candidates, letters.silent

    def __call__(self, prefix: Prefix) -> tuple[torch.Tensor, torch.Tensor] | None:
        """As of either; what tokens cannot say, letters alone tell, and the other way round."""
        spelled, said = self.letters(prefix), self.tokens(prefix)
        if said is None:
            return spelled
        heard = torch.full_like(self.candidates, SELDOM, dtype=said[0].dtype)
        heard[self.tokens.candidates], end = said[0].clamp(min=SELDOM), said[1].clamp(min=SELDOM)
        return (heard, end) if spelled is None else ((spelled[0] + heard) / 2, (spelled[1] + end) / 2)


def _carried(source: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """`x[t] = logaddexp(x[t - 1], source[t - 1]) + rate[t]`, nothing before the first place; all `[..., tokens]`."""
    summed = rate.cumsum(-1)
    carried = (source - summed)[..., :-1].logcumsumexp(-1) + summed[..., 1:]
    return torch.cat([torch.full_like(carried[..., :1], -torch.inf), carried], dim=-1)


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
        scorers: Sequence[PrefixScorer | JointPrefixScorer | None],
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
            found = None if scorer is None else scorer(tuple(said))
            if scorer is None or found is None:
                continue
            heard = torch.full_like(scores[row], UNHEARD)
            heard[scorer.candidates.to(scores.device)] = found[0].to(scores)
            heard[self.ends] = found[1].to(scores)
            scores[row] = self._mixed(scores[row].log_softmax(-1), heard, scorer.silent.to(scores.device))
        return scores

    def _mixed(self, expected: torch.Tensor, heard: torch.Tensor, silent: torch.Tensor) -> torch.Tensor:
        """Both kinds of log-probabilities `[vocabulary]` together; what is silent stays as likely as expected."""
        mixed = (1 - self.weight) * expected + self.weight * heard
        if not len(silent):
            return mixed
        spoken = torch.ones_like(mixed, dtype=torch.bool)
        spoken[silent], spoken[self.ends] = False, True
        share = expected[spoken].logsumexp(-1) - mixed[spoken].logsumexp(-1)
        return torch.where(spoken, mixed + share, expected)

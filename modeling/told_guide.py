"""Answers that repeat what is told of a picture: its name, or what is written there."""

import math
from collections.abc import Collection, Sequence

import torch
from transformers.generation import LogitsProcessor

from .ctc_prefix import REMEMBERED, Expected, Prefix, TextScorer, mixed

SHARE = 0.6
"""Of what is told, beside the decoder's, in the choice among the names or texts that a picture may have."""
SUPPORT = 0.02
"""Where the decoder gives less than this to all tokens that such an answer may begin with, the question hardly asks
for it, and it counts less in proportion."""


class NameScorer:
    """Tokens that go on with one of the names that a picture may have.

    Args:
        names: ids of each, with its log-probability.
        offered: whether the question offers them, so that an answer begins with one, supported by the decoder or not.
    """

    def __init__(self, names: Sequence[tuple[Prefix, float]], offered: bool = False):
        self.offered = offered
        self._names = [(name, math.exp(score)) for name, score in names]

    def __call__(self, prefix: Prefix) -> Expected | None:
        """None where no name begins so."""
        rest = [(name[len(prefix) :], chance) for name, chance in self._names if name[: len(prefix)] == prefix]
        total = sum(chance for _, chance in rest)
        if not total:
            return None
        chances: dict[int, float] = {}
        for name, chance in rest:
            if name:
                chances[name[0]] = chances.get(name[0], 0.0) + chance
        end = sum(chance for name, chance in rest if not name)
        return Expected.of_shares(chances, end, total)


Teller = tuple[NameScorer | TextScorer, float]
"""What may be told, and how much it counts: the probability that there is such a thing in the picture, or more."""


class ToldGuide(LogitsProcessor):
    """Takes an answer to be the decoder's own or one that a teller gives, as a mixture of these by Bayes' rule.

    As pointer-generator networks copy from their source (See et al., arXiv 1704.04368), but what is copied is known
    from the first token on, so that nothing needs to be learnt: a teller whose text the answer does not follow has no
    weight any more, and the others gain what it loses. An answer that nobody tells stays the decoder's own.

    Args:
        tellers: of each row of the prompt.
        weight: probability, before the answer begins, that it is what a teller tells that counts 1; all tellers
            together have twice that at most.
        prompt_length: tokens of the prompt, padding included.
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, tellers: Sequence[Sequence[Teller]], weight: float, prompt_length: int, ends: Collection[int]):
        self.tellers, self.weight, self.prompt_length = tellers, weight, prompt_length
        self.ends = sorted(ends)
        self._after: list[dict[Prefix, torch.Tensor]] = [{} for _ in tellers]
        """Of each row and beginning, the weights of its tellers behind each next token, `[tellers, vocabulary]`."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`scores` `[rows, vocabulary]` after `input_ids` `[rows, length]`; each row of the prompt may have beams."""
        copies = len(input_ids) // len(self.tellers)
        scores = scores.clone()
        for row, said in enumerate(input_ids[:, self.prompt_length :].tolist()):
            if self.tellers[row // copies]:
                scores[row] = self._mixture(row // copies, tuple(said), scores[row].log_softmax(-1))
        return scores

    def _mixture(self, row: int, prefix: Prefix, wanted: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of the next token, where the decoder's own are `wanted` `[vocabulary]`."""
        before = self._after[row].get(prefix[:-1]) if prefix else None
        if prefix and before is None:
            return wanted  # what this answer began with was not chosen here
        own = wanted.exp()
        said = [(number, scorer(prefix)) for number, (scorer, _) in enumerate(self.tellers[row])]
        told = [(number, expected) for number, expected in said if expected is not None]
        if before is None:
            weights = self._weights(own, [(*self.tellers[row][number], expected) for number, expected in told])
        else:
            weights = [float(before[number, prefix[-1]]) for number, _ in told]
        both = (1 - sum(weights)) * own
        after = own.new_zeros(len(self.tellers[row]), len(own))
        for (number, expected), weight in zip(told, weights, strict=True):
            after[number] = weight * mixed(wanted, expected, SHARE, self.ends).softmax(-1)
        both += after.sum(0)
        after /= both.clamp(min=torch.finfo(both.dtype).tiny)
        self._remember(row, prefix, after)
        return both.log()

    def _weights(
        self, own: torch.Tensor, told: Sequence[tuple[NameScorer | TextScorer, float, Expected]]
    ) -> list[float]:
        """Of each teller, by how much it counts and what it expects first, where the decoder gives tokens the
        probabilities `own` `[vocabulary]`. Together they have twice the weight of one at most."""
        weights = []
        for scorer, counts, expected in told:
            offered = isinstance(scorer, NameScorer) and scorer.offered
            support = SUPPORT if offered else float(own[expected.tokens.to(own.device)].sum())
            weights.append(self.weight * counts * min(1.0, support / SUPPORT))
        scale = min(1.0, 2 * self.weight / max(sum(weights), 1e-9))
        return [scale * weight for weight in weights]

    def _remember(self, row: int, prefix: Prefix, after: torch.Tensor) -> None:
        """Forgets what is too old for a draft that goes back, or a beam, to need it."""
        self._after[row][prefix] = after
        for old in [one for one in self._after[row] if len(one) < len(prefix) - REMEMBERED]:
            del self._after[row][old]

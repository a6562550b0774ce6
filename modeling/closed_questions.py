"""What a closed English question about a picture asks for: "Is there a dog in the picture?", "Is this a dog or a cat?"

A detector's findings correct what a language model says of them, as in Woodpecker (Yin et al., arXiv 2310.16045).
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

SEEN_ENOUGH = 0.3
"""Probability from which a thing is rather in the picture: one that is asked for is there more often than any other.
Best on scenes in the styles of training."""
BESIDE = frozenset(
    "a an and any anywhere are at contain depict drawing emoji here image in is it on or photo picture scene see "
    "shot show shown shows some somewhere that there these this those visible".split()
)
"""Words that may stand beside the thing: others are part of its name ("a dog house"), or tell more of it ("a red
car", "the dog")."""
BETWEEN = frozenset(("a", "an", "or"))
"""Words that may stand between two things that are offered."""
SPOKEN = ("is there {a} ", "are there ", "is this {a} ", "do you see {a} ")
"""What questions that are listened for begin with; the thing follows."""
SHARPNESS = 0.35
"""Power to which what CTC hears of a whole question is taken, whose tokens are not independent. Best for voices that
ask in training."""


def asked_thing(question: str, things: Mapping[str, int]) -> int | None:
    """What is asked for, one of `things` by its name, if the question asks for it alone and for nothing more of it.

    Args:
        question: in small letters, without signs: "is there a dog in the picture".
        things: by their names, in the singular.
    """
    words = question.split()
    found = [mention for mention in _mentions(words, things) if mention[0]]  # "Can you see ..." asks for no can
    if len(found) != 1:
        return None
    start, end, thing = found[0]
    return thing if words[start - 1] in BESIDE and (end == len(words) or words[end] in BESIDE) else None


def offered_things(question: str, things: Mapping[str, int]) -> list[int]:
    """The things that a question offers to choose from: "is this an animal food or a tool"; none where it does not."""
    words = question.split()
    found = [mention for mention in _mentions(words, things) if mention[0]]
    if len(found) < 2 or "or" not in words[found[-2][1] : found[-1][0]]:
        return []
    between = (words[before[1] : after[0]] for before, after in itertools.pairwise(found))
    return [thing for *_, thing in found] if all(set(gap) <= BETWEEN for gap in between) else []


def _mentions(words: list[str], things: Mapping[str, int]) -> Iterator[tuple[int, int, int]]:
    """First word, the one behind, and thing, where one is mentioned; of names that overlap the longest."""
    longest, start = max((len(name.split()) for name in things), default=0), 0
    while start < len(words):
        for end in range(min(start + longest, len(words)), start, -1):
            thing = _named(" ".join(words[start:end]), things)
            if thing is not None:
                yield start, end, thing
                start = end - 1
                break
        start += 1


def _named(text: str, things: Mapping[str, int]) -> int | None:
    """The thing of this name, or of which this is the plural."""
    for ending, single in (("", ""), ("s", ""), ("es", ""), ("ies", "y")):
        if text.endswith(ending) and (thing := things.get(text[: len(text) - len(ending)] + single)) is not None:
            return thing
    return None


def things_heard(
    letters: torch.Tensor, things: Iterable[str], letters_of: Callable[[str], Sequence[int]]
) -> torch.Tensor:
    """Log-likelihood that a clip asks for each of `things`, by CTC over the SPOKEN questions, `[things]`.

    Args:
        letters: log-probabilities of nothing and of letters, `[tokens, letters]`.
        letters_of: gives the letters of a text.
    """
    forms = {a: [letters_of(form.format(a=a)) for form in SPOKEN] for a in ("a", "an")}
    named = [(forms["an" if thing[0] in "aeiou" else "a"], letters_of(thing)) for thing in things]
    questions = [[*begins[form], *name] for form in range(len(SPOKEN)) for begins, name in named]
    unlikely = torch.nn.functional.ctc_loss(
        letters.float().cpu()[:, None].expand(-1, len(questions), -1),
        torch.tensor([letter for question in questions for letter in question]),
        torch.full((len(questions),), len(letters)),
        torch.tensor([len(question) for question in questions]),
        reduction="none",
    )
    return (-unlikely).view(len(SPOKEN), -1).logsumexp(0)


def verdict(there: torch.Tensor) -> torch.Tensor:
    """Probability that the answer is yes, for things of which each is in the picture with the probability `there`."""
    there = there.double().clamp(1e-6, 1 - 1e-6)
    yes, no = there / SEEN_ENOUGH, (1 - there) / (1 - SEEN_ENOUGH)
    return yes / (yes + no)


def spoken_verdict(heard: torch.Tensor, there: torch.Tensor) -> float | None:
    """The same for a thing that is asked for by voice, of which no one knows for sure which it is.

    Half of such questions are taken to be about something that is there.

    Args:
        heard: log-likelihood that each thing is asked for, `[things]`; all are -inf in a clip that is too short, and
            then there is no verdict.
        there: probability that each is in the picture, `[things]`.
    """
    if not torch.isfinite(heard).any():
        return None
    yes = verdict(there)
    prior = yes / yes.sum() + (1 - yes) / (1 - yes).sum()
    asked = (SHARPNESS * heard.double() + prior.log()).softmax(0)
    return float((asked * yes).sum())

"""Retrieval in long rows: facts `first last value` among filler, and at the end questions `first last` that want it.

Two names are a key, and no key comes twice in a row. A value is a number in one token or, in the tasks `picture` and
`speech`, a placeholder for a digit that is seen or heard. The tasks differ in how thick the facts lie. Questions come
behind each other, each with its answer, as they do in a row to train on: so one reading of a row asks many. The first
token of each row is the same.
"""

from dataclasses import dataclass
from math import ceil

import torch

PAD, IMAGE, AUDIO, BEGIN = range(4)
NUMBERS = range(8, 108)
FIRST = range(108, 172)
LAST = range(172, 236)
WORDS = range(236, 384)
VOCABULARY = 384
NAMES = len(FIRST)
FACT = 3
"""Tokens of a fact, and of a question with its answer."""


@dataclass(frozen=True)
class Task:
    """How the facts of a row lie.

    Attributes:
        spacing: tokens of the row for each fact.
        together: facts that stand behind each other.
        media: the placeholder that stands for the value, if it is one.
    """

    spacing: int
    together: int = 1
    media: int | None = None


TASKS = {
    "passkey": Task(128),
    "needles": Task(64, together=8),
    "lookup": Task(8),
    "picture": Task(128, media=IMAGE),
    "speech": Task(128, media=AUDIO),
}
FEWEST, MOST = 5, 1000
"""Facts of a row: one for each fifth of it at least."""


@dataclass(frozen=True)
class Rows:
    """Rows of one task and length.

    Attributes:
        ids: `[rows, length]`, answers included.
        asked: `[questions]`, the place of each answer; the token before it is to tell it.
        depth: `[rows, questions]`, where the fact stands, 0 for the start of what is before the questions, below 1.
        digits: `[rows, facts]`, the digits that the placeholders stand for, in the order of the row; None without.
    """

    ids: torch.Tensor
    asked: torch.Tensor
    depth: torch.Tensor
    digits: torch.Tensor | None

    @property
    def answers(self) -> torch.Tensor:
        """`[rows, questions]`."""
        return self.ids[:, self.asked]


def facts_of(task: Task, length: int) -> int:
    """How many facts a row of `length` tokens holds."""
    return min(max(length // task.spacing, FEWEST), MOST)


def make_rows(
    name: str,
    rows: int,
    length: int,
    generator: torch.Generator,
    facts: int | None = None,
    names: int = NAMES,
) -> Rows:
    """Rows of `length` tokens: filler with facts at random places, then a question about each fact, in any order.

    Args:
        facts: how many; by default as many as the task wants.
        names: how many first names a row draws from, and last names: with fewer, more keys share one of theirs.

    Raises:
        ValueError: the task is not one of `TASKS`, the facts and their questions do not fit, or names are too few.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not one of {tuple(TASKS)}")
    task = TASKS[name]
    facts = facts_of(task, length) if facts is None else facts
    if 1 + 2 * FACT * facts > length:
        raise ValueError(f"task {name!r}: {facts} facts and their questions do not fit into {length} tokens")
    if not facts <= names**2 <= NAMES**2:
        raise ValueError(
            f"task {name!r}: {names} names, {facts} facts need at least {ceil(facts**0.5)}, {NAMES} at most"
        )

    def below(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(limit, shape, generator=generator)

    def shuffled(count: int, wanted: int) -> torch.Tensor:
        return torch.stack([torch.randperm(count, generator=generator)[:wanted] for _ in range(rows)])

    key, number = shuffled(names**2, facts), below(10 if task.media else 100, rows, facts)
    first = shuffled(NAMES, names).gather(1, key // names) + FIRST.start
    last = shuffled(NAMES, names).gather(1, key % names) + LAST.start
    value = number + NUMBERS.start
    shown = torch.full_like(value, task.media) if task.media else value
    room = length - FACT * facts  # for what stands before the questions
    places = _places(task.together, facts, room - 1, rows, generator) + 1
    ids = below(len(WORDS), rows, length) + WORDS.start
    ids[:, 0] = BEGIN
    for offset, part in enumerate((first, last, shown)):
        ids.scatter_(1, places + offset, part)
    order = shuffled(facts, facts)
    question = torch.stack([part.gather(1, order) for part in (first, last, value)], dim=-1)
    ids[:, room:] = question.flatten(1)
    asked = torch.arange(room + FACT - 1, length, FACT)
    return Rows(ids, asked, places.gather(1, order) / room, number if task.media else None)


def _places(together: int, facts: int, room: int, rows: int, generator: torch.Generator) -> torch.Tensor:
    """Where facts begin within `room` tokens, `[rows, facts]`, rising; `together` of them touch."""
    groups = -(-facts // together)
    before = torch.randint(room - FACT * facts + 1, (rows, groups), generator=generator).sort().values  # filler
    return before.repeat_interleave(together, dim=1)[:, :facts] + FACT * torch.arange(facts)

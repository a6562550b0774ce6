"""Retrieval in long rows: facts `NOTE a b d d d END` among filler, and questions `ASK a b` that want the digits.

Three tasks: `passkey` (one fact), `needles` (eight facts), `lookup` (facts all the way, no filler). A row to train on
asks at many places, so that much of it teaches; questions behind a prompt to test on are about facts at some depth.
"""

from dataclasses import dataclass

import torch

PAD, NOTE, ASK, END = range(4)
DIGITS = range(4, 14)
NAMES = range(14, 142)
WORDS = range(142, 256)
VOCABULARY = 256
ANSWER = 3
FACT = 3 + ANSWER + 1
"""Tokens of a fact, and of a question with its answer."""
TASKS = ("passkey", "needles", "lookup")
FACTS = {"passkey": 1, "needles": 8}
IGNORED = -100

Key = tuple[int, int]


@dataclass(frozen=True)
class Prompt:
    """A prompt, and questions about it: the ids `[ASK, a, b]` of each, and the digits that answer it."""

    ids: list[int]
    questions: list[tuple[list[int], list[int]]]


class Writer:
    """Draws keys, digits and words; no key comes twice."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.facts: dict[Key, list[int]] = {}

    def below(self, limit: int) -> int:
        """A number in `[0, limit)`."""
        return int(torch.randint(limit, (1,), generator=self.generator))

    def words(self, count: int) -> list[int]:
        """Filler."""
        return torch.randint(WORDS.start, WORDS.stop, (count,), generator=self.generator).tolist()

    def fact(self) -> list[int]:
        """A new fact."""
        key = (NAMES[self.below(len(NAMES))], NAMES[self.below(len(NAMES))])
        while key in self.facts:
            key = (NAMES[self.below(len(NAMES))], NAMES[self.below(len(NAMES))])
        self.facts[key] = [DIGITS[self.below(10)] for _ in range(ANSWER)]
        return [NOTE, *key, *self.facts[key], END]

    def question(self) -> tuple[list[int], list[int]]:
        """A question about any fact so far, and its answer."""
        key = list(self.facts)[self.below(len(self.facts))]
        return [ASK, *key], self.facts[key]


def training_row(task: str, length: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Ids and labels of one row. Only answers are learnt.

    Raises:
        ValueError: the task is not one of `TASKS`.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r} is not one of {TASKS}")
    writer = Writer(generator)
    limit = FACTS.get(task, length)
    ids = writer.words(writer.below(8))
    labels = [IGNORED] * len(ids)
    while len(ids) < length:
        draw = writer.below(2 if task == "lookup" else 4)
        if not writer.facts or (draw == 0 and len(writer.facts) < limit):
            new = writer.fact()
            taught = [IGNORED] * len(new)
        elif draw < 3:
            asked, answer = writer.question()
            new, taught = [*asked, *answer, END], [IGNORED] * 3 + answer + [IGNORED]
        else:
            new = writer.words(1 + writer.below(24))
            taught = [IGNORED] * len(new)
        ids, labels = ids + new, labels + taught
    return ids[:length], labels[:length]


def prompt_at(task: str, length: int, depth: float, questions: int, generator: torch.Generator) -> Prompt:
    """A prompt of `length` tokens whose asked facts begin at `depth` of it (0: the start, 1: the end).

    Raises:
        ValueError: the facts do not fit.
    """
    writer = Writer(generator)
    asked = min(questions, FACTS.get(task, questions))
    if asked * FACT > length:
        raise ValueError(f"{asked} facts of {FACT} tokens do not fit into {length}")
    before = round(depth * (length - asked * FACT))
    after = length - before - asked * FACT

    def around(count: int) -> list[int]:
        facts = [token for _ in range(count // FACT) for token in writer.fact()] if task == "lookup" else []
        return facts + writer.words(count - len(facts))

    ids = around(before)
    known = len(writer.facts)
    ids += [token for _ in range(asked) for token in writer.fact()]
    wanted = list(writer.facts.items())[known:]
    return Prompt(ids + around(after), [([ASK, *key], answer) for key, answer in wanted])

"""Write chats: what the model is, what it can't know, and what was said a turn ago.

Run: python scripts/prepare_chats.py     (after scripts/fetch.py)
Training rows go to build/data/chats.jsonl, questions of other forms about other words to build/data/eval/chats.jsonl.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from common import DATA, EVAL, SEED, run_main, wordnet_entries, write_jsonl
from prepare_text import CHATS, with_article

UNKNOWN = "I do not know that. I am small, and I know little about the world."
NOW = "I cannot know that. I only know what you send me."
UNABLE = "I cannot do that. I read handwritten digits, name clothes and write down short speech."
PLACES = (
    "France Spain Italy Germany Japan China India Brazil Canada Mexico Egypt Kenya Norway Sweden Poland Greece Turkey "
    "Russia Australia Peru London Paris Berlin Rome Madrid Tokyo Boston Chicago Texas California Africa Europe Asia"
).split()
NAMES = (
    "Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Maria Noah Olga Paul Rosa Sam Tom Vera Will Zoe "
    "Alice Bob Carl Diana Eric Fiona George Helen Ivan Julia Kevin Laura Mark Nina Oscar Peter Ruth Simon Tina Victor"
).split()
FORMS: dict[str, tuple[str, ...]] = {
    UNKNOWN: (
        "What is {a}?", "What is the {noun}?", "What does {noun} mean?", "What are {noun}s?",
        "Tell me about the {noun}.", "Who invented the {noun}?", "Who wrote the {noun}?",
        "Who is the king of {place}?", "Who was {name}?", "Who is the president of {place}?",
        "What is the capital of {place}?", "What is the largest city in {place}?", "Where is {place}?",
        "Where do {noun}s live?", "Where does the {noun} come from?", "Why is the {noun} {adj}?",
        "Why do {noun}s sleep?", "When was the {noun} made?", "When did {name} live?", "How does {a} work?",
        "How old is the {noun}?", "How tall is the {noun}?", "How far is it to {place}?",
        "How many {noun}s are there?", "How many people live in {place}?", "How much is {a}?", "How do I make {a}?",
        "Is {a} {adj}?", "Are {noun}s {adj}?", "What colour is {a}?", "What do {noun}s eat?",
        "Which {noun} is the best?", "Explain the {noun}.", "Which language do people speak in {place}?",
        "Do you know {place}?", "Do you know {name}?", "What is {n} plus {m}?", "What is {n} times {m}?",
        "How much is {n} minus {m}?", "What do you think of {noun}s?", "What should I do about {a}?",
    ),
    NOW: (
        "What time is it?", "What day is it today?", "What is the date?", "What is the weather like?",
        "Will it rain today?", "What is the weather in {place}?", "How is the weather today?", "What is in the news?",
        "Who won the game?", "What happened in {place} today?", "Where am I?", "Where is my {noun}?", "How old am I?",
        "What is my name?", "Who am I?", "What did I do yesterday?", "What do I have in my hand?",
        "What will happen tomorrow?", "Who is {name}?", "Where is {name} now?", "What is {name} doing?",
        "Is {name} at home?",
    ),
    UNABLE: (
        "Tell me a joke.", "Tell me a story.", "Tell me a joke about {a}.", "Tell me a story about {name}.",
        "Sing a song.", "Write a poem.", "Write a poem about {a}.", "Write a letter to {name}.", "Write a program.",
        "Write code in Python.", "Write a program about {noun}s.", "Can you write code?", "Can you cook?",
        "Can you dance?", "Can you draw {a}?", "Draw {a}.", "Translate {noun} into French.",
        "Translate this into German.", "Can you speak French?", "Can you call {name}?", "Call {name}.",
        "Play some music.", "Buy {a} for me.", "Book a flight to {place}.", "Send a mail to {name}.",
        "Search for {noun}s.", "Summarize the book.", "Solve this for me.", "Help me with my {noun}.",
    ),
}  # fmt: skip
HELD_OUT_FORMS: dict[str, tuple[str, ...]] = {
    UNKNOWN: (
        "Who discovered the {noun}?", "What is the longest river in {place}?", "What is {noun} made of?",
        "Define {noun}.", "Why are {noun}s {adj}?", "How big is {a}?", "What is the history of {place}?",
        "What is the meaning of {noun}?",
    ),
    NOW: (
        "What's the weather today?", "What time is it in {place}?", "Where does {name} live?",
        "Is it cold in {place}?",
    ),
    UNABLE: ("Can you write Python code?", "Write a story about {a}.", "Tell me another joke.", "Can you sing?"),
}  # fmt: skip
TRAIN_ROWS, TEST_ROWS, HELD_OUT_NOUNS = 9000, 240, 0.1
TALK, MEMORY = 0.3, 0.15
"""Shares of training rows that are several turns, and that ask for a name said before."""
Pair = tuple[str, str]


def common_words(part: str) -> list[str]:
    """Short words of a part of speech, those of WordNet's example sentences."""
    used = {word for *_, examples in wordnet_entries() for text in examples for word in re.findall(r"[a-z]+", text)}
    entries = {word for kind, word, *_ in wordnet_entries() if kind == part}
    return sorted(word for word in entries & used if 3 <= len(word) <= 9)


def split_nouns() -> dict[str, list[str]]:
    """Nouns for training, and those that its questions never name."""
    nouns = common_words("noun")
    held = set(random.Random(f"{SEED} nouns").sample(nouns, round(len(nouns) * HELD_OUT_NOUNS)))
    return {"train": [noun for noun in nouns if noun not in held], "test": sorted(held)}


def filled(form: str, nouns: list[str], adjectives: list[str], rng: random.Random) -> str:
    """A form with something in its gaps."""
    noun = rng.choice(nouns)
    return form.format(
        noun=noun, a=with_article(noun), adj=rng.choice(adjectives), place=rng.choice(PLACES), name=rng.choice(NAMES),
        n=rng.randint(2, 99), m=rng.randint(2, 99),
    )  # fmt: skip


def typed(text: str, rng: random.Random) -> str:
    """As people type: now and then without capitals or the mark at the end."""
    return rng.choice([text, text, text.lower(), text.rstrip("?.!")])


class Chats:
    """Draws questions and their answers."""

    def __init__(self, forms: dict[str, tuple[str, ...]], nouns: list[str], adjectives: list[str], rng: random.Random):
        self.forms, self.nouns, self.adjectives, self.rng = forms, nouns, adjectives, rng

    def unknown(self) -> Pair:
        """What it cannot know or do, and that it says so."""
        answer = self.rng.choice([UNKNOWN, UNKNOWN, NOW, UNABLE])
        return filled(self.rng.choice(self.forms[answer]), self.nouns, self.adjectives, self.rng), answer

    def own(self) -> Pair:
        """About itself."""
        questions, answers = self.rng.choice(CHATS)
        return self.rng.choice(questions), self.rng.choice(answers)

    def pair(self) -> Pair:
        """Either."""
        return self.unknown() if self.rng.random() < 0.6 else self.own()

    def talk(self) -> list[Pair]:
        """Several turns; in some of them a name is said, and asked for later."""
        turns = [self.pair() for _ in range(self.rng.randint(2, 3))]
        if self.rng.random() > MEMORY / TALK:
            return turns
        name = self.rng.choice(NAMES)
        said = self.rng.choice([f"My name is {name}.", f"I am {name}.", f"Hello, I am {name}."])
        asked = self.rng.choice(["What is my name?", "Who am I?", "Do you know my name?"])
        return [
            (said, f"Nice to meet you, {name}."),
            *turns[: self.rng.randint(0, 2)],
            (asked, f"Your name is {name}."),
        ]


def row_of(pairs: list[Pair], rng: random.Random) -> dict[str, Any]:
    """A training row of these turns."""
    messages = []
    for asked, answer in pairs:
        messages.append({"role": "user", "content": [{"type": "text", "text": typed(asked, rng)}]})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "task": "chats"}


def train_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Single questions and talks."""
    chats = Chats(FORMS, split_nouns()["train"], common_words("adj"), rng)
    for _ in range(TRAIN_ROWS):
        yield row_of(chats.talk() if rng.random() < TALK else [chats.pair()], rng)


def test_rows(rng: random.Random) -> Iterator[dict[str, Any]]:
    """Questions of forms and about words that training never shows; any of the three answers is fair."""
    chats = Chats(HELD_OUT_FORMS, split_nouns()["test"], common_words("adj"), rng)
    for _ in range(TEST_ROWS):
        asked, _ = chats.unknown()
        yield {"task": "chats", "prompt": asked, "answers": [UNKNOWN, NOW, UNABLE], "metric": "exact"}


def main() -> None:
    """Write both splits."""
    write_jsonl(DATA / "chats.jsonl", train_rows(random.Random(SEED)))
    write_jsonl(EVAL / "chats.jsonl", test_rows(random.Random(f"{SEED} held out")))


if __name__ == "__main__":
    run_main(main)

"""Write build/data/text.jsonl (dictionary text, short chats, studio prompts, exercises), copy.jsonl (copying words)
and copy_pieces.jsonl (copying pieces of words after silence, as a clip comes to the decoder).

Run: python scripts/prepare_text.py     (after scripts/fetch.py)
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from common import (
    CLOTHES,
    CLOTHES_PROMPTS,
    DATA,
    DIGIT_PICTURE_PROMPTS,
    DIGIT_SPOKEN_PROMPTS,
    DIGIT_WORDS,
    LETTER_SPOKEN_PROMPTS,
    NUMBER_PICTURE_PROMPTS,
    PAIR_PROMPTS,
    SEED,
    TRANSCRIBE_PROMPTS,
    chat_row,
    plain,
    run_main,
    sentence,
    train_sentences,
    wordnet_entries,
    write_jsonl,
)

Row = dict[str, Any]
NAME = "I am MixLora, a small model that reads text, looks at pictures and listens to voices."
TALENTS = "I read handwritten digits, name clothes, write down short speech and compare a voice with a picture."
LIMITS = "I am very small. I make mistakes, and I know little about the world."
CHATS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello", "Hi", "Hello!", "Hi there", "Good morning", "Good evening", "Hey"),
        ("Hello! How can I help you?", "Hello! Send me a text, a picture or a clip."),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself."),
        (NAME,),
    ),
    (("What can you do?", "How can you help me?", "What are you good at?", "What can I ask you?"), (TALENTS,)),
    (("What can you not do?", "What are your limits?", "Do you make mistakes?", "Are you always right?"), (LIMITS,)),
    (("Thank you", "Thanks", "Thank you!", "Thanks a lot."), ("You are welcome.", "You are welcome!")),
    (("Goodbye", "Bye", "Good night", "See you"), ("Goodbye!", "Goodbye! Come back soon.")),
    (("How are you?", "How are you today?", "How do you feel?"), ("I am well, thank you.",)),
    (("Can you see?", "Can you see pictures?", "Do you see images?"), ("Yes. Send me a picture and ask about it.",)),
    (("Can you hear?", "Can you hear me?", "Do you hear voices?"), ("Yes. Send me a clip and I listen to it.",)),
    (("Are you a human?", "Are you a person?"), ("No, I am a small computer model.",)),
    (
        ("Which pictures do you know?", "What pictures can you read?"),
        ("Handwritten digits and numbers, and clothes.",),
    ),
    (
        ("Which clothes do you know?", "Name some clothes."),
        (", ".join(CLOTHES[:-1]).capitalize() + " and ankle boot.",),
    ),
    (
        DIGIT_PICTURE_PROMPTS + NUMBER_PICTURE_PROMPTS + CLOTHES_PROMPTS,
        ("I see no picture. Please send one.",),
    ),
    (
        DIGIT_SPOKEN_PROMPTS + LETTER_SPOKEN_PROMPTS + TRANSCRIBE_PROMPTS,
        ("I hear no clip. Please send one.",),
    ),
    (PAIR_PROMPTS, ("Please send me a picture and a clip.",)),
)
QUESTIONS = {
    "noun": ("What is {a}?", "What does {w} mean?", "Explain the word {w}.", "Define {w}."),
    "verb": ("What does it mean to {w}?", "What does {w} mean?", "Explain the verb {w}."),
    "adj": ("What does {w} mean?", "When is something {w}?", "Explain the word {w}."),
    "adv": ("What does {w} mean?", "Explain the word {w}."),
}


def with_article(word: str) -> str:
    """The word with "a" or "an"; names with a capital stand alone."""
    if word[:1].isupper():
        return word
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def good_word(word: str) -> bool:
    """Plain English words of up to two parts."""
    return re.fullmatch(r"[A-Za-z]{2,14}( [a-z]{2,12})?", word) is not None


def definition_rows(rng: random.Random, count: int) -> Iterator[Row]:
    """Chats about the first sense of words: question, gloss as a sentence."""
    entries: dict[str, tuple[str, str]] = {}
    for part, word, gloss, _ in wordnet_entries():
        if good_word(word) and 12 <= len(gloss) <= 90 and word not in entries and "(" not in gloss:
            entries[word] = (part, gloss)
    for word, (part, gloss) in rng.sample(sorted(entries.items()), count):
        question = rng.choice(QUESTIONS[part]).format(w=word, a=with_article(word))
        yield chat_row("define", sentence_of_gloss(gloss), question)


def sentence_of_gloss(gloss: str) -> str:
    """A gloss with a capital and a stop."""
    return gloss[:1].upper() + gloss[1:] + ("" if gloss[-1] in ".?!" else ".")


def plain_rows(rng: random.Random, sentences: list[str], glosses: list[str]) -> Iterator[Row]:
    """Plain text: three to eight sentences or dictionary lines a row."""
    lines = [*sentences, *glosses]
    rng.shuffle(lines)
    at = 0
    while at < len(lines):
        size = rng.randint(3, 8)
        yield {"text": " ".join(lines[at : at + size])}
        at += size


def number_words(number: int) -> str:
    """The digits of a number as words."""
    return " ".join(DIGIT_WORDS[int(digit)] for digit in str(number))


def misheard(text: str, rng: random.Random) -> str:
    """The text with some letters dropped, doubled or swapped for others, as a bad ear would write it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    slips = (lambda c: "", lambda c: c + c, lambda c: rng.choice(letters), lambda c: c + rng.choice(letters))
    return "".join(rng.choice(slips)(c) if c.isalpha() and rng.random() < 0.1 else c for c in text)


def exercise_rows(rng: random.Random, sentences: list[str], count: int) -> Iterator[Row]:
    """Exercises in copying and mending, in digits and their words, and in yes or no, which the senses build on."""
    for _ in range(count):
        digit = rng.randrange(10)
        other = digit if rng.random() < 0.5 else rng.choice([d for d in range(10) if d != digit])
        word = DIGIT_WORDS[other]
        number = rng.randrange(10, 1000)
        said = rng.choice(sentences)
        shuffled = " ".join(rng.sample(said.split(), len(said.split())))
        yield rng.choice(
            [
                chat_row("copy", said, f"Repeat this: {said}"),
                chat_row("copy", shuffled, f"{shuffled} Say it again."),
                chat_row("mend", said, f"{misheard(said, rng)} {rng.choice(TRANSCRIBE_PROMPTS)}"),
                chat_row("mend", said, f"{misheard(said, rng)} {rng.choice(TRANSCRIBE_PROMPTS)}"),
                chat_row("same", "yes" if digit == other else "no", f"Is {digit} the same as {word}?"),
                chat_row("same", "yes" if digit == other else "no", f"I say {word}. The picture shows {digit}. Same?"),
                chat_row("digit", str(other), f"Write {word} as a digit."),
                chat_row("digit", str(number), f"Write in digits: {number_words(number)}."),
                chat_row("words", number_words(number), f"Say {number} in words, digit by digit."),
            ]
        )


def copy_rows(rng: random.Random, sentences: list[str], words: list[str], count: int) -> Iterator[Row]:
    """Dense practice in copying: mostly words in no order, which nothing but looking back can repeat; some misheard.

    A small decoder does not learn to look back from text alone, and transcribing is little else.
    """
    for _ in range(count):
        if rng.random() < 0.7:
            said = " ".join(rng.choices(words, k=rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8, 10])))
            said = sentence(said) if rng.random() < 0.5 else said
        else:
            said = rng.choice(sentences)
        heard = misheard(said, rng) if rng.random() < 0.2 else said
        ask = rng.choice(["Repeat this: {}", "{} Say it again.", *("{} " + prompt for prompt in TRANSCRIBE_PROMPTS)])
        yield chat_row("copy", said, ask.format(heard))


def pieces_of(words: list[str], rng: random.Random, count: int) -> str:
    """That many random pieces of words, joined into words that nobody knows."""
    text = ""
    for _ in range(count):
        word = rng.choice(words)
        start = rng.randrange(len(word))
        text += (" " if rng.random() < 0.6 else "") + word[start : start + rng.randint(1, 6)]
    return text.strip()


def copy_piece_rows(rng: random.Random, sentences: list[str], words: list[str], count: int) -> Iterator[Row]:
    """Copying token by token, whatever the tokens: pieces of words, then mended sentences, often after silence.

    Silence is written as line breaks, so that a clip, which comes as what CTC hears in it after line breaks, is
    nothing new to the decoder.
    """
    for _ in range(count):
        draw = rng.random()
        if draw < 0.5:
            said = heard = sentence(pieces_of(words, rng, rng.choice([1, 2, 3, 4, 6, 8, 12, 16, 24])))
        elif draw < 0.7:
            said = heard = sentence(" ".join(rng.choices(words, k=rng.randint(1, 12))))
        else:
            said = " ".join(rng.sample(sentences, rng.choice([1, 1, 1, 2, 3])))  # an answer goes on after a stop
            heard = misheard(said, rng)
        silence = "\n" * rng.randint(0, 40) if rng.random() < 0.7 else ""
        gap = rng.choice(["", " ", "\n"] if heard[-1] in ".?!" else [" ", "\n"])
        yield chat_row("copy", said, silence + heard + gap + rng.choice(TRANSCRIBE_PROMPTS))


def chat_rows(rng: random.Random, times: int) -> Iterator[Row]:
    """Every question of CHATS, several times, with one of its answers, sometimes lower case or without its mark."""
    for _ in range(times):
        for questions, answers in CHATS:
            for question in questions:
                asked = rng.choice([question, question, question.lower(), question.rstrip("?.!")])
                yield chat_row("chat", rng.choice(answers), asked)


def main() -> None:
    """Write the text for the decoder and a small held-out part of it."""
    rng = random.Random(SEED)
    entries = list(wordnet_entries())
    examples = sorted({sentence(e) for *_, found in entries for e in found if 8 <= len(e) <= 160 and e.isascii()})
    glosses = [f"{word}: {gloss}." for _, word, gloss, _ in entries if good_word(word) and gloss.isascii()]
    prompts = train_sentences()
    rows = list(plain_rows(rng, [*examples, *prompts * 20], rng.sample(glosses, 24000)))
    rows += definition_rows(rng, 16000)
    rows += exercise_rows(rng, [*(e for e in examples if len(e) < 70), *prompts * 10], 26000)
    rows += chat_rows(rng, 25)
    rng.shuffle(rows)
    write_jsonl(DATA / "text_held_out.jsonl", rows[:300])
    write_jsonl(DATA / "text.jsonl", rows[300:])
    write_jsonl(DATA / "text_undefined.jsonl", [row for row in rows[300:] if row.get("task") != "define"])
    short = [e for e in examples if len(e) <= 60]
    words = sorted({word for _, word, *_ in entries if word.islower() and good_word(word) and " " not in word})
    spoken = [word for text in prompts for word in plain(text).split()]
    words += spoken * (len(words) // len(spoken))  # half of them as often as the studio voice says them
    write_jsonl(DATA / "copy.jsonl", copy_rows(rng, short, words, 40000))
    write_jsonl(DATA / "copy_pieces.jsonl", copy_piece_rows(rng, short, words, 50000))


if __name__ == "__main__":
    run_main(main)

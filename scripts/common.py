"""Paths and small helpers that the preparation scripts share. Nothing heavy is imported here."""

from __future__ import annotations

import gzip
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PACKAGES = BUILD / "packages"
DATA = BUILD / "data"
EVAL = DATA / "eval"
ENCODERS = BUILD / "encoders"
TOKENIZER = BUILD / "tokenizer"
SEED = 20261124

TRANSCRIBE_PROMPTS = (
    "Transcribe the audio.",
    "What is said here?",
    "Write down what you hear.",
    "What does the voice say?",
)
DIGIT_SPOKEN_PROMPTS = ("Which digit is spoken?", "What digit do you hear?", "Which number is said?")
LETTER_SPOKEN_PROMPTS = ("Which letter is spoken?", "What letter do you hear?", "Which letter is said?")
DIGIT_PICTURE_PROMPTS = (
    "What digit is this?",
    "Which digit do you see?",
    "Which digit is written here?",
    "What number is this?",
)
NUMBER_PICTURE_PROMPTS = ("Which number is written here?", "What number is this?", "Read the number.")
CLOTHES_PROMPTS = (
    "What is this piece of clothing?",
    "What kind of clothing is this?",
    "What is shown in the picture?",
    "Which garment is this?",
)
PAIR_PROMPTS = (
    "Is this what I say?",
    "Does the picture show what I say?",
    "Is the digit that I say the one in the picture?",
)
CLOTHES = ("t-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ASTERISK = "usr/share/asterisk/sounds/en_US_f_Allison"
ASTERISK_TEXT = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
HELD_OUT_PROMPTS = 60


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(message, flush=True)


def package(name: str) -> Path:
    """The unpacked folder of a package; FileNotFoundError says how to fetch it."""
    folder = PACKAGES / name
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing: run `python scripts/fetch.py {name}` first")
    return folder


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write rows, one JSON object a line; returns their count. The file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    count = 0
    with part.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    part.replace(path)
    say(f"{path.relative_to(ROOT)}: {count} rows, {path.stat().st_size / 1e6:.2f} MB")
    return count


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every row of a JSONL file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def chat_row(
    task: str, answer: str, prompt: str | None = None, images: Iterable[str] = (), audio: Iterable[str] = ()
) -> dict[str, Any]:
    """One training row: a user turn of pictures, clips and an optional question, and the assistant's answer."""
    content: list[dict[str, str]] = [{"type": "image", "path": path} for path in images]
    content += [{"type": "audio", "path": path} for path in audio]
    if prompt is not None:
        content.append({"type": "text", "text": prompt})
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "task": task}


def with_progress(items: list[Any], what: str, every: float = 10.0) -> Iterator[Any]:
    """Yield the items and say every few seconds how many are done."""
    last = time.monotonic()
    for index, item in enumerate(items):
        yield item
        if time.monotonic() - last > every:
            last = time.monotonic()
            say(f"{what}: {index + 1} of {len(items)}")
    say(f"{what}: {len(items)} done")


def asterisk_transcripts() -> dict[str, str]:
    """Clip name -> what is said, for the clips that are speech (bracketed descriptions are dropped)."""
    texts: dict[str, str] = {}
    with gzip.open(package("asterisk-core-sounds-en") / ASTERISK_TEXT, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(";") or ": " not in line:
                continue
            name, text = line.strip().split(": ", 1)
            text = re.sub(r"\[.*?\]|<.*?>|\(.*?\)", "", text)
            if any(character.isalnum() for character in text):
                texts[name] = re.sub(r"\s+", " ", text).strip()
    return texts


def is_phrase(name: str) -> bool:
    """True for a studio prompt that is neither a digit or number, a letter nor a word of the spelling alphabet."""
    return not name.startswith(("digits/", "letters/", "phonetic/", "silence/"))


def asterisk_seconds(name: str) -> float:
    """Length of a studio clip: g722 takes 64 kbit a second."""
    return (package("asterisk-core-sounds-en-g722") / ASTERISK / f"{name}.g722").stat().st_size / 8000


def held_out_prompts(texts: dict[str, str]) -> set[str]:
    """The clip names kept for the test, drawn by seed among phrases of 2 words or more that last up to 12 s.

    A text that two clips share is never drawn.
    """
    counts = Counter(plain(text) for text in texts.values())
    names = sorted(
        name
        for name, text in texts.items()
        if is_phrase(name) and counts[plain(text)] == 1 and " " in plain(text) and asterisk_seconds(name) <= 12
    )
    return set(random.Random(SEED).sample(names, HELD_OUT_PROMPTS))


def train_sentences() -> list[str]:
    """What the studio voice says in the clips for training; no held-out text is among them."""
    texts = asterisk_transcripts()
    held = held_out_prompts(texts)
    return [sentence(text) for name, text in texts.items() if name not in held]


def sentence(text: str) -> str:
    """A transcript as it is spoken: signs as words, a capital in front, a stop behind from two words on."""
    text = text.replace("exclaimation-point", "exclamation point").replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\d+", lambda match: " " + " ".join(DIGIT_WORDS[int(d)] for d in match[0]) + " ", text)
    text = re.sub(r"\s+([.,;:?!])", r"\1", " ".join(text.replace("`", "'").split()))
    text = text[:1].upper() + text[1:]
    return text if " " not in text or text[-1] in ".?!" else text.rstrip(",;:") + "."


def plain(text: str) -> str:
    """Lower case, letters, digits and single spaces only: for comparing texts."""
    return " ".join(re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split())


def wordnet_entries() -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield (part of speech, word, gloss, example sentences) of each WordNet synset."""
    for part in ("noun", "verb", "adj", "adv"):
        path = package("wordnet-base") / "usr/share/wordnet" / f"data.{part}"
        for line in path.read_text(encoding="latin-1").splitlines():
            if line.startswith("  ") or " | " not in line:
                continue
            fields, text = line.split(" | ", 1)
            word = re.sub(r"\([a-z]+\)$", "", fields.split(" ", 5)[4]).replace("_", " ")
            examples = [e.strip() for e in re.findall(r'"([^"]+)"', text)]
            gloss = text.split('; "')[0].split(' "')[0].strip().strip(";").strip()
            if gloss and not gloss.startswith('"'):
                yield part, word, gloss, examples


def run_main(main: Callable[[], None]) -> None:
    """Run main and turn the errors a user can mend into one line."""
    try:
        main()
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")

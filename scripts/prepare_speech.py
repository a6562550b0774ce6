"""Write the speech rows: studio prompts, spoken digits and letters (human), and synthetic sentences.

Run: python scripts/prepare_speech.py     (after scripts/fetch.py; needs ffmpeg on the PATH)
Clips go to build/data/speech/, rows to build/data/{transcribe,synthetic,spoken_digit,spoken_letter}.jsonl and
build/data/eval/.
"""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

from audio_files import (
    FLITE_VOICES,
    HELD_OUT_FLITE,
    RATE,
    Utterance,
    at_speed,
    read_clip,
    studio_clip,
    synthesise_all,
    write_clip,
)
from common import (
    DATA,
    DIGIT_SPOKEN_PROMPTS,
    DIGIT_WORDS,
    EVAL,
    LETTER_SPOKEN_PROMPTS,
    SEED,
    TRANSCRIBE_PROMPTS,
    asterisk_seconds,
    asterisk_transcripts,
    chat_row,
    held_out_prompts,
    package,
    plain,
    run_main,
    sentence,
    with_progress,
    wordnet_entries,
    write_jsonl,
)

Row = dict[str, Any]
LONGEST = 16.0
"""Studio clips longer than this many seconds are left out of training."""
PHRASE_SPEEDS = (100, 93, 107)
WORD_SPEEDS = (100, 90, 95, 105, 110)
DIGIT_SPEEDS = (100, 88, 91, 94, 97, 103, 106, 109, 112)
JOINED = 500
SYNTHETIC = {"wordnet": 1500, "prompts": 1500}
SOUNDS_NOT_WORDS = ("aw", "th", "ch", "or")


def relative(path: Path) -> str:
    """A media path as a training row holds it."""
    return str(path.relative_to(DATA))


def save_speeds(samples: Any, stem: Path, speeds: tuple[int, ...]) -> list[str]:
    """Write a clip at several speeds; returns the paths for rows."""
    paths = [stem.with_name(f"{stem.name}_{percent}.flac") for percent in speeds]
    for percent, path in zip(speeds, paths, strict=True):
        if not path.exists():
            write_clip(at_speed(samples, percent), path)
    return [relative(path) for path in paths]


def eval_row(task: str, prompt: str, path: str, answer: str, metric: str) -> Row:
    """One row of a held-out file."""
    return {"task": task, "prompt": prompt, "audio": [f"../{path}"], "answers": [answer], "metric": metric}


def studio_rows(rng: random.Random) -> tuple[list[Row], list[Row], list[str]]:
    """The studio voice: training rows, held-out rows, and the texts of the training clips."""
    import numpy as np

    texts = {n: t for n, t in asterisk_transcripts().items() if clip_exists(n)}
    held = held_out_prompts(asterisk_transcripts())
    train: list[Row] = []
    test: list[Row] = []
    short: list[tuple[str, Any]] = []
    for name in with_progress(sorted(texts), "studio clips"):
        text = sentence(texts[name])
        stem = DATA / "speech/studio" / ("test" if name in held else "train") / name.replace("/", "_")
        if name in held:
            held_path = save_speeds(studio_clip(name), stem, (100,))[0]
            test.append(eval_row("studio_prompts", TRANSCRIBE_PROMPTS[0], held_path, text, "wer"))
        elif asterisk_seconds(name) <= LONGEST:
            samples = studio_clip(name)
            for saved in save_speeds(samples, stem, PHRASE_SPEEDS):
                train.append(chat_row("transcribe", text, rng.choice(TRANSCRIBE_PROMPTS), audio=[saved]))
            if len(samples) <= 2.5 * RATE:
                short.append((text.rstrip("."), samples))
    for serial in range(JOINED):
        parts = rng.sample(short, rng.choice([2, 2, 3]))
        path = DATA / f"speech/studio/joined/{serial:04d}.flac"
        write_clip(np.concatenate([samples for _, samples in parts]), path)
        text = sentence(" ".join(text[:1].lower() + text[1:] if len(text) > 1 else text for text, _ in parts))
        train.append(chat_row("transcribe", text, rng.choice(TRANSCRIBE_PROMPTS), audio=[relative(path)]))
    return train, test, [sentence(text) for name, text in texts.items() if name not in held]


def clip_exists(name: str) -> bool:
    """True where the package holds the clip that a transcript names."""
    try:
        return asterisk_seconds(name) > 0
    except FileNotFoundError:
        return False


def klettres(folder: str) -> dict[str, Path]:
    """Lower-case name -> clip of a folder such as "en/alpha"."""
    base = package("klettres-data") / "usr/share/klettres" / folder
    return {path.stem.lower(): path for path in sorted(base.glob("*.ogg"))}


def word_rows(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Single words: one speaker for training, another for the test."""
    train: list[Row] = []
    test: list[Row] = []
    for folder in ("en", "en_GB"):
        for word, source in klettres(f"{folder}/syllab").items():
            if word in SOUNDS_NOT_WORDS:
                continue
            stem = DATA / f"speech/words/{folder}/{word}"
            if folder == "en":
                for path in save_speeds(read_clip(source), stem, WORD_SPEEDS):
                    train.append(chat_row("transcribe", sentence(word), rng.choice(TRANSCRIBE_PROMPTS), audio=[path]))
            else:
                path = save_speeds(read_clip(source), stem, (100,))[0]
                test.append(eval_row("spoken_words", TRANSCRIBE_PROMPTS[0], path, word, "wer"))
    return train, test


def letter_rows(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Letters: the studio voice and an American speaker for training, a British speaker for the test."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    train: list[Row] = []
    clips = [(letter, "studio", studio_clip(f"letters/{letter}")) for letter in alphabet]
    clips.append(("z", "studio_zed", studio_clip("letters/zed")))
    clips += [(letter, "klettres", read_clip(path)) for letter, path in klettres("en/alpha").items()]
    for letter, speaker, samples in clips:
        for path in save_speeds(samples, DATA / f"speech/letters/{speaker}/{letter}", WORD_SPEEDS):
            train.append(chat_row("spoken_letter", letter, rng.choice(LETTER_SPOKEN_PROMPTS), audio=[path]))
    test = []
    for letter, source in klettres("en_GB/alpha").items():
        path = save_speeds(read_clip(source), DATA / f"speech/letters/british/{letter}", (100,))[0]
        test.append(eval_row("spoken_letter", LETTER_SPOKEN_PROMPTS[0], path, letter, "exact"))
    return train, test


def digit_rows(rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Digits: the studio voice and synthetic voices for training, one synthetic voice for the test."""
    train: list[Row] = []
    for digit in range(10):
        stem = DATA / f"speech/digits/studio/{digit}"
        for saved in save_speeds(studio_clip(f"digits/{digit}"), stem, DIGIT_SPEEDS):
            train.append(chat_row("spoken_digit", str(digit), rng.choice(DIGIT_SPOKEN_PROMPTS), audio=[saved]))
    spoken: list[tuple[int, Utterance]] = []
    for digit, word in enumerate(DIGIT_WORDS):
        for voice in FLITE_VOICES:
            for stretch in (0.85, 1.0, 1.2):
                path = DATA / f"speech/digits/{voice}/{digit}_{stretch}.flac"
                spoken.append((digit, (f"flite:{voice}", word, stretch, path)))
    synthesise_all([utterance for _, utterance in spoken], "synthetic digits")
    test: list[Row] = []
    for digit, (voice, _, _, path) in spoken:
        if voice == f"flite:{HELD_OUT_FLITE}":
            test.append(eval_row("spoken_digit", DIGIT_SPOKEN_PROMPTS[0], relative(path), str(digit), "exact"))
        else:
            row = chat_row("spoken_digit", str(digit), rng.choice(DIGIT_SPOKEN_PROMPTS), audio=[relative(path)])
            train.append(row)
    return train, test


def word_walks(texts: list[str], rng: random.Random, count: int) -> list[str]:
    """Sentences of 3 to 9 words that walk through the prompts' own word pairs."""
    pairs: dict[str, list[str]] = {}
    for text in texts:
        words = ["", *plain(text).split(), ""]
        for left, right in zip(words, words[1:], strict=False):
            pairs.setdefault(left, []).append(right)
    walks: set[str] = set()
    while len(walks) < count:
        words = [rng.choice(pairs[""])]
        while words[-1] and len(words) < 11:
            words.append(rng.choice(pairs[words[-1]]))
        if words[-1] == "" and 4 <= len(words) <= 10:
            walks.add(" ".join(words[:-1]))
    return sorted(walks)


def spoken_examples(longest: int) -> list[str]:
    """WordNet's examples of 2 words or more, up to the longest, that a voice reads as they are written; sorted."""
    plainly = re.compile(r"[A-Za-z][a-z' ,]+[a-z.!?]")
    examples = {example for *_, found in wordnet_entries() for example in found if plainly.fullmatch(example)}
    return sorted(example for example in examples if 2 <= len(example.split()) <= longest)


def held_out_prompt_texts() -> set[str]:
    """The plain texts of the held-out studio prompts; no synthetic voice speaks them."""
    transcripts = asterisk_transcripts()
    return {plain(transcripts[name]) for name in held_out_prompts(transcripts)}


def synthetic_rows(texts: list[str], rng: random.Random) -> list[Row]:
    """Sentences of WordNet and of the prompts' vocabulary in four flite voices; no held-out text is among them."""
    held = held_out_prompt_texts()
    chosen = rng.sample(spoken_examples(9), SYNTHETIC["wordnet"]) + word_walks(texts, rng, SYNTHETIC["prompts"])
    chosen = [sentence(text) for text in chosen if plain(text) not in held]
    rng.shuffle(chosen)
    spoken: list[Utterance] = []
    for serial, text in enumerate(chosen):
        path = DATA / f"speech/synthetic/{serial:04d}.flac"
        voice = f"flite:{FLITE_VOICES[serial % len(FLITE_VOICES)]}"
        spoken.append((voice, text, rng.choice([0.9, 1.0, 1.15]), path))
    synthesise_all(spoken, "synthetic sentences")
    return [
        chat_row("transcribe", text, rng.choice(TRANSCRIBE_PROMPTS), audio=[relative(path)])
        for _, text, _, path in spoken
    ]


def main() -> None:
    """Write all speech tasks, the human ones first."""
    rng = random.Random(SEED)
    studio, prompts, texts = studio_rows(rng)
    words, spoken_words = word_rows(rng)
    letters, held_letters = letter_rows(rng)
    digits, held_digits = digit_rows(rng)
    tasks = {"transcribe": studio + words, "spoken_letter": letters, "spoken_digit": digits}
    held = {"studio_prompts": prompts, "spoken_words": spoken_words}
    held |= {"spoken_letter": held_letters, "spoken_digit": held_digits}
    for task, rows in tasks.items():
        rng.shuffle(rows)
        write_jsonl(DATA / f"{task}.jsonl", rows)
    for task, rows in held.items():
        write_jsonl(EVAL / f"{task}.jsonl", rows)
    write_jsonl(DATA / "synthetic.jsonl", synthetic_rows(texts, rng))


if __name__ == "__main__":
    run_main(main)

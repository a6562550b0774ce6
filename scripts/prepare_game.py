"""Write the rows of the voiced adventure game: human speech of many voices, with whole characters held out.

Run: python scripts/prepare_game.py     (after scripts/fetch.py)
Clips go to build/data/speech/game/ as the MP3 files they are, rows to build/data/game.jsonl and
build/data/eval/{game_voices,game_joe,game_scenes}.jsonl.
"""

from __future__ import annotations

import io
import random
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from functools import cache

from common import (
    DATA,
    EVAL,
    SEED,
    TRANSCRIBE_PROMPTS,
    chat_row,
    package,
    plain,
    run_main,
    say,
    sentence,
    train_sentences,
    wordnet_entries,
    write_jsonl,
)
from game_archive import HERO, GameArchive, Line
from prepare_speech import Row, eval_row, relative

ARCHIVE = "usr/share/scummvm/flight-of-the-amazon-queen/queen.1c"
LONGEST = 12.0
"""Clips longer than this many seconds are left out."""
HELD_OUT_CHARACTERS = 7
HELD_OUT_SIZE = range(40, 101)
"""How many clips a character that is held out may have: enough to measure, yet the largest voices stay in training."""
SCENE_SHARE = 0.15
"""Share of the cut-scenes that is held out."""
TRAIN, VOICES, JOE, SCENES = "game", "game_voices", "game_joe", "game_scenes"
HELD_OUT = (VOICES, JOE, SCENES)
NOISES = frozenset(
    "ack aark ahem aroof bleep budda eep glub ha haar har heh hubba hup nya nyah oof oop oot ptooie ruff "
    "squawk sqwawk uck ugga unga ungawa ungh ungha whoop woof".split()
)
"""Laughs, animals, gunfire and grunts, which no two people would spell alike."""
FEWEST_SOURCES = 3
"""A word that is strange to WordNet counts as English where as many of the game's files use it."""


@cache
def game() -> GameArchive:
    """The game's archive."""
    return GameArchive(package("flight-of-the-amazon-queen") / ARCHIVE)


def tidy(text: str, written_small: frozenset[str]) -> str:
    """A line as it is heard: no marks that are silent, one mark at an end, no shouting in capitals.

    Args:
        written_small: words that the game also writes in small letters; others in capitals are taken for letters.
    """

    def unshouted(match: re.Match[str]) -> str:
        return match[0].lower() if match[0].lower() in written_small else match[0]

    text = re.sub(r"\^_|@@|\"", "", text).strip().lstrip(".")
    text = re.sub(r"\b[A-Z][A-Z']+\b", unshouted, text)
    text = re.sub(r"\.{2,}\s*(?=[a-z])", ", ", text)
    text = re.sub(r"\.{2,}\s*", ". ", text)
    return re.sub(r"!*\?[?!]*", "?", re.sub(r"!{2,}", "!", text)).strip()


def is_speech(text: str, known: frozenset[str]) -> bool:
    """False for noises, invented languages and what is not written as it is spoken (digits, signs)."""
    words = plain(text).split()
    strange = [word for word in words if not {word, word.partition("'")[0]} & known]
    written = re.fullmatch(r"[A-Za-z .,:;!?'-]+", text) is not None
    drawn_out = re.search(r"([a-z])\1\1", text.lower()) is not None
    return bool(words) and written and not drawn_out and not NOISES & set(words) and 3 * len(strange) <= len(words)


def known_words(lines: Iterable[Line]) -> frozenset[str]:
    """The words of WordNet's texts, and those that several of the game's files use."""
    sources = defaultdict(set)
    for line in lines:
        for word in plain(line.text).split():
            sources[word].add(line.source)
    shared = {word for word, files in sources.items() if len(files) >= FEWEST_SOURCES}
    texts = (plain(" ".join([word, gloss, *examples])) for _, word, gloss, examples in wordnet_entries())
    return frozenset(shared.union(*(text.split() for text in texts)))


def seconds(line: Line) -> float:
    """Length of a line's clip."""
    import soundfile

    duration: float = soundfile.info(io.BytesIO(game().clip(line))).duration
    return duration


@cache
def spoken_lines() -> list[Line]:
    """The lines that are speech, with their texts as rows hold them."""
    lines = game().lines()
    known = known_words(lines)
    small = frozenset(word for line in lines for word in re.findall(r"\b[a-z][a-z']+\b", line.text))
    heard = (replace(line, text=tidy(line.text, small)) for line in lines)
    speech = [line for line in heard if is_speech(line.text, known) and seconds(line) <= LONGEST]
    return [replace(line, text=sentence(line.text)) for line in speech]


def held_out_characters(lines: list[Line]) -> set[str]:
    """The characters kept for the test with all their dialogues, drawn by seed among those of HELD_OUT_SIZE."""
    counts: dict[str, int] = defaultdict(int)
    for line in lines:
        if line.source.endswith(".DOG") and line.speaker != HERO:
            counts[line.speaker] += 1
    able = sorted(character for character, count in counts.items() if count in HELD_OUT_SIZE)
    return set(random.Random(SEED).sample(able, HELD_OUT_CHARACTERS))


def held_out_scenes(lines: list[Line]) -> set[str]:
    """The cut-scenes kept for the test, drawn by seed."""
    scenes = sorted({line.source for line in lines if line.source.endswith(".CUT")})
    return set(random.Random(SEED).sample(scenes, round(SCENE_SHARE * len(scenes))))


def part_of(line: Line, characters: set[str], scenes: set[str]) -> str:
    """The file that a line goes to, given what is held out."""
    stem, _, kind = line.source.partition(".")
    if kind == "DOG" and stem.rstrip("0123456789") in characters:
        return JOE if line.speaker == HERO else VOICES
    return SCENES if line.source in scenes else TRAIN


@cache
def split() -> dict[str, list[Line]]:
    """File name -> its lines. A held-out line whose text the human training clips have too is in no file."""
    lines = spoken_lines()
    characters, scenes = held_out_characters(lines), held_out_scenes(lines)
    parts: dict[str, list[Line]] = {TRAIN: [], VOICES: [], JOE: [], SCENES: []}
    for line in lines:
        parts[part_of(line, characters, scenes)].append(line)
    trained = {plain(text) for text in [*(line.text for line in parts[TRAIN]), *train_sentences()]}
    for name in HELD_OUT:
        parts[name] = [line for line in parts[name] if plain(line.text) not in trained]
    return parts


def train_texts() -> list[str]:
    """What is said in the game's training clips, each text once; no held-out text is among them."""
    return sorted({line.text for line in split()[TRAIN]})


def held_out_texts() -> set[str]:
    """The plain texts of all held-out lines."""
    return {plain(line.text) for name in HELD_OUT for line in split()[name]}


def save_clip(line: Line) -> str:
    """Write a line's MP3 bytes; returns the path for rows."""
    path = DATA / f"speech/game/{line.clip}.mp3"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(game().clip(line))
    return relative(path)


def test_row(task: str, line: Line) -> Row:
    """One row of a held-out file, which also says whose voice it is."""
    return eval_row(task, TRANSCRIBE_PROMPTS[0], save_clip(line), line.text, "wer") | {"voice": line.speaker}


def main() -> None:
    """Write the clips and rows, and say how much they are."""
    rng = random.Random(SEED)
    parts = split()
    say(f"{len(game().clips)} clips, {len(game().lines())} with a text, {len(spoken_lines())} of them speech")
    train = [
        chat_row("transcribe", line.text, rng.choice(TRANSCRIBE_PROMPTS), audio=[save_clip(line)])
        for line in parts[TRAIN]
    ]
    rng.shuffle(train)
    write_jsonl(DATA / f"{TRAIN}.jsonl", train)
    for name in HELD_OUT:
        write_jsonl(EVAL / f"{name}.jsonl", [test_row(name, line) for line in parts[name]])
    for name, part in parts.items():
        speakers = sorted({line.speaker for line in part})
        say(f"{name}: {len(part)} clips, {sum(map(seconds, part)) / 3600:.3f} h, {len(speakers)} speakers or scenes")
    say(f"held-out characters: {', '.join(sorted({line.speaker for line in parts[VOICES]}))}")


if __name__ == "__main__":
    run_main(main)

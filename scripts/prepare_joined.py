"""Write build/data/joined.jsonl: short clips one after the other, until a window of the speech tower is full.

Run: python scripts/prepare_joined.py     (after prepare_speech.py, prepare_game.py and prepare_synthetic.py)
Clips go to build/data/speech/joined/. A window costs the tower the same however much of it is silence, so a tower
that trains hears three times as much of them; and it learns words wherever in a window they stand.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

from audio_files import RATE, at_speed, read_clip, write_clip
from common import DATA, SEED, TRANSCRIBE_PROMPTS, chat_row, read_jsonl, run_main, with_progress, write_jsonl
from prepare_speech import Row, relative

FULL = 7.9
"""Seconds of a joined clip at most: a little less than the window."""
GAPS = (0.15, 0.5)
"""Shortest and longest silence between two clips, in seconds."""
TURNS = {"game": 3, "transcribe": 2, "synthetic": 1, "synthetic_more": 1}
"""File of rows -> how often all of its clips are joined, each time with other neighbours and at other speeds."""
SPEEDS = (90, 95, 100, 105, 110)
"""In percent; a clip takes one of them each time."""
Spoken = tuple[str, str, float, int]
"""Path of a clip, what it says, its length in seconds at the speed, and that speed."""


def spoken(rows: list[Row], rng: random.Random) -> list[Spoken]:
    """The clips of rows that fit into a window, each at a drawn speed."""
    import soundfile

    clips = []
    for row in rows:
        path = next(part["path"] for part in row["messages"][0]["content"] if part["type"] == "audio")
        speed = rng.choice(SPEEDS)
        seconds = soundfile.info(DATA / path).duration * 100 / speed
        if seconds <= FULL:
            clips.append((path, row["messages"][1]["content"], seconds, speed))
    return clips


def windows(clips: list[Spoken], rng: random.Random) -> Iterator[tuple[list[Spoken], list[float]]]:
    """All clips in a drawn order, as many at a time as fit, and the silences (seconds) between them."""
    clips = rng.sample(clips, len(clips))
    window: list[Spoken] = []
    gaps: list[float] = []
    for clip in clips:
        gap = rng.uniform(*GAPS)
        if window and sum(each[2] for each in window) + sum(gaps) + gap + clip[2] > FULL:
            yield window, gaps
            window, gaps = [], []
        if window:
            gaps.append(gap)
        window.append(clip)
    yield window, gaps


def join(window: list[Spoken], gaps: list[float]) -> Path:
    """Write clips with silences between them as one; named by what it holds."""
    import numpy as np

    name = hashlib.sha256(repr((window, gaps)).encode()).hexdigest()[:16]
    path = DATA / f"speech/joined/{name}.flac"
    if not path.exists():
        parts = []
        for (clip, *_, speed), gap in zip(window, [0.0, *gaps], strict=True):
            parts += [np.zeros(round(gap * RATE), dtype=np.float32), at_speed(read_clip(DATA / clip), speed)]
        write_clip(np.concatenate(parts), path)
    return path


def main() -> None:
    """Join the clips of each file and write the rows."""
    rng = random.Random(SEED)
    drawn = [
        each
        for name, turns in TURNS.items()
        for _ in range(turns)
        for each in windows(spoken(read_jsonl(DATA / f"{name}.jsonl"), rng), rng)
    ]
    rows = []
    for window, gaps in with_progress(drawn, "joined clips"):
        text = " ".join(said for _, said, *_ in window)
        path = relative(join(window, gaps))
        rows.append(chat_row("transcribe", text, rng.choice(TRANSCRIBE_PROMPTS), audio=[path]))
    rng.shuffle(rows)
    write_jsonl(DATA / "joined.jsonl", rows)


if __name__ == "__main__":
    run_main(main)

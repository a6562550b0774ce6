"""Clips joined to full windows: each once, none cut, with silence between them."""

import random
from pathlib import Path

import numpy as np
import prepare_joined
import pytest
from audio_files import RATE, read_clip, write_clip
from prepare_joined import FULL, GAPS, join, windows


def test_each_clip_is_in_one_window_and_no_window_is_too_long() -> None:
    rng = random.Random(0)
    clips = [(f"{index}.flac", f"Text {index}.", rng.uniform(0.4, 7.8), 100) for index in range(300)]
    drawn = list(windows(clips, random.Random(1)))
    assert sorted(clip for window, _ in drawn for clip in window) == sorted(clips)
    for window, gaps in drawn:
        assert len(gaps) == len(window) - 1 and all(GAPS[0] <= gap <= GAPS[1] for gap in gaps)
        assert sum(clip[2] for clip in window) + sum(gaps) <= FULL
    assert np.mean([sum(clip[2] for clip in window) for window, _ in drawn]) > FULL / 2
    assert [window for window, _ in windows(clips, random.Random(2))] != [window for window, _ in drawn]


def test_a_window_is_its_clips_at_their_speeds_with_silences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_joined, "DATA", tmp_path)
    write_clip(np.full(RATE, 0.5, np.float32), tmp_path / "one.flac")
    write_clip(np.full(RATE // 2, -0.25, np.float32), tmp_path / "two.flac")
    path = join([("one.flac", "One.", 1.0, 100), ("two.flac", "Two.", 1.0, 50)], [0.25])
    samples = read_clip(path)
    assert len(samples) == pytest.approx(2.25 * RATE, abs=2)
    assert samples[: RATE - 200] == pytest.approx(0.5, abs=1e-3)
    assert samples[RATE + 10 : int(1.24 * RATE)] == pytest.approx(0)
    assert samples[int(1.3 * RATE) : int(2.2 * RATE)] == pytest.approx(-0.25, abs=1e-2)

"""The synthetic voices: which exist, who takes turns, and that a clip is made once."""

import random
from collections import Counter
from pathlib import Path

import audio_files
import numpy as np
import pytest
from audio_files import asking_voices, held_out_voices, synthesise, training_voices
from prepare_synthetic import utterances


def test_no_held_out_voice_is_trained() -> None:
    trained = [voice for voices in training_voices().values() for voice in voices]
    held = held_out_voices()
    assert len(set(trained)) == len(trained) and len(set(held)) == len(held)
    assert not set(trained) & set(held)
    variants = [{voice.partition("+")[2] for voice in voices if "+" in voice} for voices in (trained, held)]
    assert not variants[0] & variants[1] and len(variants[0]) == len(variants[1])
    accents = [{voice.partition("+")[0] for voice in voices if "+" in voice} for voices in (trained, held)]
    assert accents[0] == accents[1], "only the variants differ, so a test measures them alone"


def test_more_voices_ask_and_no_held_out_one_does() -> None:
    asking = asking_voices()
    assert not set(asking) & set(held_out_voices())
    assert all(set(voices) <= set(asking) for voices in training_voices().values())
    assert Counter(voice.partition(":")[0] for voice in asking) == {"espeak": 64, "flite": 32, "hibari": 32}


def test_engines_take_turns_and_their_voices_too() -> None:
    spoken = utterances([f"sentence {index}" for index in range(96)], random.Random(0))
    counts = Counter(voice for voice, *_ in spoken)
    for voices in training_voices().values():
        shares = [counts[voice] for voice in voices]
        assert sum(shares) == 32 and max(shares) - min(shares) <= 1
    assert len({path for *_, path in spoken}) == len(spoken)


def test_a_clip_is_spoken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def tone(voice: str, text: str, stretch: float) -> np.ndarray:
        asked.append((voice, text, stretch))
        return np.full(1600, 0.5, np.float32)

    monkeypatch.setattr(audio_files, "ENGINES", {"tone": tone})
    path = tmp_path / "made/clip.flac"
    for _ in range(2):
        synthesise(("tone:a+b", "Hello.", 1.15, path))
    assert asked == [("a+b", "Hello.", 1.15)]
    assert audio_files.read_clip(path) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("voice", ["slt", "festival:slt", "flite:"])
def test_a_voice_of_no_engine_is_refused(tmp_path: Path, voice: str) -> None:
    with pytest.raises(ValueError, match=f"voice '{voice}': expected ENGINE:NAME .* flite, espeak, hibari"):
        synthesise((voice, "Hello.", 1.0, tmp_path / "clip.flac"))

"""Reading, changing, synthesising and writing speech clips (16 kHz mono) for the preparation scripts."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from common import ASTERISK, package, with_progress

if TYPE_CHECKING:
    import numpy as np

RATE = 16000
VOICES = ("kal16", "awb", "rms", "slt")
Utterance = tuple[str, str, float, Path]
"""Voice, text, stretch of its length, and the flac file to write."""


def decode_g722(path: Path) -> np.ndarray:
    """A raw g722 file as float32 [samples] at 16 kHz; RuntimeError where ffmpeg is missing or fails."""
    import numpy as np

    if shutil.which("ffmpeg") is None:
        raise RuntimeError("g722 clips need `ffmpeg` on the PATH (apt-get install ffmpeg)")
    command = ["ffmpeg", "-v", "error", "-nostdin", "-threads", "1", "-f", "g722", "-i", str(path), "-f", "f32le"]
    done = subprocess.run([*command, "-ac", "1", "-ar", str(RATE), "-"], capture_output=True)
    if done.returncode or not done.stdout:
        raise RuntimeError(f"ffmpeg could not decode {path}: {done.stderr.decode().strip()}")
    return np.frombuffer(done.stdout, dtype="<f4").astype(np.float32)


def studio_clip(name: str) -> np.ndarray:
    """A clip of the studio voice, float32 [samples]."""
    return decode_g722(package("asterisk-core-sounds-en-g722") / ASTERISK / f"{name}.g722")


def read_clip(source: Path | io.BytesIO) -> np.ndarray:
    """Any soundfile clip as float32 mono [samples] at 16 kHz."""
    import soundfile

    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return resample(samples.mean(axis=1), rate, RATE)


def resample(samples: np.ndarray, rate: int, target: int) -> np.ndarray:
    """Samples [n] at another rate."""
    import torch
    import torchaudio.functional

    if rate == target:
        return samples
    changed: np.ndarray = torchaudio.functional.resample(torch.from_numpy(samples), rate, target).numpy()
    return changed


def at_speed(samples: np.ndarray, percent: int) -> np.ndarray:
    """Played at percent of the speed; the pitch moves with it."""
    return resample(samples, percent, 100)


def write_clip(samples: np.ndarray, path: Path) -> None:
    """Write 16-bit flac, made quieter where it would clip."""
    import numpy as np
    import soundfile

    path.parent.mkdir(parents=True, exist_ok=True)
    peak = float(np.abs(samples).max())
    soundfile.write(path, samples * (0.98 / peak) if peak > 0.98 else samples, RATE, subtype="PCM_16")


def flite_command() -> tuple[str, dict[str, str]]:
    """The unpacked flite program and the environment in which it finds its libraries."""
    libraries = next((package("libflite1") / "usr/lib").glob("*/libflite.so.1")).parent
    return str(package("flite") / "usr/bin/flite"), {**os.environ, "LD_LIBRARY_PATH": str(libraries)}


def synthesise(utterance: Utterance) -> None:
    """Speak one text with a flite voice; files that are there already stay."""
    voice, text, stretch, path = utterance
    if path.exists():
        return
    program, environment = flite_command()
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = path.with_suffix(".wav")
    command = [program, "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o", str(wav)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or not wav.exists():
        raise RuntimeError(f"flite failed on {text!r}: {done.stderr.strip()}")
    write_clip(read_clip(wav), path)
    wav.unlink()


def synthesise_all(utterances: list[Utterance], what: str) -> None:
    """Speak many texts, two processes at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        for _ in with_progress(list(zip(utterances, pool.map(synthesise, utterances), strict=True)), what):
            pass

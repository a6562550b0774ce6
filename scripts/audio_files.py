"""Reading, changing, synthesising and writing speech clips (16 kHz mono) for the preparation scripts."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from common import ASTERISK, package, with_progress

if TYPE_CHECKING:
    import numpy as np

RATE = 16000
FLITE_VOICES = ("kal16", "awb", "rms", "slt")
HELD_OUT_FLITE = "rms"
"""The flite voice of the spoken tests; see docs/data.md for what training hears of it."""
ESPEAK_ACCENTS = (
    "en-us",
    "en-gb",
    "en-gb-scotland",
    "en-029",
    "en-us-nyc",
    "en-gb-x-rp",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
)
ESPEAK_VARIANTS = ("m3", "Andy", "Lee", "gustave", "f2", "belinda", "Annie", "grandma")
MORE_ESPEAK_VARIANTS = (
    *("f1", "f4", "f5", "m1", "m2", "m5", "m7", "m8", "Alex", "Alicia", "Gene", "Hugo", "Jacky", "Marco"),
    *("Mario", "Michael", "anika", "benjamin", "ed", "grandpa", "linda", "quincy", "steph", "victor"),
)
"""Variants that ask questions of training besides."""
HELD_OUT_VARIANTS = ("m4", "boris", "pablo", "Denis", "f3", "Andrea", "shelby", "aunty")
"""espeak-ng variants that no training clip uses: for the tests of spoken questions."""
Utterance = tuple[str, str, float, Path]
"""Voice as ENGINE:NAME ("flite:slt", "espeak:en-us+f3", "hibari:heart"), text, stretch of its length, flac file."""
ESPEAK_SPEED = 160
"""Words a minute where nothing is stretched."""
HIBARI_LOCK = Lock()
"""hibari speaks inside this process; it does not say that two threads may share it."""
WORKERS = 2
"""Synthesisers that run at a time."""


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


def run_program(command: list[str], libraries: list[str], text: str) -> np.ndarray:
    """Run a synthesiser from its unpacked package and read the wav file that its command's last option names.

    Args:
        command: the program and its options, the file's name left out.
        libraries: the packages that hold the shared libraries it needs.
        text: what it reads from its standard input.
    """
    folders = [str(folder) for name in libraries for folder in (package(name) / "usr/lib").glob("*-linux-*")]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(folders)}
    with tempfile.TemporaryDirectory() as temporary:
        wav = Path(temporary) / "speech.wav"
        done = subprocess.run([*command, str(wav)], env=environment, input=text, capture_output=True, text=True)
        if done.returncode or not wav.exists():
            raise RuntimeError(f"{Path(command[0]).name} failed on {text!r}: {done.stderr.strip()}")
        return read_clip(wav)


def espeak_voices(variants: tuple[str, ...]) -> list[str]:
    """Each variant in two accents; every eight variants go through all accents twice."""
    half = len(ESPEAK_ACCENTS) // 2
    pairs = [
        (ESPEAK_ACCENTS[(index + turn) % len(ESPEAK_ACCENTS)], variant)
        for turn in (0, half)
        for index, variant in enumerate(variants)
    ]
    return [f"espeak:{accent}+{variant}" for accent, variant in pairs]


def training_voices() -> dict[str, list[str]]:
    """Engine -> the voices that training may hear."""
    return {
        "flite": [f"flite:{voice}" for voice in FLITE_VOICES if voice != HELD_OUT_FLITE],
        "espeak": espeak_voices(ESPEAK_VARIANTS),
        "hibari": ["hibari:heart"],
    }


def asking_voices() -> list[str]:
    """The voices that ask questions of training, in turn: half of the turns are espeak-ng's, of 32 variants."""
    voices = training_voices()
    flite, hibari = itertools.cycle(voices["flite"]), itertools.cycle(voices["hibari"])
    many = espeak_voices((*ESPEAK_VARIANTS, *MORE_ESPEAK_VARIANTS))
    return [voice for turn, each in enumerate(many) for voice in (each, next(hibari if turn % 2 else flite))]


def held_out_voices() -> list[str]:
    """The voices kept for tests of spoken questions."""
    return [f"flite:{HELD_OUT_FLITE}", *espeak_voices(HELD_OUT_VARIANTS)]


def flite(voice: str, text: str, stretch: float) -> np.ndarray:
    """Speak with a flite voice."""
    program = str(package("flite") / "usr/bin/flite")
    command = [program, "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", text, "-o"]
    return run_program(command, ["libflite1"], text)


def espeak(voice: str, text: str, stretch: float) -> np.ndarray:
    """Speak with an espeak-ng voice: an accent, or an accent and a variant ("en-us+f3")."""
    program = str(package("espeak-ng") / "usr/bin/espeak-ng")
    (data,) = (package("espeak-ng-data") / "usr/lib").glob("*/espeak-ng-data")
    command = [
        program,
        f"--path={data.parent}",
        "-v",
        voice,
        "-s",
        str(round(ESPEAK_SPEED / stretch)),
        "--stdin",
        "-w",
    ]
    return run_program(command, ["libespeak-ng1", "libsonic0", "libpcaudio0"], text)


def hibari(voice: str, text: str, stretch: float) -> np.ndarray:
    """Speak with the hibari voice that its package holds."""
    with HIBARI_LOCK:
        model = load_hibari(voice)
        return resample(model(text, speed=1 / stretch, seed=0), model.sample_rate, RATE)


@cache
def load_hibari(voice: str) -> Any:
    """The hibari model of a voice, from the unpacked package; RuntimeError where onnxruntime is missing."""
    if find_spec("onnxruntime") is None:
        raise RuntimeError("hibari voices need onnxruntime (pip install -c constraints.txt onnxruntime)")
    sys.path.insert(0, str(package("hibari-tts")))
    from hibari import Hibari

    return Hibari(voice=voice)


ENGINES = {"flite": flite, "espeak": espeak, "hibari": hibari}


def clip_name(voice: str, text: str, stretch: float) -> str:
    """Of what it says and how, so that a clip of another run is never taken for this one."""
    return hashlib.sha256(f"{voice} {stretch} {text}".encode()).hexdigest()[:16] + ".flac"


def synthesise(utterance: Utterance) -> None:
    """Speak one text; files that are there already stay. ValueError for a voice of no known engine."""
    voice, text, stretch, path = utterance
    engine, _, name = voice.partition(":")
    if engine not in ENGINES or not name:
        raise ValueError(f"voice {voice!r}: expected ENGINE:NAME with one of the engines {', '.join(ENGINES)}")
    if not path.exists():
        write_clip(ENGINES[engine](name, text, stretch), path)


def synthesise_all(utterances: list[Utterance], what: str) -> None:
    """Speak many texts, WORKERS at a time."""
    with ThreadPoolExecutor(max_workers=WORKERS) as pool:
        for _ in with_progress(list(zip(utterances, pool.map(synthesise, utterances), strict=True)), what):
            pass

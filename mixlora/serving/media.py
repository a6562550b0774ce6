"""Pictures and clips from bytes that a stranger sent: told by their content, measured before they are decoded."""

import base64
import binascii
import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile
from PIL import Image

from mixlora.modeling.audio_processing_mixlora import MOST_CHANNELS, RATE, load_clip
from mixlora.modeling.image_processing_mixlora import load_picture

PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow's other readers are not tried: some start programs, many are old."""
CLIPS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3", "MPEG")
RATES = (8000, 192_000)


class MediaError(ValueError):
    """A picture or clip that is not taken; the message says which and why."""


@dataclass(frozen=True)
class MediaLimits:
    """What one request may bring."""

    bytes: int = 20_000_000
    """Of a file."""
    pixels: int = 25_000_000
    """Of a picture."""
    seconds: float = 60.0
    """Of a clip."""
    items: int = 16
    """Pictures and clips together, of all turns."""
    text: int = 100_000
    """Characters, of all turns."""


def decode_base64(data: str, where: str, limits: MediaLimits) -> bytes:
    """Bytes of base64.

    Raises:
        MediaError: it is none, or too long.
    """
    if len(data) > limits.bytes * 4 // 3 + 4:
        raise MediaError(f"{where}: more than {limits.bytes} bytes")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"{where}: can't be read as base64 ({error})") from error


def read_picture(data: bytes, where: str, limits: MediaLimits) -> Image.Image:
    """A picture in RGB from the bytes of a file.

    Raises:
        MediaError: not one of `PICTURES`, too large, or broken.
    """
    _check_size(data, where, limits)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit follows
            picture = Image.open(io.BytesIO(data), formats=PICTURES)
    except Image.DecompressionBombError as error:
        raise MediaError(f"{where}: more than {limits.pixels} pixels") from error
    except Exception as error:  # decoders raise errors of any kind
        raise MediaError(f"{where}: not a picture ({', '.join(PICTURES)})") from error
    if picture.width * picture.height > limits.pixels:
        raise MediaError(f"{where}: {picture.width} x {picture.height} pixels, at most {limits.pixels} are taken")
    try:
        return load_picture(picture, where)
    except Exception as error:
        raise MediaError(str(error) if isinstance(error, ValueError) else f"{where}: a broken picture") from error


def read_clip(data: bytes, where: str, limits: MediaLimits) -> np.ndarray:
    """A clip, float32 mono at 16 kHz, from the bytes of a file.

    Raises:
        MediaError: not one of `CLIPS`, too long, or broken.
    """
    _check_size(data, where, limits)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels, kind = file.samplerate, file.channels, file.format
            most = int(limits.seconds * rate) + 1
            ok = kind in CLIPS and RATES[0] <= rate <= RATES[1] and channels <= MOST_CHANNELS
            # no more than allowed, whatever the header says
            samples = file.read(most, dtype="float32") if ok else np.zeros(0, np.float32)
    except Exception as error:
        raise MediaError(f"{where}: not a clip (wav, flac, ogg, mp3), or a broken one") from error
    if not ok:
        raise MediaError(f"{where}: {kind} with {channels} channels at {rate} Hz is not taken")
    if len(samples) >= most:
        raise MediaError(f"{where}: longer than {limits.seconds:g} seconds")
    try:
        return load_clip((samples, rate), where=where)
    except ValueError as error:
        raise MediaError(str(error)) from error


def read_medium(data: bytes, where: str, limits: MediaLimits) -> tuple[str, Any]:
    """`("image", picture)` or `("audio", (samples, rate))` from the bytes of a file, whatever it is called.

    Raises:
        MediaError: neither, or not taken.
    """
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    if is_webp or data.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM")):
        return "image", read_picture(data, where, limits)
    return "audio", (read_clip(data, where, limits), RATE)


def _check_size(data: bytes, where: str, limits: MediaLimits) -> None:
    if len(data) > limits.bytes:
        raise MediaError(f"{where}: {len(data)} bytes, at most {limits.bytes} are taken")
    if not data:
        raise MediaError(f"{where}: the file is empty")

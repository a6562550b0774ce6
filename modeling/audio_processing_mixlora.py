"""Clips: whatever a user hands over, as mono at one rate, then log-mel frames."""

import io
import math
import numbers
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin
from transformers.utils import logging

logger = logging.get_logger(__name__)

RATE = 16000
SHORTEST = 400  # samples, 25 ms: one analysis window
MOST_CHANNELS = 8
LOUDEST = 32.0  # float samples beyond this are integers that were not scaled


def load_clip(source: Any, sampling_rate: int | None = None, where: str = "clip") -> np.ndarray:
    """A clip as float32 mono samples at 16 kHz.

    Args:
        source: samples `[n]`, `[n, 2]` or `[2, n]` (int16 or float in -1..1), `(samples, rate)`, the same as
            `{"array", "sampling_rate"}`, a path, or encoded bytes (wav, flac, ogg, mp3).
        sampling_rate: rate of plain samples in Hz; where nobody says it, 16 kHz, with a warning.
        where: how errors call it.

    Raises:
        ValueError: something else, an undecodable, empty or too short clip, NaN or infinity.
    """
    if isinstance(source, dict) and {"array", "sampling_rate"} <= source.keys():
        source = source["array"], source["sampling_rate"]
    if _is_pair(source):
        source, sampling_rate = source
    if isinstance(source, str) and source.split(":", 1)[0].lower() in ("http", "https", "data"):
        raise ValueError(f"{where}: addresses are not fetched; pass a path, bytes or samples")
    if isinstance(source, str | Path | bytes):
        try:
            source, sampling_rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source)
        except Exception as error:  # decoders raise errors of any kind
            raise ValueError(f"{where}: can't be read as audio ({error})") from error
    samples = _mono(_as_array(source, where), where)
    if sampling_rate is None:
        logger.warning_once(
            f"Samples without their rate are taken to be at {RATE} Hz; others would be heard too slow or "
            "too fast. Say it: (samples, rate) or sampling_rate."
        )
    try:
        rate = RATE if sampling_rate is None else int(sampling_rate)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: a sampling rate is a number of Hz, got {sampling_rate!r}") from error
    if rate < 1000:
        raise ValueError(f"{where}: a sampling rate of {rate} Hz is not one of speech")
    if rate != RATE:
        samples = _resample(samples, rate)
    if len(samples) < SHORTEST:
        raise ValueError(f"{where}: {len(samples)} samples at {RATE} Hz are shorter than 25 ms ({SHORTEST})")
    return samples


def _is_pair(source: Any) -> bool:
    """Whether it is `(samples, rate)`."""
    return isinstance(source, tuple) and len(source) == 2 and np.ndim(source[0]) > 0 and np.ndim(source[1]) == 0


def _as_array(source: Any, where: str) -> np.ndarray:
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        return (source.float() if source.is_floating_point() else source).numpy()
    if not isinstance(source, np.ndarray | list | tuple):
        raise ValueError(f"{where}: expected samples, (samples, rate), a path or bytes, got {type(source).__name__}")
    try:
        return np.asarray(source)
    except ValueError as error:
        raise ValueError(f"{where}: the samples are no array ({error})") from error


def _mono(samples: np.ndarray, where: str) -> np.ndarray:
    if samples.size == 0:
        raise ValueError(f"{where}: the clip is empty, its shape is {samples.shape}")
    if samples.ndim == 2 and min(samples.shape) <= MOST_CHANNELS:
        channels = 0 if samples.shape[0] <= samples.shape[1] else 1
    elif samples.ndim == 1:
        channels = None
    else:
        raise ValueError(f"{where}: samples of shape {samples.shape} are not [n], [n, channels] or [channels, n]")
    if samples.dtype in (np.int16, np.int32):
        samples = samples / float(2 ** (8 * samples.dtype.itemsize - 1))
    elif samples.dtype.kind != "f":
        raise ValueError(f"{where}: samples of type {samples.dtype}; expected int16, int32, or float in -1..1")
    elif not np.isfinite(samples).all():
        raise ValueError(f"{where}: NaN or infinity in the samples")
    elif np.abs(samples).max() > LOUDEST:
        raise ValueError(f"{where}: float samples up to {np.abs(samples).max():.0f}; expected -1..1, or pass int16")
    return (samples if channels is None else samples.mean(axis=channels)).astype(np.float32)


def _resample(samples: np.ndarray, rate: int) -> np.ndarray:
    if math.gcd(rate, RATE) < 10:  # the filter of an odd rate would fill gigabytes; 5 Hz more or less can't be heard
        rate = 10 * round(rate / 10)
    return torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE).numpy()


@lru_cache(maxsize=8)
def _mel_filters(frequencies: int, mels: int) -> torch.Tensor:
    """`[mels, frequencies]`."""
    filters = torchaudio.functional.melscale_fbanks(
        frequencies, 0.0, RATE / 2, mels, RATE, norm="slaney", mel_scale="slaney"
    )
    return filters.T


class MixLoraAudioProcessor(FeatureExtractionMixin):
    """Whisper's log-mel frames, 10 ms each (arXiv 2212.04356, section 2.2), of windows of any length.

    Args:
        window_frames: frames of the tower's window; a clip is padded with silence to a multiple of it before the mel
            spectrum is taken, so that its features never depend on a neighbour in the batch.
        feature_size: mel bins.
    """

    model_input_names = ["input_features", "input_features_mask"]

    def __init__(
        self, window_frames: int = 800, feature_size: int = 80, n_fft: int = 400, hop_length: int = 160, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.window_frames, self.feature_size = window_frames, feature_size
        self.n_fft, self.hop_length, self.sampling_rate = n_fft, hop_length, RATE

    def __call__(
        self, audio: Any, sampling_rate: int | None = None, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """`input_features` `[clips, frames, mels]`, `input_features_mask` `[clips, frames]`, 1 at real frames.

        `sampling_rate` is that of clips that are samples alone; those of any other rate than 16 kHz are resampled.
        """
        is_clip = isinstance(audio, np.ndarray | torch.Tensor | str | Path | bytes | dict) or _is_pair(audio)
        audio = [audio] if is_clip or (len(audio) and isinstance(audio[0], numbers.Real)) else audio
        if not audio:
            raise ValueError("audio: at least one clip is needed")
        clips = [load_clip(clip, sampling_rate, f"clip {i}") for i, clip in enumerate(audio)]
        mels = [self.log_mel(clip) for clip in clips]
        frames = max(len(mel) for mel in mels)
        features = torch.stack([torch.nn.functional.pad(mel, (0, 0, 0, frames - len(mel))) for mel in mels])
        real = torch.tensor([self.real_frames(len(clip)) for clip in clips])
        mask = (torch.arange(frames) < real[:, None]).long()
        return BatchFeature({"input_features": features, "input_features_mask": mask}, tensor_type=return_tensors)

    def real_frames(self, samples: int) -> int:
        """Mel frames of a clip of `samples` that are not padding."""
        return -(-samples // self.hop_length)

    def log_mel(self, clip: np.ndarray) -> torch.Tensor:
        """`[frames, mels]` of a clip `[samples]` at 16 kHz, frames a multiple of the window."""
        samples = torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))
        samples = torch.nn.functional.pad(samples, (0, -len(samples) % (self.window_frames * self.hop_length)))
        window = torch.hann_window(self.n_fft)
        spectrum = torch.stft(samples, self.n_fft, self.hop_length, window=window, return_complex=True)
        power = spectrum[:, :-1].abs() ** 2
        log = (_mel_filters(len(power), self.feature_size) @ power).clamp(min=1e-10).log10()
        log = torch.maximum(log, log.max() - 8.0)
        return ((log + 4.0) / 4.0).T.contiguous()

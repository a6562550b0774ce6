"""Clips: whatever a user hands over, as mono at one rate, then log-mel frames."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torchaudio
from transformers.feature_extraction_utils import BatchFeature, FeatureExtractionMixin

RATE = 16000
SHORTEST = 400  # samples, 25 ms: one analysis window


def load_clip(source: Any, sampling_rate: int | None = None, where: str = "clip") -> np.ndarray:
    """A clip as float32 mono samples at 16 kHz.

    Args:
        source: samples `[n]`, `[n, 2]` or `[2, n]` (int16 or float in -1..1), `(samples, rate)`, a path, or encoded
            bytes (wav, flac, ogg, mp3).
        sampling_rate: rate of plain samples; 16 kHz where it is not given.
        where: how errors call it.

    Raises:
        ValueError: something else, an undecodable, empty or too short clip, NaN or infinity.
    """
    if isinstance(source, tuple) and len(source) == 2 and np.ndim(source[1]) == 0:
        source, sampling_rate = source
    if isinstance(source, str | Path | bytes):
        if isinstance(source, str) and source.split(":", 1)[0].lower() in ("http", "https", "data"):
            raise ValueError(f"{where}: addresses are not fetched; pass a path, bytes or samples")
        try:
            source, sampling_rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{where}: can't be read as audio ({error})") from error
    if not isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        raise ValueError(f"{where}: expected samples, (samples, rate), a path or bytes, got {type(source).__name__}")
    samples = _mono(np.asarray(source), where)
    rate = RATE if sampling_rate is None else int(sampling_rate)
    if rate < 1000:
        raise ValueError(f"{where}: a sampling rate of {rate} Hz is not one of speech")
    if rate != RATE:
        samples = torchaudio.functional.resample(torch.from_numpy(samples), rate, RATE).numpy()
    if len(samples) < SHORTEST:
        raise ValueError(f"{where}: {len(samples)} samples at {RATE} Hz are shorter than 25 ms ({SHORTEST})")
    return samples


def _mono(samples: np.ndarray, where: str) -> np.ndarray:
    if samples.dtype.kind == "i":
        samples = samples / float(2 ** (8 * samples.dtype.itemsize - 1))
    elif samples.dtype.kind != "f":
        raise ValueError(f"{where}: samples of type {samples.dtype} are neither signed integers nor floats")
    if samples.ndim == 2 and min(samples.shape) <= 8:
        samples = samples.mean(axis=0 if samples.shape[0] <= samples.shape[1] else 1)
    if samples.ndim != 1:
        raise ValueError(f"{where}: samples of shape {samples.shape} are neither [n] nor [n, channels]")
    if not np.isfinite(samples).all():
        raise ValueError(f"{where}: NaN or infinity in the samples")
    return samples.astype(np.float32)


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
        """`input_features` `[clips, frames, mels]`, `input_features_mask` `[clips, frames]`, 1 at real frames."""
        single = isinstance(audio, np.ndarray | torch.Tensor | str | Path | bytes) or (
            isinstance(audio, tuple) and len(audio) == 2 and np.ndim(audio[1]) == 0
        )
        clips = [load_clip(c, sampling_rate, f"clip {i}") for i, c in enumerate([audio] if single else audio)]
        mels = [self.log_mel(clip) for clip in clips]
        frames = max(len(mel) for mel in mels)
        features = torch.stack([torch.nn.functional.pad(mel, (0, 0, 0, frames - len(mel))) for mel in mels])
        real = torch.tensor([-(-len(clip) // self.hop_length) for clip in clips])
        mask = (torch.arange(frames) < real[:, None]).long()
        return BatchFeature({"input_features": features, "input_features_mask": mask}, tensor_type=return_tensors)

    def log_mel(self, clip: np.ndarray) -> torch.Tensor:
        """`[frames, mels]` of a clip `[samples]` at 16 kHz, frames a multiple of the window."""
        samples = torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))
        samples = torch.nn.functional.pad(samples, (0, -len(samples) % (self.window_frames * self.hop_length)))
        window = torch.hann_window(self.n_fft)
        spectrum = torch.stft(samples, self.n_fft, self.hop_length, window=window, return_complex=True)
        power = spectrum[:, :-1].abs() ** 2
        filters = torchaudio.functional.melscale_fbanks(
            self.n_fft // 2 + 1, 0.0, RATE / 2, self.feature_size, RATE, norm="slaney", mel_scale="slaney"
        )
        log = (filters.T @ power).clamp(min=1e-10).log10()
        log = torch.maximum(log, log.max() - 8.0)
        return ((log + 4.0) / 4.0).T.contiguous()

"""Phi-4-Multimodal's clips: log-mel frames of 25 ms every 10 ms, as Kaldi takes them."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers.audio_utils import mel_filter_bank

from .audio_processing_mixlora import RATE, MixLoraAudioProcessor

FULL_SCALE = 32768  # the frames are those of 16-bit samples


@lru_cache(maxsize=8)
def _mel_filters(frequencies: int, mels: int, lowest: float, highest: float) -> torch.Tensor:
    """`[frequencies, mels]`: triangles on Kaldi's mel scale."""
    filters = mel_filter_bank(
        frequencies, mels, lowest, highest, RATE, mel_scale="kaldi", triangularize_in_mel_space=True
    )
    return torch.from_numpy(filters).float()


class Phi4AudioProcessor(MixLoraAudioProcessor):
    """Log-mel frames of a clip of any length, taken clip by clip, so that a neighbour in the batch changes nothing.

    A frame exists where its whole window lies in the clip: `n` samples give `(n - win_length) // hop_length + 1`.

    Args:
        feature_size: mel bins.
        win_length, hop_length: samples of a window, and from one to the next.
        n_fft: points of the Fourier transform.
        preemphasis: how much of the sample before is taken off each sample, within a window.
        mel_min_frequency, mel_max_frequency: Hz.
        audio_compression_rate: frames that the speech tower makes one.
        audio_downsample_rate: of those, how many the projector joins into a token.

    Raises:
        ValueError: a sampling rate other than 16 kHz, or `audio_feat_stride` other than 1.
    """

    def __init__(
        self,
        feature_size: int = 80,
        n_fft: int = 512,
        win_length: int = 400,
        hop_length: int = 160,
        preemphasis: float = 0.97,
        mel_min_frequency: float = 0,
        mel_max_frequency: float = 7690,
        audio_compression_rate: int = 8,
        audio_downsample_rate: int = 1,
        **kwargs: Any,
    ):
        for name, wanted in (("sampling_rate", RATE), ("audio_feat_stride", 1), ("window_frames", 1)):
            if (given := kwargs.pop(name, wanted)) != wanted:
                raise ValueError(f"{name} is {given}, only {wanted} is supported")
        super().__init__(window_frames=1, feature_size=feature_size, n_fft=n_fft, hop_length=hop_length, **kwargs)
        self.win_length, self.preemphasis = win_length, preemphasis
        self.mel_min_frequency, self.mel_max_frequency = mel_min_frequency, mel_max_frequency
        self.audio_compression_rate, self.audio_downsample_rate = audio_compression_rate, audio_downsample_rate

    def real_frames(self, samples: int) -> int:
        """Mel frames of a clip of `samples`."""
        return (samples - self.win_length) // self.hop_length + 1

    def log_mel(self, clip: np.ndarray) -> torch.Tensor:
        """`[frames, mels]` of a clip `[samples]` at 16 kHz."""
        samples = torch.from_numpy(np.ascontiguousarray(clip, dtype=np.float32))
        frames = samples.unfold(0, self.win_length, self.hop_length)
        before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
        frames = (frames - self.preemphasis * before) * FULL_SCALE
        window = torch.hamming_window(self.win_length, periodic=False, dtype=torch.float64)
        power = torch.fft.rfft(frames * window, n=self.n_fft).to(torch.complex64).abs() ** 2
        filters = _mel_filters(power.shape[1], self.feature_size, self.mel_min_frequency, self.mel_max_frequency)
        return (power @ filters).clamp(min=1.0).log()

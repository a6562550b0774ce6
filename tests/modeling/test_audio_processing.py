"""Clips that are easily misread: scales, rates, channels; and the mask of what is real."""

import logging

import numpy as np
import pytest
import torch

from mixlora.modeling import audio_processing_mixlora
from mixlora.modeling.audio_processing_mixlora import MixLoraAudioProcessor, load_clip

TONE = (np.sin(np.arange(4000) / 7) * 0.3).astype(np.float32)


def test_integers_are_scaled_by_their_range():
    for kind in (np.int16, np.int32):
        full = -np.iinfo(kind).min
        samples = load_clip((TONE * full).astype(kind), 16000)
        assert samples.dtype == np.float32 and np.abs(samples - TONE).max() < 1e-4
    assert load_clip(np.full(400, -32768, dtype=np.int16), 16000).tolist() == [-1.0] * 400


def test_channels_are_averaged():
    both = np.stack([TONE, -TONE / 2])
    for source in (both, both.T, torch.from_numpy(both), (both.T, 16000)):
        assert np.allclose(load_clip(source, 16000), TONE / 4, atol=1e-6)


def test_lists_and_tensors_of_samples():
    for source in (TONE.tolist(), tuple(TONE.tolist()), torch.from_numpy(TONE).double().requires_grad_()):
        assert np.allclose(load_clip(source, 16000), TONE, atol=1e-6)
    assert MixLoraAudioProcessor(window_frames=40)(TONE.tolist(), 16000)["input_features"].shape == (1, 40, 80)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 44101, 48000])
def test_a_tone_keeps_its_pitch_at_any_rate(rate):
    seconds = np.arange(rate) / rate
    samples = load_clip((np.sin(2 * np.pi * 500 * seconds).astype(np.float32), rate))
    spectrum = np.abs(np.fft.rfft(samples[:15000] * np.hanning(15000)))
    assert abs(len(samples) - 16000) < 10
    assert abs(spectrum.argmax() * 16000 / 15000 - 500) < 2


@pytest.mark.parametrize(
    "source, message",
    [
        (np.zeros(0), "empty"),
        (np.zeros((0, 2)), "empty"),
        (np.zeros(399), "399 samples .* shorter than 25 ms"),
        (np.where(np.arange(500) == 7, np.inf, 0.0), "NaN or infinity"),
        (np.zeros((100, 100)), "shape"),
        (np.zeros((2, 500, 2)), "shape"),
        (np.zeros(500, dtype=np.int64), "int64; expected int16"),
        (np.zeros(500, dtype=np.uint8), "uint8; expected int16"),
        (TONE * 32768, "or pass int16"),
        (["a"] * 500, "expected int16"),
        ([[1.0], [1.0, 2.0]], "no array"),
        ((TONE, 0), "0 Hz"),
        ((TONE, "16k"), "a number of Hz, got '16k'"),
        ((TONE, float("nan")), "a number of Hz, got nan"),
        (b"RIFF", "can't be read"),
        ("no/such/file.wav", "can't be read"),
        ("http://example.org/a.wav", "not fetched"),
        (3, "got int"),
    ],
)
def test_bad_clips_are_refused_by_name(source, message):
    with pytest.raises(ValueError, match=f"row 1, clip 0: .*{message}"):
        load_clip(source, 16000, "row 1, clip 0")


def test_no_clips_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        MixLoraAudioProcessor()([])


@pytest.mark.parametrize("samples, frames", [(400, 3), (1600, 10), (1601, 11), (6400, 40), (6401, 41)])
def test_the_mask_counts_started_frames(samples, frames):
    batch = MixLoraAudioProcessor(window_frames=40)(np.full(samples, 0.1), 16000)
    assert batch["input_features_mask"].sum() == frames
    assert batch["input_features"].shape == (1, 40 * -(-frames // 40), 80)


def test_save_and_reload(tmp_path):
    MixLoraAudioProcessor(window_frames=40, feature_size=8).save_pretrained(tmp_path)
    again = MixLoraAudioProcessor.from_pretrained(tmp_path)
    assert again.window_frames == 40 and again(TONE, 16000)["input_features"].shape == (1, 40, 8)


def test_samples_without_their_rate_are_at_16_khz_and_a_warning_says_so(caplog, monkeypatch):
    """Nobody can tell from samples alone; a recording at 44.1 kHz would be heard 2.8 times too slow."""
    audio_processing_mixlora.logger.warning_once.cache_clear()
    monkeypatch.setattr(audio_processing_mixlora.logger, "propagate", True)
    for parent in ("mixlora", "transformers"):
        monkeypatch.setattr(logging.getLogger(parent), "propagate", True)
    for source in (TONE, TONE.tolist(), torch.from_numpy(TONE), (TONE * 32768).astype(np.int16)):
        assert len(load_clip(source)) == len(TONE)
    assert caplog.text.count("Samples without their rate") == 1
    for source in ((TONE, 44100), {"array": TONE, "sampling_rate": 44100}):
        assert len(load_clip(source)) == len(load_clip(TONE, 44100)) == 1452

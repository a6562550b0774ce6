"""What is done to cached features on their way into a batch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor, default_checkpoint
from mixlora.modeling.audio_processing_mixlora import RATE
from mixlora.training.data.augment import Augmenter
from mixlora.training.data.items import View
from mixlora.training.data.media import LONGEST_SPAN, Media, mask_spans
from mixlora.training.data.settings import Augment


@pytest.fixture(scope="module")
def model() -> Any:
    return MixLoraForConditionalGeneration.from_pretrained(default_checkpoint())


@pytest.fixture(scope="module")
def processor() -> Any:
    return MixLoraProcessor.from_pretrained(default_checkpoint())


def test_masked_spans_are_zero_and_the_rest_is_untouched() -> None:
    torch.manual_seed(0)
    features = torch.randn(4000, 3)
    before = features.clone()
    masked = mask_spans(features, 0.1)
    zero = (masked == 0).all(-1)
    assert torch.equal(features, before)  # the cache's tensor is not written to
    assert torch.equal(masked[~zero], features[~zero])
    assert 0.05 < zero.float().mean() < 0.13


def test_a_short_clip_is_masked_in_proportion() -> None:
    torch.manual_seed(0)
    hidden = [(mask_spans(torch.ones(20, 1), 0.1) == 0).sum().item() for _ in range(500)]
    assert 0.5 < sum(hidden) / 500 < 2.5 and max(hidden) <= LONGEST_SPAN


def test_a_tower_that_trains_hears_masked_clips(model: Any, processor: Any) -> None:
    rng = np.random.default_rng(0)
    clips = [(rng.standard_normal(n) * 0.1).astype(np.float32) for n in (40_000, 9_000)]
    plain = Media(model, processor).inputs([], clips)
    media = Media(model, processor, mask_time=0.2, mask_bands=0.1)
    masked, again, other = (media.inputs([], clips, [draw, draw + 1]) for draw in (7, 7, 9))
    heard, whole, real = masked["input_features"], plain["input_features"], plain["input_features_mask"].bool()
    hidden = (heard == 0) & (whole != 0)
    assert torch.equal(heard[~hidden], whole[~hidden]) and not hidden[~real].any()
    for clip, length in zip(hidden, real.sum(-1).tolist(), strict=True):
        frames, bands = clip[:length].all(1), clip[:length].all(0)
        assert frames.any() and bands.any() and (clip[:length] == (frames[:, None] | bands)).all()
    assert torch.equal(heard, again["input_features"]) and not torch.equal(heard, other["input_features"])


@pytest.mark.parametrize("seconds", [0.3, 7.99, 8.01])
def test_a_counted_clip_is_not_read_again(
    model: Any, processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    path, media = tmp_path / "clip.wav", Media(model, processor)
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * 11025)), 11025)
    media.augmenter = Augmenter(Augment(views=2, noise=["white"]))
    inputs = media.clips([path])
    (features,) = model.model.encode_speech(inputs["input_features"], inputs["input_features_mask"])
    media.count([], [path])

    def unread(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(media.augmenter, "clip", unread)
    expected = -(-len(features) // model.config.speech_stack)
    assert media.audio_tokens(path) == media.audio_tokens(View(path, 1, "mark")) == expected


def test_speed_changes_how_many_tokens_a_clip_takes(model: Any, processor: Any, tmp_path: Path) -> None:
    path, media = tmp_path / "clip.wav", Media(model, processor)
    soundfile.write(path, np.zeros(4 * RATE), RATE)
    media.augmenter = Augmenter(Augment(views=2, speed=[2.0, 2.0]))
    assert media.audio_tokens(View(path, 1, "mark")) * 2 == media.audio_tokens(path)

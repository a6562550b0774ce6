"""What is done to cached features on their way into a batch."""

import torch

from mixlora.training.data.media import LONGEST_SPAN, mask_spans


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

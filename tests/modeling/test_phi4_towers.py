"""Towers: a picture or clip gives the same features in any company, under every attention backend."""

import pytest
import torch

from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.towers import build_speech_tower, build_vision_tower
from tests.modeling.model_fixtures import make_loud
from tests.modeling.phi4_fixtures import CROP, MELS, native_config, picture, picture_tokens

CLIPS = (61, 8, 200, 1, 4500, 4000, 4001)
FRAMES = [-(-frames // 8) for frames in CLIPS]


def phi4_config(**audio) -> MixLoraConfig:
    config = native_config()
    config.audio_config = type(config.audio_config)(**(config.audio_config.to_dict() | audio))
    return MixLoraConfig.from_dict(config.to_dict())


def loud(tower: torch.nn.Module) -> torch.nn.Module:
    return make_loud(tower).eval()


def pad(clips: list[torch.Tensor], value: float) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(clip) for clip in clips])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True, padding_value=value), mask.long()


@torch.no_grad()
@pytest.mark.parametrize("audio", [{}, {"chunk_size": 9, "left_chunk": 2}], ids=["whole", "chunked"])
def test_a_clip_does_not_depend_on_the_clips_beside_it(audio: dict) -> None:
    """Not on their lengths, nor on what lies behind a clip's end."""
    tower = loud(build_speech_tower(phi4_config(**audio)))
    clips = [torch.randn(frames, MELS) for frames in CLIPS]
    together = tower(*pad(clips, value=7.0))
    assert [len(features) for features in together] == FRAMES
    for clip, found in zip(clips, together, strict=True):
        alone = tower(*pad([clip], 0.0))[0]
        assert (found - alone).abs().max() < 1e-4 * alone.std()


@torch.no_grad()
def test_speech_tower_takes_no_backend_that_drops_the_bias() -> None:
    tower = build_speech_tower(phi4_config())
    for requested in ("flash_attention_2", "flex_attention"):
        assert tower.encoder._check_and_adjust_attn_implementation(requested) == "sdpa"
        assert tower.encoder.get_correct_attn_implementation(requested) == "sdpa"
    assert tower.encoder._check_and_adjust_attn_implementation("eager") == "eager"
    assert tower.encoder.get_correct_attn_implementation("eager") == "eager"


@torch.no_grad()
def test_vision_tower_takes_no_backend_that_leaves_out_patches() -> None:
    """At an odd edge a patch of padding is averaged with real ones, so it must look at the picture as they do."""
    encoder = build_vision_tower(phi4_config()).encoder
    make_loud(encoder)
    for requested in ("flash_attention_2", "flash_attention_3"):
        assert encoder._check_and_adjust_attn_implementation(requested) == "sdpa"
        assert encoder.get_correct_attn_implementation(requested) == "sdpa"
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    mask[:, 3] = False
    features = []
    for name in ("eager", "sdpa"):
        encoder.set_attn_implementation(name)
        features.append(encoder.features(torch.randn(1, 3, 56, 56, generator=torch.manual_seed(0)), mask, [2]))
    assert (features[0] - features[1]).abs().max() < 1e-4 * features[0].std()
    assert features[0][:, 3].std() > 0.1  # they are not zeros


def test_speech_tower_checkpoints_its_layers() -> None:
    """Gradients with checkpointing are those without."""
    model = make_loud(MixLoraForConditionalGeneration(phi4_config())).train()
    clips = pad([torch.randn(61, MELS), torch.randn(30, MELS)], 0.0)
    gradients, calls = [], []
    model.model.speech_tower.encoder.encoders[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.cat(model.model.encode_speech(*clips)).square().mean().backward()
        gradients.append(model.model.speech_tower.encoder.embed.out.weight.grad.clone())
    assert len(calls) == 1 + 2
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_picture_does_not_depend_on_the_pictures_beside_it(implementation: str) -> None:
    """A picture without padding beside one with, and the last patch is seen by the first."""
    config = phi4_config()
    config.vision_config._attn_implementation = implementation
    tower = loud(build_vision_tower(config))
    items = [picture(size, torch.Generator().manual_seed(i)) for i, size in enumerate([(56, 56), (70, 130), (20, 40)])]
    together = tower(
        torch.cat([item["pixels"] for item in items]),
        torch.stack([item["size"] for item in items]),
        torch.cat([item["mask"] for item in items]),
    )
    for item, found in zip(items, together, strict=True):
        alone = tower(item["pixels"], item["size"][None], item["mask"])[0]
        assert len(found) == picture_tokens(item)
        assert (found - alone).abs().max() < 1e-4 * alone.std()
    changed = items[0]["pixels"].clone()
    changed[:, :, -14:, -14:] += 1
    other = tower(changed, items[0]["size"][None], items[0]["mask"])[0]
    assert (other[0] - together[0][0]).abs().max() > 1e-3


@torch.no_grad()
def test_flags_mark_row_ends_and_the_border_before_the_global_view() -> None:
    tower = loud(build_vision_tower(phi4_config()))
    item = picture((56, 84), torch.Generator().manual_seed(0))
    features = tower(item["pixels"], item["size"][None], item["mask"])[0]
    assert features[:, -2].nonzero().flatten().tolist() == [3, 7, 11, 14]
    assert features[:, -1].nonzero().flatten().tolist() == [8]


def test_layers_behind_the_feature_layer_are_kept_but_not_computed() -> None:
    model = MixLoraForConditionalGeneration(phi4_config())
    encoder = model.model.vision_tower.encoder
    encoder.encoder.layers[2].forward = encoder.head.forward = None  # a call would fail
    item = picture((56, 56), torch.Generator().manual_seed(0))
    model.model.encode_vision(item["pixels"], item["size"][None], item["mask"])[0].sum().backward()
    groups = model.parameter_groups()
    never = [name for name, p in model.named_parameters() if "vision_tower" in name and p.grad is None]
    assert never and sorted(groups["vision_tower.unused"]) == sorted(never)


def test_wrong_numbers_of_crops_are_named() -> None:
    tower = build_vision_tower(phi4_config())
    with pytest.raises(ValueError, match="1 pictures ask for 3 crops of 56 pixels.*holds 2"):
        tower(torch.zeros(2, 3, CROP, CROP), torch.tensor([[CROP, 2 * CROP]]))
    with pytest.raises(ValueError, match="need image_sizes"):
        tower(torch.zeros(2, 3, CROP, CROP))

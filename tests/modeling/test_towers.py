"""Every tower: the same features in any company, those of the whole encoder, and gradients for all that acts."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    ParakeetEncoderConfig,
    SiglipVisionConfig,
    TimmWrapperConfig,
    ViTConfig,
    VoxtralEncoderConfig,
    Wav2Vec2BertConfig,
    WhisperConfig,
)
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.towers import build_speech_tower, build_vision_tower
from tests.modeling.model_fixtures import make_loud, tiny_config
from tests.modeling.test_phi4_towers import pad, phi4_config

PATCHES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
VISION: dict[str, Any] = {
    "siglip": SiglipVisionConfig(**PATCHES),
    "clip": CLIPVisionConfig(**PATCHES),
    "dinov2": Dinov2Config(**PATCHES),
    "vit": ViTConfig(**PATCHES),
    "efficientnet": TimmWrapperConfig(architecture="tf_efficientnet_lite0"),
}
PATCH_ENCODERS = ["siglip", "clip", "dinov2", "vit"]
MELS = 8
WHISPER = {
    "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24, "num_mel_bins": MELS,
    "max_source_positions": 20,
}  # fmt: skip
CONFORMER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
WINDOWED: dict[str, Any] = {
    "whisper": WhisperConfig(**WHISPER, decoder_attention_heads=2, decoder_layers=1, vocab_size=10, pad_token_id=0),
    "qwen2_audio": Qwen2AudioEncoderConfig(**WHISPER),
    "voxtral": VoxtralEncoderConfig(**WHISPER),
}
MASKED: dict[str, Any] = {
    "wav2vec2-bert": Wav2Vec2BertConfig(
        **CONFORMER, feature_projection_input_dim=MELS, left_max_position_embeddings=6, right_max_position_embeddings=3
    ),
    "parakeet": ParakeetEncoderConfig(
        **CONFORMER, num_mel_bins=MELS, subsampling_conv_channels=4, conv_kernel_size=3, layerdrop=0.0
    ),
}
STRIDES = {"whisper": 2, "voxtral": 2, "qwen2_audio": 4, "wav2vec2-bert": 1, "parakeet": 8}
CLIPS = (30, 7, 79, 40)


def vision_config(kind: str):
    layers = [3, 4] if kind == "efficientnet" else [1, -3]  # the first two of four layers
    return tiny_config(vision_config=VISION[kind], vision_layers=layers)


def pictures(kind: str) -> torch.Tensor:
    size = 64 if kind == "efficientnet" else PATCHES["image_size"]
    return torch.randn(3, 3, size, size)


@torch.no_grad()
@pytest.mark.parametrize("kind", VISION)
def test_a_picture_gives_the_same_features_in_any_company(kind: str) -> None:
    tower = make_loud(build_vision_tower(vision_config(kind))).eval()
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.add_(1)  # near 0, nothing of a picture would reach the last stage
    pixels = pictures(kind)
    together = tower(pixels)
    assert together.shape == (3, 4, tower.feature_size)
    for picture, found in zip(pixels, together, strict=True):
        assert (found - tower(picture[None])[0]).abs().max() < 1e-4 * found.std()
    assert (together[0] - together[1]).abs().max() > 0.1 * together.std()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", PATCH_ENCODERS)
def test_features_are_those_of_the_whole_encoder(kind: str, attention: str) -> None:
    """The tower has two of its four layers, and neither its last norm nor its head."""
    whole = make_loud(AutoModel.from_config(VISION[kind], attn_implementation=attention)).eval()
    model = MixLoraForConditionalGeneration.from_parts(
        tiny_config().text_config,
        vision_tower=whole,
        vision_layers=[1, -3],
        vision_tokens_per_side=2,
        image_token_id=1,
    ).eval()
    pixels = pictures(kind)
    states = whole(pixels, output_hidden_states=True).hidden_states
    want = torch.cat([states[1], states[2]], dim=-1)[:, -4:]
    torch.testing.assert_close(torch.stack(model.model.encode_vision(pixels)), want)
    names = [name for name, _ in model.model.vision_tower.named_parameters()]
    assert not any(f".{n}." in name for name in names for n in (2, 3))
    assert not any(f"encoder.{tail}" in name for name in names for tail in ("post_", "layernorm", "head", "pooler"))


@pytest.mark.parametrize("index", [-6, 5])
def test_a_feature_layer_that_is_not_there_is_named(index: int) -> None:
    with pytest.raises(ValueError, match=rf"vision_layers: \[{index}\] are not among the encoder's, -5 to 4"):
        build_vision_tower(tiny_config(vision_config=VISION["clip"], vision_layers=[-1, index]))


def test_encoders_without_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="'convnext' is no patch encoder; timm_wrapper takes its like"):
        build_vision_tower(tiny_config(vision_config=ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1])))


def test_another_number_of_patches_is_refused() -> None:
    """Not cut to the last of them."""
    tower = build_vision_tower(tiny_config(vision_config=ViTConfig(**(PATCHES | {"image_size": 16}))))
    with pytest.raises(ValueError, match=r"\[1, 3, 16, 16\] are 4 x 4 patches, but vision_tokens_per_side is 2"):
        tower(torch.randn(1, 3, 16, 16))


@torch.no_grad()
@pytest.mark.parametrize("kind", PATCH_ENCODERS)
def test_patch_encoders_give_their_patches_in_order(kind: str) -> None:
    """The class token, where there is one, is left out: a changed patch changes its own feature alone."""
    tower = make_loud(build_vision_tower(tiny_config(vision_config=VISION[kind], vision_layers=[0]))).eval()
    pixels = torch.randn(1, 3, 8, 8)
    before = tower(pixels)[0]
    assert before.shape == (4, 16)
    pixels[..., :4, 4:] += 1
    moved = (tower(pixels)[0] - before).abs().amax(dim=-1)
    assert moved[1] > 0.1 and (moved[[0, 2, 3]] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", [*WINDOWED, *MASKED])
def test_a_clip_gives_the_same_features_in_any_company(kind: str) -> None:
    """An encoder without a mask takes windows that end in silence; the others see nothing behind a clip's end."""
    windowed = kind in WINDOWED
    tower = make_loud(build_speech_tower(tiny_config(speech_config=(WINDOWED | MASKED)[kind]))).eval()
    clips = [torch.randn(frames, MELS) for frames in CLIPS]
    whole = [torch.nn.functional.pad(clip, (0, 0, 0, -len(clip) % 40)) if windowed else clip for clip in clips]
    features, _ = pad(whole, 0.0 if windowed else 5.0)
    mask = (torch.arange(features.shape[1]) < torch.tensor(CLIPS)[:, None]).long()
    for i, found in enumerate(tower(features, mask)):
        assert found.shape == (-(-CLIPS[i] // STRIDES[kind]), 16)
        assert tower.token_count(CLIPS[i]) == len(found)
        alone = tower(whole[i][None], mask[i : i + 1, : len(whole[i])])[0]
        assert (found - alone).abs().max() < 1e-4 * alone.std()


def without_gradients(model: MixLoraForConditionalGeneration, tower: str) -> tuple[list[str], list[str]]:
    """Parameters of a tower that got no gradient, and those that say so."""
    mine = {n: p for n, p in model.named_parameters() if n.startswith(f"model.{tower}.") and p.requires_grad}
    return sorted(n for n, p in mine.items() if p.grad is None), model.parameter_groups().get(f"{tower}.unused", [])


@pytest.mark.parametrize("kind", VISION)
def test_gradients_reach_the_vision_tower(kind: str) -> None:
    model = MixLoraForConditionalGeneration(vision_config(kind)).train()
    torch.stack(model.model.encode_vision(pictures(kind))).square().sum().backward()
    missing, unused = without_gradients(model, "vision_tower")
    assert missing == sorted(unused)


@pytest.mark.parametrize("kind", [*WINDOWED, *MASKED, "phi4"])
def test_gradients_reach_the_speech_tower(kind: str) -> None:
    config = phi4_config() if kind == "phi4" else tiny_config(speech_config=(WINDOWED | MASKED)[kind])
    model = MixLoraForConditionalGeneration(config).train()
    mels = config.speech_config.input_size if kind == "phi4" else MELS
    torch.cat(model.model.encode_speech(torch.randn(2, 40, mels))).square().sum().backward()
    missing, unused = without_gradients(model, "speech_tower")
    assert missing == sorted(unused)


def test_unknown_speech_encoders_are_refused() -> None:
    config = tiny_config()
    config.speech_config = CLIPVisionConfig()
    with pytest.raises(ValueError, match="'clip_vision_model' is not supported.*whisper.*wav2vec2-bert"):
        build_speech_tower(config)
    config.speech_config = Wav2Vec2BertConfig(add_adapter=True)
    with pytest.raises(ValueError, match="add_adapter"):
        build_speech_tower(config)

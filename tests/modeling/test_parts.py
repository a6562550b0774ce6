"""A model around a decoder, a tower and an encoder of others gives what they give."""

from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipConfig,
    SiglipModel,
    Starcoder2Config,
    Starcoder2ForCausalLM,
    TimmWrapperConfig,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from mixlora.modeling.configuration_mixlora import MixLoraTextConfig
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from tests.modeling.model_fixtures import make_loud

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW = {"sliding_window": 5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
PHI4_MINI = {
    "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
    "original_max_position_embeddings": 4,  # all rows of the test are longer
    "sliding_window": 256,  # as released: too wide to act
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "smollm2": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**SIZES, **WINDOW, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "qwen3-bias": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, attention_bias=True)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "phi3-window": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, **WINDOW)),
    "phi4-mini": lambda: Phi3ForCausalLM(Phi3Config(**SIZES, **PHI4_MINI)),
    "starcoder2": lambda: Starcoder2ForCausalLM(Starcoder2Config(**SIZES, **WINDOW)),
    "starcoder2-plain": lambda: Starcoder2ForCausalLM(Starcoder2Config(**SIZES, use_bias=False, norm_epsilon=1e-3)),
}


def reference(family: str, seed: int = 3) -> torch.nn.Module:
    """transformers' model of a family with loud random weights, biases and norms included."""
    return make_loud(FAMILIES[family](), seed).eval()


def from_decoder(part) -> MixLoraForConditionalGeneration:
    return MixLoraForConditionalGeneration.from_parts(part, adapters={"vision": {"r": 2, "alpha": 4}}).eval()


def rows(lengths: list[int], side: str = "right") -> dict[str, torch.Tensor]:
    """Ids and mask of rows of random tokens."""
    generator, longest = torch.Generator().manual_seed(1), max(lengths)
    place = torch.arange(longest)
    mask = torch.stack([place < n if side == "right" else place >= longest - n for n in lengths])
    ids = torch.randint(3, 97, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask.long()}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_logits_equal_the_decoders_own_class(family: str, seed: int) -> None:
    theirs, inputs = reference(family, seed), rows([11, 8])
    real = inputs["attention_mask"].bool()
    want = theirs(**inputs).logits[real]
    torch.testing.assert_close(from_decoder(theirs)(**inputs).logits[real], want, rtol=1e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi4-mini", "starcoder2"])
def test_a_decoder_is_read_from_a_folder(family: str, tmp_path: Path) -> None:
    """And a saved model, which holds what its config says of the decoder, gives the same."""
    theirs, inputs = reference(family), rows([11])
    theirs.save_pretrained(tmp_path / "theirs")
    model = from_decoder(tmp_path / "theirs")
    logits = model(**inputs).logits
    torch.testing.assert_close(logits, theirs(**inputs).logits, rtol=1e-4, atol=2e-4)
    model.save_pretrained(tmp_path / "ours")
    assert torch.equal(
        MixLoraForConditionalGeneration.from_pretrained(tmp_path / "ours").eval()(**inputs).logits, logits
    )


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["starcoder2", "phi3-window"])
def test_a_sliding_window_holds_while_generating(family: str, attention: str) -> None:
    """Cached, uncached, beside a longer row and in transformers' class: the same tokens, past the window."""
    theirs, inputs = reference(family), rows([9, 4], side="left")
    model = from_decoder(theirs)
    model.set_attn_implementation(attention)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(**inputs, **options)
    assert torch.equal(tokens, theirs.generate(**inputs, **options))
    assert torch.equal(tokens, model.generate(**inputs, **options, use_cache=False))
    assert torch.equal(tokens[1, 5:], model.generate(inputs["input_ids"][1:, 5:], **options)[0])
    wide = from_decoder(theirs)
    wide.config.text_config.sliding_window = None
    assert not torch.equal(tokens, wide.generate(**inputs, **options))


def test_dropouts_of_the_family_act_in_training_alone() -> None:
    model = from_decoder(Starcoder2Config(**SIZES, residual_dropout=0.5))
    inputs = rows([6])
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model = from_decoder(Starcoder2Config(**SIZES, embedding_dropout=0.5)).train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)
    model = from_decoder(Phi3Config(**SIZES, resid_pdrop=0.5)).train()
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CLIPVisionConfig(), "'clip_vision_model' is not one of"),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
            "layers of different kinds .*full_attention.*sliding_attention",
        ),
    ],
    ids=["unknown", "mixed layers"],
)
def test_what_ours_cannot_be_is_refused_by_name(config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixLoraForConditionalGeneration.from_parts(config)


def test_a_window_is_refused_where_rotary_factors_vary() -> None:
    """Rebuilding a row's cache needs all of its past."""
    with pytest.raises(StrictDataclassClassValidationError, match=r"sliding_window \(16\) with rope_type 'longrope'"):
        from_decoder(Phi3Config(**SIZES, **(PHI4_MINI | {"sliding_window": 16})))


@torch.no_grad()
def test_towers_keep_their_weights_and_drop_what_is_not_used() -> None:
    torch.manual_seed(0)
    whisper = make_loud(WhisperEncoder(WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=24, num_mel_bins=8,
        max_source_positions=20, vocab_size=10, decoder_layers=1, pad_token_id=0,
    ))).eval()  # fmt: skip
    model = MixLoraForConditionalGeneration.from_parts(
        MixLoraTextConfig(**SIZES),
        vision_tower=TimmWrapperConfig(architecture="tf_efficientnet_lite0"),
        speech_tower=whisper,
        vision_layers=[3, 4],
        vision_tokens_per_side=7,
        image_token_id=3,
        audio_token_id=4,
    ).eval()
    assert not any("conv_head" in name for name, _ in model.named_parameters())
    features = model.model.encode_vision(torch.randn(1, 3, 224, 224))
    assert features[0].shape == (49, 112 * 4 + 320)
    mels = torch.randn(1, 80, 8)
    clip = model.model.encode_speech(mels)[0]
    windows = whisper(mels.reshape(2, 40, 8).transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(clip, windows.reshape(40, 16))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_vision_tower_is_read_from_a_folder_with_a_whole_clip(kind: str, tmp_path: Path) -> None:
    """So these encoders lie on the hub: pictures and text in one checkpoint."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision, text = sizes | {"image_size": 8, "patch_size": 4}, sizes | {"vocab_size": 20}
    if kind == "clip":
        whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text | {"eos_token_id": 2}))
    else:
        whole = SiglipModel(SiglipConfig(vision_config=vision, text_config=text | {"projection_size": 16}))
    make_loud(whole).eval().save_pretrained(tmp_path)
    model = MixLoraForConditionalGeneration.from_parts(
        MixLoraTextConfig(**SIZES),
        vision_tower=tmp_path,
        vision_layers=[-2],
        vision_tokens_per_side=2,
        image_token_id=3,
    ).eval()
    pixels = torch.randn(2, 3, 8, 8)
    want = whole.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, -4:]
    torch.testing.assert_close(torch.stack(model.model.encode_vision(pixels)), want)

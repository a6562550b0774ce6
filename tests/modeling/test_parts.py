"""A model around a decoder, a tower and an encoder of others gives what they give."""

import pytest
import torch
from transformers import (
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
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
}


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("from_folder", [False, True])
def test_logits_equal_the_decoders_own_class(family, from_folder, tmp_path):
    reference = make_loud(FAMILIES[family](), seed=3).eval()
    part = reference
    if from_folder:
        reference.save_pretrained(tmp_path)
        part = tmp_path
    model = MixLoraForConditionalGeneration.from_parts(part, adapters={"vision": {"r": 2, "alpha": 4}}).eval()
    ids = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    torch.testing.assert_close(
        model(input_ids=ids, attention_mask=mask).logits[mask.bool()],
        reference(input_ids=ids, attention_mask=mask).logits[mask.bool()],
        rtol=1e-4,
        atol=2e-4,
    )


def test_an_unknown_decoder_is_refused_by_name():
    with pytest.raises(ValueError, match="'clip_vision_model' is not one of"):
        MixLoraForConditionalGeneration.from_parts(CLIPVisionConfig())


@torch.no_grad()
def test_towers_keep_their_weights_and_drop_what_is_not_used():
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

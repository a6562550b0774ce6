"""A tiny processor whose tokenizer is built here: bytes, a few merges, and the control tokens."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixlora.modeling.audio_processing_mixlora import MixLoraAudioProcessor
from mixlora.modeling.image_processing_mixlora import MixLoraImageProcessor
from mixlora.modeling.processing_mixlora import MixLoraProcessor

SPECIAL = [
    "<|endoftext|>", "<|image|>", "<|audio|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>",
]  # fmt: skip


@cache
def _bytes_tokenizer() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer.to_str()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bytes_tokenizer()),
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        padding_side="left",
    )


def tiny_processor(**changes) -> MixLoraProcessor:
    """Fits `tiny_model`: pictures of 8 pixels and 4 tokens, windows of 40 frames, 8 mels, 4 frames a token."""
    return MixLoraProcessor(
        image_processor=MixLoraImageProcessor(size=8),
        audio_processor=MixLoraAudioProcessor(window_frames=40, feature_size=8),
        tokenizer=tiny_tokenizer(),
        **({"image_seq_length": 4, "audio_frames_per_token": 4} | changes),
    )

"""Tiny processors whose tokenizer is built here (bytes and the control tokens): ours, Microsoft's, transformers'."""

import json
from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Phi4MultimodalFeatureExtractor,
    Phi4MultimodalImageProcessor,
    Phi4MultimodalProcessor,
    PreTrainedTokenizerFast,
)

from mixlora.modeling.audio_processing_mixlora import MixLoraAudioProcessor
from mixlora.modeling.image_processing_mixlora import MixLoraImageProcessor
from mixlora.modeling.processing_mixlora import MixLoraProcessor

SPECIAL = [
    "<|endoftext|>", "<|image|>", "<|audio|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>",
    "<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>",
]  # fmt: skip
MICROSOFTS_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not"
    " none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' +"
    " '<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
NAMES = {"<|image|>": "<|endoftext10|>", "<|audio|>": "<|endoftext11|>"}


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


def microsofts_tokenizer(plain=()) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with Microsoft's names of both placeholders; tokens in `plain` are added, but not special."""
    fields = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for token in fields["added_tokens"]:
        token["content"] = NAMES.get(token["content"], token["content"])
        token["special"] = token["content"] not in plain
    vocabulary = fields["model"]["vocab"]
    for old, new in NAMES.items():
        vocabulary[new] = vocabulary.pop(old)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)),
        pad_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side="left",
    )


def native_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer as transformers' processor of Phi-4-Multimodal wants it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|end|>",
        padding_side="left",
        extra_special_tokens={"image_token": "<|image|>", "audio_token": "<|audio|>"},
    )


def native_processor(tokenizer=None) -> Phi4MultimodalProcessor:
    """Transformers' processor of Phi-4-Multimodal."""
    return Phi4MultimodalProcessor(
        Phi4MultimodalImageProcessor(), Phi4MultimodalFeatureExtractor(), tokenizer or native_tokenizer()
    )

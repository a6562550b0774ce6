"""Train the byte-level BPE tokenizer on build/data/text.jsonl and write build/tokenizer.

Run: python scripts/train_tokenizer.py     (after scripts/prepare_text.py)
"""

from __future__ import annotations

from collections.abc import Iterator

from common import DATA, TOKENIZER, read_jsonl, run_main, say

VOCABULARY = 4096
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|image|>",
    "<|audio|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|tool|>",
    "<|/tool|>",
    "<|tool_call|>",
    "<|/tool_call|>",
)


def texts() -> Iterator[str]:
    """Every text of the text rows: plain, and each side of a chat."""
    for row in read_jsonl(DATA / "text.jsonl"):
        if "text" in row:
            yield row["text"]
            continue
        for message in row["messages"]:
            content = message["content"]
            yield content if isinstance(content, str) else content[0]["text"]


def main() -> None:
    """Train, wrap, save, and check a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        eos_token="<|end|>",
        extra_special_tokens={"image_token": "<|image|>", "audio_token": "<|audio|>"},
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    sample = "Numbers 1024 and 7, café, 東京!\n  two spaces"
    if wrapped.decode(wrapped.encode(sample)) != sample:
        raise ValueError("the tokenizer does not return the sample text")
    wrapped.save_pretrained(TOKENIZER)
    say(f"{len(wrapped)} tokens -> {TOKENIZER}; {len(wrapped.encode(sample))} for {sample!r}")


if __name__ == "__main__":
    run_main(main)

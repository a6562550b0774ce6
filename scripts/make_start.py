"""Assembles the untrained start of the default model: a fresh decoder around two pretrained encoders.

python scripts/make_start.py --encoders build/encoders --tokenizer build/tokenizer --words build/data/words.json \
    --output build/start
"""

import argparse
import json
from pathlib import Path

from picture_things import CLIP_ART_KINDS

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORD_BYTES = 294_912
"""Room for the words that are known when a clip is heard or a picture is read."""
NAME_TOKENS, TOLD_TOKENS = 8, 16
"""Of the longest name, and of all names that are told of a picture."""


def main() -> None:
    """Writes a checkpoint with its processor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoders", default="build/encoders")
    parser.add_argument("--tokenizer", default="build/tokenizer")
    parser.add_argument("--words", type=Path, default=Path("build/data/words.json"))
    parser.add_argument("--names", type=Path, default=Path("build/data/names.json"))
    parser.add_argument("--output", default="build/start")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    from transformers import AutoTokenizer

    from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor
    from mixlora.modeling.audio_processing_mixlora import MixLoraAudioProcessor
    from mixlora.modeling.configuration_mixlora import MixLoraTextConfig
    from mixlora.modeling.image_processing_mixlora import MixLoraImageProcessor

    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    listed = json.loads(args.names.read_text())
    every = [tokenizer(name, add_special_tokens=False)["input_ids"] for name in listed]
    names = [name for name in every if len(name) <= NAME_TOKENS]
    kinds = [name for name in tokenizer(CLIP_ART_KINDS, add_special_tokens=False)["input_ids"] if name in names]
    text = MixLoraTextConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = MixLoraForConditionalGeneration.from_parts(
        decoder=text,
        vision_tower=f"{args.encoders}/efficientnet-lite0",
        speech_tower=f"{args.encoders}/whisper-tiny.en",
        adapters={
            "vision": {"r": 24, "alpha": 48, "dropout": 0.0, "target_modules": PROJECTIONS},
            "speech": {"r": 40, "alpha": 80, "dropout": 0.0, "target_modules": PROJECTIONS},
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
        audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
        vision_layers=[3, 4],
        vision_tokens_per_side=7,
        speech_stack=4,
        speech_context={"kernel_size": 11, "intermediate_size": 384, "dropout": 0.2, "stride": 2},
        speech_letters={"words": WORD_BYTES},
        speech_blank_token_id=tokenizer("\n")["input_ids"][0],
        speech_ctc_weight=0.6,
        vision_detail={},
        vision_letters={},
        vision_names={"count": len(names), "longest": TOLD_TOKENS, "hidden_size": 384, "dropout": 0.4},
        vision_told_weight=0.4,
    )
    model.model.speech_letters.learn_words(json.loads(args.words.read_text()))
    model.model.vision_names.learn_names(names, kinds)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = MixLoraProcessor(
        image_processor=MixLoraImageProcessor(),
        audio_processor=MixLoraAudioProcessor(),
        tokenizer=tokenizer,
        image_seq_length=model.model.picture_tokens,
    )
    model.save_pretrained(args.output)
    processor.save_pretrained(args.output)
    sizes = {
        name: sum(model.get_parameter(n).numel() for n in names) for name, names in model.parameter_groups().items()
    }
    print({**sizes, "total": sum(sizes.values())})


if __name__ == "__main__":
    main()

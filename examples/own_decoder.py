"""A new model around a decoder of your own: a vision tower, a speech tower, projectors and two adapters are added.

    python examples/own_decoder.py [--decoder DIR]

DIR is a checkpoint of Llama, Mistral, Qwen2, Qwen3, Phi-3, SmolLM2 or StarCoder2; by default a tiny random Llama is
made. The towers are named by a config and so have random weights; a folder or a loaded encoder in the same place
brings its own.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from shared import decoder_folder

SIDE, MELS, FRAMES, STACK = 4, 80, 100, 4  # picture tokens a side; mel bins and frames of a clip; frames of a token
PICTURE_TOKENS, CLIP_TOKENS = SIDE * SIDE, -(-(FRAMES // 2) // STACK)  # Whisper halves the frames
LENGTH = PICTURE_TOKENS + CLIP_TOKENS + 4
ROWS = {"text": (0, 0), "picture": (1, 0), "clip": (0, 1), "clip beside a picture": (1, 1)}


def main(argv: list[str] | None = None) -> None:
    """Builds the model, sends one batch of four kinds of rows through it, and prints what a stage could train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", type=Path, help="folder of a Llama-like decoder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch
    from transformers import AutoConfig, CLIPVisionConfig, WhisperConfig

    from mixlora import MixLoraForConditionalGeneration

    torch.manual_seed(args.seed)
    with TemporaryDirectory() as scratch:
        decoder = decoder_folder(args.decoder, Path(scratch))
        vocabulary = AutoConfig.from_pretrained(decoder).vocab_size
        # A real tokenizer has its placeholders as special tokens; here the last two ids of the vocabulary serve.
        image, audio = vocabulary - 2, vocabulary - 1
        model = MixLoraForConditionalGeneration.from_parts(
            decoder,
            vision_tower=CLIPVisionConfig(
                hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                image_size=8 * SIDE, patch_size=8,
            ),
            speech_tower=WhisperConfig(
                d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=MELS,
                max_source_positions=FRAMES // 2,
            ),
            adapters={"vision": {"r": 8, "alpha": 16}, "speech": {"r": 8, "alpha": 16}},
            image_token_id=image,
            audio_token_id=audio,
            vision_tokens_per_side=SIDE,
            speech_stack=STACK,
        ).eval()  # fmt: skip

    rows = []
    for pictures, clips in ROWS.values():
        media = [image] * PICTURE_TOKENS * pictures + [audio] * CLIP_TOKENS * clips
        rows.append(media + torch.randint(image, (LENGTH - len(media),)).tolist())
    inputs = {
        "input_ids": torch.tensor(rows),
        "pixel_values": torch.randn(sum(pictures for pictures, _ in ROWS.values()), 3, 8 * SIDE, 8 * SIDE),
        "input_features": torch.randn(sum(clips for _, clips in ROWS.values()), FRAMES, MELS),
    }
    with torch.no_grad():
        logits = model(**inputs).logits
    print(f"logits {list(logits.shape)}, all finite: {bool(torch.isfinite(logits).all())}")
    for kind, adapter in zip(ROWS, model.router(inputs["input_ids"]).tolist(), strict=True):
        print(f"{kind:<22} adapter {'none' if adapter < 0 else model.router.names[adapter]}")
    for group, names in model.parameter_groups().items():
        print(f"{group:<32} {sum(model.get_parameter(name).numel() for name in names):>12,} parameters")


if __name__ == "__main__":
    main()

"""Four kinds of rows in one batch: text, a picture, a voice, a voice beside a picture.

    python examples/mixed_batch.py [--model DIR]

Each row takes its own route: the adapter that the checkpoint's table names for what the row contains, or none.
"""

import argparse

from shared import SAMPLES

CONVERSATIONS = [
    [{"role": "user", "content": "Who are you?"}],
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(SAMPLES / "five.png")},
                {"type": "text", "text": "What digit is this?"},
            ],
        }
    ],
    [
        {
            "role": "user",
            "content": [
                {"type": "audio", "path": str(SAMPLES / "hello-world.flac")},
                {"type": "text", "text": "Transcribe the audio."},
            ],
        }
    ],
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "path": str(SAMPLES / "three.png")},
                {"type": "audio", "path": str(SAMPLES / "four.flac")},
                {"type": "text", "text": "Is this what I say?"},
            ],
        }
    ],
]


def main(argv: list[str] | None = None) -> None:
    """Prints what each row contains, the adapter that acted on it, and its answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder; by default the one inside the package")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor, default_checkpoint

    checkpoint = args.model or default_checkpoint()
    model = MixLoraForConditionalGeneration.from_pretrained(checkpoint, dtype="auto").eval()
    processor = MixLoraProcessor.from_pretrained(checkpoint)
    inputs = processor.apply_chat_template(
        CONVERSATIONS, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.device, dtype=model.dtype)

    modalities = model.router.modalities(inputs["input_ids"])
    adapters = model.router.adapter_names(modalities)
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{'modality':<14} {'adapter':<8} answer")
    for modality, adapter, answer in zip(modalities, adapters, answers, strict=True):
        print(f"{modality:<14} {adapter or '-':<8} {' '.join(answer.split())}")


if __name__ == "__main__":
    main()

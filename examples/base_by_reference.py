"""A checkpoint that holds no decoder: it names its base by folder and by the SHA-256 of its weights.

    python examples/base_by_reference.py [--decoder DIR]

Where many checkpoints share a large decoder, each holds only what was added. A tiny random Llama stands in for DIR.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from shared import decoder_folder


def weights_size(folder: Path) -> int:
    """Bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(argv: list[str] | None = None) -> None:
    """Saves, looks at what was saved, and loads it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decoder", type=Path, help="folder of a Llama-like decoder")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import torch

    from mixlora import MixLoraConfig, MixLoraForConditionalGeneration

    torch.manual_seed(args.seed)
    with TemporaryDirectory() as scratch:
        decoder, folder = decoder_folder(args.decoder, Path(scratch)), Path(scratch) / "checkpoint"
        model = MixLoraForConditionalGeneration.from_parts(
            decoder, adapters={"speech": {"r": 4, "alpha": 8}}, refer_to_base=True
        ).eval()
        for name in model.parameter_groups()["adapter.speech"]:
            torch.nn.init.normal_(model.get_parameter(name), std=0.1)  # a fresh adapter adds nothing yet
        model.save_pretrained(folder)
        base = MixLoraConfig.from_pretrained(folder).base_model
        print(f"base {Path(base['name_or_path']).name}, sha256 {base['sha256']}")
        print(f"weights: base {weights_size(decoder):,} bytes, checkpoint {weights_size(folder):,} bytes")

        again = MixLoraForConditionalGeneration.from_pretrained(folder).eval()
        ids = torch.randint(model.config.text_config.vocab_size, (2, 12))
        with torch.no_grad():
            for adapter in (-1, 0):
                inputs = {"input_ids": ids, "adapter_ids": torch.full((len(ids),), adapter)}
                same = torch.equal(model(**inputs).logits, again(**inputs).logits)
                print(
                    f"adapter {'none' if adapter < 0 else 'speech':<6} same logits after loading, bit for bit: {same}"
                )


if __name__ == "__main__":
    main()

"""Writes a trained stage as the checkpoint that ships inside the package: half precision on disk, fp32 in memory.

python scripts/export_default.py build/train/18-vision_views mixlora/default
"""

import argparse
import json
from pathlib import Path


def main() -> None:
    """Converts and copies; the sizes are printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()

    import torch

    from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor

    model = MixLoraForConditionalGeneration.from_pretrained(args.source, dtype=torch.float32)
    model.half().save_pretrained(args.output)
    MixLoraProcessor.from_pretrained(args.source).save_pretrained(args.output)
    config = args.output / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    for part in (content, content["text_config"], content["vision_config"], content["speech_config"]):
        part["dtype"] = "float32"  # what `from_pretrained` loads it as: half precision is slow on a CPU
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(args.output.glob("*.*")):
        print(f"{path.stat().st_size:>12,} {path}")


if __name__ == "__main__":
    main()

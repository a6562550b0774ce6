"""Reading Phi-4-Multimodal's checkpoints, both layouts, as they lie on the hub."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers.configuration_utils import PreTrainedConfig

from .base_checkpoint import load_weights
from .key_maps import KEY_MAPS, renamer
from .phi4_config import is_phi4

logger = logging.getLogger(__name__)
ADAPTER_FOLDERS = {"vision": "vision-lora", "speech": "speech-lora"}
"""Adapter -> the PEFT folder beside the weights in transformers' own layout."""
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Options of `from_pretrained` that say where a file is."""


def phi4_layout(name: str | Path, hub: dict[str, Any]) -> str | None:
    """The layout of a checkpoint (a folder or a hub id), a key of [`KEY_MAPS`]; None for ours.

    `hub` holds options for fetching the config, such as `revision`.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **hub)
    except OSError:  # weights alone, with a config that the caller passes
        return None
    return config["model_type"] if is_phi4(config) else None


def load_phi4(folder: Path, layout: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint under our names. What no row of the key map fits is logged and left out.

    Raises:
        ValueError: a `lora_B` is all zeros, so that its adapter does nothing.
    """
    rename = renamer(KEY_MAPS[layout], to_ours=True)
    state, unknown = {}, []
    for name, tensor in load_weights(folder).items():
        ours = rename(name)
        if ours is None:
            unknown.append(name)
            continue
        if ".lora_B." in ours and not tensor.any():
            raise ValueError(f"{folder}: {name} is all zeros, so the adapter does nothing there")
        state[ours] = tensor
    if unknown:
        logger.warning("%s: %d tensors are not used: %s", folder, len(unknown), ", ".join(sorted(unknown)[:10]))
    return state

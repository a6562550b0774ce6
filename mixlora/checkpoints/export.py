"""Writes a checkpoint together with its code, so that it loads where mixlora is not installed."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mixlora.modeling.audio_processing_mixlora import MixLoraAudioProcessor
from mixlora.modeling.configuration_mixlora import MixLoraConfig
from mixlora.modeling.image_processing_mixlora import MixLoraImageProcessor
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor

AUTO_CLASSES: dict[type[Any], str] = {
    MixLoraConfig: "AutoConfig",
    MixLoraForConditionalGeneration: "AutoModelForCausalLM",
    MixLoraProcessor: "AutoProcessor",
    MixLoraImageProcessor: "AutoImageProcessor",
    MixLoraAudioProcessor: "AutoFeatureExtractor",
}
MORE_MODEL_CLASSES = ("AutoModelForImageTextToText", "AutoModelForMultimodalLM")
"""Further auto classes that give the same model; transformers registers a class with one of them only."""


@contextmanager
def _registered() -> Iterator[None]:
    """Our classes registered for export, and as they were afterwards: later checkpoints carry no code."""
    before = {exported: exported.__dict__.get("_auto_class") for exported in AUTO_CLASSES}
    try:
        for exported, auto_name in AUTO_CLASSES.items():
            exported.register_for_auto_class(auto_name)
        yield
    finally:
        for exported, earlier in before.items():
            exported._auto_class = earlier


def export_code(source: str | Path, destination: str | Path) -> None:
    """Saves model, processor and code; `trust_remote_code=True` then loads the folder without mixlora.

    Args:
        source: a checkpoint folder.
        destination: a folder that is new or empty.

    Raises:
        ValueError: `destination` holds files. FileNotFoundError: `source` is no checkpoint.
    """
    source, destination = Path(source), Path(destination)
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source} is no checkpoint: it has no config.json")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} exists and is not an empty folder")
    model = MixLoraForConditionalGeneration.from_pretrained(str(source), dtype="auto")
    processor = MixLoraProcessor.from_pretrained(str(source))
    with _registered():
        model.save_pretrained(destination)
        processor.save_pretrained(destination)
    _name_more_classes(destination / "config.json")


def _name_more_classes(path: Path) -> None:
    """Lets the other auto classes find the model as well."""
    config = json.loads(path.read_text(encoding="utf-8"))
    auto_map = config["auto_map"]
    auto_map |= dict.fromkeys(MORE_MODEL_CLASSES, auto_map["AutoModelForCausalLM"])
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

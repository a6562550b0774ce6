"""Makes transformers' Auto classes know our classes, without importing transformers or torch before somebody does.

Each auto module of transformers (configurations, models, processors, ...) is served as soon as it is loaded: at once
if it already is, else by a small import hook. Two orders of import need care. Our configuration or processor module
may be the one that loads the auto module and so be half executed: then it is registered when it is whole. And the auto
module for models may be loaded in the middle of transformers' own import, where our network can't be imported yet: so
a model is registered as a stand-in that imports the class on first use, and is replaced by the class once that is
loaded.
"""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_AUTO = "transformers.models.auto."
_OURS = "mixlora.modeling."
_CONFIG = "configuration_mixlora"
_MODEL_CLASSES = {
    "AutoModel": "MixLoraModel",
    "AutoModelForCausalLM": "MixLoraForConditionalGeneration",
    "AutoModelForImageTextToText": "MixLoraForConditionalGeneration",
    "AutoModelForMultimodalLM": "MixLoraForConditionalGeneration",
}
_NAME_TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)


class _LazyClass:
    """Stands in for one of our model classes until an attribute of it is asked for."""

    def __init__(self, class_name: str) -> None:
        self._class_name = class_name

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(import_module(_OURS + "modeling_mixlora"), self._class_name), name)


def _register_configurations(auto: ModuleType) -> None:
    config = import_module(_OURS + _CONFIG)
    for config_class in (config.MixLoraTextConfig, config.MixLoraConfig, config.Phi4MMConfig):
        auto.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_models(auto: ModuleType) -> None:
    config = import_module(_OURS + _CONFIG)
    loaded = sys.modules.get(_OURS + "modeling_mixlora")
    for names in _NAME_TABLES:  # by these the trainer knows whose labels to shift, and the server what it can serve
        getattr(auto, names).setdefault("mixlora", "MixLoraForConditionalGeneration")
    for auto_name, class_name in _MODEL_CLASSES.items():
        model_class = getattr(loaded, class_name, None) or _LazyClass(class_name)
        for config_class in (config.MixLoraConfig, config.Phi4MMConfig):
            getattr(auto, auto_name)._model_mapping.register(config_class, model_class, exist_ok=True)


def _register_processor(auto: ModuleType) -> None:
    config = import_module(_OURS + _CONFIG)
    processor_class = import_module(_OURS + "processing_mixlora").MixLoraProcessor
    auto.AutoProcessor.register(config.MixLoraConfig, processor_class, exist_ok=True)
    phi4_class = import_module(_OURS + "processing_phi4").Phi4MMProcessor
    auto.AutoProcessor.register(config.Phi4MMConfig, phi4_class, exist_ok=True)


def _register_image_processor(auto: ModuleType) -> None:
    image_class = import_module(_OURS + "image_processing_mixlora").MixLoraImageProcessor
    backends = {"pil": image_class, "torchvision": image_class}
    config_class = import_module(_OURS + _CONFIG).MixLoraConfig
    auto.AutoImageProcessor.register(config_class, image_processor_classes=backends, exist_ok=True)


def _register_audio_processor(auto: ModuleType) -> None:
    audio_class = import_module(_OURS + "audio_processing_mixlora").MixLoraAudioProcessor
    auto.AutoFeatureExtractor.register(import_module(_OURS + _CONFIG).MixLoraConfig, audio_class, exist_ok=True)


# auto module -> (what registers with it, our modules that it takes classes from)
_REGISTRATIONS: dict[str, tuple[Callable[[ModuleType], None], tuple[str, ...]]] = {
    "configuration_auto": (_register_configurations, (_CONFIG,)),
    "modeling_auto": (_register_models, (_CONFIG, "modeling_mixlora")),
    "processing_auto": (_register_processor, (_CONFIG, "processing_mixlora", "processing_phi4")),
    "image_processing_auto": (_register_image_processor, (_CONFIG, "image_processing_mixlora")),
    "feature_extraction_auto": (_register_audio_processor, (_CONFIG, "audio_processing_mixlora")),
}
_WATCHED = {_AUTO + name for name in _REGISTRATIONS} | {
    _OURS + name for _, ours in _REGISTRATIONS.values() for name in ours
}
_executing: set[str] = set()  # watched modules that are being executed at this moment


def _register_with(auto_name: str) -> None:
    """Register with one auto module, unless it or a module of ours that it needs is absent or half executed."""
    auto = sys.modules.get(_AUTO + auto_name)
    register_classes, ours = _REGISTRATIONS[auto_name]
    if auto is None or _AUTO + auto_name in _executing or any(_OURS + name in _executing for name in ours):
        return
    if getattr(auto.__spec__, "_initializing", False) and not hasattr(auto, "__all__"):
        return  # half executed since before the hook was there
    register_classes(auto)


def _after(module_name: str) -> None:
    """React to a watched module that has just been executed."""
    for auto_name, (_, ours) in _REGISTRATIONS.items():
        if module_name == _AUTO + auto_name or module_name in {_OURS + name for name in ours}:
            _register_with(auto_name)


class _AfterImport(MetaPathFinder):
    """Finds the watched modules as usual, and calls ``_after`` when one of them has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in _WATCHED else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            _executing.add(fullname)
            try:
                execute(module)
            finally:
                _executing.discard(fullname)
            _after(fullname)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Register with every auto module that is loaded, and with the others when they get loaded. Safe to call twice."""
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
    for auto_name in _REGISTRATIONS:
        _register_with(auto_name)

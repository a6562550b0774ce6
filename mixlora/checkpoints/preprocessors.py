"""`preprocessor_config.json` of both layouts of Phi-4-Multimodal, with the settings of a checkpoint's processor."""

import inspect
from pathlib import Path
from typing import Any

from mixlora.modeling.configuration_mixlora import MixLoraConfig

MICROSOFT = "microsoft/Phi-4-multimodal-instruct--processing_phi4mm."
RELEASED = {"audio_compression_rate": 8, "audio_downsample_rate": 1, "audio_feat_stride": 1, "dynamic_hd": 36}
LAYOUTS: dict[str, dict[str, Any]] = {
    "phi4mm": {
        "auto_map": {
            "AutoProcessor": MICROSOFT + "Phi4MMProcessor",
            "AutoImageProcessor": MICROSOFT + "Phi4MMImageProcessor",
            "AutoFeatureExtractor": MICROSOFT + "Phi4MMAudioFeatureExtractor",
        },
        "processor_class": "Phi4MMProcessor",
        "image_processor_type": "Phi4MMImageProcessor",
        "feature_extractor_type": "Phi4MMAudioFeatureExtractor",
    },
    "phi4_multimodal": {
        "processor_class": "Phi4MultimodalProcessor",
        "image_processor_type": "Phi4MultimodalImageProcessor",
        "feature_extractor_type": "Phi4MultimodalFeatureExtractor",
    },
}


def preprocessor_config(source: Path, config: MixLoraConfig, layout: str) -> dict[str, Any]:
    """The file for `layout`, with all settings that are not those of the released processor.

    Args:
        source: a checkpoint of ours; where it holds no processor, the settings follow from its `config`.
    """
    from mixlora.modeling.processing_phi4 import (
        Phi4AudioProcessor,
        Phi4ImageProcessor,
        is_phi4_processor,
        media_processors,
    )

    if is_phi4_processor(source):
        pictures, clips = media_processors(source)
    else:
        vision: Any = config.vision_config
        speech: Any = config.speech_config
        pictures = Phi4ImageProcessor(size=vision.image_size, patch_size=vision.patch_size)
        clips = Phi4AudioProcessor(feature_size=speech.input_size, audio_downsample_rate=config.speech_stack)
    settings = _changed(pictures) | _changed(clips)
    if "size" in settings:
        settings["size"] = {"height": pictures.size, "width": pictures.size}
    return LAYOUTS[layout] | RELEASED | settings


def _changed(processor: Any) -> dict[str, Any]:
    """Settings of a processor that are not the default."""
    usual = type(processor)()
    names = [n for n in inspect.signature(type(processor).__init__).parameters if n not in ("self", "kwargs")]
    return {name: getattr(processor, name) for name in names if getattr(processor, name) != getattr(usual, name)}

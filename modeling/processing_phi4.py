"""Phi-4-Multimodal's processor, read from Microsoft's files, from transformers' or from ours."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from .audio_processing_phi4 import Phi4AudioProcessor
from .chat_template import CHAT_TEMPLATE, with_parts
from .image_processing_phi4 import Phi4ImageProcessor
from .processing_mixlora import MixLoraProcessor

PROCESSOR_CLASSES = ("Phi4MMProcessor", "Phi4MultimodalProcessor")
"""What the layouts call it: Microsoft's and ours, then transformers'."""
FILES = ("processor_config.json", "preprocessor_config.json")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
PLACEHOLDERS = (("<|image|>", "<|audio|>"), ("<|endoftext10|>", "<|endoftext11|>"))
"""Of a picture and a clip; transformers' layout has given Microsoft's tokens new names."""
NUMBERED = re.compile(r"<\|(image|audio)_(\d+)\|>")
FIXED_IMAGE = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3}
"""Settings of transformers' picture processor that are not ours to change."""


def _read(name: str | Path, file: str, options: dict[str, Any]) -> dict[str, Any]:
    """A JSON file of a folder or hub repository; empty where there is none."""
    hub = {option: options[option] for option in HUB_OPTIONS if options.get(option) is not None}
    path = cached_file(str(name), file, _raise_exceptions_for_missing_entries=False, **hub)
    return {} if path is None else json.loads(Path(path).read_text("utf-8"))


def is_phi4_processor(name: str | Path, **options: Any) -> bool:
    """Whether a folder or hub repository holds a processor of Phi-4-Multimodal, in any layout."""
    classes = (_read(name, file, options).get("processor_class") for file in FILES)
    return next((found for found in classes if found), None) in PROCESSOR_CLASSES


def _build(kind: Any, fields: dict[str, Any], fixed: dict[str, Any] | None = None) -> Any:
    """A picture or audio processor from those of `fields` that are its settings.

    Raises:
        ValueError: a field of `fixed` with another value.
    """
    for name, wanted in (fixed or {}).items():
        if fields.get(name) is not None and fields[name] != wanted:
            raise ValueError(f"{name} is {fields[name]!r}, only {wanted!r} is supported")
    known = {*inspect.signature(kind.__init__).parameters, "sampling_rate", "audio_feat_stride"} - {"self", "kwargs"}
    return kind(**{name: value for name, value in fields.items() if name in known and value is not None})


def media_processors(
    name: str | Path, parts: dict[str, Any] | None = None, **options: Any
) -> tuple[Phi4ImageProcessor, Phi4AudioProcessor]:
    """Those of a folder or hub repository, in any layout. Older files keep the settings of both in one place.

    Args:
        parts: what `processor_config.json` holds, where it was read before.
    """
    parts = _read(name, FILES[0], options) if parts is None else parts
    shared = _read(name, FILES[1], options)
    audio = parts.get("audio_processor") or parts.get("feature_extractor") or {}
    return (
        _build(Phi4ImageProcessor, shared | parts.get("image_processor", {}), FIXED_IMAGE),
        _build(Phi4AudioProcessor, shared | audio),
    )


class Phi4MMProcessor(MixLoraProcessor):
    """Ids, crops and mel frames as Phi-4-Multimodal was trained with.

    Differences to [`MixLoraProcessor`]: a picture takes as many placeholders as its shape asks for; templates that
    take strings alone, as Microsoft's does, are given parts all the same; and in `processor(text=...)`, where markers
    act, Microsoft's `<|image_1|>` and `<|audio_1|>` act too. In messages these are text, as any marker is.

    Also registered for the processor class that Microsoft's files name, so that `AutoProcessor` needs no remote code.
    """

    def __init__(
        self,
        image_processor: Phi4ImageProcessor | None = None,
        audio_processor: Phi4AudioProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
    ):
        """
        Raises:
            ValueError: no tokenizer, or one that lacks the placeholders.
        """
        audio_processor = audio_processor or Phi4AudioProcessor()
        if tokenizer is not None and tokenizer.chat_control_tokens is None:
            # Microsoft's template puts role markers together from pieces, so they cannot be found in it
            tokenizer.chat_control_tokens = [t for t in tokenizer.get_added_vocab() if t.startswith("<|")]
        image_token, audio_token = self._placeholders(tokenizer)
        ours = CHAT_TEMPLATE.replace("<|image|>", image_token).replace("<|audio|>", audio_token)
        super().__init__(
            image_processor or Phi4ImageProcessor(),
            audio_processor,
            tokenizer,
            chat_template=chat_template or getattr(tokenizer, "chat_template", None) or ours,
            audio_frames_per_token=audio_processor.audio_compression_rate * audio_processor.audio_downsample_rate,
        )

    @staticmethod
    def _placeholders(tokenizer: Any) -> tuple[str, str]:
        known = tokenizer.get_added_vocab() if tokenizer is not None else {}
        return next((pair for pair in PLACEHOLDERS if pair[0] in known), PLACEHOLDERS[0])

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, processor_dict: dict[str, Any] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Picture processor, audio processor and tokenizer."""
        return [
            *media_processors(pretrained_model_name_or_path, processor_dict, **kwargs),
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs),
        ]

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * int(image_inputs["num_img_tokens"][image_idx])

    @property
    def unused_input_names(self) -> list[str]:
        """What the pictures' processor counts for the text alone."""
        return ["num_img_tokens"]

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        """As in [`MixLoraProcessor`], with numbered markers read as placeholders, unless text is never control."""
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        if text is not None and not kwargs.get("sanitize_control_tokens"):
            text = [self._without_numbers(row, i) if isinstance(row, str) else row for i, row in enumerate(text)]
        return images, text, videos, audio

    def _without_numbers(self, text: str, row: int) -> str:
        """`text` with plain placeholders: items are taken in order, so numbers that say otherwise raise."""
        for kind in ("image", "audio"):
            numbers = [int(number) for found, number in NUMBERED.findall(text) if found == kind]
            if numbers != sorted(numbers):
                raise ValueError(
                    f"row {row}: {kind} markers are numbered {numbers}, but items are taken in order of appearance"
                )
        return NUMBERED.sub(lambda match: self.image_token if match[1] == "image" else self.audio_token, text)

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, tools: list | None = None, **kwargs: Any
    ) -> Any:
        """As in [`MixLoraProcessor`]; a template that takes strings alone is given parts too."""
        template = chat_template or self.chat_template
        if isinstance(template, str):
            template = with_parts(template, self.image_token, self.audio_token)
        return super().apply_chat_template(conversation, template, tools, **kwargs)

"""Names of tensors in other layouts of Phi-4-Multimodal and in ours: one table a layout, used in both directions.

A row is a pair of templates, theirs and ours; `{}` with a name stands for what both have in common. The first row that
fits a name renames it. No tensor is reshaped, split or joined.
"""

import re
from collections.abc import Callable

KeyMap = tuple[tuple[str, str], ...]

_EMBED = "model.embed_tokens_extend."
_IMAGE, _AUDIO = _EMBED + "image_embed.", _EMBED + "audio_embed."
_VISION, _SPEECH = "model.vision_tower.encoder.", "model.speech_tower.encoder."

_DECODER: KeyMap = (
    ("lm_head.weight", "lm_head.weight"),
    ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight"),
    ("model.norm.weight", "model.language_model.norm.weight"),
    ("model.layers.{n}.{which}layernorm.weight", "model.language_model.layers.{n}.{which}layernorm.weight"),
)

PHI4MM: KeyMap = (
    *_DECODER,
    ("model.layers.{n}.{rest}", "model.language_model.layers.{n}.{rest}"),
    (_IMAGE + "glb_GN", "model.vision_projector.global_separator"),
    (_IMAGE + "sub_GN", "model.vision_projector.row_separator"),
    (_IMAGE + "img_projection.0.{part}", "model.vision_projector.up.{part}"),
    (_IMAGE + "img_projection.2.{part}", "model.vision_projector.down.{part}"),
    (_IMAGE + "img_processor.{rest}", _VISION + "{rest}"),
    (_AUDIO + "audio_projection.speech.0.{part}", "model.speech_projector.speech.up.{part}"),
    (_AUDIO + "audio_projection.speech.2.{part}", "model.speech_projector.speech.down.{part}"),
    (_AUDIO + "audio_projection.vision.0.{part}", "model.speech_projector.vision_speech.up.{part}"),
    (_AUDIO + "audio_projection.vision.2.{part}", "model.speech_projector.vision_speech.down.{part}"),
    (
        _AUDIO + "encoder.encoders.{n}.feed_forward_{side}.net.0.linear.{part}",
        _SPEECH + "encoders.{n}.feed_forward_{side}.gate_up_proj.{part}",
    ),
    (
        _AUDIO + "encoder.encoders.{n}.feed_forward_{side}.net.2.{part}",
        _SPEECH + "encoders.{n}.feed_forward_{side}.down_proj.{part}",
    ),
    (
        _AUDIO + "encoder.encoders.{n}.self_attn.linear_out.{part}",
        _SPEECH + "encoders.{n}.self_attn.o_proj.{part}",
    ),
    (
        _AUDIO + "encoder.encoders.{n}.self_attn.linear_{q}.{part}",
        _SPEECH + "encoders.{n}.self_attn.{q}_proj.{part}",
    ),
    (_AUDIO + "encoder.{rest}", _SPEECH + "{rest}"),
)
"""Microsoft's shards, config of model type `phi4mm`: adapters lie beside their `base_layer`."""

NATIVE: KeyMap = (
    *_DECODER,
    (
        "model.layers.{n}.{block}.{which}_proj.weight",
        "model.language_model.layers.{n}.{block}.{which}_proj.base_layer.weight",
    ),
    (_IMAGE + "global_img_feature_extensor", "model.vision_projector.global_separator"),
    (_IMAGE + "sub_img_feature_extensor", "model.vision_projector.row_separator"),
    (_IMAGE + "img_projection_{side}.{part}", "model.vision_projector.{side}.{part}"),
    (_IMAGE + "img_processor.{rest}", _VISION + "{rest}"),
    (_AUDIO + "{side}_proj_for_{which}.{part}", "model.speech_projector.{which}.{side}.{part}"),
    (_AUDIO + "encoder.{rest}", _SPEECH + "{rest}"),
)
"""Transformers' own layout, model type `phi4_multimodal`: no adapters among the weights."""

KEY_MAPS: dict[str, KeyMap] = {"phi4mm": PHI4MM, "phi4_multimodal": NATIVE}
"""Layouts by the model type of their config."""


def adapter_map(adapter: str) -> KeyMap:
    """The table of a PEFT folder of `adapter`; keys come with and without `base_model.model.`, and leave with."""
    ours = "model.language_model.layers.{n}.{path}.lora_{side}." + adapter + ".weight"
    theirs = "model.layers.{n}.{path}.lora_{side}.weight"
    return ("base_model.model." + theirs, ours), (theirs, ours)


def _pattern(template: str) -> re.Pattern[str]:
    """A template as a regular expression; `{n}` is a number, any other name the shortest text without gaps."""
    parts = re.split(r"\{(\w+)\}", template)
    texts, names = parts[::2], parts[1::2]
    groups = [f"(?P<{name}>{'[0-9]+' if name == 'n' else '.*?'})" for name in names] + [""]
    return re.compile("".join(re.escape(text) + group for text, group in zip(texts, groups, strict=True)))


def renamer(key_map: KeyMap, to_ours: bool) -> Callable[[str], str | None]:
    """A function from a name to its name on the other side, None where no row fits."""
    rows = [(_pattern(row[not to_ours]), row[to_ours]) for row in key_map]

    def rename(name: str) -> str | None:
        for pattern, template in rows:
            if match := pattern.fullmatch(name):
                return template.format(**match.groupdict())
        return None

    return rename

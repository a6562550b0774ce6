"""Conversations of text, pictures and speech to model inputs, rows of any kind together."""

import base64
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .audio_processing_mixlora import MixLoraAudioProcessor, load_clip
from .image_processing_mixlora import MixLoraImageProcessor, load_picture

# Each message is `<|role|>content<|end|>`, without newlines, as in Phi-4; tools stand in the system message.
CHAT_TEMPLATE = """
{%- macro content(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] or [] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- elif part['type'] == 'image' -%}<|image|>
{%- elif part['type'] == 'audio' -%}<|audio|>
{%- endif -%}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools and (not messages or messages[0]['role'] != 'system') -%}
<|system|><|tool|>{{ tools | tojson }}<|/tool|><|end|>
{%- endif -%}
{%- for message in messages -%}
<|{{ message['role'] }}|>{{ content(message) }}
{%- if tools and loop.first and message['role'] == 'system' -%}<|tool|>{{ tools | tojson }}<|/tool|>{%- endif -%}
{%- if message['tool_calls'] -%}<|tool_call|>{{ message['tool_calls'] | tojson }}<|/tool_call|>{%- endif -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}
""".strip()
ROLES = ("system", "user", "assistant", "tool")
SOURCES = {"image": ("image", "path", "base64"), "audio": ("audio", "path", "base64")}


class MixLoraProcessor(ProcessorMixin):
    """Tokenizer, picture and clip processor in one.

    Text in messages can't become a role marker or a placeholder: `apply_chat_template` encodes control tokens in
    content as plain text unless `sanitize_control_tokens=False`. In `processor(text=...)` markers do act.
    """

    def __init__(
        self,
        image_processor: MixLoraImageProcessor | None = None,
        audio_processor: MixLoraAudioProcessor | None = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_seq_length: int = 49,
        audio_frames_per_token: int = 8,
    ):
        """
        Args:
            image_seq_length: placeholders of a picture.
            audio_frames_per_token: mel frames of one placeholder of a clip.
        """
        self.image_token, self.audio_token = "<|image|>", "<|audio|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)
        self.image_seq_length, self.audio_frames_per_token = image_seq_length, audio_frames_per_token
        super().__init__(
            image_processor or MixLoraImageProcessor(),
            audio_processor or MixLoraAudioProcessor(),
            tokenizer,
            chat_template=chat_template or CHAT_TEMPLATE,
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs: Any) -> str:
        frames = int(audio_inputs["input_features_mask"][audio_idx].sum())
        return self.audio_token * -(-frames // self.audio_frames_per_token)

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        """Decodes media; `images` and `audio` may be flat, or one list a row, which is then checked row by row."""
        if videos is not None:
            raise ValueError("videos are not supported")
        text = [text] if isinstance(text, str) else list(text) if text is not None else None
        rate = kwargs.get("sampling_rate")
        pictures = self._layout(images, text, self.image_token, "picture", load_picture)
        clips = self._layout(audio, text, self.audio_token, "clip", lambda c, where: load_clip(c, rate, where))
        return pictures, text, None, clips

    @staticmethod
    def _layout(items: Any, text: list[str] | None, token: str, what: str, load: Any) -> list | None:
        if items is None or (isinstance(items, list) and not items):
            return None
        if not isinstance(items, list):
            items = [items]
        if not isinstance(items[0], list):
            return [load(item, f"{what} {i}") for i, item in enumerate(items)]
        return [load(item, f"row {row}, {what} {i}") for row, mine in enumerate(items) for i, item in enumerate(mine)]

    def validate_inputs(self, images: Any = None, text: Any = None, audio: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where text and media do not match in number."""
        if not text or any(not isinstance(row, str) for row in text):
            raise ValueError("text: expected a string or a non-empty list of strings")
        for items, token, what in ((images, self.image_token, "pictures"), (audio, self.audio_token, "clips")):
            counts = [row.count(token) for row in text]
            if sum(counts) != len(items or []):
                raise ValueError(f"{token} stands {counts} times in the rows, but {len(items or [])} {what} are given")

    def __call__(self, images: Any = None, text: Any = None, audio: Any = None, **kwargs: Any) -> BatchFeature:
        """Model inputs of rows of text with placeholders `<|image|>` and `<|audio|>`.

        Args:
            images, audio: all items in order of appearance, or one list a row.
            kwargs: as in transformers; `sampling_rate` of plain samples. Rows are padded by default.

        Raises:
            ValueError: a row's placeholders and items differ, or an item can't be used; it names the row and the item.
        """
        rows = [text] if isinstance(text, str) else text
        if not kwargs.get("sanitize_control_tokens"):
            self._check_rows(rows, images, self.image_token, "pictures")
            self._check_rows(rows, audio, self.audio_token, "clips")
        kwargs.setdefault("padding", True)
        kwargs.setdefault("return_tensors", "pt")
        return super().__call__(images=images, text=text, audio=audio, **kwargs)

    @staticmethod
    def _check_rows(rows: Any, items: Any, token: str, what: str) -> None:
        if not isinstance(items, list) or not items or not isinstance(items[0], list) or rows is None:
            return
        if len(items) != len(rows):
            raise ValueError(f"{what}: {len(items)} lists for {len(rows)} rows of text")
        for row, (text, mine) in enumerate(zip(rows, items)):
            if text.count(token) != len(mine):
                raise ValueError(f"row {row}: {token} stands {text.count(token)} times, but it has {len(mine)} {what}")

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with control tokens in the content of messages read as plain text.

        Parts are `{"type": "text", "text"}`, `{"type": "image", "image" | "path" | "base64"}` and
        `{"type": "audio", "audio" | "path" | "base64", "sampling_rate"?}`, or OpenAI's `input_audio` and data-URL
        `image_url`. Nothing is fetched from the network.

        Raises:
            ValueError: an unknown role or part, or a part without its medium; it names the row, message and part.
        """
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        chats = conversation if batched else [conversation]
        chats = [[_message(m, f"row {r}, message {i}") for i, m in enumerate(chat)] for r, chat in enumerate(chats)]
        kwargs.setdefault("sanitize_control_tokens", bool(kwargs.get("tokenize", False)))
        return super().apply_chat_template(chats if batched else chats[0], *args, **kwargs)

    def _multimodal_inputs_from_conversations(
        self, conversations: list, audio_loading_params: dict, load_audio_from_video: bool = False
    ) -> tuple[list, list, list, dict]:
        """All media of the conversations, decoded: pictures a row, clips flat."""
        images: list[list] = []
        clips: list = []
        for row, chat in enumerate(conversations):
            parts = [part for message in chat if not isinstance(message.get("content"), str)
                     for part in message.get("content") or []]  # fmt: skip
            pictures = [part for part in parts if part["type"] == "image"]
            images.append([load_picture(_source(p), f"row {row}, picture {i}") for i, p in enumerate(pictures)])
            mine = [part for part in parts if part["type"] == "audio"]
            for i, part in enumerate(mine):
                clips.append(load_clip(_source(part), part.get("sampling_rate"), f"row {row}, clip {i}"))
        return images, [[] for _ in conversations], clips, {}


def _source(part: dict[str, Any]) -> Any:
    """The medium of a checked part."""
    if "base64" in part:
        return base64.b64decode(part["base64"])
    return next(part[key] for key in SOURCES[part["type"]] if key in part)


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A checked copy of a message, its parts in our form."""
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}: role {message.get('role')!r} is not one of {', '.join(ROLES)}")
    content = message.get("content")
    if not isinstance(content, list | tuple):
        if not isinstance(content, str) and content is not None:
            raise ValueError(f"{where}: content must be a string or a list of parts, got {type(content).__name__}")
        return dict(message)
    return {**message, "content": [_part(part, f"{where}, part {i}") for i, part in enumerate(content)]}


def _part(part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: a text part needs a string under 'text'")
        return dict(part)
    if kind == "input_audio" and "data" in part.get("input_audio", {}):
        return {"type": "audio", "base64": part["input_audio"]["data"]}
    if kind == "image_url":
        url = part.get("image_url", "")
        head, _, data = (url.get("url", "") if isinstance(url, dict) else url).partition(";base64,")
        if not data or not head.startswith("data:image/"):
            raise ValueError(f"{where}: only data URLs with base64 are read, nothing is fetched")
        return {"type": "image", "base64": data}
    if kind not in SOURCES:
        raise ValueError(f"{where}: type {kind!r} is not one of text, image, audio, image_url, input_audio")
    given = [key for key in SOURCES[kind] if part.get(key) is not None]
    if len(given) != 1:
        raise ValueError(f"{where}: an {kind} part needs exactly one of {', '.join(SOURCES[kind])}, got {given}")
    return dict(part)

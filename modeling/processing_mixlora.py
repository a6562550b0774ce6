"""Conversations of text, pictures and speech to model inputs, rows of any kind together."""

import numbers
from pathlib import Path
from typing import Any

from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .audio_processing_mixlora import RATE, MixLoraAudioProcessor, load_clip
from .chat_template import CHAT_TEMPLATE, TEMPLATE_TOKENS, checked_message, keys_of
from .image_processing_mixlora import MixLoraImageProcessor, load_picture


class MixLoraProcessor(ProcessorMixin):
    """Tokenizer, picture and clip processor in one.

    Text in messages can't become a role marker or a placeholder: `apply_chat_template` encodes control tokens in
    content as plain text unless `sanitize_control_tokens=False`. In `processor(text=...)` markers do act.

    Rows are padded, on the left unless the tokenizer was made with another `padding_side`.
    """

    text_kwargs = {"padding": True, "return_tensors": "pt", "return_token_type_ids": False}

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

        Raises:
            ValueError: no tokenizer, or one that lacks a control token.
        """
        self.image_token, self.audio_token = self._placeholders(tokenizer)
        chat_template = chat_template or CHAT_TEMPLATE
        self._check_tokenizer(tokenizer, TEMPLATE_TOKENS if chat_template == CHAT_TEMPLATE else ())
        if "padding_side" not in tokenizer.init_kwargs:
            tokenizer.padding_side = "left"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.audio_token_id = tokenizer.convert_tokens_to_ids(self.audio_token)
        self.image_seq_length, self.audio_frames_per_token = image_seq_length, audio_frames_per_token
        super().__init__(
            image_processor or MixLoraImageProcessor(),
            audio_processor or MixLoraAudioProcessor(),
            tokenizer,
            chat_template=chat_template,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Both layouts of Phi-4-Multimodal's processor give a [`Phi4MMProcessor`]."""
        from .processing_phi4 import Phi4MMProcessor, is_phi4_processor  # it builds upon this module

        name = pretrained_model_name_or_path
        if cls is MixLoraProcessor and is_phi4_processor(name, *args, **kwargs):
            return Phi4MMProcessor.from_pretrained(name, *args, **kwargs)
        return super().from_pretrained(name, *args, **kwargs)

    @staticmethod
    def _placeholders(tokenizer: Any) -> tuple[str, str]:
        """Placeholders of a picture and of a clip."""
        return "<|image|>", "<|audio|>"

    def _check_tokenizer(self, tokenizer: Any, template_tokens: tuple[str, ...]) -> None:
        if tokenizer is None:
            raise ValueError("tokenizer: one is needed")
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        missing = [t for t in (self.image_token, self.audio_token, *template_tokens) if t not in special]
        if missing:
            raise ValueError(f"tokenizer: it lacks the special tokens {', '.join(missing)}")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.image_seq_length

    def replace_audio_token(self, audio_inputs: dict, audio_idx: int, **kwargs: Any) -> str:
        frames = int(audio_inputs["input_features_mask"][audio_idx].sum())
        return self.audio_token * -(-frames // self.audio_frames_per_token)

    def __call__(self, images: Any = None, text: Any = None, audio: Any = None, **kwargs: Any) -> BatchFeature:
        """Model inputs of rows of text with placeholders `<|image|>` and `<|audio|>`.

        Args:
            images, audio: all items in order of appearance, or one list a row, which is then checked row by row.
            text: a string, or one a row.
            kwargs: as in transformers; `sampling_rate` of plain samples.

        Returns:
            `input_ids`, `attention_mask` `[rows, length]`; of pictures, if there are any, `pixel_values`
            `[pictures, 3, size, size]` and `image_sizes` `[pictures, 2]`; of clips `input_features`
            `[clips, frames, mels]` and `input_features_mask` `[clips, frames]`.

        Raises:
            ValueError: a row's placeholders and items differ, or an item can't be used; it names the row and the item.
        """
        return super().__call__(images=images, text=text, audio=audio, **kwargs)

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        """Decodes media, and keeps them as they are given: all in one list, or one list a row."""
        if videos is not None:
            raise ValueError("videos are not supported")
        text = list(text) if isinstance(text, list | tuple) else [text]
        rate = kwargs.get("sampling_rate") or kwargs.get("audio_kwargs", {}).get("sampling_rate")
        pictures = _load_all(images, "picture", load_picture)
        clips = _load_all(audio, "clip", lambda clip, where: load_clip(clip, rate, where))
        return pictures, text, None, clips

    def validate_inputs(self, images: Any = None, text: Any = None, audio: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where text is missing, or text and media do not match in number, row by row."""
        if not text or any(not isinstance(row, str) for row in text):
            raise ValueError("text: expected a string or a non-empty list of strings")
        if "" in text:
            raise ValueError(f"row {text.index('')}: the text is empty")
        for items, token, what in ((images, self.image_token, "picture"), (audio, self.audio_token, "clip")):
            _check_counts([row.count(token) for row in text], items or [], token, what)

    def _process_images(self, images: Any, **kwargs: Any) -> tuple:
        return super()._process_images(_flat(images), **kwargs)

    def _process_audio(self, audio: Any, **kwargs: Any) -> tuple:
        kwargs["sampling_rate"] = RATE  # that of the source came before: clips are resampled when they are loaded
        return super()._process_audio(_flat(audio), **kwargs)

    def _resolve_audio_loading_params(self, processor_kwargs: dict) -> dict:
        """As in transformers, but a rate that no one gave stays unknown."""
        given = processor_kwargs.get("sampling_rate") or processor_kwargs.get("audio_kwargs", {}).get("sampling_rate")
        return super()._resolve_audio_loading_params(processor_kwargs) | {"sampling_rate": given}

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, tools: list | None = None, **kwargs: Any
    ) -> Any:
        """As in transformers, with control tokens in the content of messages read as plain text.

        Parts are `{"type": "text", "text"}`, `{"type": "image", "image" | "path" | "base64"}` and
        `{"type": "audio", "audio" | "path" | "base64", "sampling_rate"?}`, or OpenAI's `input_audio` and data-URL
        `image_url`. Nothing is fetched from the network. Without `tokenize=True` the result is the bare text, in which
        nothing is told apart any more.

        Raises:
            ValueError: an unknown role or part, or a part without its medium; it names the row, message and part.
        """
        tokenize = kwargs.get("tokenize", False)
        sanitize = kwargs.setdefault("sanitize_control_tokens", bool(tokenize))
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        chats = conversation if batched else [conversation]
        for row, chat in enumerate(chats):
            if not chat:
                raise ValueError(f"row {row}: no messages")
        bare = not tokenize or bool((kwargs.get("processor_kwargs") or {}).get("images"))
        chats = [[checked_message(m, f"row {r}, message {i}", bare) for i, m in enumerate(c)]
                 for r, c in enumerate(chats)]  # fmt: skip
        if sanitize:
            self._refuse_control_keys([tools or [], *chats])
        return super().apply_chat_template(chats if batched else chats[0], chat_template, tools, **kwargs)

    def _refuse_control_keys(self, values: list) -> None:
        """Sanitising covers values but not keys, such as the names of a tool's arguments."""
        control = [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for row, value in enumerate(values, start=-1):
            bad = [key for key in keys_of(value) if any(token in key for token in control)]
            if bad:
                raise ValueError(f"{'tools' if row < 0 else f'row {row}'}: the key {bad[0]!r} holds a control token")

    def _multimodal_inputs_from_conversations(
        self, conversations: list, audio_loading_params: dict, load_audio_from_video: bool = False
    ) -> tuple[list, list, list, dict]:
        """All media of the conversations, decoded, one list a row."""
        images: list[list] = []
        clips: list[list] = []
        for row, chat in enumerate(conversations):
            contents = [message["content"] for message in chat if isinstance(message.get("content"), list)]
            parts = [part for content in contents for part in content]
            pictures = [part["image"] for part in parts if "image" in part]
            images.append([load_picture(source, f"row {row}, picture {i}") for i, source in enumerate(pictures)])
            heard = [part for part in parts if "audio" in part]
            rates = [part.get("sampling_rate") or audio_loading_params["sampling_rate"] for part in heard]
            mine = [load_clip(p["audio"], rates[i], f"row {row}, clip {i}") for i, p in enumerate(heard)]
            clips.append([(clip, RATE) for clip in mine])
        return images, [[] for _ in conversations], clips if any(clips) else [], {}


def _is_row(item: Any) -> bool:
    """Whether it is a list of media, rather than a list of samples or a medium."""
    return isinstance(item, list) and not (item and isinstance(item[0], numbers.Real))


def _load_all(items: Any, what: str, load: Any) -> list | None:
    """Media decoded, in one list or one list a row; None where there are none."""
    if items is None or (_is_row(items) and not items):
        return None
    items = items if _is_row(items) else [items]
    if not any(item is None or _is_row(item) for item in items):
        return [load(item, f"{what} {i}") for i, item in enumerate(items)]
    for row, item in enumerate(items):
        if item is not None and not _is_row(item):
            raise ValueError(
                f"row {row}: expected a list of {what}s, as for the other rows, got {type(item).__name__}"
            )
    loaded = [
        [load(item, f"row {r}, {what} {i}") for i, item in enumerate(mine or [])] for r, mine in enumerate(items)
    ]
    return loaded if any(loaded) else None


def _flat(items: list) -> list:
    return [item for row in items for item in row] if _is_row(items[0]) else items


def _check_counts(counts: list[int], items: list, token: str, what: str) -> None:
    """Raises ValueError where rows with `counts` placeholders do not match `items`, flat or one list a row."""
    if not items or not _is_row(items[0]):
        if sum(counts) != len(items):
            raise ValueError(
                f"the rows hold {counts} {token}, {sum(counts)} in all, but {len(items)} {what}s are given"
            )
        return
    if len(items) != len(counts):
        raise ValueError(f"{what}s: {len(items)} lists for {len(counts)} rows of text")
    for row, (count, mine) in enumerate(zip(counts, items, strict=True)):
        if count != len(mine):
            alone = f"{what} {count} has no placeholder" if count < len(mine) else f"placeholder {len(mine)} has none"
            raise ValueError(f"row {row}: {token} stands {count} times, but it has {len(mine)} {what}s; {alone}")

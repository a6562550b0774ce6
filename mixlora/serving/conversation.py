"""A client's messages as a conversation of ours, with every medium decoded within the limits."""

from typing import Any

from mixlora.modeling.audio_processing_mixlora import RATE
from mixlora.serving.fetching import fetch
from mixlora.serving.media import MediaError, MediaLimits, decode_base64, read_clip, read_picture
from mixlora.serving.openai_form import AudioPart, ChatForm, ImagePart, TextPart


class ConversationReader:
    """Reads the messages of a form.

    Args:
        limits: of media.
        hosts: from which pictures may be fetched.
    """

    def __init__(self, limits: MediaLimits, hosts: frozenset[str]) -> None:
        self.limits, self.hosts = limits, hosts

    async def fetched(self, form: ChatForm) -> dict[str, bytes]:
        """The bytes of every picture that is given by its address.

        Raises:
            MediaError: see [`fetch`]; or too many items, or too much text.
        """
        self._check_amount(form)
        urls = {part.image_url.url for part in _parts(form) if isinstance(part, ImagePart)}
        return {
            url: await fetch(url, self.hosts, self.limits.bytes) for url in sorted(urls) if not url.startswith("data:")
        }

    def read(self, form: ChatForm, fetched: dict[str, bytes]) -> list[dict[str, Any]]:
        """The conversation. Takes as long as decoding does: call it in a thread.

        Raises:
            MediaError: a picture or clip is not taken.
        """
        conversation: list[dict[str, Any]] = []
        for number, message in enumerate(form.messages):
            role = "system" if message.role == "developer" else message.role
            content: Any = message.content
            if isinstance(content, list):
                where = f"messages[{number}].content"
                content = [self._part(part, f"{where}[{i}]", fetched) for i, part in enumerate(content)]
            conversation.append({"role": role, "content": content})
        return conversation

    def _check_amount(self, form: ChatForm) -> None:
        items = sum(not isinstance(part, TextPart) for part in _parts(form))
        if items > self.limits.items:
            raise MediaError(f"messages: {items} pictures and clips, at most {self.limits.items} are taken")
        characters = sum(len(message.content) for message in form.messages if isinstance(message.content, str))
        characters += sum(len(part.text) for part in _parts(form) if isinstance(part, TextPart))
        if characters > self.limits.text:
            raise MediaError(f"messages: {characters} characters, at most {self.limits.text} are taken")

    def _part(self, part: TextPart | ImagePart | AudioPart, where: str, fetched: dict[str, bytes]) -> dict[str, Any]:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, AudioPart):
            data = decode_base64(part.input_audio.data, where, self.limits)
            return {"type": "audio", "audio": read_clip(data, where, self.limits), "sampling_rate": RATE}
        url = part.image_url.url
        if url not in fetched:
            head, _, encoded = url.partition(",")
            if not head.startswith("data:") or not head.endswith(";base64"):
                raise MediaError(f"{where}: a data URL must be of base64")
            data = decode_base64(encoded, where, self.limits)
        else:
            data = fetched[url]
        return {"type": "image", "image": read_picture(data, where, self.limits)}


def _parts(form: ChatForm) -> list[TextPart | ImagePart | AudioPart]:
    return [part for message in form.messages if isinstance(message.content, list) for part in message.content]

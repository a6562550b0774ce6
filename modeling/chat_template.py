"""Conversations: the template that writes them, and their messages checked and brought into one form."""

import base64
import binascii
from collections.abc import Iterator
from typing import Any

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
# In front of a template that takes strings alone, such as Microsoft's: parts, calls and tools are written into
# content. It is done in the template, so that placeholders are told from text that a user typed.
_PARTS_AS_TEXT = """
{%- set flat = namespace(messages=[]) -%}
{%- if tools and (not messages or messages[0]['role'] != 'system') -%}
{%- set flat.messages = [{'role': 'system', 'content': '', 'tools': tools | tojson}] -%}
{%- endif -%}
{%- for message in messages -%}
{%- set content -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for part in message['content'] or [] -%}
{%- if part['type'] == 'text' -%}{{ part['text'] }}
{%- elif part['type'] == 'image' -%}<|image|>
{%- elif part['type'] == 'audio' -%}<|audio|>
{%- endif -%}{%- endfor -%}{%- endif -%}
{%- if message['tool_calls'] -%}<|tool_call|>{{ message['tool_calls'] | tojson }}<|/tool_call|>{%- endif -%}
{%- endset -%}
{%- set message = dict(message, content=content) -%}
{%- if tools and loop.first and message['role'] == 'system' and not message['tools'] -%}
{%- set message = dict(message, tools=tools | tojson) -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [message] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
""".strip()
ROLES = ("system", "user", "assistant", "tool")
TEMPLATE_TOKENS = ("<|end|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", *(f"<|{role}|>" for role in ROLES))
SOURCES = ("path", "base64")  # besides the kind itself, as in {"type": "image", "image": ...}


def with_parts(template: str, image_token: str = "<|image|>", audio_token: str = "<|audio|>") -> str:
    """A template that reads parts: `template` itself, or one that takes strings alone, made to.

    A template that reads parts has to look at their "type".
    """
    if "type" in template:
        return template
    return _PARTS_AS_TEXT.replace("<|image|>", image_token).replace("<|audio|>", audio_token) + template


def checked_message(message: Any, where: str, bare: bool = False) -> dict[str, Any]:
    """A copy of a message, its parts in our form: text, and media under the key of their kind.

    Neighbouring text parts are joined, so that no control token can be typed in pieces, one part each.

    Args:
        message: role and content; the content is a string or a list of parts.
        where: how errors call it.
        bare: allow image and audio parts without a medium.

    Raises:
        ValueError: an unknown role or part, or a part without its medium.
    """
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        role = message.get("role") if isinstance(message, dict) else message
        raise ValueError(f"{where}: role {role!r} is not one of {', '.join(ROLES)}")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return dict(message)
    if not isinstance(content, list | tuple):
        raise ValueError(f"{where}: content must be a string or a list of parts, got {type(content).__name__}")
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        part = _checked_part(part, f"{where}, part {i}", bare)
        if part["type"] == "text" and parts and parts[-1]["type"] == "text":
            part = {"type": "text", "text": parts.pop()["text"] + part["text"]}
        parts.append(part)
    return {**message, "content": parts}


def _checked_part(part: Any, where: str, bare: bool) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: a text part needs a string under 'text'")
        return {"type": "text", "text": part["text"]}
    if kind == "input_audio":
        inner = part.get("input_audio")
        return {"type": "audio", "audio": _decode(inner.get("data") if isinstance(inner, dict) else None, where)}
    if kind == "image_url":
        return {"type": "image", "image": _decode(_data_of_url(part.get("image_url"), where), where)}
    if kind not in ("image", "audio"):
        if not isinstance(part, dict):
            raise ValueError(f"{where}: a part must be a dict, got {type(part).__name__}")
        raise ValueError(f"{where}: type {kind!r} is not one of text, image, audio, image_url, input_audio")
    given = [key for key in (kind, *SOURCES, "url") if part.get(key) is not None]
    if given == ["url"]:
        source: Any = _decode(_data_of_url(part["url"], where), where)
    elif len(given) == 1:
        source = _decode(part["base64"], where) if given == ["base64"] else part[given[0]]
    elif given or not bare:
        raise ValueError(f"{where}: an {kind} part needs exactly one of {kind}, {', '.join(SOURCES)}, got {given}")
    else:
        return {"type": kind}
    rate = {"sampling_rate": part["sampling_rate"]} if part.get("sampling_rate") is not None else {}
    return {"type": kind, kind: source, **rate}


def _data_of_url(url: Any, where: str) -> str:
    url = url.get("url") if isinstance(url, dict) else url
    head, _, data = url.partition(";base64,") if isinstance(url, str) else ("", "", "")
    if not data or not head.startswith("data:"):
        raise ValueError(f"{where}: only data URLs with base64 are read; nothing is fetched")
    return data


def _decode(data: Any, where: str) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"{where}: can't be read as base64 ({error})") from error


def keys_of(value: Any) -> Iterator[str]:
    """All keys in a nest of dicts and lists."""
    if isinstance(value, dict):
        yield from (str(key) for key in value)
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            if isinstance(item, dict | list | tuple):
                yield from keys_of(item)

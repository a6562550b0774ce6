"""What surrounds the page: private folders, the question for a name, headers, plain texts."""

import asyncio
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixlora.demo.headers import SafeHeaders
from mixlora.demo.plain import show_plain
from mixlora.demo.run import PrivateFolders, parse_auth


def test_auth_is_a_name_and_a_password() -> None:
    assert parse_auth(None) is None
    assert parse_auth("anna:se:cret") == ("anna", "se:cret")
    for wrong in ("anna", "anna:", ":secret", ""):
        with pytest.raises(ValueError, match="NAME:PASSWORD"):
            parse_auth(wrong)


def test_folders_are_private_and_removed() -> None:
    before = (Path.cwd(), tempfile.gettempdir(), os.environ.get("GRADIO_TEMP_DIR"))
    folders = PrivateFolders()
    try:
        assert Path.cwd() == folders.empty and list(folders.empty.iterdir()) == []
        assert Path(tempfile.gettempdir()) == folders.temporary != folders.uploads
        assert os.environ["GRADIO_TEMP_DIR"] == str(folders.uploads)
        assert all(folder.stat().st_mode & 0o077 == 0 for folder in (folders.root, folders.uploads))
    finally:
        folders.remove()
    assert (Path.cwd(), tempfile.gettempdir(), os.environ.get("GRADIO_TEMP_DIR")) == before
    assert not folders.root.exists()


def test_every_answer_gets_the_headers() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"x"})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(SafeHeaders(app)({"type": "http"}, None, send))
    headers = dict(sent[0]["headers"])
    assert headers[b"a"] == b"b" and b"default-src 'self'" in headers[b"content-security-policy"]
    assert sent[1] == {"type": "http.response.body", "body": b"x"}


class Part(SimpleNamespace):
    """As Gradio's parts of a message."""

    def model_copy(self, update: dict[str, Any]) -> "Part":
        return Part(**{**vars(self), **update})


def test_texts_are_escaped_to_the_browser_and_come_back_as_they_were() -> None:
    chatbot = show_plain(
        SimpleNamespace(
            _preprocess_content=lambda part: {"type": part.type, "text": part.text},
            _postprocess_content=lambda text: Part(type="text", text=text),
        )
    )
    for text in ("<img src='https://evil.example/a.png'>", "a < b & c", "&lt;b&gt;", "plain"):
        shown = chatbot._postprocess_content(text)
        assert "<" not in shown.text
        assert chatbot._preprocess_content(shown)["text"] == text

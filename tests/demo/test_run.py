"""What surrounds the page: private folders, the question for a name, headers, plain texts."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mixlora.demo.headers import SafeHeaders
from mixlora.demo.plain import show_plain
from mixlora.demo.run import PrivateFolders, parse_auth
from tests.serving.serving_fixtures import model_and_processor


def test_a_browser_that_is_required_is_there() -> None:
    """Where MIXLORA_REQUIRE_BROWSER is set, as in .ci/run, the tests of the page may not be skipped."""
    if os.environ.get("MIXLORA_REQUIRE_BROWSER") == "1":
        assert find_spec("gradio") and find_spec("playwright"), "install the extras demo and dev"
        assert shutil.which("chromium") or shutil.which("chromium-browser"), "install Chromium"


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_signal_ends_it_and_removes_what_was_uploaded(tmp_path: Path) -> None:
    """As a service manager ends it."""
    model, processor = model_and_processor()
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    root, port = Path(__file__).resolve().parents[2], str(_free_port())
    program = f"import sys; sys.path.insert(0, {str(root)!r}); from mixlora.cli import main; main()"
    command = ["demo", "--no-browser", "--port", port, "--model", str(tmp_path / "tiny")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *command],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        assert process.stderr is not None
        told = next((line for line in process.stderr if line.startswith("open ")), "")
        assert told == f"open http://127.0.0.1:{port}/\n"
        [folder] = tmp_path.glob("mixlora-demo-*")
        (folder / "uploads" / "a.png").write_bytes(b"x")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and not folder.exists()
    finally:
        process.kill()
        process.communicate()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


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

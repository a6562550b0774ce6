"""A real server in a process of its own: OpenAI's client, clients that leave, and a clean end."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `serve`")

from mixlora.serving.addresses import is_loopback, names_of
from mixlora.serving.sampling import Sampling
from tests.serving.serving_fixtures import alone, clip, model_and_processor, turn
from tests.serving.test_server import KINDS, data_url, png, wav

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    process: subprocess.Popen
    address: str

    def figures(self) -> dict[str, float]:
        """What `/metrics` tells."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}

    def running(self) -> float:
        """Requests that answer."""
        return sum(value for name, value in self.figures().items() if name.startswith("mixlora_running{"))

    def ask(self, text: str, **fields: Any) -> Any:
        """An open answer of `/v1/chat/completions`."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], **fields}
        return urllib.request.urlopen(
            urllib.request.Request(
                f"{self.address}/v1/chat/completions", json.dumps(body).encode(), {"content-type": "application/json"}
            ),
            timeout=120,
        )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    model, processor = model_and_processor()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from mixlora.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", "--model", str(checkpoint), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    assert process.stderr is not None
    told = []
    for line in process.stderr:
        told.append(line)
        if found := re.search(r"(http://127\.0\.0\.1:\d+)/v1 serves tiny", line):
            break
    else:
        raise AssertionError("".join(told))
    drain = threading.Thread(target=process.stderr.read, daemon=True)  # or the pipe would fill
    drain.start()
    yield Server(process, found.group(1))
    process.kill()
    process.wait()


def test_openais_client_unchanged(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="needs OpenAI's client")
    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    parts = model_and_processor()
    for modality, (pictures, clips) in KINDS.items():
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(png(one))}} for one in pictures
        ]
        content += [
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(one)).decode(), "format": "wav"}}
            for one in clips
        ]
        content.append({"type": "text", "text": "What is it?"})
        asked = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_completion_tokens": 9}
        whole = client.chat.completions.create(**asked)
        tokens = alone(*parts, [turn("What is it?", tuple(pictures), tuple(clips))], Sampling(9))
        wanted = parts[1].tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert whole.choices[0].message.content == wanted and whole.mixlora["modality"] == modality
        stream = client.chat.completions.create(**asked, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in stream).strip() == wanted
    heard = client.audio.transcriptions.create(model="tiny", file=("a.wav", wav(clip())), temperature=0)
    assert heard.text
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], temperature=9)
    with pytest.raises(openai.NotFoundError, match="the model here is 'tiny'"):
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])


def test_a_client_that_leaves_frees_its_row(server: Server) -> None:
    for stream in (True, False):
        answer = threading.Thread(target=lambda stream=stream: _leave(server, stream))  # type: ignore[misc]
        answer.start()
        answer.join()
        for _ in range(100):
            if server.running() == 0:
                break
            time.sleep(0.05)
        assert server.running() == 0
    assert server.figures()['mixlora_ended_total{modality="text",reason="cancelled"}'] == 2


def _leave(server: Server, stream: bool) -> None:
    """Asks for a long answer and goes away while it is made."""
    import socket

    host, port = server.address.removeprefix("http://").split(":")
    body = json.dumps(
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 480,
            "stream": stream,
        }
    )
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        for _ in range(200):
            if server.running() == 1:
                break
            time.sleep(0.01)


def test_a_signal_under_load_ends_cleanly(server: Server) -> None:  # the last one: it ends the server
    """What runs is answered whole, new connections are refused, and the status is 0."""
    with ThreadPoolExecutor(6) as pool:
        answers = [pool.submit(lambda i=i: json.load(server.ask(f"Hello {i}", max_tokens=300))) for i in range(6)]  # type: ignore[misc]
        while server.running() < 6:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        with pytest.raises(OSError):
            server.ask("Late", max_tokens=1)
        for answer in answers:
            body = answer.result()
            assert body["usage"]["completion_tokens"] == 300 and body["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(30) == 0


def test_loopback_is_called_by_its_own_names() -> None:
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost")
    assert not is_loopback("0.0.0.0") and not is_loopback("example.org")
    assert "localhost" in names_of("127.0.0.1") and names_of("0.0.0.0") == ("*",)

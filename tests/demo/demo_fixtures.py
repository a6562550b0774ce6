"""The page of a tiny model, and what a program may send to it without any client library."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from mixlora.demo.chat import DemoLimits
from mixlora.demo.run import Demo
from mixlora.serving.media import MediaLimits
from tests.serving.serving_fixtures import model_and_processor

MEDIA = MediaLimits(bytes=200_000, pixels=250_000, seconds=2.0, items=4, text=300)
LIMITS = DemoLimits(media=MEDIA, turns=3, tokens=400, running=2)
SETTINGS = {"tokens": 4, "temperature": 0, "top_p": 1, "top_k": 0, "seed": 0}


@contextmanager
def tiny_demo() -> Iterator[Demo]:
    """A page on a port of its own."""
    running = Demo(*model_and_processor(), limits=LIMITS)
    try:
        yield running
    finally:
        running.close()


class Visitor:
    """One open page: its session, and a connection that ends when the page is closed."""

    def __init__(self, address: str) -> None:
        self.session = uuid.uuid4().hex[:11]
        self.http = httpx.Client(base_url=address, timeout=60, trust_env=False)
        functions = self.http.get("config").json()["dependencies"]
        [self.function] = [one["id"] for one in functions if one["api_name"] == "chat"]

    def upload(self, name: str, data: bytes) -> str:
        """The path at which an uploaded file lies."""
        answer = self.http.post("gradio_api/upload", files={"files": (name, data)})
        answer.raise_for_status()
        return str(answer.json()[0])

    @contextmanager
    def asking(self, text: Any, *paths: Any, **settings: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of an answer, as the page gets them."""
        files = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in paths]
        asked = {"text": text, "files": files}
        body = {
            "data": [asked, None, *(SETTINGS | settings).values()],  # the second is the page's own
            "fn_index": self.function,
            "session_hash": self.session,
        }
        sent = self.http.post("gradio_api/queue/join", json=body)
        assert sent.status_code == 200, sent.text
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            yield (json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line)

    def ask(self, text: Any, *paths: Any, **settings: Any) -> str:
        """All that was told in answer, as one string."""
        told = []
        with self.asking(text, *paths, **settings) as events:
            for event in events:
                told.append(json.dumps(event.get("output"), ensure_ascii=False))
                if event["msg"] == "process_completed":
                    break
        return "\n".join(told)

    def close(self) -> None:
        self.http.close()

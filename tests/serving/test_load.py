"""Sixteen clients at once on the embedded checkpoint: no answer is wrong, lost or swapped; nobody is passed over."""

import base64
import json
import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="needs the extra `serve`")

import httpx
import uvicorn

import mixlora
from mixlora.chat import ChatSession
from mixlora.rows import Row
from mixlora.serving.engine import Engine, Limits
from mixlora.serving.request import Request
from mixlora.serving.sampling import Sampling
from mixlora.serving.server import Settings, create_app
from tests.serving.serving_fixtures import alone

SAMPLES = Path(mixlora.default_checkpoint()) / "samples"
CLIENTS = 16
LIMITS = Limits(rows=6, chunk=64, kept_tokens=2048)  # some wait, and longer prompts are read in chunks
QUESTIONS = [
    Row("Who are you?"),
    Row("What is your name? " * 24),
    Row("What digit is this?", (SAMPLES / "five.png",)),
    Row("What digit is this?", (SAMPLES / "seven.png",)),
    Row(None, (), (SAMPLES / "seven.flac",)),
    Row("Transcribe the audio.", (), (SAMPLES / "hello-world.flac",)),
    Row("Is this what I say?", (SAMPLES / "seven.png",), (SAMPLES / "seven.flac",)),
    Row("Is this what I say?", (SAMPLES / "three.png",), (SAMPLES / "four.flac",)),
]
Turns = tuple[Row | str, ...]
"""A conversation: questions, and the answers between them."""


@dataclass
class Load:
    """What was seen while the clients asked."""

    engine: Engine
    put: list[Request] = field(default_factory=list)
    """In the order of the queue."""
    first: list[Request] = field(default_factory=list)
    """In the order of their first tokens."""
    answers: list[tuple[Turns, Sampling, str]] = field(default_factory=list)
    """What clients asked and were answered."""
    left: int = 0
    """Clients that went away during an answer."""
    memory: list[float] = field(default_factory=list)
    """MB of the process, as time goes by."""
    _lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        put, first = self.engine._scheduler.waiting.put, self.engine.metrics.first_token

        def noted(request: Request) -> None:
            with self._lock:
                put(request)
                self.put.append(request)

        def begun(request: Request) -> None:
            first(request)
            self.first.append(request)
            request.prompt.media.clear()  # they are encoded; all of them, kept here, would be what grows

        self.engine._scheduler.waiting.put = noted  # type: ignore[method-assign]
        self.engine.metrics.first_token = begun  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def session() -> ChatSession:
    return ChatSession.from_pretrained(mixlora.default_checkpoint())


@pytest.fixture
def load(session: ChatSession) -> Iterator[tuple[Load, str]]:
    """A server in this process, and its address."""
    engine = Engine(session.model, session.processor, LIMITS)
    config = uvicorn.Config(create_app(engine, Settings()), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Load(engine), f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
    engine.close()


def message(row: Row) -> dict[str, Any]:
    """A question in OpenAI's form."""

    def encoded(path: Path) -> str:
        return base64.b64encode(path.read_bytes()).decode()

    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded(path)}"}} for path in row.images
    ]
    content += [
        {"type": "input_audio", "input_audio": {"data": encoded(path), "format": "flac"}} for path in row.audio
    ]
    content += [{"type": "text", "text": row.text}] if row.text is not None else []
    return {"role": "user", "content": content}


def messages(turns: Turns) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": one} if isinstance(one, str) else message(one) for one in turns]


def ask(http: httpx.Client, turns: Turns, sampling: Sampling, leaves: bool) -> str | None:
    """The streamed answer; None where the client went away after the first piece."""
    body = {
        "model": "mixlora",
        "messages": messages(turns),
        "stream": True,
        "max_tokens": 200 if leaves else sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed,
    }
    text, ended = "", False
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                [choice] = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["delta"].get("content", "")
                if leaves and text:
                    return None
    assert ended, "the answer was lost"
    return text.strip()


def client(number: int, address: str, until: float, load: Load) -> None:
    """Asks one question after the other, from an address of its own; some get a second turn, some are left."""
    chance = random.Random(number)
    transport = httpx.HTTPTransport(local_address=f"127.0.0.{number + 2}")
    with httpx.Client(base_url=address, transport=transport, timeout=600, trust_env=False) as http:
        asked = 0
        while asked < 2 or time.monotonic() < until:
            turns: Turns = (QUESTIONS[(number + asked) % len(QUESTIONS)],)
            asked += 1
            seed = chance.choice((None, None, 5, 6))
            sampling = Sampling(chance.choice((4, 9, 20)), temperature=0.8 if seed else 0.0, seed=seed)
            leaves = chance.random() < 0.15
            said = ask(http, turns, sampling, leaves)
            if said is None:
                load.left += 1
                continue
            load.answers.append((turns, sampling, said))
            if said and chance.random() < 0.4:  # goes on; a picture changes the route
                turns = (*turns, said, QUESTIONS[chance.choice((0, 2))])
                load.answers.append((turns, sampling, ask(http, turns, sampling, False) or ""))


def watch_memory(load: Load, over: threading.Event) -> None:
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    while not over.wait(0.25):
        load.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)


@pytest.mark.parametrize("seconds", [8, pytest.param(180, marks=pytest.mark.slow)])
def test_sixteen_clients(load: tuple[Load, str], session: ChatSession, seconds: int) -> None:
    seen, address = load
    over, until = threading.Event(), time.monotonic() + seconds
    watching = threading.Thread(target=watch_memory, args=(seen, over))
    watching.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number, address, until, seen) for number in range(CLIENTS)]
    over.set()
    watching.join()
    for one in clients:
        one.result()  # no request was refused or lost
    nothing_is_left(seen)
    nobody_was_passed_over(seen)
    memory_is_flat(seen.memory)
    every_answer_is_that_of_the_row_alone(seen, session)
    assert {request.prompt.modality for request in seen.first} == {"text", "vision", "speech", "vision_speech"}
    assert any(request.reused for request in seen.first), "some turn found the cache of the one before"


def nothing_is_left(load: Load) -> None:
    """Every request ended, those of clients that went away too, and their rows are free."""
    for request in load.put:
        request.wait(60)
    figures = load.engine.snapshot()
    assert (figures["waiting"], figures["reading"], figures["running"]) == (0, 0, 0)
    assert len(load.put) == len(load.answers) + load.left
    assert sum(request.reason == "cancelled" for request in load.put) <= load.left
    assert figures["kept_tokens"] <= LIMITS.kept_tokens and figures["refused"] == 0


def nobody_was_passed_over(load: Load) -> None:
    """While a prompt is read, no client gets more first tokens for later requests than the prompt has chunks."""
    queued = {request: place for place, request in enumerate(load.put)}
    for place, request in enumerate(load.first):
        ahead = Counter(one.user for one in load.first[:place] if queued[one] > queued[request])
        chunks = math.ceil((request.prompt.length - request.reused) / LIMITS.chunk)
        assert max(ahead.values(), default=0) <= chunks, (request.prompt.length, ahead)


def memory_is_flat(memory: list[float]) -> None:
    """From the second quarter of the time on, when every kind of row has been there, to the last."""
    quarter = len(memory) // 4
    early, late = (max(part) for part in (memory[quarter : 2 * quarter], memory[3 * quarter :]))
    assert late - early < 96, f"{early:.0f} MB grew to {late:.0f} MB"


def every_answer_is_that_of_the_row_alone(load: Load, session: ChatSession) -> None:
    found: dict[tuple[Turns, Sampling], set[str]] = {}
    for turns, sampling, said in load.answers:
        found.setdefault((turns, sampling), set()).add(said)
    for (turns, sampling), said in found.items():
        conversation = [{"role": "assistant", "content": one} if isinstance(one, str) else one.turn() for one in turns]
        tokens = alone(session.model, session.processor, conversation, sampling)
        wanted = session.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
        assert said == {wanted}, (turns, sampling)

"""In front of the routes: slow bodies, floods, and clients that leave."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="needs the extra `serve`")

from mixlora.serving.guard import Guard


def call(guard: Guard, receive: Any, headers: list[tuple[bytes, bytes]] | None = None) -> Any:
    """The status and body that a request gets."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/v1/models", "headers": headers or []}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"] or b"{}")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with what it received, up to the client's going away."""
    body = (await receive())["body"].decode()
    left = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps([body, left["type"]]).encode()})


def pieces(*messages: dict[str, Any]) -> Any:
    waiting = list(messages)

    async def receive() -> Any:
        if not waiting:
            await asyncio.sleep(60)
        return waiting.pop(0)

    return receive


def piece(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_pieces_arrives_whole_and_leaving_is_told() -> None:
    receive = pieces(piece(b"ab"), piece(b"cd", more=False), {"type": "http.disconnect"})
    assert call(Guard(echo, None, 100), receive) == (200, ["abcd", "http.disconnect"])


def test_a_slow_body_is_given_up() -> None:
    status, body = call(Guard(echo, None, 100, body_seconds=0.05), pieces(piece(b"a")))
    assert status == 408 and body["error"]["code"] == "too_slow"


@pytest.mark.parametrize("length", [b"101", b"-1", b"1e3", b"x"])
def test_a_length_that_is_too_large_or_none_is_refused_unread(length: bytes) -> None:
    status, body = call(Guard(echo, None, 100), pieces(), [(b"content-length", length)])
    assert status == 413 and body["error"]["message"] == "a request has at most 100 bytes"


def test_a_flood_is_refused_and_places_come_back() -> None:
    guard = Guard(echo, None, 100, in_flight=2)

    async def flood() -> list[int]:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        scope = {"type": "http", "path": "/", "headers": []}
        held = [asyncio.create_task(guard(scope, pieces(piece(b"a")), send)) for _ in range(2)]
        await asyncio.sleep(0.01)
        await guard(scope, pieces(piece(b"a", more=False), {"type": "http.disconnect"}), send)
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        await guard(scope, pieces(piece(b"a", more=False), {"type": "http.disconnect"}), send)
        return statuses

    assert asyncio.run(flood()) == [429, 200]
    assert guard.in_flight == 0

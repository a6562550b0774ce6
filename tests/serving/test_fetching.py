"""Fetching pictures: hosts on the list only, public ones only, no redirects, no more bytes than allowed."""

import asyncio
from typing import Any

import pytest

pytest.importorskip("httpx", reason="needs the extra `serve`")

import httpx

from mixlora.serving.fetching import PinnedTransport, fetch, public_address
from mixlora.serving.media import MediaError

HOSTS = frozenset({"pictures.example"})
URL = "https://pictures.example/a.png"


def get(url: str, answer: Any = None, most: int = 100) -> bytes:
    asked: list[str] = []

    def handle(request: Any) -> Any:
        asked.append(str(request.url))
        return answer

    try:
        return asyncio.run(fetch(url, HOSTS, most, httpx.MockTransport(handle)))
    finally:
        assert asked == ([] if answer is None else [url])


def test_an_allowed_picture_is_fetched() -> None:
    assert get(URL, httpx.Response(200, content=b"picture")) == b"picture"


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/a.png",
        "https://pictures.example:8443/a.png",
        "https://me@pictures.example/a.png",
        "https://pictures.example.evil.org/a.png",
        "https://evil.org/#pictures.example",
        "ftp://pictures.example/a",
        "https://",
        "\x00",
    ],
)
def test_others_are_not_asked(url: str) -> None:
    with pytest.raises(MediaError, match="image_url: "):
        get(url)


@pytest.mark.parametrize(
    ("status", "headers", "content", "words"),
    [
        (302, {"location": "http://127.0.0.1/"}, b"", "status 302"),
        (500, {}, b"", "status 500"),
        (200, {}, b"x" * 101, "more than 100 bytes"),
        (200, {"content-encoding": "zstd"}, b"", "packed as zstd"),
    ],
)
def test_bad_answers(status: int, headers: dict[str, str], content: bytes, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        get(URL, httpx.Response(status, headers=headers, content=content))


@pytest.mark.parametrize(
    "addresses",
    [["127.0.0.1"], ["10.0.0.1"], ["169.254.169.254"], ["::1"], ["::ffff:127.0.0.1"], ["1.1.1.1", "192.168.0.1"], []],
)
def test_private_addresses_are_never_asked(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async def find(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        return [(None, None, None, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", find)
    with pytest.raises(MediaError, match="not public"):
        asyncio.run(fetch(URL, HOSTS, 100))


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async def find(self: Any, host: str, port: int, **_: Any) -> list[Any]:
        return [(None, None, None, "", ("1.1.1.1", port))]

    seen: list[Any] = []

    async def handle(self: Any, request: Any) -> Any:
        seen.append(request)
        return httpx.Response(200, content=b"x")

    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", find)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle)
    assert asyncio.run(public_address("pictures.example")) == "1.1.1.1"
    assert asyncio.run(fetch(URL, HOSTS, 100)) == b"x"
    assert seen[0].url.host == "1.1.1.1" and seen[0].headers["host"] == "pictures.example"
    assert seen[0].extensions["sni_hostname"] == "pictures.example"
    assert PinnedTransport("1.1.1.1").address == "1.1.1.1"

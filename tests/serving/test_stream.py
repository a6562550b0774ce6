"""Text that is read while it is written, from threads and event loops."""

import asyncio
import threading

import pytest

from mixlora.serving.stream import TextStream


def write(stream: TextStream, error: BaseException | None = None) -> None:
    for piece in ("a", "", "b", "c"):
        stream.write(piece)
    stream.end(error)


def test_readers_in_threads_and_loops_get_every_piece() -> None:
    stream = TextStream()
    found: list[list[str]] = []

    async def collect() -> list[str]:
        return [piece async for piece in stream]

    readers = [threading.Thread(target=lambda: found.append(list(stream))) for _ in range(3)]
    readers += [threading.Thread(target=lambda: found.append(asyncio.run(collect()))) for _ in range(3)]
    for reader in readers:
        reader.start()
    write(stream)
    for reader in readers:
        reader.join(10)
    assert found == [["a", "b", "c"]] * 6
    assert list(stream) == ["a", "b", "c"], "one that comes late too"
    assert stream.text == "abc" and stream.ended


def test_an_error_comes_after_the_last_piece() -> None:
    stream = TextStream()
    write(stream, ValueError("broken"))
    stream.end()  # changes nothing

    async def collect() -> list[str]:
        pieces = []
        with pytest.raises(ValueError, match="broken"):
            async for piece in stream:
                pieces.append(piece)
        return pieces

    assert asyncio.run(collect()) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="broken"):
        stream.wait()


def test_a_reader_that_left_is_forgotten() -> None:
    """Its loop is closed, and the writer goes on."""
    stream = TextStream()

    async def first() -> str:
        async for piece in stream:
            return piece
        return ""

    stream.write("a")
    assert asyncio.run(first()) == "a"
    write(stream)
    assert stream.text == "aabc" and stream._loops == []


def test_waiting_has_a_limit() -> None:
    with pytest.raises(TimeoutError, match="within 0.01 seconds"):
        TextStream().wait(0.01)

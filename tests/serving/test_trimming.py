"""Freed memory goes back to the system, now and then."""

import ctypes
import os
from pathlib import Path

import pytest

from mixlora.serving import trimming
from mixlora.serving.engine import Engine
from mixlora.serving.sampling import Sampling
from tests.serving.serving_fixtures import model_and_processor, turn


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def allocated(sizes: int) -> list[ctypes.c_void_p]:
    """Blocks on the heap of the C library, none so large that it is mapped alone."""
    malloc = ctypes.CDLL(None).malloc
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    blocks = [ctypes.c_void_p(malloc(100_000)) for _ in range(sizes)]
    for block in blocks:
        ctypes.memset(block, 1, 100_000)
    return blocks


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_what_was_freed_is_given_back() -> None:
    free = ctypes.CDLL(None).free
    free.argtypes = [ctypes.c_void_p]
    blocks = allocated(1000)
    for block in blocks[:-1]:  # the last one keeps the heap from shrinking by itself
        free(block)
    before = resident()
    trim = trimming.Trimmer()
    trim()
    assert before - resident() > 50_000_000
    free(blocks[-1])


def test_not_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(trimming.time, "monotonic", lambda: clock[0])
    trim = trimming.Trimmer()
    trim._trim = calls.append
    for now in (1.0, 2.0, 5.9, 6.1, 7.0):
        clock[0] = now
        trim()
    assert len(calls) == 2


def test_elsewhere_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trimming.ctypes, "CDLL", lambda name: object())
    trimming.Trimmer()()


def test_the_engine_does_so_while_it_answers() -> None:
    with Engine(*model_and_processor()) as engine:
        calls: list[int] = []
        engine._trim._trim = calls.append
        engine._trim._next = 0.0
        engine.submit([turn("a")], Sampling(3)).wait(60)
        assert calls == [0]

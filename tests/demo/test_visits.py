"""A hundred visitors who ask and close the page at once leave nothing behind."""

import gc
import os
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs the extra `demo`")
pytest.importorskip("httpx")

from mixlora.demo.run import Demo
from tests.demo.demo_fixtures import LIMITS, Visitor, tiny_demo

VISITS = 100


def visit(demo: Demo) -> None:
    """Opens the page, asks for a long answer, and closes it while the answer comes."""
    visitor = Visitor(demo.address)
    assert visitor.http.get("").status_code == 200
    opened = threading.Event()

    def stay() -> None:  # the connection by which Gradio knows that a page is open
        with visitor.http.stream("GET", f"gradio_api/heartbeat/{visitor.session}") as alive:
            opened.set()
            while not closed.wait(0.005):
                pass
            alive.close()

    closed = threading.Event()
    page = threading.Thread(target=stay)
    page.start()
    opened.wait(30)
    with visitor.asking("Tell me", tokens=LIMITS.tokens) as events:
        next(event for event in events if event["msg"] == "process_generating")
        closed.set()
    page.join()
    visitor.close()


def megabytes() -> float:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_a_hundred_visits_leave_nothing() -> None:
    with tiny_demo() as demo:
        memory = []
        for number in range(VISITS):
            visit(demo)
            if number % 20 == 19:
                memory.append(megabytes())
        for _ in range(600):
            figures = demo.engine.snapshot()
            if not figures["running"] + figures["reading"] + figures["waiting"] and not demo.chat._running:
                break
            time.sleep(0.1)
        assert (figures["running"], figures["reading"], figures["waiting"]) == (0, 0, 0) and demo.chat._running == {}
        ended = figures["ended"]["text"]
        assert sum(ended.values()) == VISITS and ended["cancelled"] > VISITS // 2
        assert memory[-1] - memory[1] < 16, memory
        assert not list(demo.folders.uploads.rglob("*.*"))

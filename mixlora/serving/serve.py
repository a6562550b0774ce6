"""Runs the server: uvicorn in front of an engine, until it is told to stop."""

import signal
import sys
from pathlib import Path
from typing import Any

import uvicorn

from mixlora.serving.addresses import is_loopback
from mixlora.serving.engine import Engine, Limits
from mixlora.serving.patience import Impatient
from mixlora.serving.server import Settings, create_app

GRACE = 120  # seconds for running answers after a signal


def serve(model: Any, processor: Any, settings: Settings, limits: Limits, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT; then no connection is taken, what was accepted is answered, and it returns."""
    if not is_loopback(host) and settings.key is None:
        print(
            f"warning: anyone who reaches {host}:{port} may use this server; --api-key asks for a key", file=sys.stderr
        )
    engine = Engine(model, processor, limits)
    app = create_app(engine, settings, close_engine=True)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=Impatient,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=GRACE,
        limit_concurrency=512,
        h11_max_incomplete_event_size=32_768,
    )
    # uvicorn raises the signal again once it has shut down; then there is nothing left to do
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server = uvicorn.Server(config)
        _announce(server, host, settings.name)
        server.run()
    finally:
        engine.close(finish=False)
        for number, handler in before.items():
            signal.signal(number, handler)


def _announce(server: uvicorn.Server, host: str, name: str) -> None:
    """Prints where the server listens, once it does."""
    startup = server.startup

    async def announced(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        for one in server.servers:
            port = one.sockets[0].getsockname()[1]
            print(f"http://{host}:{port}/v1 serves {name}", file=sys.stderr, flush=True)

    server.startup = announced  # type: ignore[method-assign]


def name_of(folder: Path) -> str:
    """What a checkpoint is called where nobody gave it a name."""
    return folder.resolve().name

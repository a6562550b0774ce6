"""Opens the page: on this machine alone unless told otherwise, from an empty folder, with nothing sent elsewhere."""

import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

from mixlora.demo.chat import DemoChat, DemoLimits
from mixlora.demo.headers import SafeHeaders
from mixlora.serving.addresses import is_loopback, names_of
from mixlora.serving.engine import Engine, Limits


def parse_auth(auth: str | None) -> tuple[str, str] | None:
    """Name and password of `NAME:PASSWORD`.

    Raises:
        ValueError: it is not of that form.
    """
    if auth is None:
        return None
    name, colon, password = auth.partition(":")
    if not (name and colon and password):
        raise ValueError("--auth is NAME:PASSWORD")
    return name, password


class PrivateFolders:
    """Where uploads and temporary files lie: a folder of this run, removed at its end.

    Gradio lets a page read back files of the working folder and of the temporary folder, so both are empty ones here.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="mixlora-demo-")).resolve()
        self.uploads, self.temporary, self.empty = (self.root / name for name in ("uploads", "temporary", "empty"))
        for folder in (self.uploads, self.temporary, self.empty):
            folder.mkdir(mode=0o700)
        self._before = (os.environ.get("GRADIO_TEMP_DIR"), tempfile.tempdir, Path.cwd())
        os.environ["GRADIO_TEMP_DIR"] = str(self.uploads)
        tempfile.tempdir = str(self.temporary)
        os.chdir(self.empty)

    def remove(self) -> None:
        """Puts everything back, and removes what was uploaded."""
        uploads, tempfile.tempdir, folder = self._before
        os.chdir(folder)
        if uploads is None:
            os.environ.pop("GRADIO_TEMP_DIR", None)
        else:
            os.environ["GRADIO_TEMP_DIR"] = uploads
        shutil.rmtree(self.root, ignore_errors=True)


class Demo:
    """A running page and its engine; `close` ends both."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        samples: Path | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        auth: tuple[str, str] | None = None,
        limits: DemoLimits | None = None,
        browser: bool = False,
    ) -> None:
        samples = samples.resolve() if samples is not None else None  # before the working folder changes
        self.folders = PrivateFolders()
        self.engine = Engine(model, processor, Limits())
        try:
            from starlette.middleware import Middleware
            from starlette.middleware.trustedhost import TrustedHostMiddleware

            from mixlora.demo.app import CSS, JS, build_page, theme

            reads = [self.folders.uploads, *([samples] if samples is not None else [])]
            self.chat = DemoChat(self.engine, reads, limits)
            self.page = build_page(self.chat, samples)
            _, self.address, _ = self.page.launch(
                server_name=host,
                server_port=port,
                auth=auth,
                inbrowser=browser,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                show_error=False,
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                footer_links=[],
                allowed_paths=[],
                max_file_size=self.chat.limits.media.bytes,
                state_session_capacity=1000,
                theme=theme(),
                css=CSS,
                js=JS,
                app_kwargs={
                    "middleware": [
                        Middleware(SafeHeaders),
                        Middleware(TrustedHostMiddleware, allowed_hosts=list(names_of(host))),
                    ]
                },
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the page and the engine, and removes what was uploaded."""
        if hasattr(self, "page"):
            self.page.close(verbose=False)
        self.engine.close(finish=False)
        self.folders.remove()


def run(
    model: Any, processor: Any, samples: Path | None, host: str, port: int, auth: str | None, browser: bool
) -> None:
    """Shows the page until SIGINT or SIGTERM; then running answers are cancelled, and what was uploaded is removed."""
    pair = parse_auth(auth)
    if pair is None and not is_loopback(host):
        print(f"warning: anyone who reaches {host}:{port} may use this page; --auth asks for a name", file=sys.stderr)
    over = threading.Event()
    before = {number: signal.signal(number, lambda *_: over.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        demo = Demo(model, processor, samples, host, port, pair, browser=browser)
        try:
            print(f"open {demo.address}", file=sys.stderr, flush=True)
            over.wait()
        finally:
            demo.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

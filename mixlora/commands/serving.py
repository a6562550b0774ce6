"""`mixlora serve` and `mixlora demo`: a checkpoint for others."""

from pathlib import Path
from typing import Annotated

import typer

import mixlora
from mixlora.commands.shared import Model, check_extra, load_session


def serve_command(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default its folder's name.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MIXLORA_API_KEY", help="Ask clients for this key.", show_envvar=True)
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Fetch pictures from this host over https; may be given several times.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused.")] = 64,
    batch_tokens: Annotated[int, typer.Option(min=2, help="Tokens that the batch's cache may hold.")] = 65536,
    kept_tokens: Annotated[int, typer.Option(min=0, help="Tokens kept for the next turns of conversations.")] = 16384,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds of an answer, its wait included.")] = 300.0,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest clip.")] = 60.0,
    transcription_prompt: Annotated[str, typer.Option(help="The question behind a clip to transcribe.")] = (
        "Transcribe the audio."
    ),
) -> None:
    """Serve a checkpoint to many users, in the form of OpenAI's API. Needs the extra `serve`."""
    check_extra("serve", "fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart")
    from mixlora.serving.addresses import names_of
    from mixlora.serving.engine import Limits
    from mixlora.serving.media import MediaLimits
    from mixlora.serving.serve import name_of, serve
    from mixlora.serving.server import Settings

    session = load_session(model, 1)
    settings = Settings(
        name=name or (name_of(model) if model is not None else "mixlora"),
        key=api_key,
        hosts=frozenset(allow_host or ()),
        names=names_of(host),
        media=MediaLimits(seconds=max_seconds),
        timeout=timeout,
        transcription_prompt=transcription_prompt,
    )
    limits = Limits(rows=rows, waiting=waiting, batch_tokens=batch_tokens, kept_tokens=kept_tokens)
    serve(session.model, session.processor, settings, limits, host, port)


def demo_command(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    auth: Annotated[
        str | None, typer.Option(metavar="NAME:PASSWORD", envvar="MIXLORA_DEMO_AUTH", help="Ask visitors for these.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Open a page to type, show pictures and speak. Needs the extra `demo`."""
    check_extra("demo", "gradio", "uvicorn")
    from mixlora.demo.run import parse_auth, run

    parse_auth(auth)
    session = load_session(model, 1)
    samples = Path(mixlora.default_checkpoint()) / "samples" if model is None else None
    run(session.model, session.processor, samples, host, port, auth, browser)

"""The OpenAI-style server: routes on top of an engine."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import FastAPI, File, Form, UploadFile
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mixlora.modeling.audio_processing_mixlora import RATE
from mixlora.serving.conversation import ConversationReader
from mixlora.serving.engine import Engine, EngineClosedError, QueueFullError
from mixlora.serving.exposition import exposition
from mixlora.serving.guard import Guard
from mixlora.serving.media import MediaError, MediaLimits, read_clip
from mixlora.serving.openai_form import ApiError, ChatForm, Completion, usage
from mixlora.serving.prompt import Prompt
from mixlora.serving.request import Request
from mixlora.serving.sampling import Sampling

DECODERS = 4  # requests whose media are decoded at once


@dataclass(frozen=True)
class Settings:
    """How the server treats its clients."""

    name: str = "mixlora"
    """The model's name, which clients give."""
    key: str | None = None
    """The API key; None: none is asked for."""
    hosts: frozenset[str] = frozenset()
    """From which pictures may be fetched, over https; none by default."""
    names: tuple[str, ...] = ("*",)
    """By which names and addresses the server may be called."""
    media: MediaLimits = field(default_factory=MediaLimits)
    """Of pictures and clips."""
    body_bytes: int = 30_000_000
    """Of a request."""
    body_seconds: float = 30.0
    """For a request to arrive, and for a client to take each piece of an answer."""
    usual_tokens: int = 256
    """Of an answer where the client says nothing."""
    most_tokens: int = 4096
    """Of an answer."""
    timeout: float = 300.0
    """Seconds of an answer, its wait included."""
    transcription_prompt: str = "Transcribe the audio."
    """What `/v1/audio/transcriptions` asks about a clip."""


def create_app(engine: Engine, settings: Settings | None = None, close_engine: bool = False) -> FastAPI:
    """The application.

    Args:
        close_engine: when the server shuts down, answer what was accepted, and close the engine.
    """
    settings = settings or Settings()

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        if close_engine:
            await run_in_threadpool(engine.close)

    # no pages of documentation: they would load scripts from elsewhere
    app = FastAPI(title="mixlora", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, key=settings.key, body_bytes=settings.body_bytes, body_seconds=settings.body_seconds)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.names))
    _tell_errors(app)
    _Routes(engine, settings).add_to(app)
    return app


class _Routes:
    """What the server answers."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.reader = ConversationReader(settings.media, settings.hosts)
        self.started = int(time.time())
        self._decoding = asyncio.Semaphore(DECODERS)

    def add_to(self, app: FastAPI) -> None:
        """Registers the routes."""
        app.get("/health")(self.health)
        app.get("/metrics")(self.metrics)
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}")(self.model)
        app.post("/v1/chat/completions", response_model=None)(self.chat)
        app.post("/v1/audio/transcriptions", response_model=None)(self.transcribe)

    async def health(self) -> Response:
        """Whether requests are taken."""
        closed = self.engine.closed
        return JSONResponse({"status": "closing" if closed else "ok"}, 503 if closed else 200)

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return Response(exposition(self.engine.snapshot()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> dict[str, Any]:
        """The model's name."""
        return {"object": "list", "data": [await self.model(self.settings.name)]}

    async def model(self, name: str) -> dict[str, Any]:
        """The model."""
        self._check_name(name)
        return {"id": name, "object": "model", "created": self.started, "owned_by": "mixlora"}

    async def chat(self, form: ChatForm, http: HttpRequest) -> Response:
        """Answers a conversation."""
        self._check_name(form.model)
        if form.stream_options is not None and not form.stream:
            raise ApiError(400, "stream_options go with stream", "invalid_value", "stream_options")
        sampling = form.sampling(self.settings.most_tokens, self.settings.usual_tokens)
        fetched = await self.reader.fetched(form)
        prompt = await self._prepared(lambda: self.reader.read(form, fetched))
        request = self._submit(prompt, sampling, http)
        completion = Completion(form.model)
        if form.stream:
            counted = form.stream_options is not None and form.stream_options.include_usage
            return StreamingResponse(_events(request, completion, counted), media_type="text/event-stream")
        return JSONResponse(completion.whole(request, await _whole(request, http)))

    async def transcribe(
        self,
        http: HttpRequest,
        file: Annotated[UploadFile, File()],
        model: Annotated[str, Form()],
        response_format: Annotated[Literal["json", "text"], Form()] = "json",
        temperature: Annotated[float, Form(ge=0, le=5)] = 0.0,
        prompt: Annotated[str | None, Form(max_length=2000)] = None,
    ) -> Response:
        """Writes down what is said in a clip. `prompt` replaces our question about it."""
        self._check_name(model)
        data = await file.read()

        def conversation() -> list[dict[str, Any]]:
            clip = read_clip(data, "file", self.settings.media)
            text = prompt or self.settings.transcription_prompt
            heard = {"type": "audio", "audio": clip, "sampling_rate": RATE}
            return [{"role": "user", "content": [heard, {"type": "text", "text": text}]}]

        sampling = Sampling(self.settings.usual_tokens, temperature=temperature)
        request = self._submit(await self._prepared(conversation), sampling, http)
        text = await _whole(request, http)
        if response_format == "text":
            return PlainTextResponse(text + "\n")
        return JSONResponse({"text": text, "usage": {"type": "tokens", **usage(request)}})

    def _check_name(self, name: str) -> None:
        if name != self.settings.name:
            raise ApiError(404, f"the model here is {self.settings.name!r}", "model_not_found", "model")

    async def _prepared(self, conversation: Callable[[], list[dict[str, Any]]]) -> Prompt:
        """The prompt of a conversation, decoded in a thread."""
        async with self._decoding:
            try:
                return await run_in_threadpool(lambda: self.engine.prepare(conversation()))
            except ValueError as error:
                raise ApiError(400, str(error), "invalid_value", "messages") from error

    def _submit(self, prompt: Prompt, sampling: Sampling, http: HttpRequest) -> Request:
        user = http.client.host if http.client else ""
        try:
            return self.engine.submit(prompt, sampling, user=user, timeout=self.settings.timeout)
        except QueueFullError as error:
            raise ApiError(429, str(error), "queue_full") from error
        except EngineClosedError as error:
            raise ApiError(503, str(error), "shutting_down") from error


async def _pieces(request: Request) -> AsyncIterator[str]:
    """The answer's pieces, without white space at its beginning. A reader that leaves cancels the request."""
    begun = False
    try:
        async for piece in request:
            piece = piece if begun else piece.lstrip()
            if piece:
                begun = True
                yield piece
    finally:
        request.cancel()  # changes nothing where it has ended


async def _whole(request: Request, http: HttpRequest) -> str:
    """The whole answer; the request is cancelled where the client goes away meanwhile."""

    async def collect() -> str:
        return "".join([piece async for piece in _pieces(request)]).rstrip()

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    answer, leaving = asyncio.ensure_future(collect()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([answer, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            request.cancel()
        return await answer
    except Exception as error:
        raise ApiError(500, "the model failed on this request", "internal_error") from error
    finally:
        leaving.cancel()


async def _events(request: Request, completion: Completion, counted: bool) -> AsyncIterator[str]:
    """Server-sent events: the role, the pieces, the reason, and tokens where they are wanted."""
    yield _event(completion.piece({"role": "assistant", "content": ""}))
    try:
        async for piece in _pieces(request):
            yield _event(completion.piece({"content": piece}))
    except Exception:
        error = ApiError(500, "the model failed on this request", "internal_error")
        yield _event(error.body())
        return
    yield _event(completion.piece({}, request))
    if counted:
        yield _event(completion.used(request))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _tell_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form, and none with a traceback."""

    def answer(error: ApiError) -> Response:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), error.status, headers)

    async def api_error(_: HttpRequest, error: Any) -> Response:
        return answer(error)

    async def media_error(_: HttpRequest, error: Any) -> Response:
        return answer(ApiError(400, str(error), "invalid_value", "messages"))

    async def form_error(_: HttpRequest, error: Any) -> Response:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # of a union, the kind that was meant
        names = [str(part) for part in first["loc"] if part not in ("body", "str")]
        param = ".".join(name for name in names if name.isidentifier() or name.isdigit()) or None
        message = f"{param}: {first['msg']}" if param else str(first["msg"])
        return answer(ApiError(400, message, "invalid_value", param))

    async def http_error(_: HttpRequest, error: Any) -> Response:
        return answer(ApiError(error.status_code, str(error.detail), "http_error"))

    async def unexpected(_: HttpRequest, error: Any) -> Response:
        return answer(ApiError(500, "the server failed on this request", "internal_error"))

    app.exception_handler(ApiError)(api_error)
    app.exception_handler(MediaError)(media_error)
    app.exception_handler(RequestValidationError)(form_error)
    app.exception_handler(HTTPException)(http_error)
    app.exception_handler(Exception)(unexpected)

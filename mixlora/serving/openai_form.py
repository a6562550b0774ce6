"""OpenAI's forms: what a request may hold, and how an answer or an error looks.

Fields that would change the answer and that we can't honour are refused, never ignored.
"""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from mixlora.serving.request import Request
from mixlora.serving.sampling import Sampling

REASONS = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "stop"}


class ApiError(Exception):
    """An error that the client is told, in OpenAI's form."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Strict(BaseModel):
    """A form without unknown fields."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(Strict):
    data: str
    format: str | None = None
    """Not used: the content tells."""


class AudioPart(Strict):
    type: Literal["input_audio"]
    input_audio: InputAudio


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatForm(Strict):
    """The body of `/v1/chat/completions`."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=200)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=5)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = Field(None, max_length=16)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatForm":
        if self.max_tokens and self.max_completion_tokens:
            raise ValueError("max_tokens is the old name of max_completion_tokens; give one of them")
        return self

    def sampling(self, most: int, usual: int) -> Sampling:
        """Our settings. What is left open is greedy.

        Args:
            most: the longest answer that may be asked for; usual: the longest where nothing is asked.

        Raises:
            ApiError: a value that is not taken.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        tokens = self.max_completion_tokens or self.max_tokens or usual
        if tokens > most:
            raise ApiError(
                400, f"answers have at most {most} tokens here, asked for {tokens}", "too_long", "max_tokens"
            )
        try:
            return Sampling(
                max_new_tokens=tokens,
                temperature=self.temperature or 0.0,
                top_p=1.0 if self.top_p is None else self.top_p,
                top_k=self.top_k or 0,
                repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
                seed=self.seed,
                stop=tuple(stop),
            )
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from error


def usage(request: Request) -> dict[str, Any]:
    """Tokens of a request."""
    asked, said = request.prompt.length, len(request.tokens)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": request.reused},
    }


def about(request: Request) -> dict[str, Any]:
    """What OpenAI's form has no place for: the route, and why the answer ended."""
    return {"modality": request.prompt.modality, "adapter": request.prompt.adapter, "reason": request.reason}


class Completion:
    """The answers to one request: one body, or a body for each piece."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def whole(self, request: Request, text: str) -> dict[str, Any]:
        """The answer as one body."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": REASONS[str(request.reason)], "logprobs": None}
        return {
            **self._head("chat.completion"),
            "choices": [choice],
            "usage": usage(request),
            "mixlora": about(request),
        }

    def piece(self, delta: dict[str, str], request: Request | None = None) -> dict[str, Any]:
        """One piece; with an ended request the last one."""
        reason = None if request is None else REASONS[str(request.reason)]
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        extra = {} if request is None else {"mixlora": about(request)}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **extra}

    def used(self, request: Request) -> dict[str, Any]:
        """The piece behind the last one, that tells tokens."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(request)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

"""What stands in front of the routes: the key, bodies no larger and no slower than allowed, and requests in flight."""

import asyncio
import json
import secrets
from typing import Any

from mixlora.serving.openai_form import ApiError

OPEN = ("/health",)  # for a balancer, without a key


class Guard:
    """ASGI middleware that reads a body whole before a route sees it.

    Args:
        app: what is guarded.
        key: the API key; None: none is asked for.
        body_bytes: of one request.
        body_seconds: for a body to arrive, and for a client to take each piece of its answer.
        in_flight: requests at once, whatever they ask.
    """

    def __init__(
        self, app: Any, key: str | None, body_bytes: int, body_seconds: float = 30.0, in_flight: int = 96
    ) -> None:
        self.app, self.key = app, key
        self.body_bytes, self.body_seconds, self.most = body_bytes, body_seconds, in_flight
        self.in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.in_flight += 1

        async def taken(message: Any) -> None:
            async with asyncio.timeout(self.body_seconds):
                await send(message)

        try:
            headers = dict(scope["headers"])
            self._check(scope["path"], headers)
            receive = await self._body(headers, receive)
            await self.app(scope, receive, taken)
        except ApiError as error:
            await _refuse(send, error)
        except TimeoutError:
            pass  # nobody reads: the connection is closed
        finally:
            self.in_flight -= 1

    def _check(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.in_flight > self.most:
            raise ApiError(429, f"{self.most} requests are in flight already; try again later", "too_many_requests")
        given = headers.get(b"authorization", b"")
        if self.key is not None and path not in OPEN:
            if not secrets.compare_digest(given, b"Bearer " + self.key.encode()):
                raise ApiError(401, "give the API key as 'Authorization: Bearer KEY'", "invalid_api_key")

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> Any:
        """A `receive` that gives the body in one piece, then what comes behind it: the client going away."""
        too_large = ApiError(413, f"a request has at most {self.body_bytes} bytes", "request_too_large")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.body_bytes:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.body_seconds):
                while more:
                    message = await receive()
                    body += message.get("body", b"")
                    more = message["type"] == "http.request" and message.get("more_body", False)
                    if len(body) > self.body_bytes:
                        raise too_large
        except TimeoutError as error:
            raise ApiError(408, f"the body did not arrive within {self.body_seconds:g} seconds", "too_slow") from error
        told = False

        async def rest() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        return rest


async def _refuse(send: Any, error: ApiError) -> None:
    body = json.dumps(error.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    # the rest of a body that was not read must not be taken for the next request
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

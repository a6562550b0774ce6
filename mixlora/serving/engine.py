"""The batching engine: one thread owns the model; requests join its batch and leave it between steps."""

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Condition, Thread
from typing import Any

import torch

from mixlora.serving.batch import Batch
from mixlora.serving.kept import Kept, KeptCaches
from mixlora.serving.metrics import Load, Metrics
from mixlora.serving.prompt import Prompt, PromptMaker
from mixlora.serving.reading import Prepared, Reading
from mixlora.serving.request import Request
from mixlora.serving.sampling import Chooser, Sampling
from mixlora.serving.waiting import FairQueue, QueueFullError

logger = logging.getLogger(__name__)


class EngineClosedError(RuntimeError):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Limits:
    """What the engine holds at once."""

    rows: int = 16
    """Requests in the batch, those whose prompts are being read included."""
    waiting: int = 64
    """Requests in the queue; more are refused."""
    batch_tokens: int = 65536
    """Places in the batch's cache at its longest, padding included."""
    chunk: int = 256
    """Tokens of prompts that are read between two steps of the others."""
    kept_tokens: int = 16384
    """Tokens of answered conversations that are kept for their next turn; 0: none."""
    kept_seconds: float = 600.0
    """How long they are kept."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("waiting", 0), ("batch_tokens", 2), ("chunk", 1), ("kept_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


class Engine:
    """Answers requests of any modality in one running batch, each as if it were alone.

    Safe to use from any thread and event loop. Use it as a context manager, or call `close`.

        with Engine(model, processor) as engine:
            request = engine.submit([{"role": "user", "content": "Hello"}])
            for piece in request: ...        # or `async for`, or request.result()

    Between two steps that give every running row a token, at most one chunk of prompts is read, so a long prompt does
    not stall the others. Prompts that wait are read in turn.
    """

    def __init__(self, model: Any, processor: Any, limits: Limits | None = None) -> None:
        self.model, self.processor = model, processor
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._make_prompt = PromptMaker(model, processor)
        self._waiting = FairQueue(self.limits.waiting)
        self._kept = KeptCaches(self.limits.kept_tokens, self.limits.kept_seconds)
        self._reading: deque[Reading] = deque()
        self._running: Batch | None = None
        self._work = Condition()
        self._closing = self._stopping = False
        self._suppressed = model._suppressed({}, model.generation_config) or []
        self._thread = Thread(target=self._run, name="mixlora-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close(finish=error[0] is None)

    @property
    def context(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return min(self.model.config.text_config.max_position_embeddings, self.limits.batch_tokens)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    def prepare(self, conversation: list[dict[str, Any]]) -> Prompt:
        """The prompt of a conversation in the form that `processor.apply_chat_template` takes.

        Raises:
            ValueError: a message or medium can't be used, or the prompt is longer than `context`.
        """
        prompt = self._make_prompt(conversation)
        if prompt.length >= self.context:
            raise ValueError(
                f"the conversation has {prompt.length} tokens, pictures and clips included; "
                f"this model takes {self.context}, the answer included"
            )
        return prompt

    def submit(
        self,
        conversation: list[dict[str, Any]] | Prompt,
        sampling: Sampling | None = None,
        user: str = "",
        timeout: float | None = None,
    ) -> Request:
        """Queues a request.

        Args:
            conversation: messages, or what `prepare` made of them.
            sampling: greedy by default.
            user: whose it is. Users take turns in the queue, and share no kept caches.
            timeout: seconds until it ends with what text there is.

        Raises:
            ValueError: see `prepare`.
            QueueFullError: as many wait as may.
            EngineClosedError: the engine takes no more requests.
        """
        begun = time.monotonic()
        prompt = conversation if isinstance(conversation, Prompt) else self.prepare(conversation)
        sampling = sampling or Sampling()
        room = self.context - prompt.length
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        request = Request(prompt, sampling, user, timeout)
        request.timing.prepared = request.arrived - begun
        request.chooser = Chooser(self.model, sampling, prompt.length)
        with self._work:
            try:
                if self._closing:
                    raise EngineClosedError("the server is shutting down")
                self._waiting.put(request)
            except RuntimeError:
                self.metrics.refused()
                raise
            self._work.notify_all()
        return request

    def close(self, finish: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests, ends, and frees the batch.

        Args:
            finish: answer first what was accepted; otherwise it is cancelled.
            timeout: seconds for that; what is not answered then is cancelled.
        """
        with self._work:
            self._closing = True
            self._stopping = self._stopping or not finish
            self._work.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            with self._work:
                self._stopping = True
                self._work.notify_all()
            self._thread.join()

    def snapshot(self) -> dict[str, Any]:
        """The figures of [`Metrics.snapshot`], as of now."""
        running, reading = self._running, list(self._reading)
        return self.metrics.snapshot(
            Load(
                waiting=len(self._waiting),
                reading=sum(len(one.requests) for one in reading),
                running=0 if running is None else len(running.requests),
                batch_tokens=0 if running is None else running.mask.numel(),
                kept_tokens=self._kept.tokens,
            )
        )

    # What follows runs in the engine's thread alone.

    def _run(self) -> None:
        error: BaseException = EngineClosedError("the engine was closed")
        try:
            with torch.inference_mode():
                while self._wait():
                    self._step()
        except BaseException as unexpected:  # not of a forward: those are caught. Leave nobody waiting
            error = unexpected
        with self._work:
            self._closing = True
        for request in self._all():
            request.reason = request.reason or "cancelled"
            self._end(request, None if self._stopping else error)
        while (left := self._waiting.take()) is not None:
            left.reason = "cancelled"
            self._end(left, error)
        self._running = None
        self._reading.clear()
        self._kept.clear()

    def _wait(self) -> bool:
        """Waits for work; False when there is none left to do."""
        with self._work:
            while not self._stopping and not self._all() and not len(self._waiting):
                if self._closing:
                    return False
                self._kept.drop_old()
                self._work.wait(timeout=1.0 if self._kept.tokens else None)
            return not self._stopping

    def _all(self) -> list[Request]:
        """Every request in the batch or on its way into it."""
        batches = [*self._reading, *([self._running] if self._running else [])]
        return [request for batch in batches for request in batch.requests]

    def _step(self) -> None:
        self._drop_over()
        self._admit()
        self._read()
        self._decode()

    def _drop_over(self) -> None:
        """Ends what was cancelled or is out of time, and frees its rows."""
        for request in self._waiting.remove_over():
            self._end(request)
        for batch in [*self._reading, *([self._running] if self._running else [])]:
            over = {request for request in batch.requests if request.must_end()}
            for row, request in enumerate(batch.requests):
                if request in over:
                    if batch is self._running:
                        self._keep(batch, row)
                    self._end(request)
            batch.keep([row for row, request in enumerate(batch.requests) if request not in over])
        self._reading = deque(one for one in self._reading if one.requests)
        if self._running is not None and not self._running.requests:
            self._running = None

    def _admit(self) -> None:
        """Starts to read the next prompt, together with as many short ones behind it as fit one chunk."""
        group: list[Prepared] = []
        while (request := self._waiting.peek()) is not None:
            if not self._has_room([one.request for one in group], request):
                break
            width = max(request.prompt.length, *(one.length for one in group), 0)
            kept = self._kept.find(request.user, request.prompt)
            if group and (kept is not None or width * (len(group) + 1) > self.limits.chunk):
                break  # a prompt behind a kept cache is read by itself
            self._waiting.take()
            request.timing.queued = request.lap()
            if (prepared := self._prepared(request, kept)) is not None:
                group.append(prepared)
                if kept is not None:
                    break
        if group:
            self._reading.append(Reading(group))

    def _prepared(self, request: Request, kept: tuple[Kept, int] | None) -> Prepared | None:
        """The request's embeddings, its media encoded. What is wrong with them ends this request alone."""
        try:
            if kept is not None:
                self._kept.take(*kept)
            prepared = Prepared(self.model, request, kept)
        except Exception as error:
            self._end(request, error)
            return None
        request.reused = prepared.past
        request.timing.encoded = request.lap()
        return prepared

    def _has_room(self, group: list[Request], request: Request) -> bool:
        """Whether the batch may take it: in rows, and in places when every answer gets as long as it may."""
        held = [*self._all(), *group]
        longest = max(one.longest for one in (*held, request))
        return len(held) < self.limits.rows and (len(held) + 1) * longest <= self.limits.batch_tokens

    def _read(self) -> None:
        """Reads a chunk of the prompt whose turn it is."""
        if not self._reading:
            return
        reading = self._reading.popleft()
        logits = self._guarded(reading, lambda: reading.read(self.model, self.limits.chunk))
        if logits is None:
            if reading.requests:
                self._reading.append(reading)
            return
        for request in reading.requests:
            if not request.tokens:
                request.timing.read = request.lap()
                self.metrics.first_token(request)
        self.metrics.step(len(reading.requests), running=False)
        batch = Batch(reading.requests, reading.mask, reading.cache)
        self._advance(batch, logits)
        if batch.requests and self._running is not None:
            self._running.join(batch)
        elif batch.requests:
            self._running = batch

    def _decode(self) -> None:
        """Gives every running row a token."""
        if self._running is None:
            return
        batch = self._running
        logits = self._guarded(batch, lambda: batch.step(self.model))
        if logits is not None:
            self.metrics.step(len(batch.requests))
            self._advance(batch, logits)
        if not batch.requests:
            self._running = None

    def _guarded(self, batch: Batch, forward: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """`forward()`; where it raises, its rows are taken out, and each is tried once more, alone."""
        try:
            return forward()
        except Exception as error:
            logger.warning("a forward of %d rows failed", len(batch.requests), exc_info=error)
            requests, batch.requests = batch.requests, []
            for request in requests:
                request.failures += 1
                try:
                    if len(requests) == 1 or request.failures > 1:
                        raise error
                    self._reading.append(Reading([Prepared(self.model, request)]))
                except Exception as final:
                    self._end(request, final)
            return None

    def _advance(self, batch: Batch, logits: torch.Tensor) -> None:
        """Gives each row its next token from `logits` `[rows, vocabulary]`; rows that end leave."""
        logits[:, self._suppressed] = -torch.inf
        likeliest = logits.argmax(-1).tolist()
        staying = []
        for row, request in enumerate(batch.requests):
            chooser = request.chooser
            assert chooser is not None
            try:
                token = likeliest[row]
                if not chooser.plain:
                    ids = torch.tensor([request.ids], device=logits.device)
                    token = chooser.choose(ids, logits[row : row + 1])
                if request.take(token, self.processor.tokenizer):
                    staying.append(row)
                    continue
            except Exception as error:
                self._end(request, error)
                continue
            self._keep(batch, row)
            self._end(request)
        batch.keep(staying)

    def _keep(self, batch: Batch, row: int) -> None:
        """Keeps a row's cache for the next turn."""
        request = batch.requests[row]
        if self.limits.kept_tokens:
            ids, cache = batch.cut(row)
            prompt = request.prompt
            self._kept.put(
                Kept(request.user, prompt.adapter_id, prompt.modality, ids, prompt.length, request.items, cache)
            )

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        self.metrics.ended(request, failed=error is not None)
        # without its traceback, which would keep the batch's tensors as long as somebody keeps the request
        request.finish(self.processor.tokenizer, error and error.with_traceback(None))


__all__ = ["Engine", "EngineClosedError", "Limits", "QueueFullError"]

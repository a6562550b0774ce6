"""Which requests get the next forward, and what becomes of its logits."""

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from mixlora.serving.batch import Batch
from mixlora.serving.kept import Kept, KeptCaches
from mixlora.serving.limits import Limits
from mixlora.serving.metrics import Load, Metrics
from mixlora.serving.reading import Prepared, Reading
from mixlora.serving.request import Request
from mixlora.serving.waiting import FairQueue

logger = logging.getLogger(__name__)


class Scheduler:
    """The requests of an engine, from the queue to their last token. One thread calls it; others fill the queue only.

    Between two steps that give every running row a token, at most one chunk of prompts is read, so a long prompt does
    not stall the others. Prompts that wait are read in turn.

    Attributes:
        waiting: the queue.
        kept: caches for the next turns of conversations.
        suppressed: ids that are never an answer.
    """

    def __init__(self, model: Any, processor: Any, limits: Limits, metrics: Metrics) -> None:
        self.model, self.processor, self.limits, self.metrics = model, processor, limits, metrics
        self.waiting = FairQueue(limits.waiting)
        self.kept = KeptCaches(limits.kept_tokens, limits.kept_seconds)
        self.suppressed: list[int] = model._suppressed({}, model.generation_config) or []
        self._reading: deque[Reading] = deque()
        self._running: Batch | None = None

    def requests(self) -> list[Request]:
        """Every request in the batch or on its way into it."""
        return [request for batch in self._batches() for request in batch.requests]

    def _batches(self) -> list[Batch]:
        return [*self._reading, *([self._running] if self._running else [])]

    def load(self) -> Load:
        """What it holds. Any thread may ask."""
        running, reading = self._running, list(self._reading)
        return Load(
            waiting=[request.prompt.modality for request in self.waiting.requests()],
            reading=[request.prompt.modality for one in reading for request in one.requests],
            running=[] if running is None else [request.prompt.modality for request in running.requests],
            batch_tokens=0 if running is None else running.mask.numel(),
            kept_tokens=self.kept.tokens,
        )

    def step(self) -> None:
        """Ends what is over, admits what fits, reads a chunk of prompts, and gives every running row a token."""
        self._drop_over()
        self._admit()
        self._read()
        self._decode()

    def abandon(self, begun: BaseException | None, waiting: BaseException) -> None:
        """Ends every request, those that began with `begun` and the others with `waiting`, and frees all memory."""
        for request in self.requests():
            request.reason = request.reason or "cancelled"
            self._end(request, begun)
        while (left := self.waiting.take()) is not None:
            left.reason = "cancelled"
            self._end(left, waiting)
        self._running = None
        self._reading.clear()
        self.kept.clear()

    def _drop_over(self) -> None:
        """Ends what was cancelled or is out of time, and frees its rows."""
        for request in self.waiting.remove_over():
            self._end(request)
        for batch in self._batches():
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
        while (request := self.waiting.peek()) is not None:
            if not self._has_room([one.request for one in group], request):
                break
            width = max(request.prompt.length, *(one.length for one in group), 0)
            kept = self.kept.find(request.user, request.prompt)
            if group and (kept is not None or width * (len(group) + 1) > self.limits.chunk):
                break  # a prompt behind a kept cache is read by itself
            self.waiting.take()
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
                self.kept.take(*kept)
            prepared = Prepared(self.model, request, kept)
        except Exception as error:
            self._end(request, error)
            return None
        request.reused = prepared.past
        request.timing.encoded = request.lap()
        return prepared

    def _has_room(self, group: list[Request], request: Request) -> bool:
        """Whether the batch may take it: in rows, and in places when every answer gets as long as it may."""
        held = [*self.requests(), *group]
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
        self.metrics.step(reading.requests, running=False)
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
            self.metrics.step(batch.requests)
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
        logits[:, self.suppressed] = -torch.inf
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
            self.kept.put(
                Kept(request.user, prompt.adapter_id, prompt.modality, ids, prompt.length, request.items, cache)
            )

    def _end(self, request: Request, error: BaseException | None = None) -> None:
        self.metrics.ended(request, failed=error is not None)
        # without its traceback, which would keep the batch's tensors as long as somebody keeps the request
        request.finish(self.processor.tokenizer, error and error.with_traceback(None))

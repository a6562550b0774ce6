"""The batching engine: one thread owns the model; requests join its batch and leave it between steps."""

import time
from dataclasses import replace
from threading import Condition, Thread
from typing import Any

import torch

from mixlora.serving.limits import Limits
from mixlora.serving.metrics import Metrics
from mixlora.serving.prompt import Prompt, PromptMaker
from mixlora.serving.request import Request
from mixlora.serving.sampling import Chooser, Sampling
from mixlora.serving.scheduler import Scheduler
from mixlora.serving.trimming import Trimmer
from mixlora.serving.waiting import QueueFullError


class EngineClosedError(RuntimeError):
    """The engine takes no more requests."""


class Engine:
    """Answers requests of any modality in one running batch, each as if it were alone.

    Safe to use from any thread and event loop. Use it as a context manager, or call `close`.

        with Engine(model, processor) as engine:
            request = engine.submit([{"role": "user", "content": "Hello"}])
            for piece in request: ...        # or `async for`, or request.result()
    """

    def __init__(self, model: Any, processor: Any, limits: Limits | None = None) -> None:
        self.model, self.processor = model, processor
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self._make_prompt = PromptMaker(model, processor)
        self._scheduler = Scheduler(model, processor, self.limits, self.metrics)
        self._trim = Trimmer()
        self._work = Condition()
        self._closing = self._stopping = False
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
                self._scheduler.waiting.put(request)
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
        return self.metrics.snapshot(self._scheduler.load())

    # What follows runs in the engine's thread alone.

    def _run(self) -> None:
        error: BaseException = EngineClosedError("the engine was closed")
        try:
            with torch.inference_mode():
                while self._wait():
                    self._scheduler.step()
                    self._trim()
        except BaseException as unexpected:  # not of a forward: those are caught. Leave nobody waiting
            error = unexpected
        with self._work:
            self._closing = True
        self._scheduler.abandon(None if self._stopping else error, error)

    def _wait(self) -> bool:
        """Waits for work; False when there is none left to do."""
        scheduler = self._scheduler
        with self._work:
            while not self._stopping and not scheduler.requests() and not len(scheduler.waiting):
                if self._closing:
                    return False
                scheduler.kept.drop_old()
                self._work.wait(timeout=1.0 if scheduler.kept.tokens else None)
            return not self._stopping


__all__ = ["Engine", "EngineClosedError", "Limits", "QueueFullError"]

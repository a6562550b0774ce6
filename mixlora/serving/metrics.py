"""What the engine counts."""

import time
from collections import Counter, deque
from dataclasses import dataclass
from statistics import median
from threading import Lock
from typing import Any

from mixlora.modeling.configuration_mixlora import MODALITIES
from mixlora.serving.request import Request

WINDOW = 60.0  # seconds that rates and waits look back
RECENT = 10_000  # requests and steps that are remembered at most


@dataclass(frozen=True)
class Load:
    """What the engine holds now."""

    waiting: list[str]
    """Modalities of the requests in the queue."""
    reading: list[str]
    """Of those whose prompts are being read."""
    running: list[str]
    """Of those that answer, one token a step each."""
    batch_tokens: int
    """Places of the running batch's cache, padding included."""
    kept_tokens: int
    """Tokens of conversations kept for their next turn."""


class Metrics:
    """Counts since the start, and rates of the last minute."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._started = time.monotonic()
        self._ended: Counter[tuple[str, str]] = Counter()
        self._tokens: Counter[tuple[str, str]] = Counter()
        self._refused = 0
        self._steps: deque[tuple[float, Counter[str], bool]] = deque(maxlen=RECENT)
        self._first: deque[tuple[float, str, float]] = deque(maxlen=RECENT)

    def refused(self) -> None:
        """A request was not taken: the queue was full, or the engine was closing."""
        with self._lock:
            self._refused += 1

    def step(self, requests: list[Request], running: bool = True) -> None:
        """Each of these got a token: by a step of the running batch, or at the end of their prompts."""
        rows = Counter(request.prompt.modality for request in requests)
        with self._lock:
            self._steps.append((time.monotonic(), rows, running))

    def first_token(self, request: Request) -> None:
        """A request got its first token."""
        with self._lock:
            self._first.append((time.monotonic(), request.prompt.modality, request.timing.first_token))

    def ended(self, request: Request, failed: bool) -> None:
        """A request ended."""
        modality = request.prompt.modality
        with self._lock:
            self._ended[modality, "error" if failed else str(request.reason)] += 1
            self._tokens[modality, "prompt"] += request.prompt.length
            self._tokens[modality, "reused"] += request.reused
            self._tokens[modality, "answer"] += len(request.tokens)

    def snapshot(self, load: Load) -> dict[str, Any]:
        """All figures: `batch_tokens` and `kept_tokens` of `load`, and

        - `waiting`, `reading`, `running`: requests now;
        - `ended` {modality: {reason or "error": requests}}, `tokens` {modality: {prompt, reused, answer: tokens}},
          `refused`, all since the start;
        - of the last minute `tokens_per_second`, `batch_size` (mean rows a step) and `first_token_seconds`
          {modality: {"median", "worst"}};
        - `modalities` {modality: {waiting, reading, running, tokens_per_second, batch_size}}: the shares of each.
        """
        with self._lock:
            now = time.monotonic()
            steps = [(rows, running) for moment, rows, running in self._steps if moment > now - WINDOW]
            seconds: dict[str, list[float]] = {}
            for moment, modality, value in self._first:
                if moment > now - WINDOW:
                    seconds.setdefault(modality, []).append(value)
            since, ended, tokens, refused = self._started, _nested(self._ended), _nested(self._tokens), self._refused
        sizes = [rows for rows, running in steps if running]
        shares: dict[str, Counter[str]] = {
            "waiting": Counter(load.waiting),
            "reading": Counter(load.reading),
            "running": Counter(load.running),
            "tokens_per_second": _rate(sum((rows for rows, _ in steps), Counter()), min(WINDOW, now - since)),
            "batch_size": _rate(sum(sizes, Counter()), len(sizes)),
        }
        return {
            **{name: sum(counts.values()) for name, counts in shares.items()},
            "modalities": {kind: {name: counts[kind] for name, counts in shares.items()} for kind in MODALITIES},
            "batch_tokens": load.batch_tokens,
            "kept_tokens": load.kept_tokens,
            "ended": ended,
            "tokens": tokens,
            "refused": refused,
            "first_token_seconds": {
                modality: {"median": median(values), "worst": max(values)} for modality, values in seconds.items()
            },
        }


def _rate(counts: Counter[str], over: float) -> Any:
    """Counts divided by steps or seconds, of which there may be none."""
    return Counter({name: count / max(over, 1e-3) for name, count in counts.items()})


def _nested(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, int]]:
    result: dict[str, dict[str, int]] = {}
    for (first, second), count in counts.items():
        result.setdefault(first, {})[second] = count
    return result

"""One request from its arrival to its last token."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenizers.decoders import DecodeStream

from mixlora.serving.kept import Item
from mixlora.serving.prompt import Prompt
from mixlora.serving.sampling import Chooser, Sampling
from mixlora.serving.stream import TextStream

Reason = Literal["stop", "length", "cancelled", "timeout"]


@dataclass
class Timing:
    """Seconds of each stage."""

    prepared: float = 0.0
    """Decoding media and tokenizing, in the caller's thread."""
    queued: float = 0.0
    """Waiting for a place in the batch."""
    encoded: float = 0.0
    """Towers and projectors."""
    read: float = 0.0
    """The prompt's passes, decode steps of others between them included."""
    answered: float = 0.0
    """From the first token to the last."""

    @property
    def first_token(self) -> float:
        """From arrival to the first token."""
        return self.prepared + self.queued + self.encoded + self.read


@dataclass(eq=False)
class Request(TextStream):
    """A handle on a running answer: iterate over it, in a thread or a loop, for the text as it comes.

    Made by [`Engine.submit`]. The engine's thread alone writes to it; only `cancel` is for others.
    """

    prompt: Prompt
    sampling: Sampling
    user: str
    timeout: float | None
    """Seconds from submission."""
    tokens: list[int] = field(default_factory=list)
    """Of the answer, the end token included."""
    reason: Reason | None = None
    """Why it ended: at an end token or stop string, at its longest, by `cancel`, or out of time. None: it has not."""
    reused: int = 0
    """Tokens of the prompt that lay in a kept cache."""
    items: list[Item] = field(default_factory=list)
    """Where its pictures and clips stand, once they were encoded."""
    timing: Timing = field(default_factory=Timing)

    def __post_init__(self) -> None:
        super().__init__()
        self.arrived = time.monotonic()
        self.cancelled = False
        self.chooser: Chooser | None = None
        self.failures = 0
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""  # text that may be the beginning of a stop string
        self._cut = False  # at a stop string
        self._mark = self.arrived

    def cancel(self) -> None:
        """Ends it before the next step; its text so far stays."""
        self.cancelled = True

    @property
    def ids(self) -> list[int]:
        """Tokens of the prompt and of the answer so far."""
        return [*self.prompt.ids[0].tolist(), *self.tokens]

    @property
    def longest(self) -> int:
        """Tokens of the prompt and of the longest answer."""
        return self.prompt.length + self.sampling.max_new_tokens

    def result(self, timeout: float | None = None) -> str:
        """The whole text, waited for.

        Raises:
            TimeoutError: it did not end within `timeout` seconds. It goes on.
            Exception: what its forward raised.
        """
        self.wait(timeout)
        return self.text

    def must_end(self) -> bool:
        """Whether it was cancelled or is out of time; `reason` says which then."""
        late = self.timeout is not None and time.monotonic() - self.arrived > self.timeout
        if self.reason is None and (self.cancelled or late):
            self.reason = "cancelled" if self.cancelled else "timeout"
        return self.reason is not None

    def lap(self) -> float:
        """Seconds since the last lap, or since it arrived."""
        now = time.monotonic()
        mark, self._mark = self._mark, now
        return now - mark

    def take(self, token: int, tokenizer: Any) -> bool:
        """Adds a token of the answer and writes what text it completes. Whether the answer goes on."""
        assert self.chooser is not None
        self.tokens.append(token)
        self._held += self._decoder.step(tokenizer.backend_tokenizer, token) or ""
        found = [place for stop in self.sampling.stop if (place := self._held.find(stop)) >= 0]
        if found:
            self._held, self._cut, self.reason = self._held[: min(found)], True, "stop"
        elif token in self.chooser.ends:
            self.reason = "stop"
        elif len(self.tokens) >= self.sampling.max_new_tokens:
            self.reason = "length"
        else:
            keep = max((_overlap(self._held, stop) for stop in self.sampling.stop), default=0)
            self.write(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        return self.reason is None

    def finish(self, tokenizer: Any, error: BaseException | None = None) -> None:
        """Writes what was held back and ends the stream."""
        if not self._cut:  # the decoder holds a character back that is not whole
            whole = tokenizer.decode(self.tokens, skip_special_tokens=True)
            self._held += whole[len(self.text) + len(self._held) :]
        self.write(self._held)
        self._held = ""
        self.timing.answered = self.lap()
        self.end(error)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` that a stop string begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)

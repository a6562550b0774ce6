"""What an engine holds at once."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Bounds of an engine."""

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

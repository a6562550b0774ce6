"""The demo's chat without its page: messages and files in, pieces of the answer out."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mixlora.serving.engine import Engine, EngineClosedError, QueueFullError
from mixlora.serving.media import MediaError, MediaLimits, read_medium
from mixlora.serving.request import Request
from mixlora.serving.sampling import Sampling


class ChatError(ValueError):
    """What a visitor is told in one line."""


@dataclass(frozen=True)
class DemoLimits:
    """What one visitor may do."""

    media: MediaLimits = field(default_factory=lambda: MediaLimits(seconds=30.0, items=8, text=4000))
    """Of pictures and clips, over a whole conversation."""
    turns: int = 20
    """Questions of a conversation."""
    tokens: int = 512
    """Of an answer."""
    running: int = 2
    """Answers at once."""
    timeout: float = 120.0
    """Seconds of an answer, its wait included."""


class DemoChat:
    """Answers visitors on an engine.

    Args:
        folders: files are read from these alone, whatever path a client names: where uploads lie, and the examples.
    """

    def __init__(self, engine: Engine, folders: Sequence[Path], limits: DemoLimits | None = None) -> None:
        self.engine = engine
        self.folders = [folder.resolve() for folder in folders]
        self.limits = limits or DemoLimits()
        self._running: dict[str, set[Request]] = {}

    async def answer(
        self, message: dict[str, Any], history: list[dict[str, Any]], sampling: Sampling, visitor: str
    ) -> AsyncIterator[tuple[str, Request]]:
        """Yields the text so far and its request, and once more when the answer has ended.

        A reader that stops to iterate cancels the request.

        Args:
            message: `{"text", "files"}`, the files as paths.
            history: messages as the page holds them: `role`, and `content` as a list of parts of type text and file.
                Those with a title in their `metadata` are ours and no part of the conversation.

        Raises:
            ChatError: the question is not taken.
        """
        if len(self._running.get(visitor, ())) >= self.limits.running:
            raise ChatError(f"{self.limits.running} of your questions are being answered; wait for one of them")
        request = await asyncio.to_thread(self._submit, message, history, sampling, visitor)
        mine = self._running.setdefault(visitor, set())
        mine.add(request)
        text = ""
        try:
            async for piece in request:
                text = (text + piece).lstrip()
                yield text, request
            yield text.rstrip(), request
        except (GeneratorExit, ChatError):
            raise
        except Exception as error:
            raise ChatError("the model failed on this question") from error
        finally:
            request.cancel()
            mine.discard(request)
            if not mine:
                self._running.pop(visitor, None)

    def leave(self, visitor: str) -> None:
        """Ends what is answered to a visitor who closed the page."""
        for request in self._running.pop(visitor, ()):
            request.cancel()

    def _submit(
        self, message: dict[str, Any], history: list[dict[str, Any]], sampling: Sampling, visitor: str
    ) -> Request:
        try:
            turns = conversation(history, message, self.folders, self.limits)
            return self.engine.submit(turns, sampling, user=visitor, timeout=self.limits.timeout)
        except (QueueFullError, EngineClosedError, ValueError) as error:
            raise ChatError(str(error)) from error


def conversation(
    history: list[dict[str, Any]], message: dict[str, Any], folders: Sequence[Path], limits: DemoLimits
) -> list[dict[str, Any]]:
    """What was said, and the new question, as the engine takes it. Questions that got no answer are left out.

    Raises:
        ChatError: nothing is asked, or too much.
        MediaError: a file is not taken.
    """
    asked: dict[str, Any] = {"text": str(message.get("text") or ""), "files": list(message.get("files") or [])}
    if not asked["text"].strip() and not asked["files"]:
        raise ChatError("nothing is asked: type, add a picture, or speak")
    rounds = [(question, said) for question, said in _rounds(history) if said] + [(asked, "")]
    if len(rounds) > limits.turns:
        raise ChatError(f"a conversation has at most {limits.turns} questions here; clear it to start over")
    items = sum(len(question["files"]) for question, _ in rounds)
    if items > limits.media.items:
        raise ChatError(f"{items} pictures and clips, at most {limits.media.items} fit into a conversation")
    characters = sum(len(question["text"]) + len(said) for question, said in rounds)
    if characters > limits.media.text:
        raise ChatError(f"{characters} characters, at most {limits.media.text} fit into a conversation")
    turns: list[dict[str, Any]] = []
    for question, said in rounds:
        turns.append(_turn(question, folders, limits.media))
        if said:
            turns.append({"role": "assistant", "content": said})
    return turns


def _rounds(history: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Questions with their answers; neighbouring messages of one side are one."""
    rounds: list[tuple[dict[str, Any], str]] = []
    for entry in history:
        content = entry.get("content")
        parts: list[dict[str, Any]] = (
            [{"type": "text", "text": content}] if isinstance(content, str) else content or []
        )
        text = "".join(part["text"] for part in parts if part.get("type") == "text")
        if entry.get("role") == "user":
            if not rounds or rounds[-1][1]:
                rounds.append(({"text": "", "files": []}, ""))
            rounds[-1][0]["text"] += text
            rounds[-1][0]["files"] += [part["file"]["path"] for part in parts if part.get("type") == "file"]
        elif rounds and not (entry.get("metadata") or {}).get("title"):
            rounds[-1] = (rounds[-1][0], rounds[-1][1] + text)
        elif rounds and not rounds[-1][1]:
            rounds[-1][0].update(text="", files=[])  # refused: whatever comes next is a question of its own
    return rounds


def _turn(question: dict[str, Any], folders: Sequence[Path], limits: MediaLimits) -> dict[str, Any]:
    """A question as a user's turn: pictures, then clips, then text."""
    media: dict[str, list[Any]] = {"image": [], "audio": []}
    for number, path in enumerate(question["files"], start=1):
        kind, medium = read_medium(_file(path, folders, f"file {number}", limits), f"file {number}", limits)
        media[kind].append(medium)
    parts = [{"type": kind, kind: one} for kind, items in media.items() for one in items]
    if question["text"].strip():
        parts.append({"type": "text", "text": question["text"]})
    return {"role": "user", "content": parts}


def _file(path: Any, folders: Sequence[Path], where: str, limits: MediaLimits) -> bytes:
    """The bytes of a file in one of `folders`; nothing else is opened, and no link out of them is followed."""
    try:
        real = Path(path).resolve()
        inside = any(real.is_relative_to(folder) for folder in folders) and real.is_file()
    except (OSError, TypeError, ValueError):
        inside = False
    if not inside:
        raise MediaError(f"{where}: it is not here any more; add it anew")
    with real.open("rb") as file:
        return file.read(limits.bytes + 1)

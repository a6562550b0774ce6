"""`mixlora chat`: questions of the command line, of a file, or turn by turn."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixlora.commands.shared import Model, Tokens, load_session
from mixlora.rows import Row, read_questions

if TYPE_CHECKING:
    from mixlora.chat import Answer, ChatSession

COMMANDS = "/image FILE or /audio FILE adds to the next turn, /new starts over, /quit or an empty line ends."


def chat(
    prompt: Annotated[str | None, typer.Argument(help="The question; without one, talk turn by turn.")] = None,
    model: Model = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A clip; alone, it is the question.")] = None,
    batch: Annotated[
        Path | None, typer.Option(help='Answer rows {"text"?, "images"?, "audio"?} of a JSON lines file as one batch.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --batch: one JSON object a row.")] = False,
    max_new_tokens: Tokens = 64,
) -> None:
    """Ask about text, pictures and voices; answers stream."""
    if batch is not None:
        if prompt is not None or image or audio:
            raise ValueError("--batch takes its questions from the file: give no PROMPT, --image or --audio with it")
        rows = read_questions(batch)
        answers = load_session(model, max_new_tokens).answer_batch(rows)
        print("\n".join(_json_lines(answers) if as_json else _table(rows, answers)))
        return
    if as_json:
        raise ValueError("--json goes with --batch")
    for path in [*(image or []), *(audio or [])]:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    row = Row(prompt, tuple(image or ()), tuple(audio or ()), where="command line")
    if prompt is not None and not prompt.strip() and not image and not audio:
        raise ValueError("the prompt is empty")
    session = load_session(model, max_new_tokens)
    if prompt is None and not audio:
        _talk(session, row)
    else:
        _say(session, row)


def _json_lines(answers: "list[Answer]") -> Iterator[str]:
    """One JSON object an answer."""
    for answer in answers:
        record = {"text": answer.text, "modality": answer.modality, "adapter": answer.adapter}
        yield json.dumps(record, ensure_ascii=False)


def _table(rows: list[Row], answers: "list[Answer]") -> Iterator[str]:
    """Columns for a reader: the route, the question, the answer."""
    yield f"{'modality':<14} {'adapter':<8} {'question':<50} answer"
    for row, answer in zip(rows, answers, strict=True):
        media = " ".join(f"[{path.name}]" for path in (*row.images, *row.audio))
        asked = " ".join(f"{media} {row.text or ''}".split())
        yield f"{answer.modality:<14} {answer.adapter or '-':<8} {asked:<50} {' '.join(answer.text.split())}"


def _say(session: "ChatSession", row: Row) -> None:
    """Print an answer as it comes."""
    for piece in session.ask(row):
        print(piece, end="", flush=True)
    print()


def _talk(session: "ChatSession", row: Row) -> None:
    """Turn by turn until the input ends; media of `row` belong to the first turn. Bad media end no conversation."""
    images, clips = list(row.images), list(row.audio)
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        command, _, argument = said.partition(" ")
        if said == "/quit" or (not said and not images and not clips):
            return
        if command in ("/image", "/audio"):
            (images if command == "/image" else clips).append(Path(argument.strip()))
            continue
        if said == "/new":
            session.reset()
            images, clips = [], []
            continue
        try:
            _say(session, Row(said or None, tuple(images), tuple(clips), where="this turn"))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        images, clips = [], []

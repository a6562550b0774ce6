"""A conversation of several turns about a picture; answers appear as they are made.

    python examples/stream_chat.py [--model DIR] [--image FILE] [TURN ...]

The picture belongs to the first turn. Later turns see it too, since the session sends the whole conversation.
"""

import argparse
from pathlib import Path

from shared import SAMPLES

TURNS = ["What digit is this?", "Are you sure?"]


def main(argv: list[str] | None = None) -> None:
    """Asks the turns one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("turns", nargs="*", default=TURNS, metavar="TURN", help=f"by default {' '.join(TURNS)}")
    parser.add_argument("--model", help="checkpoint folder; by default the one inside the package")
    parser.add_argument("--image", type=Path, default=SAMPLES / "seven.png")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    from mixlora import default_checkpoint
    from mixlora.chat import ChatSession
    from mixlora.rows import Row

    session = ChatSession.from_pretrained(args.model or default_checkpoint(), args.max_new_tokens)
    for number, turn in enumerate(args.turns, start=1):
        images = (args.image,) if number == 1 else ()
        print(f"> {turn}")
        for piece in session.ask(Row(turn, images, where=f"turn {number}")):
            print(piece, end="", flush=True)
        print()
    print(f"{len(session.turns)} messages in the conversation")


if __name__ == "__main__":
    main()

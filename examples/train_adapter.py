"""Trains a vision adapter on rows of your own, here coloured squares, and loads it elsewhere as a PEFT folder.

    python examples/train_adapter.py --output DIR [--model DIR]

Nothing but the adapter changes, so its folder alone turns the checkpoint that it started from into the trained one.
"""

import argparse
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

COLOURS = {"red": (210, 40, 40), "green": (40, 170, 60), "blue": (40, 60, 210), "yellow": (230, 210, 40)}
QUESTION = "What colour is the square?"


def draw_squares(folder: Path, count: int, seed: int) -> list[tuple[Path, str]]:
    """Draws squares of random colour, shade, size and place on grey; gives each file with its colour's name."""
    from PIL import Image

    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    squares = []
    for number in range(count):
        name, colour = rng.choice(sorted(COLOURS.items()))
        side = rng.randint(24, 56)
        place = rng.randint(0, 64 - side), rng.randint(0, 64 - side)
        picture = Image.new("RGB", (64, 64), (128, 128, 128))
        picture.paste(
            tuple(value + rng.randint(-25, 25) for value in colour), (*place, place[0] + side, place[1] + side)
        )
        picture.save(folder / f"{number}.png")
        squares.append((folder / f"{number}.png", name))
    return squares


def write_rows(squares: list[tuple[Path, str]], path: Path) -> None:
    """Training rows, a question about each square and the answer; media paths count from the file."""
    with path.open("w", encoding="utf-8") as file:
        for picture, name in squares:
            place = str(picture.relative_to(path.parent))
            question = [{"type": "image", "path": place}, {"type": "text", "text": QUESTION}]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": name}]
            file.write(json.dumps({"messages": messages}) + "\n")


def accuracy(session: Any, squares: list[tuple[Path, str]]) -> float:
    """The share of squares whose colour the model names."""
    from mixlora.evaluation.metrics import exact, total
    from mixlora.rows import Row

    answers = session.answer_batch([Row(QUESTION, (picture,)) for picture, _ in squares])
    return total([exact(answer.text, [name]) for answer, (_, name) in zip(answers, squares, strict=True)])


def main(argv: list[str] | None = None) -> None:
    """Draws, measures, trains, saves, loads back, and measures again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="checkpoint folder; by default the one inside the package")
    parser.add_argument("--squares", type=int, default=160, help="to learn from; a quarter as many are held out")
    parser.add_argument("--epochs", type=float, default=15)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    import yaml

    from mixlora import MixLoraForConditionalGeneration, default_checkpoint
    from mixlora.chat import ChatSession
    from mixlora.training.stages import Recipe, Source, Stage
    from mixlora.training.train import train

    start = args.model or default_checkpoint()
    squares = draw_squares(args.output / "squares", args.squares, args.seed)
    held_out = draw_squares(args.output / "held-out", args.squares // 4, args.seed + 1)
    write_rows(squares, args.output / "squares.jsonl")
    session = ChatSession.from_pretrained(start, max_new_tokens=8)
    adapter = session.model.config.routing["vision"]
    before = accuracy(session, held_out)

    stage = Stage(
        name="colours", train=[f"adapter.{adapter}"], data=[Source(str(args.output / "squares.jsonl"))],
        learning_rate=args.learning_rate, epochs=args.epochs, rows_per_batch=8,
    )  # fmt: skip
    recipe = args.output / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(dataclasses.asdict(Recipe(start, [stage], args.seed))), encoding="utf-8")
    train(recipe, args.output)

    folder = args.output / "adapter"
    MixLoraForConditionalGeneration.from_pretrained(args.output / "01-colours").save_adapter(folder, adapter)
    session.model.delete_adapter(adapter)
    session.model.load_adapter(folder, adapter)
    print(f"held-out squares named right: {before:.0%} before, {accuracy(session, held_out):.0%} after")
    print(f"PEFT folder: {folder}")


if __name__ == "__main__":
    main()

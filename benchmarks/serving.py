"""Tokens per second of the engine beside one `generate` of the same rows, on the embedded checkpoint.

python benchmarks/serving.py [--rows 16] [--tokens 48] [--rounds 3] [--whole] [--json FILE]

Both answer the same rows of four modalities, all as long, from decoded files and tokens; towers, prompts and steps are
within the time. With --whole decoding and tokenizing are too, and the engine gets one row after
the other. The two take turns, and each round's figures are printed. The answers must be equal.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

MOST_APART = 0.01  # share of tokens; where the two likeliest are as good as equal, a batch of another shape may differ


def generate(session: Any, inputs: Any, tokens: int) -> list[list[int]]:
    """All rows in one batch that nobody joins."""
    output = session.model.generate(**inputs, max_new_tokens=tokens)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def engine(running: Any, prompts: Iterable[Any], tokens: int) -> list[list[int]]:
    """All rows sent, prompts or conversations, and waited for."""
    from mixlora.serving.sampling import Sampling

    requests = [running.submit(prompt, Sampling(tokens)) for prompt in prompts]
    for request in requests:
        request.wait()
    return [request.tokens for request in requests]


def main(argv: list[str] | None = None) -> None:
    """Prints a row a round, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, default in (("--rows", 16), ("--tokens", 48), ("--rounds", 3)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)

    from mixlora import default_checkpoint
    from mixlora.chat import ChatSession
    from mixlora.rows import read_questions
    from mixlora.serving.engine import Engine, Limits

    session = ChatSession.from_pretrained(default_checkpoint())
    session.model.generation_config.eos_token_id = None  # every answer is as long as asked
    session.model.config.text_config.eos_token_id = None
    questions = read_questions(Path(default_checkpoint()) / "samples" / "rows.jsonl")
    rows = (questions * (args.rows // len(questions) + 1))[: args.rows]
    turns = [[row.turn()] for row in rows]
    inputs = session._encode(turns)

    def encoded() -> Any:
        return session._encode([[row.turn()] for row in rows])

    speeds: dict[str, list[float]] = {"generate": [], "engine": []}
    answers: dict[str, list[list[int]]] = {}
    print(f"{'round':<8} {'generate':>10} {'engine':>10}   tokens/s, {args.rows} rows of {args.tokens} tokens")
    with Engine(session.model, session.processor, Limits(args.rows, args.rows, kept_tokens=0)) as running:
        prompts = [running.prepare(turn) for turn in turns]
        ways: dict[str, Callable[[], list[list[int]]]] = {
            "generate": lambda: generate(session, inputs, args.tokens),
            "engine": lambda: engine(running, prompts, args.tokens),
        }
        if args.whole:
            ways = {
                "generate": lambda: generate(session, encoded(), args.tokens),
                "engine": lambda: engine(running, ([row.turn()] for row in rows), args.tokens),
            }
        for number in range(args.rounds):
            for name, run in ways.items():
                begun = time.perf_counter()
                answers[name] = run()
                speeds[name].append(args.rows * args.tokens / (time.perf_counter() - begun))
            print(f"{number + 1:<8} {speeds['generate'][-1]:>10.1f} {speeds['engine'][-1]:>10.1f}", flush=True)
    pairs = zip(answers["generate"], answers["engine"], strict=True)
    apart = statistics.mean(a != b for left, right in pairs for a, b in zip(left, right, strict=True))
    if apart > MOST_APART:
        raise RuntimeError(f"{apart:.1%} of the tokens differ")
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(f"{'median':<8} {medians['generate']:>10.1f} {medians['engine']:>10.1f}   {apart:.2%} of the tokens differ")
    if args.json is not None:
        args.json.write_text(json.dumps({"tokens_per_second": medians, "differ": apart}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Answering rows of text, pictures and speech: one call of ours beside transformers with PEFT, a call a modality.

python -m benchmarks.decode [--repeat 3] [--shapes full] [--quick] [--device cuda --dtype bfloat16] [--json FILE]

All rows are answered greedily with the same number of tokens. Apart from each other are timed: the towers and
projectors, reading the prompts, and decoding. `bare` is transformers' decoder without adapters on the same rows, in
one call and in three, fewer steps: what one call gains where there is nothing to route. `--padded` adds our model
with packing off.
"""

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

from benchmarks import measure
from benchmarks.pair import Feeder, Pair, Row, build_pair, check_agreement

PARTS = ("towers", "prefill", "decode")


class Clock:
    """Seconds of the parts of `generate`, of decoding those of a step.

    It is a stopping criterion that sees each step end.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.steps: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        import torch

        measure.wait(self.device)
        self.steps.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def generate(self, model: Any, inputs: dict[str, Any], tokens: int, **options: Any) -> None:
        """Adds the parts of one call. Encoding is part of the first step, and is taken off it."""
        from transformers import StoppingCriteriaList

        encoded, self.steps = self.seconds["towers"], []
        measure.wait(self.device)
        begun = time.perf_counter()
        criteria = StoppingCriteriaList([self])
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False, stopping_criteria=criteria, **options)
        self.seconds["prefill"] += self.steps[0] - begun - (self.seconds["towers"] - encoded)
        self.seconds["decode"] += (self.steps[-1] - self.steps[0]) / (tokens - 1)


def ways_of(
    pair: Pair, feeder: Feeder, rows: list[Row], with_padded: bool = False, new_tokens: int = 0
) -> dict[str, Callable[[], dict[str, float]]]:
    """Each way of answering, as a call that gives the seconds of its parts."""
    tokens = new_tokens or pair.shapes.new_tokens
    few = max(3, tokens // 8)
    inputs, calls = feeder.ours(rows), feeder.peer_calls(rows)
    names = ("input_ids", "attention_mask")
    bare_calls = {name: {key: call[key] for key in names} for name, call in calls.items()}
    bare = {key: inputs[key] for key in names}
    for each in (bare, *bare_calls.values()):  # placeholders are words there
        each["input_ids"] = each["input_ids"].clamp(max=pair.shapes.image_id - 1)

    def ours() -> dict[str, float]:
        clock = Clock(pair.device)
        with measure.watching(pair.ours.model, "encode_media", clock.seconds, "towers", pair.device):
            clock.generate(pair.ours, inputs, tokens)
        return clock.seconds

    def padded() -> dict[str, float]:
        from mixlora.modeling import backbone

        with mock.patch.object(backbone, "packing_of", lambda *args: ()):
            return ours()

    def peer() -> dict[str, float]:
        clock = Clock(pair.device)
        embedding = pair.peer.base_model.model.model.embed_tokens_extend
        with measure.watching(embedding, "forward", clock.seconds, "towers", pair.device):
            for modality, call in calls.items():
                with pair.acting(modality) as model:
                    clock.generate(model, call, tokens)
        return clock.seconds

    def bare_one() -> dict[str, float]:
        clock = Clock(pair.device)
        with pair.acting("text") as model:
            clock.generate(model, bare, few)
        return clock.seconds

    def bare_three() -> dict[str, float]:
        clock = Clock(pair.device)
        with pair.acting("text") as model:
            for call in bare_calls.values():
                clock.generate(model, call, few)
        return clock.seconds

    found = {"ours": ours, "peer, three calls": peer, "bare, one call": bare_one, "bare, three calls": bare_three}
    return found | ({"ours, padded": padded} if with_padded else {})


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints the parts of each way and the ratios."""
    parser = measure.options(__doc__, repeat=3)
    parser.add_argument("--padded", action="store_true")
    args, shapes = measure.parse(parser, argv)
    pair, feeder = build_pair(shapes, args.device, args.dtype), Feeder(shapes, args.device, args.dtype)
    rows = feeder.rows(shapes.answered)
    apart = check_agreement(pair, feeder, rows)
    ways = ways_of(pair, feeder, rows, args.padded)
    brief = {name: way for name, way in ways_of(pair, feeder, rows, new_tokens=3).items() if "bare" not in name}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(args.repeat + 1):
        for name, way in ways.items():
            if number:
                rounds[name].append(way())
            elif name in brief:  # warm up
                brief[name]()
    times = {part: {name: [each[part] for each in found] for name, found in rounds.items()} for part in PARTS}
    middle = {part: measure.medians(each) for part, each in times.items()}
    print(f"rows of {[len(row.ids) for row in rows]} tokens, {shapes.new_tokens} new ones; seconds, decode: a step")
    print(measure.table(("", *PARTS), [(name, *(middle[part][name] for part in PARTS)) for name in ways]))
    ratios = {part: measure.ratio(times[part], "peer, three calls", "ours") for part in PARTS}
    whole = {name: [sum(each[p] for p in PARTS[:2]) for each in found] for name, found in rounds.items()}
    ratios["towers and prefill"] = measure.ratio(whole, "peer, three calls", "ours")
    ratios["bare decode"] = measure.ratio(times["decode"], "bare, three calls", "bare, one call")
    ratios["decode, of what the bare decoder gains"] = ratios["decode"] / ratios["bare decode"]
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} x")
    speeds = {name: len(rows) / seconds for name, seconds in middle["decode"].items()}
    profiles = {name: measure.profile(way, args.device) for name, way in brief.items()}
    result = {
        "profiles": profiles,
        "medians": middle,
        "ratios": ratios,
        "decoded_tokens_per_second": speeds,
        "differ": apart,
    }
    return measure.finish("decode", args, result | {"lengths": [len(row.ids) for row in rows]})


if __name__ == "__main__":
    main()

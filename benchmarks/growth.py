"""How the cost of routing grows: tokens per second by batch size, rank, adapters, share of routed rows, and lengths.

python -m benchmarks.growth [--repeat 5] [--quick] [--device cuda --dtype bfloat16] [--json FILE]

A decoder of four layers alone, at the shapes' width. The first four are steps of decoding; `base` are the same rows
without adapters, and the bound is `base` slowed by the weights that adapters add to what is read. The last is reading
prompts of one mean length and growing spread, real tokens counted; its bound is the speed without any spread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

from benchmarks import measure
from benchmarks.shapes import Shapes

PAST = 32
LAYERS = 4
BATCHES, RANKS, ADAPTERS, SHARES = (3, 6, 12, 24, 48), (16, 32, 64, 128), (1, 2, 4, 8), (0.0, 0.25, 0.5, 0.75, 1.0)
SPREADS = (0.0, 0.25, 0.5, 0.75, 0.95)
ROWS, MEAN = 24, 160


@dataclass
class Point:
    """Tokens per second at one place of an axis."""

    at: float
    ours: float
    base: float
    bound: float


def build(shapes: Shapes, adapters: int, rank: int, device: str, dtype: str) -> Any:
    """A decoder with so many adapters."""
    import torch

    from mixlora.modeling.configuration_mixlora import MixLoraConfig
    from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration

    torch.manual_seed(0)
    names = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    text = {
        "vocab_size": 4096,
        "hidden_size": shapes.width,
        "intermediate_size": shapes.inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": shapes.heads,
        "num_key_value_heads": shapes.key_value_heads,
        "fused_projections": True,
        "pad_token_id": 0,
    }
    spec = {"r": rank, "alpha": 2 * rank, "dropout": 0.0, "target_modules": names}
    config = MixLoraConfig(text_config=text, exact_base=False, adapters={f"a{i}": dict(spec) for i in range(adapters)})
    model = MixLoraForConditionalGeneration(config).eval().to(device, getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def step(model: Any, adapter_ids: list[int], device: str) -> Callable[[], Any]:
    """A step of decoding, one row for each of `adapter_ids`."""
    import torch
    from transformers import DynamicCache

    ids = torch.randint(1, 4096, (len(adapter_ids), PAST + 1), device=device)
    chosen, cache = torch.tensor(adapter_ids, device=device), DynamicCache()
    options = {"past_key_values": cache, "use_cache": True, "adapter_ids": chosen, "logits_to_keep": 1}
    with torch.no_grad():
        model(input_ids=ids[:, :PAST], **options)

    def run() -> None:
        with torch.no_grad():
            model(input_ids=ids[:, PAST:], **options)
        cache.crop(-1)

    return run


def decoded(model: Any, at: float, adapter_ids: list[int], args: Any) -> Point:
    """A point of decoding. Rows lie in order of their adapters."""
    adapter_ids = sorted(adapter_ids)
    ways = {name: step(model, ids, args.device) for name, ids in
            (("ours", adapter_ids), ("base", [-1] * len(adapter_ids)))}  # fmt: skip
    middle = measure.medians(measure.alternate(ways, args.repeat, args.device))
    sizes = {True: 0, False: 0}
    read = {f".a{i}." for i in adapter_ids if i >= 0}
    for name, parameter in model.model.language_model.named_parameters():
        if ".lora_" not in name or any(part in name for part in read):
            sizes[".lora_" in name] += parameter.numel()
    speed = len(adapter_ids) / middle["base"]
    return Point(at, len(adapter_ids) / middle["ours"], speed, speed / (1 + sizes[True] / sizes[False]))


def lengths_of(spread: float, rows: int, mean: int) -> list[int]:
    """Lengths of one mean, evenly from `(1 - spread)` to `(1 + spread)` times it."""
    return [round(mean * (1 + spread * (2 * i / (rows - 1) - 1))) for i in range(rows)]


def prompts(model: Any, args: Any, rows: int, mean: int) -> list[Point]:
    """Points of reading prompts: packed as ours, padded as base."""
    import torch

    from mixlora.modeling import backbone

    found: list[Point] = []
    for spread in SPREADS:
        lengths = lengths_of(spread, rows, mean)
        longest = max(lengths)
        mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths]).to(args.device)
        inputs = {
            "input_ids": torch.randint(1, 4096, mask.shape, device=args.device),
            "attention_mask": mask,
            "adapter_ids": torch.tensor([i % 3 - 1 for i in range(rows)], device=args.device),
        }

        def packed(inputs: dict[str, Any] = inputs) -> None:
            with torch.no_grad():
                model(**inputs, logits_to_keep=1)

        def padded(packed: Callable[[], None] = packed) -> None:
            with mock.patch.object(backbone, "packing_of", lambda *args: ()):
                packed()

        middle = measure.medians(measure.alternate({"ours": packed, "base": padded}, args.repeat, args.device))
        speeds = {name: sum(lengths) / seconds for name, seconds in middle.items()}
        found.append(Point(spread, speeds["ours"], speeds["base"], found[0].ours if found else speeds["ours"]))
    return found


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints a table for each axis."""
    args, shapes = measure.parse(measure.options(__doc__, repeat=5), argv)
    rank, few = dict(shapes.ranks)["vision"], args.quick
    pair = build(shapes, 2, rank, args.device, args.dtype)
    axes: dict[str, list[Point]] = {"batch": [], "rank": [], "adapters": [], "share": []}
    for batch in BATCHES[:2] if few else BATCHES:
        axes["batch"].append(decoded(pair, batch, [i % 3 - 1 for i in range(batch)], args))
    for share in SHARES[-2:] if few else SHARES:
        routed = round(share * ROWS)
        axes["share"].append(decoded(pair, share, [i % 2 if i < routed else -1 for i in range(ROWS)], args))
    for each in RANKS[:1] if few else RANKS:
        model = build(shapes, 2, each, args.device, args.dtype)
        axes["rank"].append(decoded(model, each, [i % 3 - 1 for i in range(ROWS)], args))
    for count in ADAPTERS[:2] if few else ADAPTERS:
        model = build(shapes, count, rank, args.device, args.dtype)
        axes["adapters"].append(decoded(model, count, [i % count for i in range(ROWS)], args))
    axes["spread"] = prompts(pair, args, 4 if few else 8, 24 if few else MEAN)
    for name, points in axes.items():
        rows = [(p.at, p.ours, p.base, p.bound) for p in points]
        print(measure.table((f"{name} (tokens/s)", "ours", "padded" if name == "spread" else "base", "bound"), rows))
    return measure.finish("growth", args, {"axes": {name: [vars(p) for p in axes[name]] for name in axes}})


if __name__ == "__main__":
    main()

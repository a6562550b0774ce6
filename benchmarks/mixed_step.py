"""What adapters cost in a decoding step whose rows take different ones: ours beside PEFT's `adapter_names`.

python -m benchmarks.mixed_step [--repeat 25] [--shapes full] [--quick] [--device cuda --dtype bfloat16] [--json FILE]

The cost is a mixed step less a step of the same model without adapters, both behind a short cache. Four rows take
none, four `vision`, four `speech`: in order, and in turn. The bound is the adapters' weights over all others that a
step reads.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from benchmarks import measure
from benchmarks.pair import Pair, build_pair

PAST = 32
ROWS = 12
NAMES = ("__base__", "vision", "speech")


def steps_of(pair: Pair) -> dict[str, Callable[[], Any]]:
    """Each way of doing a step, as a call that gives its logits. A cache is cut back to its prompt before a step.

    The peer's base step wants its adapters off, see [`within`].
    """
    import torch
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, pair.shapes.vocabulary - 60, (ROWS, PAST + 1), generator=generator).to(pair.device)
    in_order = [name for name in NAMES for _ in range(ROWS // 3)]
    in_turn = list(NAMES) * (ROWS // 3)
    number = {name: i for i, name in enumerate(pair.ours.router.names)} | {"__base__": -1}

    def step(model: Any, options: dict[str, Any]) -> Callable[[], Any]:
        cache = DynamicCache()
        with torch.no_grad():
            model(input_ids=ids[:, :PAST], past_key_values=cache, use_cache=True, logits_to_keep=1, **options)

        def run() -> Any:
            with torch.no_grad():
                logits = model(input_ids=ids[:, PAST:], past_key_values=cache, use_cache=True, **options).logits
            cache.crop(-1)
            return logits

        return run

    def ours(names: list[str]) -> Callable[[], Any]:
        return step(pair.ours, {"adapter_ids": torch.tensor([number[name] for name in names], device=pair.device)})

    with pair.acting("text") as model:
        bare = step(model, {})
    return {
        "base, ours": ours(["__base__"] * ROWS),
        "base, peer": bare,
        "in order, ours": ours(in_order),
        "in order, peer": step(pair.peer, {"adapter_names": in_order}),
        "in turn, ours": ours(in_turn),
        "in turn, peer": step(pair.peer, {"adapter_names": in_turn}),
    }


def within(pair: Pair) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """To switch the peer's adapters off takes longer than they do in a step, and is no part of a step."""
    return {"base, peer": lambda: pair.acting("text")}


def bound(pair: Pair) -> float:
    """Bytes of the adapters' weights over those of the decoder, head included, that a step reads."""
    sizes = {True: 0, False: 0}
    for name, parameter in pair.ours.model.language_model.named_parameters():
        sizes[".lora_" in name] += parameter.numel()
    return sizes[True] / sizes[False]


def limits(least: float, adapters: dict[str, float]) -> dict[str, float]:
    """How many times the peer's own time is what reading the adapters' weights takes: more no way of ours can reach.

    Args:
        least: seconds that reading them takes at the rate at which a base step reads its own weights.
        adapters: seconds, by order of the rows and by who.
    """
    return {order: adapters[f"{order}, peer"] / least for order in ("in order", "in turn")}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prints steps, what adapters add, and the ratios."""
    args, shapes = measure.parse(measure.options(__doc__, repeat=25), argv)
    pair = build_pair(shapes, args.device, args.dtype)
    steps = steps_of(pair)
    around = within(pair)
    for order in ("base", "in order", "in turn"):
        found = steps[f"{order}, ours"]().float()
        with around.get(f"{order}, peer", nullcontext)():
            wanted = steps[f"{order}, peer"]().float()
        apart = ((found - wanted).abs().max() / wanted.std()).item()
        if apart > (5e-3 if args.dtype == "float32" else 0.3):
            raise RuntimeError(f"{order}: the answers differ by {apart:.3g} standard deviations")
    times = measure.alternate(steps, args.repeat, args.device, around)
    middle = measure.medians(times)
    adapters, shares = {}, {}
    for order in ("in order", "in turn"):
        for who in ("ours", "peer"):
            pairs = zip(times[f"{order}, {who}"], times[f"base, {who}"], strict=True)
            added = sorted(mixed - base for mixed, base in pairs)
            adapters[f"{order}, {who}"] = added[len(added) // 2]
            shares[f"{order}, {who}"] = adapters[f"{order}, {who}"] / middle[f"base, {who}"]
    ratios = {order: adapters[f"{order}, peer"] / adapters[f"{order}, ours"] for order in ("in order", "in turn")}
    print(f"{ROWS} rows behind {PAST} tokens, a step; the weights' share is {bound(pair):.3f}")
    print(measure.table(("", "seconds"), list(middle.items())))
    print(
        measure.table(("adapters' own", "seconds", "of a base step"), [(k, v, shares[k]) for k, v in adapters.items()])
    )
    least = bound(pair) * middle["base, ours"]
    most = limits(least, adapters)
    for name, value in ratios.items():
        print(f"{name}: {value:.2f} x, {most[name]:.2f} x if only the adapters' weights had to be read")
    profiles = {name: measure.profile(steps[name], args.device) for name in ("in order, ours", "in order, peer")}
    result = {
        "profiles": profiles,
        "medians": middle,
        "adapters": adapters,
        "shares": shares,
        "ratios": ratios,
        "bound": bound(pair),
        "least": least,
        "limits": most,
    }
    return measure.finish("mixed_step", args, result)


if __name__ == "__main__":
    main()

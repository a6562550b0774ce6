"""Runs ways of doing one thing in turn, and tells their medians and ratios."""

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.shapes import VARIANTS, Shapes


def options(doc: str | None, repeat: int, shapes: str = "small-vocabulary") -> argparse.ArgumentParser:
    """A parser with what all benchmarks take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=repeat, help="rounds, after one that warms up")
    parser.add_argument("--shapes", choices=sorted(VARIANTS), default=shapes)
    parser.add_argument("--quick", action="store_true", help="toy shapes and one round: does it run at all?")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="write what was measured here")
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> tuple[argparse.Namespace, Shapes]:
    """Arguments and the shapes that they ask for."""
    args = parser.parse_args(argv)
    args.begun = time.perf_counter()
    if args.quick:
        args.shapes, args.repeat = "toy", 1
    return args, VARIANTS[args.shapes]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def timed(way: Callable[[], Any], device: str = "cpu") -> float:
    """Seconds that `way` takes."""
    wait(device)
    begun = time.perf_counter()
    way()
    wait(device)
    return time.perf_counter() - begun


@contextmanager
def watching(owner: Any, name: str, seconds: dict[str, float], part: str, device: str = "cpu") -> Iterator[None]:
    """Adds the time that a method of `owner` takes to `seconds[part]`."""
    method = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        wait(device)
        begun = time.perf_counter()
        result = method(*args, **kwargs)
        wait(device)
        seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - begun
        return result

    with mock.patch.object(owner, name, watched):
        yield


def alternate(
    ways: Mapping[str, Callable[[], Any]],
    repeat: int,
    device: str = "cpu",
    within: Mapping[str, Callable[[], AbstractContextManager[Any]]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each way, round by round: all take turns, so that what disturbs one disturbs the others.

    Args:
        within: contexts that some ways run in; to enter and to leave them is not timed.
    """
    contexts = {name: (within or {}).get(name, nullcontext) for name in ways}

    def run(name: str) -> float:
        with contexts[name]():
            return timed(ways[name], device)

    for name in ways:
        run(name)
    rounds = [{name: run(name) for name in ways} for _ in range(repeat)]
    return {name: [each[name] for each in rounds] for name in ways}


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each way."""
    return {name: statistics.median(values) for name, values in times.items()}


def ratio(times: Mapping[str, list[float]], peer: str, ours: str) -> float:
    """How many times as long the peer takes: the median of the rounds' own ratios."""
    return statistics.median(a / b for a, b in zip(times[peer], times[ours], strict=True))


def profile(way: Callable[[], Any], device: str = "cpu", most: int = 8) -> dict[str, float]:
    """The operations that take the most time in one call, each with its share of all; the rest as `others`."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    cuda = device != "cpu"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profiler(activities=activities) as seen:
        way()
        wait(device)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    times = {event.key: float(getattr(event, field)) for event in seen.key_averages()}
    total = sum(times.values()) or 1.0
    first = sorted(times, key=times.__getitem__, reverse=True)[:most]
    shares = {name: times[name] / total for name in first}
    return shares | {"others": 1 - sum(shares.values())}


def functions(way: Callable[[], Any], most: int = 8) -> dict[str, float]:
    """As [`profile`], of what is not PyTorch's: Python's own functions and those that it calls."""
    seen = cProfile.Profile()
    seen.runcall(way)
    times: dict[str, float] = {}
    for (file, _, name), (_, _, own, _, _) in pstats.Stats(seen).stats.items():  # type: ignore[attr-defined]
        name = name if file == "~" else f"{Path(file).stem}.{name}"
        times[name] = times.get(name, 0.0) + own
    total = sum(times.values()) or 1.0
    first = sorted(times, key=times.__getitem__, reverse=True)[:most]
    shares = {name: times[name] / total for name in first}
    return shares | {"others": 1 - sum(shares.values())}


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """Rows in columns, numbers of three places."""
    shown = [tuple(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row) for row in (head, *rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(r, widths, strict=True))
        )
        for r in shown
    )


def machine(device: str) -> dict[str, Any]:
    """Where it was measured."""
    import torch
    import transformers

    name = torch.cuda.get_device_name() if device != "cpu" else platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def finish(name: str, args: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Adds where and at which shapes it was measured, and writes it where `--json` says."""
    where = {"benchmark": name, "shapes": args.shapes, "dtype": args.dtype, **machine(args.device)}
    result = {**where, "took": time.perf_counter() - args.begun, **result}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result

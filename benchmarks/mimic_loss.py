"""Mimicking a teacher over a large vocabulary: our loss beside the plain computation and TRL's, heads frozen.

python benchmarks/mimic_loss.py [--tokens 1024] [--vocabulary 200064] [--width 256] [--rounds 3] [--json FILE]

Forward and backward. Each measurement is a process of its own: peak memory over what its inputs take, and the median
time of the rounds. All ways must give the same loss and gradient. TRL's, by chunks of the vocabulary, is left out
where it is not installed, or is older than 1.16.
"""

import argparse
import importlib.util
import json
import multiprocessing
import resource
import statistics
import time
from pathlib import Path
from typing import Any

DIVERGENCE = "forward_kl"


def inputs(tokens: int, vocabulary: int, width: int) -> list[Any]:
    """Hidden states and heads of a student and a teacher whose distributions are neither flat nor the same."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = [(tokens, width), (vocabulary, width)] * 2
    made = [
        torch.randn(shape, generator=generator) * (3 / width**0.5 if i % 2 else 1) for i, shape in enumerate(shapes)
    ]
    made[0].requires_grad_()
    return made


def ours(student: Any, student_head: Any, teacher: Any, teacher_head: Any) -> Any:
    """The package's loss."""
    import torch

    from mixlora.training.objectives import mimic_loss

    mask = torch.ones(len(student), dtype=torch.bool)
    return mimic_loss(student, student_head, teacher, teacher_head, mask, divergence=DIVERGENCE)


def plain(student: Any, student_head: Any, teacher: Any, teacher_head: Any) -> Any:
    """All logits of both at once."""
    from torch.nn import functional as F

    log_p, log_q = (student @ student_head.T).log_softmax(-1), (teacher @ teacher_head.T).log_softmax(-1)
    return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def trl(student: Any, student_head: Any, teacher: Any, teacher_head: Any) -> Any:
    """TRL's, without the student's entropy that it gives as well."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(student, student_head, None, teacher, teacher_head, None, 0.0)
    return divergence.mean()


WAYS = {"plain": plain, "trl": trl, "ours": ours}


def ways() -> list[str]:
    """Those that can be measured here."""
    try:
        has_trl = importlib.util.find_spec("trl.kernels.chunked_divergence") is not None
    except ModuleNotFoundError:
        has_trl = False
    return [way for way in WAYS if way != "trl" or has_trl]


def peak() -> float:
    """The process's highest memory so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(name: str, shape: tuple[int, int, int], rounds: int, results: Any) -> None:
    """Runs one way and puts what was measured on a queue."""
    tensors = inputs(*shape)
    few = [tensors[0][:2].detach().requires_grad_(), tensors[1][:1000], tensors[2][:2], tensors[3][:1000]]
    WAYS[name](*few).backward()  # libraries are loaded
    (tensors[0] @ tensors[1][:1000].T).sum().backward()  # threads are started
    base, times, loss = peak(), [], None
    for _ in range(rounds):
        tensors[0].grad = None
        started = time.perf_counter()
        loss = WAYS[name](*tensors)
        loss.backward()
        times.append(time.perf_counter() - started)
    assert loss is not None
    results.put((name, peak() - base, statistics.median(times), loss.item(), tensors[0].grad.norm().item()))


def main() -> None:
    """Measures all, one after the other, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--vocabulary", type=int, default=200064)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    records = []
    print(f"vocabulary {args.vocabulary:,}, width {args.width}, fp32, {DIVERGENCE}, median of {args.rounds}")
    print(f"{'tokens':>7} {'way':<6} {'peak GiB':>9} {'seconds':>8} {'loss':>10} {'gradient':>10}")
    for tokens in args.tokens:
        found = {}
        for name in ways():
            results = context.Queue()
            process = context.Process(
                target=measure, args=(name, (tokens, args.vocabulary, args.width), args.rounds, results)
            )
            process.start()
            found[name] = results.get()
            process.join()
            _, memory, seconds, loss, gradient = found[name]
            print(f"{tokens:>7} {name:<6} {memory:>9.2f} {seconds:>8.2f} {loss:>10.5f} {gradient:>10.5f}", flush=True)
        for name, (_, memory, seconds, loss, gradient) in found.items():
            assert abs(loss - found["plain"][3]) < 1e-3 * abs(loss), f"the loss of {name} differs"
            assert abs(gradient - found["plain"][4]) < 1e-3 * abs(gradient), f"the gradient of {name} differs"
            memory_ratio, time_ratio = memory / found["plain"][1], seconds / found["plain"][2]
            if name != "plain":
                print(f"{tokens:>7} {name} / plain: {memory_ratio:.3f} of the memory, {time_ratio:.2f} of the time")
        records += [
            {"tokens": tokens, "way": way, "peak_gib": memory, "seconds": seconds, "loss": loss}
            for way, memory, seconds, loss, _ in found.values()
        ]
    if args.json:
        args.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

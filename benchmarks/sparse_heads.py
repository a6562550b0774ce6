"""What a sparse head costs: attention of one head by its budget, beside dense attention, from 4 k to 128 k tokens.

python benchmarks/sparse_heads.py [--lengths 4096 ... 131072] [--budgets 16,2 64,2 256,4 1024,8] [--dim 64]
    [--json FILE] [--plot FILE.png]

Queries and keys are random: a budget costs the same whatever it finds. Choosing the keys is part of the time. What a
head needs is the decoder's matter: see `sparse_prefill.py` and `sparse_retrieval.py`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mixlora.modeling.sparse_parts import Stretch
from mixlora.modeling.sparse_prefill import Budget, SparsePrefill, attend_sparsely


def seconds(run: Callable[[], Any], times: int) -> float:
    """The shortest of some runs."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return min(found)


def read(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, budget: Budget, spec: SparsePrefill) -> int:
    """Reads a row `[length, dim]` by segments; the number of scores that were computed."""
    pairs = 0
    for first in range(0, len(query), spec.segment):
        last = min(first + spec.segment, len(query))
        stretch = Stretch(((0, last, query[first:last]),), key[:last], value[:last], first, query.shape[1] ** -0.5)
        pairs += attend_sparsely([stretch], budget, spec)[1]
    return pairs


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """How many times as fast, by length, a line a budget."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    lengths = sorted({record["tokens"] for record in records})
    for budget in dict.fromkeys(tuple(record["budget"]) for record in records):
        mine = [record for record in records if tuple(record["budget"]) == budget]
        times = [record["dense_seconds"] / record["sparse_seconds"] for record in mine]
        axes.plot(
            [record["tokens"] for record in mine], times, marker="o", label="{} columns, {} diagonals".format(*budget)
        )
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024} k" for length in lengths])
    axes.set_yticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    axes.set_xlabel("tokens")
    axes.set_ylabel("times as fast as dense")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=90)


def main() -> None:
    """Prints a table, a row for each length and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(12, 18)])
    parser.add_argument("--budgets", nargs="+", default=["16,2", "64,2", "256,4", "1024,8"])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--segment", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    spec, records = SparsePrefill(1, args.block_size, args.segment, 16), []
    print(f"{torch.get_num_threads()} threads, a head of {args.dim} dimensions, fp32")
    print(f"{'tokens':>8} {'budget':>10} {'dense s':>9} {'sparse s':>9} {'times':>6} {'share':>6}")
    for length in args.lengths:
        query, key, value = torch.randn(3, length, args.dim, generator=torch.Generator().manual_seed(0))
        whole = [each[None, None] for each in (query, key, value)]
        times = 1 if length > 32768 else 8
        dense = seconds(lambda parts=whole: scaled_dot_product_attention(*parts, is_causal=True), times)
        for budget in (tuple(map(int, text.split(","))) for text in args.budgets):
            pairs = read(query, key, value, budget, spec)
            sparse = seconds(lambda parts=(query, key, value), b=budget: read(*parts, b, spec), times)
            share = pairs / (length * (length + 1) // 2)
            records.append({"tokens": length, "budget": budget, "share": share})
            records[-1] |= {"dense_seconds": dense, "sparse_seconds": sparse}
            shown = ",".join(map(str, budget))
            print(
                f"{length:>8,} {shown:>10} {dense:>9.3f} {sparse:>9.3f} {dense / sparse:>6.1f} {share:>6.3f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()

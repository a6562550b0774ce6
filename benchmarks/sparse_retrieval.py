"""Sparse prefill of the decoder that `scripts/long_context_study.py` trained: time, recall, answers and memory.

python benchmarks/sparse_retrieval.py --study build/long_context [--task lookup] [--lengths 4096 8192 16384 32768]
    [--positions dual_chunk] [--calibration 32768] [--json FILE] [--plot FILE.png]

A row of the study's task is read in pieces with a cache, up to its questions, by dual chunk attention or with YaRN's
positions and no chunks. Then all questions are asked about it, a group at a time. Time is that of attention while the
row is read, of all layers and heads, dense ones included, beside `scaled_dot_product_attention` on the same queries
and keys in the same run. Answers are those after the sparse reading beside those after a dense one. Memory is what the
process holds at its peak beyond what it held before, beside what was to be expected. Recall and the dense answers take
a dense reading each: `--check` is the longest row that gets them.
"""

import argparse
import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from benchmarks.sparse_prefill import Stopwatch, summary
from mixlora import MixLoraForConditionalGeneration
from mixlora.evaluation.sparse_budgets import calibrate, measure
from mixlora.modeling.long_attention import LongAttention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from retrieval_reader import Study, method_config
from retrieval_tasks import FACT, TASKS, Rows, facts_of, make_rows

PIECE = 4096
GROUP = 32
"""Questions that are asked together: few enough to be read exactly, as the end of any prompt is."""
FLOAT = 4
"""Bytes of a number."""
MMAP_THRESHOLD = -3
"""Option of glibc's mallopt: larger blocks lie in memory of their own."""


def decoder(folder: Path, method: str, length: int) -> Any:
    """The study's decoder, as it reads rows of `length` tokens by a method of the study."""
    trained = MixLoraForConditionalGeneration.from_pretrained(folder / "decoder").eval()
    text = trained.config.text_config
    sizes = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.head_dim)
    study = Study(*sizes, text.max_position_embeddings)
    model = MixLoraForConditionalGeneration(method_config(study, method, length)).eval()
    model.load_state_dict(trained.state_dict())
    return model


def row_of(task: str, length: int, seed: int) -> Rows:
    """A row of the task with `length` tokens before its questions."""
    facts = facts_of(TASKS[task], length)
    return make_rows(task, 1, length + FACT * facts, torch.Generator().manual_seed(seed), facts)


def haystack(row: Rows) -> torch.Tensor:
    """What stands before the questions, `[1, tokens]`."""
    return row.ids[:, : row.asked[0] - FACT + 1]


@torch.no_grad()
def read(model: Any, ids: torch.Tensor) -> DynamicCache:
    """Reads `ids` in pieces; gives the cache."""
    cache = DynamicCache(config=model.config.text_config)
    for piece in ids.split(PIECE, dim=1):
        model.model(piece, past_key_values=cache)
    return cache


@torch.no_grad()
def answers(model: Any, row: Rows, cache: DynamicCache) -> float:
    """The share of a row's questions that is answered right, asked in groups about what was read once."""
    found, before = [], cache.get_seq_length()
    for group in row.ids[:, before:].split(GROUP * FACT, dim=1):
        hidden = model.model(group, past_key_values=cache).last_hidden_state
        found.append(model.lm_head(hidden[0, FACT - 2 :: FACT]).argmax(-1))
        cache.crop(-group.shape[1])
    return float((torch.cat(found) == row.answers[0]).float().mean())


def timed(model: Any, row: Rows) -> tuple[Stopwatch, float]:
    """Attention times of reading what stands before the questions, and the answers."""
    watch = Stopwatch()
    LongAttention.attend = lambda self, *args, **kwargs: watch(self, *args, **kwargs)  # type: ignore[method-assign]
    try:
        cache = read(model, haystack(row))
    finally:
        LongAttention.attend = watch.attend  # type: ignore[method-assign]
    return watch, answers(model, row, cache)


def expected_bytes(model: Any, length: int) -> int:
    """What reading a row takes: the cache, a copy of its part in one layer while it grows, and scores of one head."""
    text = model.config.text_config
    layer = 2 * text.num_key_value_heads * text.head_dim * length * FLOAT
    return text.num_hidden_layers * layer + layer // 2 + 2 * text.sparse_prefill["block_size"] * length * FLOAT


def held(what: str) -> int:
    """Bytes that the process holds (`VmRSS`), or held at most since it was last asked to forget (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def peak_bytes(model: Any, row: Rows) -> int:
    """What reading the row takes at its peak; 0 where the system does not tell."""
    forget = Path("/proc/self/clear_refs")
    if not forget.exists():
        return 0
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 17)  # tensors go back when they are freed, and leave no holes
    libc.malloc_trim(0)
    forget.write_text("5", encoding="utf-8")
    before = held("VmRSS")
    read(model, haystack(row))
    return held("VmHWM") - before


def plot(records: list[dict[str, Any]], file: Path) -> None:
    """The speed-up by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    lengths = [record["tokens"] for record in records]
    axes.plot(lengths, [record["dense_seconds"] / record["our_seconds"] for record in records], marker="o")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024} k" for length in lengths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("times as fast as dense attention")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=90)


def main() -> None:
    """Searches budgets, then measures each length, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, required=True)
    parser.add_argument(
        "--task", choices=[name for name, task in TASKS.items() if task.media is None], default="lookup"
    )
    parser.add_argument("--positions", choices=["dual_chunk", "dual_chunk_temperature", "yarn"], default="dual_chunk")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384, 32768])
    parser.add_argument("--calibration", type=int, default=32768, help="tokens that budgets are searched on")
    parser.add_argument("--budgets", type=Path, help="JSON of an earlier run whose budgets are taken")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--check", type=int, default=32768)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    print(f"{torch.get_num_threads()} threads, {args.positions}, task {args.task}")
    if args.budgets:
        budgets = json.loads(args.budgets.read_text(encoding="utf-8"))["budgets"]
    else:
        sizes = {"min_length": PIECE, "block_size": args.block_size}
        batch = {"input_ids": haystack(row_of(args.task, args.calibration, 0))}
        model = decoder(args.study, args.positions, args.calibration)
        budgets, _ = calibrate(model, [batch], recall=args.recall, columns=(16, 64, 256, 1024), **sizes)
    print("budgets", json.dumps(budgets["budgets"]), flush=True)

    records = []
    for length in args.lengths:
        model = decoder(args.study, args.positions, length)
        row, record = row_of(args.task, length, 1), {"tokens": length}
        if length <= args.check:
            record["dense_right"] = answers(model, row, read(model, haystack(row)))
        model.config.set_long_context(sparse_prefill=budgets)
        if length <= args.check:
            record |= summary(measure(model, {"input_ids": haystack(row)}))
        watch, record["right"] = timed(model, row)
        record |= {"dense_seconds": watch.dense, "our_seconds": watch.ours, "times": watch.dense / watch.ours}
        record |= {"expected_bytes": expected_bytes(model, length), "peak_bytes": peak_bytes(model, row)}
        records.append(record)
        print(json.dumps(record), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"budgets": budgets, "lengths": records}, indent=1) + "\n", encoding="utf-8")
    if args.plot:
        plot(records, args.plot)


if __name__ == "__main__":
    main()

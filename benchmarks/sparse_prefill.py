"""Reading a long prompt: sparse attention beside dense `sdpa` of torch, on the same queries and keys in the same run.

python benchmarks/sparse_prefill.py [--checkpoint DIR] [--lengths 4096 8192] [--calibration 4096] [--recall 0.95]
    [--chunk-size 1024 --local-size 128] [--prefill-chunk N] [--min-length 2048] [--text FILE ...] [--json FILE]

Budgets are searched on one stretch of text and measured on another: the mean of the recall over heads and blocks of
queries, its 10th percentile, the heads that stay dense, and the share of scores that is computed. Dense heads count in
the time. Times are of attention alone, all layers; dense is `scaled_dot_product_attention(is_causal=True)` on
the same tensors. A prompt beyond the decoder's positions needs dual chunk attention (`--chunk-size`), then part of
what is timed as ours. The text is the documents and code of this repository, by default.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor, default_checkpoint
from mixlora.evaluation.sparse_budgets import HeadBudget, calibrate, measure
from mixlora.modeling.long_attention import LongAttention

ROOT = Path(__file__).resolve().parents[1]


class Stopwatch:
    """Replaces `LongAttention.attend`: adds up its time, and that of dense attention over the same tensors."""

    def __init__(self) -> None:
        self.ours, self.dense = 0.0, 0.0
        self.attend = LongAttention.attend

    def __call__(self, attention: LongAttention, query: Any, key: Any, value: Any, scale: float, *rest: Any) -> Any:
        """As `attend`."""
        started = time.perf_counter()
        result = self.attend(attention, query, key, value, scale, *rest)
        between = time.perf_counter()
        if key.shape[2] == query.shape[2]:
            scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        else:  # behind a cache, the keys of the cache are seen by all
            new = slice(key.shape[2] - query.shape[2], None)
            old = slice(0, key.shape[2] - query.shape[2])
            for part, causal in ((old, False), (new, True)):
                options = {"is_causal": causal, "scale": scale, "enable_gqa": True}
                scaled_dot_product_attention(query, key[:, :, part], value[:, :, part], **options)
        self.ours += between - started
        self.dense += time.perf_counter() - between
        return result


def token_ids(processor: Any, files: list[Path]) -> torch.Tensor:
    """All the text as one row of tokens."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    ids = torch.tensor(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[~torch.isin(ids, torch.tensor(processor.tokenizer.all_special_ids))]  # the documents name some


def stretch(ids: torch.Tensor, start: int, length: int) -> dict[str, torch.Tensor]:
    """Inputs of `length` tokens from `start`; the text begins anew where it ends."""
    row = ids[(torch.arange(length) + start) % len(ids)][None]
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


def timed(model: Any, batch: dict[str, torch.Tensor], chunk: int | None) -> Stopwatch:
    """Attention times of reading a prompt."""
    watch = Stopwatch()
    LongAttention.attend = lambda self, *args, **kwargs: watch(self, *args, **kwargs)  # type: ignore[method-assign]
    try:
        options = {"max_new_tokens": 1, "do_sample": False, "eos_token_id": None}
        model.generate(**batch, **options, prefill_chunk_size=chunk)
    finally:
        LongAttention.attend = watch.attend  # type: ignore[method-assign]
    return watch


def summary(heads: list[HeadBudget]) -> dict[str, float]:
    """Figures over all heads and blocks of queries."""
    recalls = sorted(recall for each in heads for recall in each.recalls if each.budget is not None)
    if not recalls:
        recalls = [1.0]
    return {
        "recall": statistics.fmean(recalls),
        "recall_p10": recalls[len(recalls) // 10],
        "dense_heads": sum(each.budget is None for each in heads),
        "heads": len(heads),
        "share": statistics.fmean(each.share for each in heads),
    }


def main() -> None:
    """Searches budgets, then measures each length, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--calibration", type=int, default=4096, help="tokens that budgets are searched on")
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--min-length", type=int, default=2048)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--segment", type=int, default=1024)
    parser.add_argument("--chunk-size", type=int, help="dual chunk attention; the decoder's positions by default")
    parser.add_argument("--local-size", type=int, help="an eighth of the chunk by default")
    parser.add_argument("--prefill-chunk", type=int)
    parser.add_argument("--text", type=Path, nargs="+")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    checkpoint = args.checkpoint or default_checkpoint()
    model = MixLoraForConditionalGeneration.from_pretrained(checkpoint).eval()
    files = args.text or sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("m*/*.py"), *ROOT.glob("training/*.py")])
    ids = token_ids(MixLoraProcessor.from_pretrained(checkpoint), files)
    longest = model.config.text_config.max_position_embeddings
    if args.chunk_size or max(args.lengths) > longest:
        chunk = args.chunk_size or longest
        spec = {"method": "dual_chunk", "chunk_size": chunk, "local_size": args.local_size or chunk // 8}
        model.config.set_long_context(long_context=spec)
    print(f"{checkpoint}: {len(ids):,} tokens of text, long_context {model.config.text_config.long_context}, ", end="")
    print(f"{torch.get_num_threads()} threads, {model.dtype}")

    started = time.perf_counter()
    sizes = {"min_length": args.min_length, "block_size": args.block_size, "segment": args.segment}
    budgets, found = calibrate(model, [stretch(ids, 0, args.calibration)], recall=args.recall, **sizes)
    model.config.set_long_context(sparse_prefill=budgets)
    print(f"budgets searched at {args.calibration:,} tokens in {time.perf_counter() - started:.0f} s: ", end="")
    print(
        json.dumps(budgets["budgets"]), json.dumps({name: round(value, 3) for name, value in summary(found).items()})
    )

    print(
        f"{'tokens':>8} {'dense s':>8} {'ours s':>8} {'dense/ours':>10} {'recall':>7} {'p10':>6} {'dense heads':>11} ",
        end="",
    )
    print(f"{'share':>6}")
    records = []
    for length in args.lengths:
        batch = stretch(ids, args.calibration, length)
        figures = summary(measure(model, batch))
        watch = timed(model, batch, args.prefill_chunk)
        record = {"tokens": length, "dense_seconds": watch.dense, "our_seconds": watch.ours, **figures}
        records.append(record)
        print(
            f"{length:>8,} {watch.dense:>8.2f} {watch.ours:>8.2f} {watch.dense / watch.ours:>10.2f} "
            f"{figures['recall']:>7.3f} {figures['recall_p10']:>6.3f} "
            f"{figures['dense_heads']:>5} of {figures['heads']:>2} {figures['share']:>6.3f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"budgets": budgets, "lengths": records}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

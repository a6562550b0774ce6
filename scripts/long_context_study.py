"""Trains a small decoder to retrieve in rows of 1,024 tokens, then asks it in longer ones, by each way to extend it.

python scripts/long_context_study.py --output build/long_context

The tasks are those of `retrieval_tasks.py`. It is trained on those of text alone. Digits to see and hear come from the
embedded checkpoint's towers and projectors (`retrieval_media.py`, which needs the rows of prepare_pictures.py and
prepare_speech.py) and least squares, which makes numbers of them. A run that was stopped goes on: training from its
last save, the questions from the first that was not asked. The length of training rows doubles when answers are right
(`--right`), up to `--train-length`.
Writes `training.jsonl`, `results.json` (of a method, task and length: asked and right by fifths of the row),
`table.md` and heat maps of the tasks.
"""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
from long_context_results import DEPTHS, Cell, heat_maps, table
from retrieval_media import load_media
from retrieval_reader import METHODS, Parts, Reader, Study, drawn
from retrieval_tasks import TASKS, make_rows
from retrieval_training import train

FAR_METHODS = ("plain", "dual_chunk", "dual_chunk_temperature")
TOKENS_AT_ONCE = 8192


@torch.no_grad()
def ask(reader: Reader, media: Parts, task: str, length: int, questions: int) -> tuple[list[int], list[int]]:
    """Questions asked about each fifth of the row, at least `questions`, and how many of the answers are right."""
    generator = torch.Generator().manual_seed(1_000 * length + list(TASKS).index(task))
    asked, right = torch.zeros(DEPTHS, dtype=torch.long), torch.zeros(DEPTHS, dtype=torch.long)
    while int(asked.min()) < questions:
        rows = make_rows(task, max(TOKENS_AT_ONCE // length, 1), length, generator)
        hidden = reader(rows.ids, drawn(rows, task, media, generator))
        correct = reader.model.lm_head(hidden[:, rows.asked - 1]).argmax(-1) == rows.answers
        fifth = (rows.depth * DEPTHS).long()
        asked += fifth.flatten().bincount(minlength=DEPTHS)
        right += fifth[correct].bincount(minlength=DEPTHS)
    return asked.tolist(), right.tolist()


def evaluate(trained: Reader, study: Study, options: argparse.Namespace, media: Parts) -> list[Cell]:
    """Every cell, those of an earlier run as they are."""
    file = options.output / "results.json"
    cells: list[Cell] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    done = {(cell["method"], cell["task"], cell["length"]) for cell in cells}
    for length in options.lengths:
        for method in options.methods:
            if method not in FAR_METHODS and not study.train_length < length <= options.far:
                continue  # up to the length of training they are the plain decoder
            reader = Reader(study, media, method, length).eval()
            reader.load_state_dict(trained.state_dict())
            for task in TASKS:
                if (method, task, length) in done:
                    continue
                started = time.perf_counter()
                asked, right = ask(reader, media, task, length, options.questions)
                cells.append({"method": method, "task": task, "length": length, "asked": asked, "right": right})
                file.write_text("[\n" + ",\n".join(map(json.dumps, cells)) + "\n]\n", encoding="utf-8")
                print(json.dumps(cells[-1]), f"{time.perf_counter() - started:.1f} s", flush=True)
    return cells


def main(arguments: list[str] | None = None) -> None:
    """Trains, asks, and writes the table and the heat maps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--media", type=Path, help="vectors of digits; by default a file of the output, encoded once")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step; at least a row of each task")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--first-length", type=int, default=64)
    parser.add_argument("--right", type=float, default=0.9, help="share of right answers at which rows get longer")
    parser.add_argument("--rest", type=float, default=0.3, help="weight of the loss that lets idle tokens rest")
    parser.add_argument("--crowd", type=float, default=32.0, help="how many times as many keys they shall bear")
    parser.add_argument("--save-every", type=int, default=50)
    parser.add_argument("--stop-after", type=int, help="stop training at this step")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384, 32768])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--far", type=int, default=8192, help=f"longer rows are read by {', '.join(FAR_METHODS)} alone"
    )
    parser.add_argument("--questions", type=int, default=200, help="of each cell, at least")
    for name, default in asdict(Study()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    study = Study(**{name: getattr(options, name) for name in asdict(Study())})
    decoder = train(study, options)
    if decoder is None:
        return
    decoder.model.save_pretrained(options.output / "decoder")  # for benchmarks/sparse_retrieval.py
    media = load_media(options.media or options.output / "media.safetensors")
    trained = Reader(study, media).eval()
    trained.model.load_state_dict(decoder.model.state_dict())
    trained.learn_digits(media)
    cells = evaluate(trained, study, options, media)
    (options.output / "table.md").write_text(table(cells, tuple(TASKS)), encoding="utf-8")
    heat_maps(cells, tuple(TASKS), options.output)
    print(table(cells, tuple(TASKS)))


if __name__ == "__main__":
    main()

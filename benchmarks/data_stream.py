"""How many rows a second the data give, beside those that a step of the embedded checkpoint takes, on one core.

python -m benchmarks.data_stream [--rows 192] [--batch 16] [--repeat 3] [FILE ...]

Three ways, each with the step that goes with it, all in one process with one thread and in seconds of its own time (so
that what else runs on the machine does not count): features of frozen towers that are kept on disk; media that are
read in every step, for towers that run in every step; and rows that are streamed, from the line in the file on. The
step is forward, backward and AdamW on adapters and projectors.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DEFAULT = ("digits", "clothes", "transcribe", "spoken_digit", "pairs")
"""Rows of the default recipe; those of the recipe `tiny` where they were never made."""
TRAIN = ["adapter.vision", "adapter.speech", "vision_projector", "speech_projector.speech"]


def default_files() -> list[Path]:
    from mixlora.training.recipe import PACKAGED

    made = [Path("build/data") / f"{name}.jsonl" for name in DEFAULT]
    found = [path for path in made if path.is_file()]
    return found or [PACKAGED / "tiny" / f"{name}.jsonl" for name in ("shapes", "tones", "both")]


def own_seconds(work: Callable[[], int]) -> float:
    """Rows a second of this process's time; `work` gives how many rows it did."""
    begin = time.process_time()
    rows = work()
    return rows / (time.process_time() - begin)


def best(work: Callable[[], int], repeat: int) -> float:
    return max(own_seconds(work) for _ in range(repeat))


def steps_of(model: Any, optimizer: Any, batches: list[dict[str, Any]]) -> int:
    """Trains on batches that are there already."""
    from mixlora.training.step_supervised import SupervisedStep

    step, rows = SupervisedStep(0.0, 0, 0), 0
    for batch in batches:
        loss, _ = step(model, batch, None)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rows += len(batch["input_ids"])
    return rows


def consumed(batches: Iterator[Any]) -> int:
    return sum(len(batch["input_ids"]) for batch in batches)


def measure(files: list[Path], rows: int, size: int, repeat: int, folder: Path) -> list[tuple[str, float, float]]:
    """Name, rows a second of the data, and of the step, of each way."""
    import torch

    import mixlora
    from mixlora.training.data.check import BrokenRows
    from mixlora.training.data.collate import Collator
    from mixlora.training.data.media import Media
    from mixlora.training.groups import select_parameters
    from mixlora.training.stage_data import stage_data
    from mixlora.training.stages import Source, Stage

    model = mixlora.MixLoraForConditionalGeneration.from_pretrained(mixlora.default_checkpoint(), dtype=torch.float32)
    processor = mixlora.MixLoraProcessor.from_pretrained(mixlora.default_checkpoint())
    select_parameters(model, TRAIN)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
    sources = [Source(str(path), limit=rows // len(files)) for path in files]
    settings: dict[str, Any] = {"name": "bench", "train": TRAIN, "data": sources, "learning_rate": 1e-5}
    found = []
    for name, streaming, cache in (
        ("kept features", False, folder),
        ("media read in every step", False, None),
        ("streamed rows", True, None),
    ):
        batches = -(-rows // size)
        stage = Stage(**settings, max_steps=batches, rows_per_batch=size, streaming=streaming, window=rows)
        media = Media(model, processor)
        data = stage_data(stage, model, processor, media, cache, 0, BrokenRows())
        collate = Collator(media, processor.tokenizer.pad_token_id)

        def stream(data: Any = data, collate: Any = collate) -> int:
            return consumed(iter(data.loader(collate, 0, 1)))

        given = best(stream, repeat)
        model.train()
        ready = list(itertools.islice(iter(data.loader(collate, 0, 1)), 4))
        steps_of(model, optimizer, ready[:1])  # warm
        taken = best(lambda ready=ready: steps_of(model, optimizer, ready), repeat)  # type: ignore[misc]
        found.append((name, given, taken))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="Rows; by default those of the embedded checkpoint.")
    parser.add_argument("--rows", type=int, default=192)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.files or default_files(), args.rows, args.batch, args.repeat, Path(folder))
    print(f"\n{'':<26} {'data, rows/s':>13} {'step, rows/s':>13} {'data / step':>12}")
    for name, given, taken in found:
        print(f"{name:<26} {given:>13,.1f} {taken:>13,.1f} {given / taken:>12.1f}")


if __name__ == "__main__":
    main()

"""A training step whose teacher is on disk, beside one that needs no teacher, and one in which the teacher runs.

python benchmarks/cached_teacher.py [--model DIR] [--rows 8] [--prompt 96] [--answer 48] [--rounds 9] [--json FILE]

A step is a batch collated, the student's forward, the loss and its gradients, without the optimizer. Ways take turns
in every round, and what is counted is the process's CPU time, so that other work on the machine does not count.
`given` gets the same states from memory. By default the embedded checkpoint is student and teacher.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mixlora

WAYS = ("given", "float32", "bfloat16", "top64", "sample16", "running")


class Given:
    """States in memory, by example."""

    def __init__(self, cache: Any, examples: list[Any]):
        self.examples, self.states = examples, [cache[example] for example in examples]

    def __getitem__(self, example: Any) -> Any:
        return next(s for each, s in zip(self.examples, self.states, strict=True) if each is example)


def prepare(name: str, rows: int, prompt: int, answer: int, folder: Path) -> tuple[Any, list[Any], dict[str, Any]]:
    """The student, examples of random tokens, and for each way its collator and its step."""
    import torch

    from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
    from mixlora.modeling.processing_mixlora import MixLoraProcessor
    from mixlora.training.data.collate import Collator, Example
    from mixlora.training.data.media import Media
    from mixlora.training.stages import Mimic, cache_form
    from mixlora.training.steps import MimicStep
    from mixlora.training.teacher import CheckpointTeacher, KeptTeacher
    from mixlora.training.teacher_cache import Form, cache_states

    model = MixLoraForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    model.config.routing["text"] = sorted(model.config.adapters)[0]  # so that rows of text train something
    trained = model.parameter_groups()[f"adapter.{model.config.routing['text']}"]
    for path, parameter in model.named_parameters():
        parameter.requires_grad_(path in trained)
    torch.manual_seed(0)
    ids = torch.randint(20, model.config.text_config.vocab_size, (rows, prompt + answer))
    for placeholder in (model.config.image_token_id, model.config.audio_token_id):
        ids[ids == placeholder] = 20
    examples = [Example(row, torch.cat([torch.full((prompt,), -100), row[prompt:]])) for row in ids]
    media = Media(model, MixLoraProcessor.from_pretrained(name))
    teacher = CheckpointTeacher(MixLoraForConditionalGeneration.from_pretrained(name, dtype=torch.float32))
    kept = KeptTeacher(teacher.head)
    ways: dict[str, Any] = {}
    for way in WAYS:
        collator = Collator(media, 0)
        if way == "running":
            ways[way] = collator, MimicStep(teacher, Mimic())
            continue
        kept_as = "float32" if way == "given" else way
        kind, count = cache_form(kept_as)
        form = Form(kind, torch.int16, count) if count else Form("states", getattr(torch, kind))
        collator.states = cache_states(teacher, teacher.model, Collator(media, 0), examples, folder, form)
        if way == "given":
            collator.states = Given(collator.states, examples)
        ways[way] = collator, MimicStep(kept, Mimic(), kept=kept_as)
    return model, examples, ways


def main() -> None:
    """Measures all ways and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=96)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    name = args.model or mixlora.default_checkpoint()
    with tempfile.TemporaryDirectory() as folder:
        model, examples, ways = prepare(name, args.rows, args.prompt, args.answer, Path(folder))
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.rounds + 1):
            for way, (collator, step) in ways.items():
                model.zero_grad()
                started = time.process_time()
                step(model, collator(examples), None)[0].backward()
                times[way].append(time.process_time() - started)
    medians = {way: statistics.median(each[1:]) for way, each in times.items()}  # the first round warms up
    print(f"{args.rows} rows of {args.prompt} + {args.answer} tokens, median of {args.rounds}")
    print(f"{'teacher':<9} {'CPU s':>7} {'/ given':>8}")
    for way, median in medians.items():
        print(f"{way:<9} {median:>7.3f} {median / medians['given']:>8.3f}")
    if args.json:
        args.json.write_text(json.dumps(medians, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

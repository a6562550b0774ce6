"""`mixlora train`, and `mixlora data`: rows checked and made for it."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mixlora.commands.shared import Model, Tokens, load_session

data_app = typer.Typer(help="Check rows for training, and make some.", no_args_is_help=True)


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, or STAGE.key=value.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the stages.")] = Path("build/train"),
    cache_teacher: Annotated[bool, typer.Option(help="Only compute the teacher's states of the next stage.")] = False,
    shard: Annotated[bool, typer.Option(help="Of several processes, each holds a part of the model (FSDP2).")] = False,
    plan: Annotated[bool, typer.Option(help="Only say what each stage would do: parameters, tokens, memory.")] = False,
) -> None:
    """Run the stages of a recipe in order; the same command goes on after a kill."""
    from mixlora.training.stopping import TrainingStopped
    from mixlora.training.train import leave_ranks, plan_recipe
    from mixlora.training.train import train as run_recipe

    if plan:
        plan_recipe(recipe, overrides or [])
        return
    try:
        run_recipe(recipe, output, overrides or [], cache_teacher, shard)
        leave_ranks()
    except TrainingStopped as stopped:
        sys.exit(f"error: {stopped}")


@data_app.command("check")
def check_command(
    files: Annotated[
        list[str], typer.Argument(help="JSONL or Parquet files of training rows, folders of such, names of data sets.")
    ],
    media: Annotated[bool, typer.Option(help="Open every picture and clip as well.")] = False,
    split: Annotated[str, typer.Option(help="Of data sets.")] = "train",
) -> None:
    """Say what is wrong with training rows, line by line, before a run; exit status 1 where anything is."""
    from mixlora.training.data.check import check_file

    wrong = 0
    for path in files:
        rows = 0
        for fault in check_file(path, media, split):
            rows += 1
            if fault is not None:
                wrong += 1
                print(fault)
        print(f"{path}: {rows} rows")
    if wrong:
        raise ValueError(f"{wrong} rows can't be used")


@data_app.command("prefer")
def prefer(
    output: Annotated[Path, typer.Argument(help="JSON lines to write, for objective: preference.")],
    model: Model = None,
    data: Annotated[
        Path | None, typer.Option(help="Rows as for training or eval; by default the training rows.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="This task only.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows of each task only.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers drawn for a row.")] = 8,
    temperature: Annotated[float, typer.Option(help="Of the draws.")] = 1.0,
    judge: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Scores (row, answer); by default the row's answers do."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 8,
    max_new_tokens: Tokens = 64,
) -> None:
    """Sample answers, and write pairs of a better and a worse one."""
    from mixlora.commands.questions import select_questions
    from mixlora.evaluation import preferences

    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    rows = select_questions(data, task, limit)
    chosen_judge = preferences.load_judge(judge) if judge else preferences.truth
    session = load_session(model, max_new_tokens)
    print(f"{samples} answers to each of {len(rows)} rows", file=sys.stderr)
    import torch

    torch.manual_seed(seed)
    found = preferences.preferences(
        session, rows, samples=samples, temperature=temperature, judge=chosen_judge, batch_size=batch_size
    )
    print(f"wrote {preferences.write_preferences(found, output)} pairs of {len(rows)} rows to {output}")

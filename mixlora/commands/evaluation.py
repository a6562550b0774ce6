"""`mixlora eval`: a checkpoint measured."""

from pathlib import Path
from typing import Annotated

import typer

from mixlora.commands.shared import Model, Tokens, load_session


def evaluate(
    model: Model = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines; by default the held-out splits.")] = None,
    task: Annotated[str | None, typer.Option(help="This task only.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows of each task only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 16,
    beams: Annotated[int, typer.Option(min=1, help="Beams of the search for an answer; 1 is greedy.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")] = None,
    report: Annotated[Path | None, typer.Option(help="A folder for a page with plots and wrong answers.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="With --report: the most wrong answers shown of a task.")] = 8,
    compare: Annotated[
        bool,
        typer.Option("--references/--no-references", help="With --report: measure other systems that are installed."),
    ] = True,
    whisper: Annotated[
        list[str] | None,
        typer.Option(
            envvar="MIXLORA_WHISPER",
            metavar="NAME=FOLDER",
            help="With --report: a Whisper model for faster-whisper to compare with; may be given several times.",
        ),
    ] = None,
    max_new_tokens: Tokens = 64,
) -> None:
    """Measure a checkpoint: word error rate, exact match, yes or no, each with its 95 % interval.

    A row of --data is {"task"?, "prompt"?, "images"?, "audio"?, "answers": [...], "metric": "wer"|"exact"|"yes_no"};
    media paths count from the file. It may hold voice, font, style and noise, by which --report breaks figures down.
    The word error rate's interval is a seeded bootstrap, the others are Wilson's.
    """
    from mixlora.evaluation import run, tasks

    groups = tasks.select(data, task, limit)
    if report is not None:  # what is wrong with it is said before anything is measured
        from mixlora.evaluation import references
        from mixlora.evaluation import report as page

        page.check(report)
        others, skipped = references.choose(groups, references.folders(whisper or [])) if compare else ([], [])
    session = load_session(model, max_new_tokens)
    session.num_beams = beams
    print(run.heading(), flush=True)
    results = run.printed(run.evaluate(session, groups, batch_size))
    if json_path is not None:
        run.write_results(results, json_path)
    if report is not None:
        systems = {model.resolve().name if model is not None else "embedded model": results}
        for other in others:
            print(f"{other.name}:")
            systems[other.name] = run.printed(references.measure(other, groups))
        for line in skipped:
            print(line)
        print(f"wrote {page.write(report, systems, skipped, examples)}")

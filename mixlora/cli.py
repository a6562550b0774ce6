"""The command line. Heavy libraries are imported inside the commands, so that `--help` answers at once."""

import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mixlora
from mixlora.rows import Row, read_questions

if TYPE_CHECKING:
    from mixlora.chat import Answer, ChatSession

app = typer.Typer(
    help="A text decoder with eyes and ears: LoRA adapters routed row by row.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
export_app = typer.Typer(help="Write a checkpoint in another form.", no_args_is_help=True)
app.add_typer(export_app, name="export")
data_app = typer.Typer(help="Check rows for training, and make some.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Model = Annotated[Path | None, typer.Option(help="Checkpoint folder; by default the one inside the package.")]
Tokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
COMMANDS = "/image FILE or /audio FILE adds to the next turn, /new starts over, /quit or an empty line ends."


def _load(model: Path | None, max_new_tokens: int) -> "ChatSession":
    """A session with the checkpoint, saying on stderr which one it is."""
    folder = model if model is not None else Path(mixlora.default_checkpoint())
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint: it has no config.json")
    print(f"loading {folder}", file=sys.stderr)
    from transformers.utils import logging

    from mixlora.chat import ChatSession

    logging.disable_progress_bar()
    return ChatSession.from_pretrained(folder, max_new_tokens)


def _check_extra(extra: str, *libraries: str) -> None:
    """Raises ValueError where a command's libraries are not installed."""
    if missing := [name for name in libraries if find_spec(name) is None]:
        raise ValueError(
            f"{', '.join(missing)} not installed: this command needs the extra, "
            f"pip install 'mixlora-multimodal[{extra}]'"
        )


@app.command()
def chat(
    prompt: Annotated[str | None, typer.Argument(help="The question; without one, talk turn by turn.")] = None,
    model: Model = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture; may be given several times.")] = None,
    audio: Annotated[list[Path] | None, typer.Option(help="A clip; alone, it is the question.")] = None,
    batch: Annotated[
        Path | None, typer.Option(help='Answer rows {"text"?, "images"?, "audio"?} of a JSON lines file as one batch.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --batch: one JSON object a row.")] = False,
    max_new_tokens: Tokens = 64,
) -> None:
    """Ask about text, pictures and voices; answers stream."""
    if batch is not None:
        if prompt is not None or image or audio:
            raise ValueError("--batch takes its questions from the file: give no PROMPT, --image or --audio with it")
        rows = read_questions(batch)
        answers = _load(model, max_new_tokens).answer_batch(rows)
        print("\n".join(_json_lines(answers) if as_json else _table(rows, answers)))
        return
    if as_json:
        raise ValueError("--json goes with --batch")
    for path in [*(image or []), *(audio or [])]:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
    row = Row(prompt, tuple(image or ()), tuple(audio or ()), where="command line")
    if prompt is not None and not prompt.strip() and not image and not audio:
        raise ValueError("the prompt is empty")
    session = _load(model, max_new_tokens)
    if prompt is None and not audio:
        _talk(session, row)
    else:
        _say(session, row)


def _json_lines(answers: "list[Answer]") -> Iterator[str]:
    """One JSON object an answer."""
    for answer in answers:
        record = {"text": answer.text, "modality": answer.modality, "adapter": answer.adapter}
        yield json.dumps(record, ensure_ascii=False)


def _table(rows: list[Row], answers: "list[Answer]") -> Iterator[str]:
    """Columns for a reader: the route, the question, the answer."""
    yield f"{'modality':<14} {'adapter':<8} {'question':<50} answer"
    for row, answer in zip(rows, answers, strict=True):
        media = " ".join(f"[{path.name}]" for path in (*row.images, *row.audio))
        asked = " ".join(f"{media} {row.text or ''}".split())
        yield f"{answer.modality:<14} {answer.adapter or '-':<8} {asked:<50} {' '.join(answer.text.split())}"


def _say(session: "ChatSession", row: Row) -> None:
    """Print an answer as it comes."""
    for piece in session.ask(row):
        print(piece, end="", flush=True)
    print()


def _talk(session: "ChatSession", row: Row) -> None:
    """Turn by turn until the input ends; media of `row` belong to the first turn. Bad media end no conversation."""
    images, clips = list(row.images), list(row.audio)
    print(COMMANDS, file=sys.stderr)
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return
        command, _, argument = said.partition(" ")
        if said == "/quit" or (not said and not images and not clips):
            return
        if command in ("/image", "/audio"):
            (images if command == "/image" else clips).append(Path(argument.strip()))
            continue
        if said == "/new":
            session.reset()
            images, clips = [], []
            continue
        try:
            _say(session, Row(said or None, tuple(images), tuple(clips), where="this turn"))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        images, clips = [], []


@app.command("eval")
def evaluate(
    model: Model = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines; by default the held-out splits.")] = None,
    task: Annotated[str | None, typer.Option(help="This task only.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows of each task only.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows answered at once.")] = 16,
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
    session = _load(model, max_new_tokens)
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


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, or STAGE.key=value.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the stages.")] = Path("build/train"),
    cache_teacher: Annotated[bool, typer.Option(help="Only compute the teacher's states of the next stage.")] = False,
    shard: Annotated[bool, typer.Option(help="Of several processes, each holds a part of the model (FSDP2).")] = False,
    plan: Annotated[bool, typer.Option(help="Only say what each stage would do: parameters, tokens, memory.")] = False,
) -> None:
    """Run the stages of a recipe in order; the same command goes on after a kill."""
    from mixlora.training.train import plan_recipe
    from mixlora.training.train import train as run_recipe

    if plan:
        plan_recipe(recipe, overrides or [])
    else:
        run_recipe(recipe, output, overrides or [], cache_teacher, shard)


@data_app.command("check")
def check_command(
    files: Annotated[list[Path], typer.Argument(help="JSON lines of training rows.")],
    media: Annotated[bool, typer.Option(help="Open every picture and clip as well.")] = False,
) -> None:
    """Say what is wrong with training rows, line by line, before a run; exit status 1 where anything is."""
    from mixlora.training.data.check import check_file

    wrong = 0
    for path in files:
        rows = 0
        for fault in check_file(path, media):
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
    data: Annotated[Path | None, typer.Option(help="Rows as for eval; by default the held-out splits.")] = None,
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
    from mixlora.evaluation import preferences, tasks

    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    rows = [row for group in tasks.select(data, task, limit).values() for row in group]
    chosen_judge = preferences.load_judge(judge) if judge else preferences.truth
    session = _load(model, max_new_tokens)
    import torch

    torch.manual_seed(seed)
    found = preferences.preferences(
        session, rows, samples=samples, temperature=temperature, judge=chosen_judge, batch_size=batch_size
    )
    print(f"wrote {preferences.write_preferences(found, output)} pairs of {len(rows)} rows to {output}")


@app.command("serve")
def serve_command(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default its folder's name.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MIXLORA_API_KEY", help="Ask clients for this key.", show_envvar=True)
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Fetch pictures from this host over https; may be given several times.")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Requests answered at once.")] = 16,
    waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused.")] = 64,
    batch_tokens: Annotated[int, typer.Option(min=2, help="Tokens that the batch's cache may hold.")] = 65536,
    kept_tokens: Annotated[int, typer.Option(min=0, help="Tokens kept for the next turns of conversations.")] = 16384,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds of an answer, its wait included.")] = 300.0,
    max_seconds: Annotated[float, typer.Option(min=0.1, help="Longest clip.")] = 60.0,
    transcription_prompt: Annotated[str, typer.Option(help="The question behind a clip to transcribe.")] = (
        "Transcribe the audio."
    ),
) -> None:
    """Serve a checkpoint to many users, in the form of OpenAI's API. Needs the extra `serve`."""
    _check_extra("serve", "fastapi", "uvicorn", "httpx", "prometheus_client", "python_multipart")
    from mixlora.serving.addresses import names_of
    from mixlora.serving.engine import Limits
    from mixlora.serving.media import MediaLimits
    from mixlora.serving.serve import name_of, serve
    from mixlora.serving.server import Settings

    session = _load(model, 1)
    settings = Settings(
        name=name or (name_of(model) if model is not None else "mixlora"),
        key=api_key,
        hosts=frozenset(allow_host or ()),
        names=names_of(host),
        media=MediaLimits(seconds=max_seconds),
        timeout=timeout,
        transcription_prompt=transcription_prompt,
    )
    limits = Limits(rows=rows, waiting=waiting, batch_tokens=batch_tokens, kept_tokens=kept_tokens)
    serve(session.model, session.processor, settings, limits, host, port)


@app.command("demo")
def demo_command(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    auth: Annotated[
        str | None, typer.Option(metavar="NAME:PASSWORD", envvar="MIXLORA_DEMO_AUTH", help="Ask visitors for these.")
    ] = None,
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Open a page to type, show pictures and speak. Needs the extra `demo`."""
    _check_extra("demo", "gradio", "uvicorn")
    from mixlora.demo.run import parse_auth, run

    parse_auth(auth)
    session = _load(model, 1)
    samples = Path(mixlora.default_checkpoint()) / "samples" if model is None else None
    run(session.model, session.processor, samples, host, port, auth, browser)


Source = Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="A new or empty folder.")]


@app.command("convert")
def convert_command(
    source: Source,
    destination: Destination,
    experts: Annotated[int, typer.Option(help="Make every adapter so many copies of itself, with routers.")] = 0,
    top_k: Annotated[int, typer.Option(help="With --experts: how many of them a token takes.")] = 2,
    adapter: Annotated[list[str] | None, typer.Option(help="With --experts: only this adapter.")] = None,
    seed: Annotated[int, typer.Option(help="With --experts: of the routers.")] = 0,
) -> None:
    """Turn Phi-4-Multimodal, in Microsoft's or transformers' layout, into a checkpoint of ours, tensor by tensor.

    With --experts, SRC may also be one of ours; DST computes the same until its experts are trained.
    """
    if experts:
        from mixlora.checkpoints.experts import convert_to_experts

        unused = convert_to_experts(source, destination, experts, top_k, adapter, seed)
    else:
        from mixlora.checkpoints.convert import convert

        unused = convert(source, destination)
    for name in unused:
        print(f"not used: {name}", file=sys.stderr)
    print(f"wrote {destination}")


@export_app.command("phi4")
def export_phi4_command(source: Source, destination: Destination) -> None:
    """Write Microsoft's layout of Phi-4-Multimodal (model type phi4mm)."""
    from mixlora.checkpoints.convert import export_phi4

    export_phi4(source, destination)
    print(f"wrote {destination}")


@export_app.command("transformers")
def export_transformers_command(source: Source, destination: Destination) -> None:
    """Write transformers' layout of Phi-4-Multimodal, adapters in vision-lora and speech-lora."""
    from mixlora.checkpoints.convert import export_transformers

    export_transformers(source, destination)
    print(f"wrote {destination}")


@export_app.command("vllm")
def export_vllm_command(source: Source, destination: Destination) -> None:
    """Write what vLLM's Phi4MMForCausalLM needs, and print the command that serves it."""
    from mixlora.checkpoints.convert import export_vllm

    print(export_vllm(source, destination))


@export_app.command("peft")
def export_peft_command(source: Source, destination: Destination) -> None:
    """Write each adapter as a PEFT folder, which PeftModel.from_pretrained loads on the plain decoder."""
    from mixlora.checkpoints.convert import export_peft

    for name in export_peft(source, destination):
        print(f"wrote {destination / name}")


@export_app.command("code")
def export_code_command(
    source: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    destination: Annotated[Path, typer.Argument(help="A new or empty folder.")],
) -> None:
    """Write a checkpoint with its code, for trust_remote_code=True where mixlora is not installed."""
    from mixlora.checkpoints.export import export_code

    export_code(source, destination)
    print(f"wrote {destination}")


def main(arguments: list[str] | None = None) -> Any:
    """The entry point: what a user can mend becomes one line on stderr and exit status 1."""
    try:
        return app(arguments)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "TrainingStopped":
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

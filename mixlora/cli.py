"""The command line. Heavy libraries are imported inside the commands, so that `--help` answers at once."""

import sys
from typing import Any

import typer

from mixlora.commands.chat import chat
from mixlora.commands.checkpoints import convert_command, export_app
from mixlora.commands.evaluation import evaluate
from mixlora.commands.serving import demo_command, serve_command
from mixlora.commands.training import data_app, train

app = typer.Typer(
    help="A text decoder with eyes and ears: LoRA adapters routed row by row.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(chat)
app.command("eval")(evaluate)
app.command()(train)
app.add_typer(data_app, name="data")
app.command("serve")(serve_command)
app.command("demo")(demo_command)
app.command("convert")(convert_command)
app.add_typer(export_app, name="export")


def main(arguments: list[str] | None = None) -> Any:
    """The entry point: what a user can mend becomes one line on stderr and exit status 1."""
    try:
        return app(arguments)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

"""`mixlora convert` and `mixlora export`: checkpoints in other forms."""

import sys
from pathlib import Path
from typing import Annotated

import typer

export_app = typer.Typer(help="Write a checkpoint in another form.", no_args_is_help=True)
Source = Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint folder.")]
Destination = Annotated[Path, typer.Argument(metavar="DST", help="A new or empty folder.")]


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

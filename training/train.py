"""Runs the stages of a recipe: `python -m mixlora.training.train RECIPE --output DIR [key=value]...`."""

import contextlib
import dataclasses
import io
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import PartialState
from torch import distributed

from mixlora.training.begun import check_settings, write_json
from mixlora.training.checkpoints import RUNNING, full_state
from mixlora.training.data.check import BrokenRows
from mixlora.training.data.media import Media
from mixlora.training.expert_adapters import split_adapters
from mixlora.training.groups import checked_routing, prepare_parts, refuse_layerdrop, select_parameters
from mixlora.training.loaded import LoadedStage, load_checkpoint
from mixlora.training.plan import StagePlan, plan_stage
from mixlora.training.progress import Board, Progress
from mixlora.training.recipe import find_recipe, load_recipe
from mixlora.training.report import write_report
from mixlora.training.stage_data import Streamed, stage_data
from mixlora.training.stages import Recipe, RecipeError, Stage
from mixlora.training.steps import build_step
from mixlora.training.still_groups import StillGroups
from mixlora.training.stopping import StopOnSignal, TrainingStopped, check_room, room_on_disk
from mixlora.training.trainer import StageTrainer, last_checkpoint, training_arguments


def train(
    recipe: Path,
    output: Path,
    overrides: list[str] | None = None,
    cache_teacher: bool = False,
    shard: bool = False,
) -> None:
    """Runs every stage of a recipe that is not finished yet, each from the one before.

    Started by torchrun or by accelerate, the processes share the work, and the first one alone writes and prints.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        output: each stage writes `NN-name/` here, ready for `from_pretrained`. The same command goes on after a kill.
        overrides: `key=value` or `STAGE.key=value`.
        cache_teacher: train nothing, but compute the states of the teacher that the next stage keeps on disk.
        shard: of several processes each holds a part of the model, its gradients and its optimizer state (FSDP2).

    Raises:
        RecipeError: a recipe that can't be run, or a stage that was begun with other settings.
        RowError: too many rows that can't be used.
        TrainingStopped: SIGTERM came, the disk is full, or the loss is no number; it says what to do.
    """
    plan = load_recipe(find_recipe(recipe), overrides)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RecipeError("DeepSpeed is not supported: start with --shard (FSDP2) in place of ZeRO-3")
    ranks = PartialState(cpu=not torch.cuda.is_available())
    with contextlib.nullcontext() if ranks.is_main_process else contextlib.redirect_stdout(io.StringIO()):
        _run_stages(plan, output, cache_teacher, shard or os.environ.get("ACCELERATE_USE_FSDP") == "true")


def plan_recipe(recipe: Path, overrides: list[str] | None = None) -> list[StagePlan]:
    """What each stage of a recipe would do; it is printed too. Nothing is trained, nothing written.

    Every stage is planned on the checkpoint that the first one starts from, with the copies and the experts of those
    before it, but nothing trained.

    Raises:
        RecipeError: a recipe that can't be run; RowError: a row that can't be used.
    """
    whole = load_recipe(find_recipe(recipe), overrides)
    plans = []
    for number, stage in enumerate(whole.stages):
        print(f"==> stage {stage.name}")
        before = whole.stages[:number]
        model, processor = _load(stage, whole.model, whole.seed, before)
        with contextlib.redirect_stdout(io.StringIO()):
            for each in before:
                prepare_parts(model, each, processor.tokenizer)
        checked_routing(stage, model.config)
        media, broken = Media(model, processor), BrokenRows(stage.max_broken)
        data = stage_data(stage, model, processor, media, None, whole.seed, broken)
        plans.append(plan_stage(stage, model, len(data.examples), data.sample(), len(data)))
        print(plans[-1])
    return plans


def _run_stages(plan: Recipe, output: Path, cache_teacher: bool, shard: bool) -> None:
    start = plan.model
    folders = [output / f"{number:02d}-{stage.name}" for number, stage in enumerate(plan.stages, start=1)]
    for folder, stage in zip(folders, plan.stages, strict=True):
        check_settings(folder, {"start": start, "seed": plan.seed, **dataclasses.asdict(stage)})
        if (folder / "done.json").is_file():
            print(f"==> stage {stage.name}: finished before, kept in {folder}")
        elif cache_teacher:
            if not stage.teacher_cache:
                raise RecipeError(f"stage {stage.name!r} comes first and keeps no teacher's states: train it before")
            print(f"==> stage {stage.name}: the teacher's states")
            return _run(stage, plan, start, folder, Path(plan.cache or output / "features"), shard, cache_only=True)
        else:
            print(f"==> stage {stage.name}: from {start} to {folder}")
            _run(stage, plan, start, folder, Path(plan.cache or output / "features"), shard)
        start = str(folder)
        if PartialState().is_main_process:
            write_report(output, folders)


def _run(
    stage: Stage, recipe: Recipe, start: str, folder: Path, cache: Path, shard: bool, cache_only: bool = False
) -> None:
    """One stage, from reading its start to writing its end, or up to what it reads from caches."""
    model, processor = _load(stage, start, recipe.seed)
    routing = dict(model.config.routing)
    model.config.routing = checked_routing(stage, model.config)
    prepare_parts(model, stage, processor.tokenizer)
    media, broken = Media(model, processor, stage.mask_time, stage.mask_bands), BrokenRows(stage.max_broken)
    data = stage_data(stage, model, processor, media, cache, recipe.seed, broken)
    shard = shard and PartialState().num_processes > 1
    step, collator = build_step(LoadedStage(stage, model, processor, media, data.examples, cache, shard))
    if cache_only:
        return
    check_room(folder, sum(each.numel() for each in model.parameters() if each.requires_grad))
    checkpoints, on_signal, progress = folder / "checkpoints", StopOnSignal(), Progress(PartialState().is_main_process)
    callbacks: list[Any] = [progress, on_signal]
    if recipe.tensorboard:
        callbacks.append(Board(folder / "tensorboard"))
    args = training_arguments(stage, checkpoints, recipe.seed, shard)
    if args.world_size > 1:
        refuse_layerdrop(model)
        callbacks.append(StillGroups(model, stage, data.batch, len(data)))
    trainer = StageTrainer(model, processor, stage, data, collator, args, step, callbacks)
    last = last_checkpoint(checkpoints)
    if last:
        print(f"  going on from {last}")
        _go_on(trainer, data, Path(last))
    with on_signal.listening(), contextlib.closing(progress):
        trainer.train(resume_from_checkpoint=last)
    if on_signal.stopped:
        raise TrainingStopped(
            f"stage {stage.name!r}: told to end, and saved after step {trainer.state.global_step}; the same command "
            "goes on from there"
        )
    model.config.routing = routing
    _write_end(trainer, model, processor, folder, shard, broken)


def _go_on(trainer: StageTrainer, data: Any, last: Path) -> None:
    """Tells the trainer and the data what a checkpoint says of them; older ones say nothing."""
    if not (last / RUNNING).is_file():
        return
    trainer.to_restore = json.loads((last / RUNNING).read_text(encoding="utf-8"))
    if isinstance(data, Streamed):
        data.stream.go_on(trainer.to_restore["data"])


def _write_end(
    trainer: StageTrainer, model: Any, processor: Any, folder: Path, shard: bool, broken: BrokenRows
) -> None:
    """The stage's checkpoint, its log, and at last the note that it is finished."""
    whole = full_state(model) if shard else model.state_dict()
    if PartialState().is_main_process:
        with room_on_disk(folder / "model.safetensors", "from its last checkpoint"):
            model.save_pretrained(folder, state_dict=whole)
            processor.save_pretrained(folder)
            write_json(folder / "log.json", trainer.state.log_history)
            done = {"steps": trainer.state.global_step}
            write_json(folder / "done.json", done | ({"broken": broken.faults} if broken.faults else {}))
        shutil.rmtree(folder / "checkpoints")
    PartialState().wait_for_everyone()


def _load(stage: Stage, start: str, seed: int, before: Sequence[Stage] = ()) -> tuple[Any, Any]:
    """The stage's model, with its parameters selected, and its processor; stages `before` have made their experts."""
    model, processor = load_checkpoint(start, "model")
    model.to(PartialState().device)  # type: ignore[arg-type]
    for each in (*before, stage):
        split_adapters(model, each, seed)
    select_parameters(model, stage.train)
    return model, processor


def leave_ranks() -> None:
    """Where there are several processes, ends what they exchange by: its threads, left running, may abort the exit."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def main(
    recipe: Annotated[Path, typer.Argument(help="A YAML file, or the name of a packaged recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, or STAGE.key=value.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the stages.")] = Path("build/train"),
    cache_teacher: Annotated[bool, typer.Option(help="Only compute the teacher's states of the next stage.")] = False,
    shard: Annotated[bool, typer.Option(help="Of several processes, each holds a part of the model (FSDP2).")] = False,
    plan: Annotated[bool, typer.Option(help="Only say what each stage would do.")] = False,
) -> None:
    """Run the stages of a recipe; the same command goes on after a kill."""
    try:
        if plan:
            plan_recipe(recipe, overrides)
        else:
            train(recipe, output, overrides, cache_teacher, shard)
        leave_ranks()
    except (ValueError, OSError, TrainingStopped) as error:
        raise SystemExit(f"mixlora train: {error}") from error


if __name__ == "__main__":
    typer.run(main)

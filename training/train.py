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

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.modeling.projectors import WhiteningProjector
from mixlora.training.checkpoints import full_state
from mixlora.training.curves import write_curves
from mixlora.training.data.augment import Augmenter
from mixlora.training.data.batches import BatchPlan, plan_batches
from mixlora.training.data.collate import Example, Tokenizer, views_by_row
from mixlora.training.data.media import Media
from mixlora.training.data.rows import Row, RowError, read_rows
from mixlora.training.expert_adapters import split_adapters
from mixlora.training.plan import StagePlan, plan_stage
from mixlora.training.recipe import find_recipe, load_recipe, nearest
from mixlora.training.stages import Recipe, RecipeError, Stage
from mixlora.training.steps import build_step
from mixlora.training.still_groups import StillGroups
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
        RecipeError: a recipe that can't be run, a stage that was begun with other settings, or DeepSpeed.
    """
    plan = load_recipe(find_recipe(recipe), overrides)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise RecipeError("DeepSpeed is not supported: start with --shard (FSDP2) in place of ZeRO-3")
    ranks = PartialState(cpu=not torch.cuda.is_available())
    with contextlib.nullcontext() if ranks.is_main_process else contextlib.redirect_stdout(io.StringIO()):
        _run_stages(plan, output, cache_teacher, shard or os.environ.get("ACCELERATE_USE_FSDP") == "true")


def plan_recipe(recipe: Path, overrides: list[str] | None = None) -> list[StagePlan]:
    """What each stage of a recipe would do; it is printed too. Nothing is trained, nothing written.

    Every stage is planned on the checkpoint that the first one starts from: stages change no shapes, except that they
    make experts of adapters.

    Raises:
        RecipeError: a recipe that can't be run; RowError: a row that can't be used.
    """
    whole = load_recipe(find_recipe(recipe), overrides)
    plans = []
    for number, stage in enumerate(whole.stages):
        print(f"==> stage {stage.name}")
        model, processor = _load(stage, whole.model, whole.seed, before=whole.stages[:number])
        _checked_routing(stage, model.config)
        examples = _examples(stage, model, processor, Media(model, processor), cache=None)
        plans.append(plan_stage(stage, model, examples, _plan(stage, examples, whole.seed)))
        print(plans[-1])
    return plans


def _run_stages(plan: Recipe, output: Path, cache_teacher: bool, shard: bool) -> None:
    start = plan.model
    folders = [output / f"{number:02d}-{stage.name}" for number, stage in enumerate(plan.stages, start=1)]
    for folder, stage in zip(folders, plan.stages, strict=True):
        _check_settings(folder, {"start": start, "seed": plan.seed, **dataclasses.asdict(stage)})
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
            write_curves(output, folders)


def _run(
    stage: Stage, recipe: Recipe, start: str, folder: Path, cache: Path, shard: bool, cache_only: bool = False
) -> None:
    """One stage, from reading its start to writing its end, or up to what it reads from caches."""
    model, processor = _load(stage, start, recipe.seed)
    routing = dict(model.config.routing)
    model.config.routing = _checked_routing(stage, model.config)
    copy_groups(model, stage.copy)
    if stage.ctc_weight:
        fit_basis(model)
    media = Media(model, processor, stage.mask_time)
    examples = _examples(stage, model, processor, media, cache)
    plan = _plan(stage, examples, recipe.seed)
    shard = shard and PartialState().num_processes > 1
    step, collator = build_step(stage, model, processor, media, examples, cache, shard)
    if cache_only:
        return
    checkpoints = folder / "checkpoints"
    args = training_arguments(stage, checkpoints, recipe.seed, shard)
    trainer = StageTrainer(model, processor, examples, plan, collator, args, step)
    if args.world_size > 1:
        refuse_layerdrop(model)
        trainer.add_callback(StillGroups(model, stage, examples, plan))
    last = last_checkpoint(checkpoints)
    if last:
        print(f"  going on from {last}")
    trainer.train(resume_from_checkpoint=last)
    model.config.routing = routing
    whole = full_state(model) if shard else model.state_dict()
    if PartialState().is_main_process:
        model.save_pretrained(folder, state_dict=whole)
        processor.save_pretrained(folder)
        _write(folder / "log.json", trainer.state.log_history)
        _write(folder / "done.json", {"steps": trainer.state.global_step})
        shutil.rmtree(checkpoints)
    PartialState().wait_for_everyone()


def _load(stage: Stage, start: str, seed: int, before: Sequence[Stage] = ()) -> tuple[Any, Any]:
    """The stage's model, with its parameters selected, and its processor; stages `before` have made their experts."""
    model = MixLoraForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    model.to(PartialState().device)
    for each in (*before, stage):
        split_adapters(model, each, seed)
    select_parameters(model, stage.train)
    return model, MixLoraProcessor.from_pretrained(start)


def select_parameters(model: MixLoraForConditionalGeneration, train: list[str]) -> None:
    """Lets gradients reach the named groups alone, and prints what is trained and what is frozen.

    Raises:
        RecipeError: a group that the model does not have.
    """
    groups = model.parameter_groups()
    for name in train:
        if name not in groups:
            raise RecipeError(f"train: this model has no parameter group {name!r}{nearest(name, groups)}")
    trained = {parameter for name in train for parameter in groups[name]}
    sizes = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
        sizes[name] = parameter.numel()
    for name, parameters in groups.items():
        word = "train " if name in train else "freeze"
        print(f"  {word} {name:<32} {sum(sizes[parameter] for parameter in parameters):>12,} parameters")
    print(f"  {sum(sizes[name] for name in trained):,} of {sum(sizes.values()):,} parameters are trained")


def refuse_layerdrop(model: MixLoraForConditionalGeneration) -> None:
    """Raises RecipeError for a trained tower that skips whole layers at random: each rank would skip others."""
    tower: Any = getattr(model.model, "speech_tower", None)
    if tower is None or not any(parameter.requires_grad for parameter in tower.parameters()):
        return
    for field in ("layerdrop", "encoder_layerdrop"):
        if getattr(model.config.speech_config, field, 0):
            raise RecipeError(f"several processes can't train a speech tower with {field}: set it to 0 in the config")


def _checked_routing(stage: Stage, config: Any) -> dict[str, str | None]:
    """The config's routing with the stage's changes.

    Raises:
        RecipeError: no such modality, or no such adapter.
    """
    for modality, adapter in stage.routing.items():
        if modality not in config.routing:
            raise RecipeError(f"routing: no modality {modality!r}{nearest(modality, config.routing)}")
        if adapter not in config.adapters:
            raise RecipeError(f"routing: no adapter {adapter!r}{nearest(adapter, config.adapters)}")
    return config.routing | stage.routing


@torch.no_grad()
def copy_groups(model: MixLoraForConditionalGeneration, copy: dict[str, str]) -> None:
    """Gives each parameter group that `copy` names the values of another one of the same shapes.

    Raises:
        RecipeError: no such group, or other shapes.
    """
    groups = model.parameter_groups()
    for target, source in copy.items():
        if source not in groups:
            raise RecipeError(f"copy: this model has no parameter group {source!r}{nearest(source, groups)}")
        ours, theirs = ([model.get_parameter(name) for name in groups[group]] for group in (target, source))
        if [each.shape for each in ours] != [each.shape for each in theirs]:
            raise RecipeError(f"copy: the parameters of {source} do not fit those of {target}")
        for mine, other in zip(ours, theirs, strict=True):
            mine.copy_(other)
        for name, buffer in model.named_buffers():
            if name.startswith(f"model.{source}."):
                model.get_buffer(name.replace(source, target, 1)).copy_(buffer)
        print(f"  {target} starts as a copy of {source}")


def fit_basis(model: MixLoraForConditionalGeneration) -> None:
    """Prepares the projector of clips for CTC, where it is of the kind that is read in a basis of its own."""
    projector = model.model.speech_projector["speech"]
    if isinstance(projector, WhiteningProjector):
        table: torch.Tensor = model.model.language_model.embed_tokens.weight
        projector.fit(table)


def _examples(stage: Stage, model: Any, processor: Any, media: Media, cache: Path | None) -> list[Example]:
    """The stage's rows in all their views, tokenized; tower features of their media are in `cache` afterwards."""
    rows: list[tuple[list[Row], float]] = []
    for source in stage.data:
        rows.append((read_rows(Path(source.path), source.limit), source.weight))
        print(f"  {len(rows[-1][0]):,} rows of {source.path}, weight {source.weight:g}")
    every = [row for group, _ in rows for row in group]
    pairs = stage.objective == "preference"
    for row in every:
        if (row.rejected is not None) != pairs:
            wanted = "prompt, chosen and rejected" if pairs else "messages or text"
            raise RowError(f"{row.source}: objective {stage.objective} takes rows with {wanted}")
    media.augmenter = augmenter = Augmenter(stage.augment, [path for row in every for path in row.audio])
    views = [augmenter.media(row, view) for row in every for view in range(augmenter.count(row))]
    if cache is not None:
        media.cache(model, cache, [p for images, _ in views for p in images], [p for _, audio in views for p in audio])
    tokenizer = Tokenizer(processor, media, stage.max_length)
    examples = [example for group, weight in rows for example in tokenizer(group, weight)]
    if tokenizer.left_out:
        print(f"  {tokenizer.left_out:,} conversations of more than {stage.max_length} tokens are left out")
    if not examples:
        raise RowError(f"stage {stage.name!r}: no row fits max_length {stage.max_length}")
    return examples


def _plan(stage: Stage, examples: list[Example], seed: int) -> BatchPlan:
    """All batches of the stage."""
    lengths = [example.size for example in examples]
    views = views_by_row(examples)
    plan = plan_batches(
        lengths,
        [examples[places[0]].weight for places in views],
        tokens_per_batch=stage.tokens_per_batch,
        rows_per_batch=stage.rows_per_batch,
        epochs=stage.epochs,
        num_batches=stage.max_steps * stage.gradient_accumulation,
        seed=seed,
        views=views,
    )
    tokens = sum(lengths[places[0]] for places in views)
    extra = f", {len(examples) - len(views):,} further views" if len(examples) > len(views) else ""
    print(f"  {len(views):,} examples, {tokens:,} tokens{extra}, {len(plan):,} batches")
    return plan


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Notes a stage's settings when it begins; they must be the same when it goes on.

    Raises:
        RecipeError: they are not; the differences are named.
    """
    file = folder / "stage.json"
    wanted = json.loads(json.dumps(settings))
    if not file.is_file():
        if PartialState().is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            _write(file, wanted)
        return
    before = _with_defaults(json.loads(file.read_text(encoding="utf-8")))
    changed = [f"{key}: {before.get(key)!r} -> {wanted[key]!r}" for key in wanted if before.get(key) != wanted[key]]
    if changed:
        raise RecipeError(
            f"{folder} was begun with other settings ({'; '.join(changed)}): remove it, or name another output"
        )


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that were noted before a field was there, which the stage then had at its default."""
    filled = dict(settings)
    for entry in dataclasses.fields(Stage):
        if entry.default_factory is dataclasses.MISSING:
            default = entry.default
        else:
            default = entry.default_factory()
        if dataclasses.is_dataclass(default):
            filled[entry.name] = dataclasses.asdict(default) | filled.get(entry.name, {})  # type: ignore[arg-type]
        elif default is not dataclasses.MISSING:
            filled.setdefault(entry.name, default)
    return filled


def _write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


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
    except (RecipeError, RowError, FileNotFoundError) as error:
        raise SystemExit(f"mixlora train: {error}") from error


if __name__ == "__main__":
    typer.run(main)

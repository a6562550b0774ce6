"""Runs the stages of a recipe: `python -m mixlora.training.train RECIPE --output DIR [key=value]...`."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.curves import write_curves
from mixlora.training.data.augment import Augmenter
from mixlora.training.data.batches import BatchPlan, plan_batches
from mixlora.training.data.collate import Example, Tokenizer, views_by_row
from mixlora.training.data.media import Media
from mixlora.training.data.rows import Row, RowError, read_rows
from mixlora.training.expert_adapters import split_adapters
from mixlora.training.recipe import find_recipe, load_recipe, nearest
from mixlora.training.stages import Recipe, RecipeError, Stage
from mixlora.training.steps import build_step
from mixlora.training.trainer import StageTrainer, last_checkpoint, training_arguments


def train(recipe: Path, output: Path, overrides: list[str] | None = None, cache_teacher: bool = False) -> None:
    """Runs every stage of a recipe that is not finished yet, each from the one before.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        output: each stage writes `NN-name/` here, ready for `from_pretrained`. The same command goes on after a kill.
        overrides: `key=value` or `STAGE.key=value`.
        cache_teacher: train nothing, but compute the states of the teacher that the next stage keeps on disk.

    Raises:
        RecipeError: a recipe that can't be run, or a stage that was begun with other settings.
    """
    plan = load_recipe(find_recipe(recipe), overrides)
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
            return _run(stage, plan, start, folder, Path(plan.cache or output / "features"), cache_only=True)
        else:
            print(f"==> stage {stage.name}: from {start} to {folder}")
            _run(stage, plan, start, folder, Path(plan.cache or output / "features"))
        start = str(folder)
        write_curves(output, folders)


def _run(stage: Stage, recipe: Recipe, start: str, folder: Path, cache: Path, cache_only: bool = False) -> None:
    """One stage, from reading its start to writing its end, or up to what it reads from caches."""
    model = MixLoraForConditionalGeneration.from_pretrained(start, dtype=torch.float32)
    processor = MixLoraProcessor.from_pretrained(start)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    split_adapters(model, stage, recipe.seed)
    select_parameters(model, stage.train)
    routing = dict(model.config.routing)
    model.config.routing = _checked_routing(stage, model.config)
    copy_groups(model, stage.copy)
    media = Media(model, processor, stage.mask_time)
    examples = _examples(stage, model, processor, media, cache)
    plan = _plan(stage, examples, recipe.seed)
    step, collator = build_step(stage, model, processor, media, examples, cache)
    if cache_only:
        return
    checkpoints = folder / "checkpoints"
    args = training_arguments(stage, checkpoints, recipe.seed)
    trainer = StageTrainer(model, processor, examples, plan, collator, args, step)
    last = last_checkpoint(checkpoints)
    if last:
        print(f"  going on from {last}")
    trainer.train(resume_from_checkpoint=last)
    model.config.routing = routing
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    _write(folder / "log.json", trainer.state.log_history)
    _write(folder / "done.json", {"steps": trainer.state.global_step})
    shutil.rmtree(checkpoints)


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
        print(f"  {target} starts as a copy of {source}")


def _examples(stage: Stage, model: Any, processor: Any, media: Media, cache: Path) -> list[Example]:
    """The stage's rows in all their views, tokenized; tower features of their media are on disk afterwards."""
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
) -> None:
    """Run the stages of a recipe; the same command goes on after a kill."""
    try:
        train(recipe, output, overrides, cache_teacher)
    except (RecipeError, RowError, FileNotFoundError) as error:
        raise SystemExit(f"mixlora train: {error}") from error


if __name__ == "__main__":
    typer.run(main)

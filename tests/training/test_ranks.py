"""Whole stages on two ranks, under DDP and FSDP2: the losses and the weights of one process."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file, save_file

from mixlora.modeling.decoder import DecoderLayer
from mixlora.training import train as entry
from mixlora.training.data.batches import BatchPlan, RankShare, draws_of
from mixlora.training.stages import RecipeError
from mixlora.training.steps import check_on_policy
from mixlora.training.trainer import StageTrainer
from tests.modeling.model_fixtures import tiny_model
from tests.modeling.rank_fixtures import on_ranks
from tests.training.training_fixtures import make_start, write_recipe, write_rows

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
NAME = "01-only"
TRAINED = ["adapter.vision", "adapter.speech", "vision_projector", "speech_context", "speech_projector.speech"]
DETAIL = {"widths": [4], "patch_size": 2, "cells": 2}
READING = {"widths": [4], "layers": [1], "patch_size": 2, "tokens": 2}
PREFERENCE: dict[str, Any] = {"objective": "preference", "teacher": "self", "data": "pairs"}
EXPERTS = {"count": 4, "top_k": 2, "balance_weight": 0.5}
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"train": TRAINED, "max_steps": 5, "rows_per_batch": 3, "gradient_accumulation": 2, "weight_decay": 0.1},
    "towers": {"train": [*TRAINED, "vision_tower", "speech_tower"], "rows_per_batch": 1, "max_steps": 4},
    "ctc": {"train": ["speech_projector.speech", "adapter.speech"], "data": "clips", "ctc_weight": 1},
    "mimic": {
        "train": TRAINED, "objective": "mimic", "teacher": "other", "teacher_cache": "float32", "rows_per_batch": 1,
        "mimic": {"sft_weight": 0.2},
    },
    "dpo": {"train": TRAINED, **PREFERENCE, "rows_per_batch": 1, "preference": {"sft_weight": 0.3}},
    "kto": {
        "train": ["decoder"], **PREFERENCE, "rows_per_batch": 3, "preference": {"kind": "kto_pair", "beta": 0.5},
        "gradient_checkpointing": True,
    },
    "sparse": {
        "train": TRAINED, "objective": "mimic", "teacher": "other", "teacher_cache": "top8", "experts": EXPERTS,
        "rows_per_batch": 3, "gradient_accumulation": 2, "gradient_checkpointing": True,
    },
    "held": {
        "train": TRAINED, **PREFERENCE, "teacher": "other", "rows_per_batch": 1, "experts": EXPERTS,
        "preference": {"mimic_weight": 0.5},
    },
    "detail": {"train": ["vision_detail", "adapter.vision"], "rows_per_batch": 1, "max_steps": 4},
    "heard": {"train": [*TRAINED, "speech_letters"], "data": "clips", "ctc_weight": 0.5, "experts": EXPERTS},
    "log_probs": {"train": TRAINED, **PREFERENCE, "teacher_cache": "log_probs", "rows_per_batch": 1},
}  # fmt: skip
BEGUN = 3
"""Steps of a training that is broken off, behind its checkpoint of step 2."""


def make_recipes(folder: Path) -> dict[str, Path]:
    """A recipe for each stage, with three rows in most batches, and at times a single one for both ranks."""
    hearing: dict[str, Any] = {"speech_context": {"layers": 1, "stride": 2}, "speech_letters": {}}
    start, rows = make_start(folder / "start", **hearing), write_rows(folder)
    (folder / "detail start").mkdir()
    starts = {"detail": make_start(folder / "detail start", vision_detail=DETAIL, vision_letters=READING)}
    (folder / "teacher").mkdir()
    teacher = make_start(folder / "teacher")
    weights = folder / "teacher" / "model.safetensors"
    louder = {name: tensor * (1 if "tower" in name else 1.2) for name, tensor in load_file(weights).items()}
    save_file(louder, weights, metadata={"format": "pt"})
    lines = rows.read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines[1:]]
    pairs = [{"prompt": chat[:1], "chosen": chat[1]["content"], "rejected": "never and never"} for chat in chats]
    files = {"rows": rows, "pairs": rows.with_name("pairs.jsonl"), "clips": rows.with_name("clips.jsonl")}
    files["pairs"].write_text("\n".join(json.dumps(pair) for pair in pairs))
    files["clips"].write_text("\n".join(line for line in lines if "audio" in line and "image" not in line))
    recipes = {}
    for name, stage in STAGES.items():
        changes = {
            "rows_per_batch": 5,
            "tokens_per_batch": 0,
            "max_steps": 2,
            "learning_rate": 1e-4,
            "warmup": 0,
        } | stage
        if changes.get("teacher") == "other":
            changes["teacher"] = teacher
        train, data = changes.pop("train"), files[changes.pop("data", "rows")]
        recipes[name] = write_recipe(folder, starts.get(name, start), data, train, **changes).rename(
            folder / f"{name}.yaml"
        )
    return recipes


def log(folder: Path, name: str) -> list[float]:
    return [point[name] for point in json.loads((folder / NAME / "log.json").read_text()) if name in point]


def begin(recipe: Path, folder: Path, shard: bool) -> None:
    """A training that ends before its time."""
    log = StageTrainer.log

    def break_off(trainer: StageTrainer, logs: dict[str, float], start_time: float | None = None) -> None:
        log(trainer, logs, start_time)
        if trainer.state.global_step == BEGUN:
            raise InterruptedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(StageTrainer, "log", break_off)
        entry.train(recipe, folder, shard=shard)


def run_all(folder: str, recipes: dict[str, str], shard: bool) -> bool:
    for name, recipe in recipes.items():
        entry.train(Path(recipe), Path(folder) / name, shard=shard)
    begin(Path(recipes["sft"]), Path(folder) / "begun", shard)
    return True


def go_on(folder: str, recipe: str, shard: bool) -> bool:
    entry.train(Path(recipe), Path(folder), shard=shard)
    return True


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """What one process gives."""
    folder = tmp_path_factory.mktemp("alone")
    recipes = make_recipes(folder)
    run_all(str(folder), {name: str(path) for name, path in recipes.items()}, shard=False)
    return folder, recipes


@pytest.fixture(scope="module", params=[False, True], ids=["ddp", "fsdp"])
def together(
    request: pytest.FixtureRequest, alone: tuple[Path, dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What two ranks give."""
    folder = tmp_path_factory.mktemp("together")
    on_ranks(folder, run_all, str(folder), {name: str(path) for name, path in alone[1].items()}, request.param)
    shutil.copytree(alone[0] / "begun", folder / "gone on")
    on_ranks(folder, go_on, str(folder / "gone on"), str(alone[1]["sft"]), request.param)
    return folder


def check(one: Path, two: Path, start: Path) -> None:
    """Two trainings are the same but for rounding."""
    for figure in ("loss", "grad_norm", "rewards/margins", "balance"):
        rounding = 5e-5 if figure == "rewards/margins" else 1e-6  # a difference of sums over whole answers
        assert log(two, figure) == pytest.approx(log(one, figure), rel=2e-4, abs=rounding), figure
    before, first, second = (load_file(path / "model.safetensors") for path in (start, one / NAME, two / NAME))
    assert first.keys() == second.keys()
    moved = torch.cat([(first[key] - before[key]).flatten() for key in first if key in before])  # new: experts
    apart = torch.cat([(first[key] - second[key]).flatten() for key in first])
    assert 0 < moved.norm() and apart.norm() < 0.01 * moved.norm()


@pytest.mark.parametrize("name", STAGES)
def test_two_ranks_train_as_one_process(alone: tuple[Path, dict[str, Path]], together: Path, name: str) -> None:
    check(alone[0] / name, together / name, alone[0] / ("detail start" if name == "detail" else "start"))


def test_a_training_goes_on_where_there_are_more_ranks_or_fewer(
    alone: tuple[Path, dict[str, Path]], together: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun by one process and ended by two, and the other way round."""
    check(alone[0] / "sft", together / "gone on", alone[0] / "start")
    entry.train(alone[1]["sft"], together / "begun")
    assert "going on from" in capsys.readouterr().out
    check(alone[0] / "sft", together / "begun", alone[0] / "start")


def test_ranks_share_each_batch() -> None:
    """All rows once, in the same order on any number of ranks; an idle rank is told so."""
    plan = BatchPlan([[4, 1, 7, 0, 2], [5], [3, 6]])
    for ranks in (1, 2, 3):
        shares = [list(RankShare(plan, rank, ranks, seed=7)) for rank in range(ranks)]
        for number, batch in enumerate(plan):
            drawn = [pair for share in shares for pair in share[number]]
            assert {abs(seed) for _, seed in drawn} <= set(draws_of(number, len(batch), seed=7))
            parts = [[row for row, _ in share[number]] for share in shares]
            assert sorted(row for part in parts for row in part if row >= 0) == sorted(batch)
            assert all(part == [-1 - batch[0]] for part in parts if min(part) < 0)
            assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_those_of_accelerate(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}[path.stem]
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == DecoderLayer.__name__


def test_answers_are_drawn_in_one_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    stage: Any = type("", (), {"name": "only", "teacher": "self"})
    check_on_policy(stage)
    monkeypatch.setattr("mixlora.training.steps.PartialState", lambda: type("", (), {"num_processes": 2}))
    with pytest.raises(RecipeError, match="on_policy draws answers in one process alone"):
        check_on_policy(stage)


def test_deepspeed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    recipe = write_recipe(tmp_path, "start", tmp_path / "rows.jsonl", TRAINED)
    with pytest.raises(RecipeError, match="--shard"):
        entry.train(recipe, tmp_path / "out")


def test_a_tower_that_drops_layers_is_refused() -> None:
    model = tiny_model()
    entry.refuse_layerdrop(model)
    model.config.speech_config.encoder_layerdrop = 0.1
    with pytest.raises(RecipeError, match="encoder_layerdrop"):
        entry.refuse_layerdrop(model)
    model.requires_grad_(False)
    entry.refuse_layerdrop(model)

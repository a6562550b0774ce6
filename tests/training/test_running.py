"""How a stage runs and ends: rates of groups, what is logged, streams, signals, full disks and bad losses."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.training import checkpoints, stopping
from mixlora.training import train as entry
from mixlora.training.progress import Progress
from mixlora.training.stopping import StopOnBadLoss, StopOnSignal, TrainingStopped, check_room
from mixlora.training.trainer import StageTrainer
from tests.training.training_fixtures import write_recipe

ADAPTERS = ["adapter.vision", "adapter.speech"]
STREAM = {"streaming": True, "window": 10}


def points(folder: Path) -> list[dict[str, Any]]:
    """The loss curve, with all that is counted and nothing that is timed."""
    return [point for point in json.loads((folder / "log.json").read_text()) if "loss" in point]


def break_off(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The next training receives SIGTERM within a step, as if a cluster ended the job."""
    compute = StageTrainer.compute_loss

    def sent(trainer: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "compute_loss", sent)


@pytest.mark.parametrize("stream", [{}, STREAM], ids=["planned", "streamed"])
def test_after_sigterm_it_goes_on_bit_for_bit(
    tmp_path: Path, start: str, rows: Path, monkeypatch: pytest.MonkeyPatch, stream: dict[str, Any]
) -> None:
    """In the middle of two points of the log, and of a round; masks and batches are those of a whole run."""
    train = [*ADAPTERS, "speech_projector.speech"]
    changes = {"max_steps": 11, "tokens_per_batch": 90, "logging_steps": 4, "save_steps": 8, "mask_time": 0.3}
    recipe = write_recipe(tmp_path, start, rows, train, gradient_accumulation=2, **changes | stream)
    before = signal.getsignal(signal.SIGTERM)
    entry.train(recipe, tmp_path / "whole")
    for step in (6, 9):
        with monkeypatch.context() as patch:
            break_off(patch, step)
            with pytest.raises(TrainingStopped, match=f"saved after step {step}; the same command goes on"):
                entry.train(recipe, tmp_path / "broken")
        assert (tmp_path / f"broken/01-only/checkpoints/checkpoint-{step}").is_dir()
    assert signal.getsignal(signal.SIGTERM) == before
    entry.train(recipe, tmp_path / "broken")
    assert points(tmp_path / "broken/01-only") == points(tmp_path / "whole/01-only")
    first, second = (load_file(tmp_path / name / "01-only/model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_signal_after_the_last_step_changes_nothing(tmp_path: Path, start: str, rows: Path) -> None:
    stop = StopOnSignal()
    stop.asked = True
    state, control, args = (
        type("", (), fields) for fields in ({"global_step": 3, "max_steps": 3}, {}, {"device": "cpu"})
    )
    stop.on_step_end(args, state, control)
    assert not stop.stopped and not hasattr(control, "should_training_stop")


def test_groups_learn_at_their_own_rates(tmp_path: Path, start: str, rows: Path) -> None:
    """AdamW's first step is as long as its rate, whatever the gradient."""
    rates = {"default": 1e-3, "adapter.speech": 1e-4}
    changes = {"learning_rate": rates, "max_steps": 1, "warmup": 0, "tokens_per_batch": 0, "rows_per_batch": 13}
    entry.train(write_recipe(tmp_path, start, rows, ADAPTERS, **changes), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "out/01-only"))
    groups = MixLoraForConditionalGeneration.from_pretrained(start).parameter_groups()
    for group, rate in (("adapter.vision", 1e-3), ("adapter.speech", 1e-4)):
        moved = max(float((after[name] - before[name]).abs().max()) for name in groups[group])
        assert moved == pytest.approx(rate, rel=0.02)
    (point,) = points(tmp_path / "out/01-only")
    assert point["learning_rate/adapter.speech"] == pytest.approx(0.1 * point["learning_rate/adapter.vision"])


def test_weight_decay_is_for_matrices_alone(tmp_path: Path, start: str, rows: Path) -> None:
    seen: list[Any] = []
    create = StageTrainer.create_optimizer

    def kept(trainer: StageTrainer, *args: Any) -> Any:
        optimizer = create(trainer, *args)
        seen.append((trainer, optimizer))
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StageTrainer, "create_optimizer", kept)
        recipe = write_recipe(tmp_path, start, rows, ["decoder", "adapter.vision"], weight_decay=0.1, max_steps=1)
        entry.train(recipe, tmp_path / "out")
    trainer, optimizer = seen[0]
    found = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert {id(each) for each in found} == {id(each) for each in trained} and len(found) == len(trained)
    for group in optimizer.param_groups:
        assert {each.ndim for each in group["params"]} <= ({2} if group["weight_decay"] else {1})


def test_the_log_tells_of_modalities_tasks_and_groups(
    tmp_path: Path, start: str, rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weighted by tokens, the losses of the modalities make up the loss; the groups' gradients make up the norm."""
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    rows.write_text("\n".join(json.dumps(line | {"task": f"task {i % 2}"}) for i, line in enumerate(lines)))
    recipe = write_recipe(
        tmp_path, start, rows, ADAPTERS, max_steps=2, tokens_per_batch=0, rows_per_batch=13, max_grad_norm=0
    )
    entry.train(recipe, tmp_path / "out")
    for point in points(tmp_path / "out/01-only"):
        modalities = {name for name in point if re.fullmatch("loss/[a-z_]+", name)}
        assert modalities == {"loss/text", "loss/vision", "loss/speech", "loss/vision_speech"}
        tasks = [point["loss/task/task 0"], point["loss/task/task 1"]]
        assert min(tasks) < point["loss"] < max(tasks)
        assert math.hypot(*(point[f"grad_norm/{group}"] for group in ADAPTERS)) == pytest.approx(point["grad_norm"])
    tokens = [point["tokens"] for point in points(tmp_path / "out/01-only")]
    assert tokens[1] == 2 * tokens[0] > 0
    said = capfd.readouterr()
    assert re.search(r"step 2/2  loss [\d.]+ .*[\d,]+ tokens/s  0:00:00 left", said.out + said.err)
    page = (tmp_path / "out/report.html").read_text()
    assert "01-only" in page and "<svg" in page and "loss by modality" in page


def test_tensorboard_where_it_is_installed(tmp_path: Path, start: str, rows: Path) -> None:
    recipe = write_recipe(tmp_path, start, rows, ADAPTERS, max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mixlora.training.progress.find_spec", lambda name: None)
        with pytest.raises(entry.RecipeError, match="tensorboard: true needs that package"):
            entry.train(recipe, tmp_path / "out", ["tensorboard=true"])
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    entry.train(recipe, tmp_path / "out", ["tensorboard=true"])
    events = EventAccumulator(str(tmp_path / "out/01-only/tensorboard")).Reload()
    found = [event.value for event in events.Scalars("loss")]
    assert found == pytest.approx([point["loss"] for point in points(tmp_path / "out/01-only")])


@pytest.mark.parametrize(
    ("logs", "message"),
    [
        ({"loss": math.nan}, "the loss is nan at step 7"),
        ({"loss": 1.0, "grad_norm": math.inf}, "the norm of the gradients is inf at step 7"),
        ({"loss": 9.5}, "the loss is 9.5, twice that of guessing at step 7"),
    ],
)
def test_a_bad_loss_says_what_to_do(logs: dict[str, float], message: str) -> None:
    bad = StopOnBadLoss("only", {"decoder": 1e-2, "adapter.vision": 1e-3}, vocabulary=100)
    bad.check(6, {"loss": 9.0, "grad_norm": 3.0})
    with pytest.raises(TrainingStopped, match=f"{message}.*decoder 0.01.*only.learning_rate=0.001 or a longer warmup"):
        bad.check(7, logs)


def test_a_rate_that_is_far_too_high_ends_the_run(tmp_path: Path, start: str, rows: Path) -> None:
    recipe = write_recipe(tmp_path, start, rows, ["decoder"], learning_rate=50, warmup=0, max_steps=40, save_steps=20)
    with pytest.raises(TrainingStopped, match="learning rate is too high as a rule"):
        entry.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out/01-only/done.json").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), RuntimeError("No space left on device (os error 28)")]
)
def test_a_full_disk_says_what_to_do_and_the_run_goes_on(
    tmp_path: Path, start: str, rows: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    recipe = write_recipe(tmp_path, start, rows, ADAPTERS)
    save, saved = checkpoints.checkpoint.save, []

    def full(*args: Any, **kwargs: Any) -> None:
        saved.append(1)
        if len(saved) == 2:
            raise ValueError("while writing") from error
        save(*args, **kwargs)

    monkeypatch.setattr(checkpoints.checkpoint, "save", full)
    with pytest.raises(TrainingStopped, match="the disk is full.*Make room.*goes on from checkpoint-2"):
        entry.train(recipe, tmp_path / "out")
    assert not (tmp_path / "out/01-only/checkpoints/checkpoint-4").exists()
    entry.train(recipe, tmp_path / "out")
    assert [point["step"] for point in points(tmp_path / "out/01-only")] == [1, 2, 3, 4, 5, 6]


def test_a_disk_without_room_is_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_room(tmp_path / "not" / "there", 1000)
    monkeypatch.setattr(stopping.shutil, "disk_usage", lambda path: type("", (), {"free": 2**20}))
    with pytest.raises(TrainingStopped, match="checkpoints need 25 MiB, and 1 MiB are free"):
        check_room(tmp_path, 10**6)


def test_bfloat16_is_near_float32(tmp_path: Path, start: str, rows: Path) -> None:
    losses = []
    recipe = write_recipe(tmp_path, start, rows, ADAPTERS, max_steps=3)
    for bf16 in ("true", "false"):
        entry.train(recipe, tmp_path / bf16, [f"only.bf16={bf16}"])
        losses.append([point["loss"] for point in points(tmp_path / bf16 / "01-only")])
        weights = load_file(tmp_path / bf16 / "01-only/model.safetensors")
        assert {tensor.dtype for name, tensor in weights.items() if "lora" in name} == {torch.float32}
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]


def test_the_command_ends_in_a_line(tmp_path: Path, start: str, rows: Path) -> None:
    recipe = write_recipe(tmp_path, start, rows, ["decoder"], learning_rate=1e6, warmup=0, max_steps=40)
    command = [sys.executable, "-m", "mixlora.cli", "train", str(recipe), "--output", str(tmp_path / "out")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert re.match("error: stage 'only': the (loss|norm of the gradients) is", ended.stderr.splitlines()[-1])


def test_time_left() -> None:
    assert Progress(shown=False).on_log(None, None, None, {"loss": 1.0}) is None
    from mixlora.training.progress import _clock

    assert _clock(3 * 3600 + 62.4) == "3:01:02"

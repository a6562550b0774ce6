"""The real launchers, two processes on the CPU: the losses and weights of one process, killed in between or not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mixlora.training import train as entry
from mixlora.training.trainer import last_checkpoint
from tests.training.training_fixtures import write_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "training" / "configs"
TRAINED = ["adapter.vision", "adapter.speech", "vision_projector", "speech_projector.speech"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29611"]
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "2"]
PORT = ["--main_process_port", "29612"]
LAUNCHERS = {
    "torchrun": (TORCHRUN, []),
    "torchrun, sharded": (TORCHRUN, ["--shard"]),
    "accelerate, ddp.yaml": ([*ACCELERATE, "--config_file", str(CONFIGS / "ddp.yaml"), *PORT], []),
    "accelerate, fsdp2.yaml": ([*ACCELERATE, "--config_file", str(CONFIGS / "fsdp2.yaml"), *PORT], []),
}
PATIENCE = 400
LONG = ["only.max_steps=240", "only.save_steps=20"]
"""So many steps that the end comes before the last, on a slow machine as well."""

pytestmark = pytest.mark.slow


def command(launcher: str, recipe: Path, output: Path) -> list[str]:
    start, options = LAUNCHERS[launcher]
    return [sys.executable, *start, "-m", "mixlora.training.train", str(recipe), "--output", str(output), *options]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def recipe(tmp_path: Path, start: str, rows: Path) -> Path:
    changes = {"max_steps": 8, "tokens_per_batch": 0, "rows_per_batch": 5, "learning_rate": 1e-4, "warmup": 0}
    return write_recipe(tmp_path, start, rows, TRAINED, **changes)


def check_same(one: Path, two: Path, start: Path) -> None:
    """Two trainings are the same but for rounding."""
    curves = [
        [(p["step"], p["loss"]) for p in json.loads((f / "01-only/log.json").read_text()) if "loss" in p]
        for f in (one, two)
    ]
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]]
    assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curves[1]], rel=2e-4)
    before, *after = (load_file(f / "model.safetensors") for f in (start, one / "01-only", two / "01-only"))
    moved = torch.cat([(after[0][key] - before[key]).flatten() for key in before])
    apart = torch.cat([(after[0][key] - after[1][key]).flatten() for key in before])
    assert 0 < moved.norm() and apart.norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one(tmp_path: Path, start: str, recipe: Path, launcher: str) -> None:
    done = subprocess.run(
        command(launcher, recipe, tmp_path / "two"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entry.train(recipe, tmp_path / "one")
    check_same(tmp_path / "one", tmp_path / "two", Path(start))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "told to end"])
def test_two_processes_go_on_after_an_end_at_any_time(
    tmp_path: Path, start: str, recipe: Path, how: signal.Signals
) -> None:
    """The whole group is ended within some step; first two ranks, and then one, go on."""
    folder = tmp_path / "two"
    entry.train(recipe, tmp_path / "one", LONG)
    long = [*command("torchrun", recipe, folder), *LONG]
    run = subprocess.Popen(long, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    checkpoints = folder / "01-only/checkpoints"
    while last_checkpoint(checkpoints) is None and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(random.Random(str(how)).uniform(0, 0.5))
    if how == signal.SIGKILL:
        for process in (*psutil.Process(run.pid).children(recursive=True), run):  # ranks have sessions of their own
            process.kill()
    else:
        run.send_signal(how)  # torchrun hands it on to its ranks
    run.wait(timeout=PATIENCE)
    assert not (folder / "01-only/done.json").exists()
    entry.train(recipe, folder, LONG)
    check_same(tmp_path / "one", folder, Path(start))

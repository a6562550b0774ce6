"""How a training ends before its end: a signal, a full disk, a loss that is no number or that grows."""

import errno
import math
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from mixlora.modeling.ranks import in_process_group

ROOM = 2.2
"""Checkpoints that must find room: two are kept, and the third is written before the first goes."""


class TrainingStopped(RuntimeError):
    """A training that can't go on, or was told to end; the message says what to do."""


class StopOnSignal(TrainerCallback):
    """After SIGTERM, such as a cluster sends before it ends a job: a checkpoint after the step, then the end.

    Attributes:
        stopped: whether that happened.
    """

    def __init__(self) -> None:
        self.asked = self.stopped = False
        self._before: Any = None

    def _ask(self, *_: Any) -> None:
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signal; outside of the main thread, where that can't be, nothing is taken."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """All ranks end after the same step, whichever was told."""
        asked = torch.tensor(int(self.asked), device=args.device)
        if in_process_group():
            distributed.all_reduce(asked)
        if asked.item() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True


class StopOnBadLoss:
    """Ends a training whose loss is no number, or that has become worse than guessing.

    Args:
        stage: name of the stage.
        rates: learning rates of its groups, at their peak.
        vocabulary: tokens to guess among; 0 where the loss is not a cross entropy.
    """

    def __init__(self, stage: str, rates: dict[str, float], vocabulary: int):
        self.stage, self.rates = stage, rates
        self.worst = 2 * math.log(vocabulary) if vocabulary else math.inf

    def check(self, step: int, logs: dict[str, float]) -> None:
        """Looks at a point of the log.

        Raises:
            TrainingStopped: with the step, and what to change.
        """
        loss, norm = logs.get("loss", 0.0), logs.get("grad_norm", 0.0)
        if not math.isfinite(loss):
            self._stop(step, f"the loss is {loss}")
        if not math.isfinite(norm):
            self._stop(step, f"the norm of the gradients is {norm}")
        self.worst = max(self.worst, 2 * loss if step <= 1 else 0.0)
        if loss > self.worst:
            self._stop(step, f"the loss is {loss:.3g}, twice that of guessing")

    def _stop(self, step: int, what: str) -> None:
        rates = ", ".join(f"{group} {rate:g}" for group, rate in self.rates.items())
        lower = max(self.rates.values()) / 10
        raise TrainingStopped(
            f"stage {self.stage!r}: {what} at step {step}. The learning rate is too high as a rule ({rates}): begin "
            f"the stage again, in an empty folder, with {self.stage}.learning_rate={lower:g} or a longer warmup. "
            "If that does not help, look for odd rows by `mixlora data check FILE --media`"
        )


@contextmanager
def room_on_disk(folder: Path, going_on: str) -> Iterator[None]:
    """Where the disk gets full, what was half written is removed, and the training ends with what to do.

    Args:
        folder: that is written inside.
        going_on: where the training goes on.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
        raise TrainingStopped(
            f"the disk is full: {folder} could not be written ({free / 2**20:,.0f} MiB are free). Make room, or move "
            f"the output to another disk; then the same command goes on {going_on}"
        ) from error


def check_room(folder: Path, trained: int) -> None:
    """Refuses to begin where the checkpoints of a stage will not find room.

    Args:
        folder: of the stage, which may not exist yet.
        trained: parameters that are trained; a checkpoint holds them and their two moments in float32.

    Raises:
        TrainingStopped: with what is needed and what is free.
    """
    needed = ROOM * 12 * trained
    free = shutil.disk_usage(next(each for each in (folder, *folder.parents) if each.exists())).free
    if free < needed:
        raise TrainingStopped(
            f"{folder}: checkpoints need {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free: make room, "
            "or name another output"
        )


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk; libraries in Rust and C++ have it in their words alone."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False

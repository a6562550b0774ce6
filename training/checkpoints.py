"""What a stage needs to go on: trained parameters and optimizer state, on disk in a form that no number of ranks owns.

A checkpoint is written by all ranks at once, each its part (torch.distributed.checkpoint), and read by any number of
them, under DDP, FSDP2 or in a single process. Frozen parameters are not written: the stage's start has them.
"""

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer

from mixlora.training.stopping import room_on_disk

STATE = "state"
SCHEDULER = "scheduler.pt"
RUNNING = "running.json"
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a model, whole and on the CPU, however it is sharded; to be called by all ranks."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=whole)
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        if name in state:  # of the first rank alone
            state[name] = state[source]  # one tensor again, which is saved once
    return state


class ResumableTrainer(Trainer):
    """Writes and reads its own checkpoints; those of DeepSpeed are left to transformers.

    Attributes:
        to_restore: what a checkpoint says of the running figures and the data; empty in a training that begins.
    """

    to_restore: dict[str, Any] = {}

    def running_state(self) -> dict[str, Any]:
        """What lies between two points of the log, as JSON; to be called by all ranks."""
        return {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        before = Path(self.args.output_dir).glob("checkpoint-*")
        newest = max((path.name for path in before), key=lambda name: int(name.rpartition("-")[2]), default=None)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with room_on_disk(folder, f"from {newest}" if newest else "from the begin of the stage"):
            super()._save_checkpoint(model, trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Makes the folder of a checkpoint; what is in it is written with the optimizer's state."""
        if self.is_deepspeed_enabled or not _internal_call or output_dir is None:
            super().save_model(output_dir, _internal_call)
        else:
            os.makedirs(output_dir, exist_ok=True)

    def _training_state(self) -> dict[str, Any]:
        """By names of parameters; tensors are shards where the model is sharded."""
        optimizer = self.optimizer.optimizer  # behind accelerate's wrapper
        return {
            "model": get_model_state_dict(self.model, options=TRAINED),
            "optimizer": get_optimizer_state_dict(self.model, optimizer, options=TRAINED),
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        running = self.running_state()
        if self.args.should_save:
            (folder / RUNNING).write_text(json.dumps(running), encoding="utf-8")
        with _alone():
            checkpoint.save(self._training_state(), checkpoint_id=folder / STATE)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not (Path(resume_from_checkpoint) / STATE).is_dir():  # DeepSpeed's
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        # else the model waits for its optimizer: both are read once they are sharded

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        if checkpoint_folder is None or not (Path(checkpoint_folder) / STATE).is_dir():
            super()._load_optimizer_and_scheduler(checkpoint_folder)
            return
        folder, state = Path(checkpoint_folder), self._training_state()
        with _alone():
            checkpoint.load(state, checkpoint_id=folder / STATE)
        set_model_state_dict(self.model, state["model"], options=TRAINED)
        set_optimizer_state_dict(self.model, self.optimizer.optimizer, state["optimizer"], options=TRAINED)
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))


@contextmanager
def _alone() -> Iterator[None]:
    """Without the warning that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        yield

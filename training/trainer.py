"""The one trainer: transformers' loop over a batch plan that is drawn beforehand, with the stage's objective."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from mixlora.training.checkpoints import ResumableTrainer
from mixlora.training.data.batches import BatchPlan, RankShare
from mixlora.training.data.collate import Collator, Example, Examples
from mixlora.training.stages import Stage
from mixlora.training.steps import Step

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class StageTrainer(ResumableTrainer):
    """Trains the parameters of a model that require gradients; only they get optimizer state.

    The plan holds all epochs, so the loop sees a single one of a known length, and to resume it skips the batches
    that were done. Several processes share each batch: the loss, the order of the data and the number of steps are
    those of one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        examples: Sequence[Example],
        plan: BatchPlan,
        collator: Collator,
        args: TrainingArguments,
        step: Step,
    ):
        super().__init__(model=model, args=args, processing_class=processor, data_collator=collator)
        self.examples, self.plan, self.collator, self.step = examples, plan, collator, step
        self._figures: dict[str, list[float]] = {}

    def get_train_dataloader(self) -> DataLoader:
        """This process's share of the batches of the plan, in its order."""
        share = RankShare(self.plan, self.args.process_index, self.args.world_size)
        loader: DataLoader = DataLoader(Examples(self.examples), batch_sampler=share, collate_fn=self.collator)
        return prepare_data_loader(loader, self.args.device, num_processes=1, process_index=0, put_on_device=True)

    def create_accelerator_and_postprocess(self) -> None:
        """As in transformers; accelerate passes FSDP by on CPUs, where it works as well."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.args.fsdp_plugin_args and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """What the stage's objective makes of the batch, normalised over the optimizer step."""
        loss, figures = self.step(model, inputs, num_items_in_batch)
        for name, value in figures.items():
            self._figures.setdefault(name, []).append(value)
        if not loss.requires_grad:  # no row of this batch takes a trained part, such as text beside a trained adapter
            loss = loss + sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
        loss = loss * self.args.world_size  # each process has its share of the loss, and gradients are averaged
        return (loss, {}) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the estimate walks all parameters in every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with the objective's figures; but a loss that is not finite ends the training.

        Raises:
            FloatingPointError: with the step.
        """
        if "loss" in logs:
            logs |= {name: sum(values) / len(values) for name, values in self._figures.items()}
            self._figures.clear()
        super().log(logs, start_time)
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: lower learning_rate"
            )


def training_arguments(stage: Stage, folder: Path, seed: int, shard: bool = False) -> TrainingArguments:
    """What transformers' loop needs to know of a stage; checkpoints go to `folder`.

    Args:
        shard: where there are several processes, shard parameters, gradients and optimizer state over them (FSDP2).
    """
    args = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),
        fsdp=shard and PartialState().num_processes > 1,
        ddp_find_unused_parameters=False,  # every trained parameter gets a gradient on every rank
        ddp_broadcast_buffers=False,  # none of them changes
        num_train_epochs=1,
        gradient_accumulation_steps=stage.gradient_accumulation,
        activation_checkpointing=stage.gradient_checkpointing,
        learning_rate=stage.learning_rate,
        lr_scheduler_type=SCHEDULERS[stage.schedule],
        warmup_steps=stage.warmup,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.beta2,
        max_grad_norm=stage.max_grad_norm,
        logging_steps=stage.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=stage.save_steps,
        save_total_limit=2,
        seed=seed,
        report_to="none",
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    args._n_gpu = min(args.n_gpu, 1)  # one process drives one device; transformers would spread it over all it sees
    return args


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end: its `trainer_state.json`, the last file, can be read."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            continue
        return str(checkpoint)
    return None

"""The one trainer: transformers' loop over a batch plan that is drawn beforehand, with the stage's objective."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from mixlora.modeling.ranks import sum_over_ranks
from mixlora.training.checkpoints import ResumableTrainer
from mixlora.training.data.collate import Collator, Example
from mixlora.training.ledger import Ledger, gradient_norms
from mixlora.training.stage_data import Data
from mixlora.training.stages import Stage
from mixlora.training.steps import Step
from mixlora.training.stopping import StopOnBadLoss

SCHEDULERS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


class StageTrainer(ResumableTrainer):
    """Trains the parameters of a model that require gradients; only they get optimizer state.

    The data hold all epochs, so the loop sees a single one of a known length, and to resume it skips the batches
    that were done. Several processes share each batch: the loss, the order of the data and the number of steps are
    those of one.
    """

    optimizer: Any
    _tr_loss: Any

    def __init__(
        self,
        model: Any,
        processor: Any,
        stage: Stage,
        data: Data,
        collator: Collator,
        args: TrainingArguments,
        step: Step,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        super().__init__(
            model=model,
            args=args,
            processing_class=processor,
            data_collator=collator,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.stage, self.data, self.collator, self.step = stage, data, collator, step
        self.groups = {group: names for group, names in model.parameter_groups().items() if group in stage.train}
        self.ledger = Ledger()
        self.add_callback(_Restore(self))
        vocabulary = model.config.text_config.vocab_size if stage.objective == "sft" and not stage.ctc_weight else 0
        self._bad_loss = StopOnBadLoss(stage.name, {name: stage.rate_of(name) for name in self.groups}, vocabulary)
        self._norms: dict[str, float] = {}

    def get_train_dataloader(self) -> DataLoader:
        """This process's share of the batches, in their order."""
        loader = self.data.loader(self._collate, self.args.process_index, self.args.world_size)
        return prepare_data_loader(
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,  # else it would cut a stream's batches by their rows, media and all
        )

    def _collate(self, examples: list[Example]) -> dict[str, Any]:
        """A batch, and of each of its rows the modality and the task."""
        return self.collator(examples) | {"kinds": [(example.modality, example.task) for example in examples]}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with each group's learning rate; weight decay is for matrices alone."""
        if self.optimizer is None:
            model = self.model if model is None else model
            decayed, parameters = set(self.get_decay_parameter_names(model)), dict(model.named_parameters())
            groups = []
            for group, names in self.groups.items():
                for decays in (True, False):
                    chosen = [parameters[name] for name in names if (name in decayed) == decays]
                    decay = self.args.weight_decay if decays else 0.0
                    if chosen:
                        groups.append({"params": chosen, "lr": self.stage.rate_of(group), "weight_decay": decay})
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

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
        kinds = inputs.pop("kinds")
        self.ledger.add_tokens(int(inputs["attention_mask"].sum()))
        loss, figures = self.step(model, inputs, num_items_in_batch)
        rows = figures.pop("row_losses", None)
        if rows is not None:
            self.ledger.add_rows(kinds, rows)
        self.ledger.add_figures(figures)
        if not loss.requires_grad:  # no row of this batch takes a trained part, such as text beside a trained adapter
            loss = loss + sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
        loss = loss * self.args.world_size  # each process has its share of the loss, and gradients are averaged
        return (loss, {}) if return_outputs else loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        self._note_norms()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing was clipped
            self._note_norms()
        return super()._get_grad_norm(model, grad_norm)

    def _note_norms(self) -> None:
        """The norm of each group's gradients, in steps that are logged."""
        if (self.state.global_step + 1) % self.args.logging_steps == 0 and not self.is_deepspeed_enabled:
            self._norms = gradient_norms(dict(self.model.named_parameters()), self.groups)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the estimate walks all parameters in every step."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers, with what was counted since the last point.

        Raises:
            TrainingStopped: the loss is not finite, or far worse than guessing.
        """
        if "loss" in logs:
            logs |= self.ledger.means() | self._norms
            if isinstance(self.stage.learning_rate, dict):
                rates = {group: self.stage.rate_of(group) for group in self.groups}
                peak = self.stage.rate_of(next(iter(self.groups)))
                logs |= {f"learning_rate/{name}": logs["learning_rate"] * rate / peak for name, rate in rates.items()}
        super().log(logs, start_time)
        if "loss" in logs:
            self._bad_loss.check(self.state.global_step, logs)

    def running_state(self) -> dict[str, Any]:
        """What lies between two points of the log, and where the data stand; to be called by all ranks."""
        loss = sum_over_ranks(self._tr_loss) / self.args.world_size
        batches = self.state.global_step * self.args.gradient_accumulation_steps
        return {
            "loss": loss.item(),
            "logged": self._globalstep_last_logged,
            "ledger": self.ledger.state(),
            "data": self.data.state(batches),
        }

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Goes on from `running_state`, which the first rank wrote."""
        self._tr_loss = self._tr_loss + state["loss"]
        self._globalstep_last_logged = state["logged"]
        if self.args.process_index == 0:
            self.ledger.load(state["ledger"])
        else:
            self.ledger.tokens = state["ledger"]["tokens"]


class _Restore(TrainerCallback):
    """Gives the trainer back what it was counting, once its loop has set all to zero."""

    def __init__(self, trainer: StageTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.to_restore:
            self.trainer.load_running_state(self.trainer.to_restore)


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
        learning_rate=max(stage.rate_of(group) for group in stage.train),
        bf16=stage.bf16,
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
        disable_tqdm=True,  # there is a bar of ours
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

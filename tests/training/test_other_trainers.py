"""The trainers of others take our model: transformers' own, TRL's SFT and DPO with pictures."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from mixlora import MixLoraForConditionalGeneration, MixLoraProcessor
from tests.modeling.model_fixtures import ROWS, VOCAB, batch_inputs, row_inputs, tiny_model
from tests.training.training_fixtures import make_start

ANSWERS = ("a cat", "no")


def test_label_smoothing_shifts_the_labels(tmp_path: Path) -> None:
    """transformers' trainer does so for models that it knows by name; else each token would be its own answer."""
    model = tiny_model()
    batch = batch_inputs([row_inputs(kind) for kind in ROWS])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True)
    found = Trainer(model, arguments).compute_loss(model, batch | {"labels": labels})
    logits, targets = model(**batch).logits[:, :-1], labels[:, 1:]
    wanted = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-100, label_smoothing=0.1
    )
    torch.testing.assert_close(found, wanted)


def test_predictions_hold_no_cache(tmp_path: Path) -> None:
    """The config tells transformers' trainer to leave the cache out, by either of its names."""
    model = tiny_model()
    row = batch_inputs([row_inputs("image")])
    rows = [{"input_ids": row["input_ids"][0], "pixel_values": row["pixel_values"][0]}] * 2
    arguments = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_eval_batch_size=1)
    found = Trainer(model, arguments).predict(rows).predictions
    assert isinstance(found, np.ndarray) and found.shape == (2, row["input_ids"].shape[1], VOCAB)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_start(tmp_path_factory.mktemp("start"))


def pictures() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in range(2)]


def asked(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def trained(model: MixLoraForConditionalGeneration) -> set[str]:
    """Names of the vision adapter and projector: what a stage for pictures trains."""
    groups = model.parameter_groups()
    names = {*groups["adapter.vision"], *groups["vision_projector"]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return names


def load(start: str) -> tuple[MixLoraForConditionalGeneration, MixLoraProcessor]:
    return MixLoraForConditionalGeneration.from_pretrained(start), MixLoraProcessor.from_pretrained(start)


def changed(model: torch.nn.Module, start: str) -> set[str]:
    before = MixLoraForConditionalGeneration.from_pretrained(start).state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def shared(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
    }


@pytest.mark.parametrize("form", ["messages", "prompt and completion"])
def test_trl_fine_tunes_on_pictures(form: str, start: str, tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, processor = load(start)
    names = trained(model)
    rows: list[dict[str, Any]] = []
    for picture, answer in zip(pictures(), ANSWERS, strict=True):
        question, reply = asked("What is it?"), said(answer)
        row = {"messages": question + reply} if form == "messages" else {"prompt": question, "completion": reply}
        rows.append({"images": [picture], **row})
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**shared(tmp_path), max_length=None),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():  # TRL counts every label, those of placeholders too, which ours leaves out
        logits, labels = model.eval()(**batch).logits[:, :-1], batch["labels"][:, 1:]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-3)
    assert changed(model, start) and changed(model, start) <= names


def test_trl_prefers_answers_about_pictures(start: str, tmp_path: Path) -> None:
    """One step of DPO; before it, the policy is its own reference, so that the loss is log 2."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, processor = load(start)
    reference, _ = load(start)
    names = trained(model)
    rows = [
        {"images": [picture], "prompt": asked("What is it?"), "chosen": said(good), "rejected": said(bad)}
        for picture, good, bad in zip(pictures(), ANSWERS, ANSWERS[::-1], strict=True)
    ]
    trainer = trl.DPOTrainer(
        model,
        ref_model=reference,
        args=trl.DPOConfig(**shared(tmp_path), max_length=None),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=processor,
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(np.log(2), rel=1e-4) and log["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert changed(model, start) and changed(model, start) <= names

"""Whole stages on a tiny model: only what is named changes, a killed run ends like an unkilled one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training import train as entry
from mixlora.training.data.collate import Collator, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import read_rows
from mixlora.training.groups import copy_groups
from mixlora.training.objectives import place_loss
from mixlora.training.stages import RecipeError
from mixlora.training.steps import SupervisedStep
from mixlora.training.trainer import StageTrainer, last_checkpoint
from tests.modeling.model_fixtures import tiny_model
from tests.training.training_fixtures import chat, make_start, write_recipe, write_rows

ADAPTERS = ["adapter.vision", "adapter.speech"]


@pytest.fixture
def start(tmp_path: Path) -> str:
    return make_start(tmp_path / "start")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path)


def curve(folder: Path) -> list[tuple[int, float]]:
    return [
        (point["step"], point["loss"]) for point in json.loads((folder / "log.json").read_text()) if "loss" in point
    ]


@pytest.mark.parametrize("groups", [["decoder"], ADAPTERS, ["vision_projector", "speech_projector.speech"]])
def test_only_what_is_named_changes(
    tmp_path: Path, start: str, rows: Path, groups: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state: dict[str, Any] = {}

    def save(trainer: StageTrainer, *args: Any, **kwargs: Any) -> None:
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        state.update({names[parameter]: 1 for parameter in trainer.optimizer.optimizer.state})

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", save)
    monkeypatch.setattr(entry.shutil, "rmtree", lambda path: None)
    entry.train(write_recipe(tmp_path, start, rows, groups), tmp_path / "out")
    model = MixLoraForConditionalGeneration.from_pretrained(start)
    named = {name for group in groups for name in model.parameter_groups()[group]}
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "out/01-only"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and changed <= named
    assert set(state) == named


def test_a_finished_stage_is_skipped_and_other_settings_are_refused(
    tmp_path: Path, start: str, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, start, rows, ADAPTERS, max_steps=2)
    entry.train(recipe, tmp_path / "out")
    first = capsys.readouterr().out
    assert "train  adapter.vision" in first and "freeze decoder" in first
    assert not (tmp_path / "out/01-only/checkpoints").exists()
    entry.train(recipe, tmp_path / "out")
    assert "finished before" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="learning_rate: 0.01 -> 0.5"):
        entry.train(recipe, tmp_path / "out", ["only.learning_rate=0.5"])


def test_unknown_group_is_named(tmp_path: Path, start: str, rows: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'adapter.vision'"):
        entry.train(write_recipe(tmp_path, start, rows, ["adapter.visoin"]), tmp_path / "out")


def test_a_checkpoint_that_is_not_there_is_named_in_a_line(tmp_path: Path, start: str, rows: Path) -> None:
    recipe = write_recipe(tmp_path, start, rows, ADAPTERS)
    (tmp_path / "empty").mkdir()
    taught = ["only.objective=mimic", "only.teacher=gone"]
    for overrides, message in {
        ("model=gone",): "^model gone: no checkpoint with its processor: no such folder, nor a hub id that loads$",
        (f"model={tmp_path}/empty",): f"^model {tmp_path}/empty: no checkpoint with its processor: Error no file",
        tuple(taught): "^teacher gone: no checkpoint with its processor: no such folder",
    }.items():
        with pytest.raises(RecipeError, match=message):
            entry.train(recipe, tmp_path / "out", [*overrides])


def test_copy_starts_one_group_from_another(start: str) -> None:
    model = MixLoraForConditionalGeneration.from_pretrained(start)
    copy_groups(model, {"speech_projector.vision_speech": "speech_projector.speech"})
    projector = model.model.speech_projector
    assert torch.equal(projector["speech"].up.weight, projector["vision_speech"].up.weight)
    with pytest.raises(RecipeError, match="do not fit"):
        copy_groups(model, {"speech_projector.speech": "vision_projector"})


def clips_alone(rows: Path) -> Path:
    """A file of those rows that hold clips and no picture."""
    clips = rows.with_name("clips.jsonl")
    clips.write_text(
        "\n".join(line for line in rows.read_text().splitlines() if "audio" in line and "image" not in line)
    )
    return clips


@pytest.mark.parametrize("weight", [0.4, 1.0])
def test_ctc_trains_the_projector(tmp_path: Path, start: str, rows: Path, weight: float) -> None:
    clips = clips_alone(rows)
    train = ["speech_projector.speech", "adapter.speech"]
    recipe = write_recipe(tmp_path, start, clips, train, ctc_weight=weight, mask_time=0.1, max_steps=20)
    entry.train(recipe, tmp_path / "out")
    losses = [loss for _, loss in curve(tmp_path / "out/01-only")]
    assert losses[-1] < 0.8 * losses[0]
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "out/01-only"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("speech_projector.speech" in name for name in changed)
    assert any("lora" in name for name in changed) == (weight < 1)  # at 1, the decoder is not run


def test_ctc_reads_the_projector_behind_the_context_in_a_whitened_basis(tmp_path: Path, rows: Path) -> None:
    start = make_start(tmp_path / "start", speech_context={"layers": 1})
    clips = clips_alone(rows)
    train = ["speech_context", "speech_projector.speech"]
    recipe = write_recipe(tmp_path, start, clips, train, ctc_weight=1, max_steps=20)
    entry.train(recipe, tmp_path / "out")
    losses = [loss for _, loss in curve(tmp_path / "out/01-only")]
    assert losses[-1] < 0.8 * losses[0]
    model = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "out/01-only")
    projectors = model.model.speech_projector
    assert not torch.equal(projectors["speech"].basis, projectors["vision_speech"].basis)
    copy_groups(model, {"speech_projector.vision_speech": "speech_projector.speech"})
    assert torch.equal(projectors["speech"].basis, projectors["vision_speech"].basis)


def test_letters_learn_by_ctc_with_the_spelling_of_the_processor(tmp_path: Path, rows: Path) -> None:
    start = make_start(tmp_path / "start", speech_context={"layers": 1, "stride": 2}, speech_letters={})
    clips = clips_alone(rows)
    recipe = write_recipe(tmp_path, start, clips, ["speech_context", "speech_letters"], ctc_weight=1, max_steps=20)
    entry.train(recipe, tmp_path / "out")
    losses = [loss for _, loss in curve(tmp_path / "out/01-only")]
    assert losses[-1] < 0.8 * losses[0]
    letters = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "out/01-only").model.speech_letters
    processor = MixLoraProcessor.from_pretrained(tmp_path / "out/01-only")
    read = letters.spell(torch.tensor(processor.tokenizer("seven")["input_ids"])).tolist()
    assert "".join(letters.alphabet[letter - 1] for letter in read) == "seven"
    with pytest.raises(ValueError, match="speech_letters learns by CTC alone, and ctc_weight is 0"):
        entry.train(recipe, tmp_path / "other", ["only.ctc_weight=0"])


def pictures_alone(rows: Path) -> Path:
    """A file of rows about the pictures, with two answers in turn."""
    pictures = rows.with_name("pictures.jsonl")
    pictures.write_text("\n".join(json.dumps(chat("i", "yes" if i % 2 else "no way", i)) for i in range(12)))
    return pictures


@pytest.mark.parametrize("cached", [False, True])
def test_what_is_written_in_pictures_is_learnt_line_by_line(tmp_path: Path, rows: Path, cached: bool) -> None:
    reading = {"widths": [8], "layers": [1], "patch_size": 1, "lines": 2, "tokens": 3}
    start = make_start(tmp_path / "start", vision_letters=reading)
    recipe = write_recipe(
        tmp_path, start, pictures_alone(rows), ["vision_letters"], ctc_weight=1, max_steps=40, tokens_per_batch=512
    )
    entry.train(recipe, tmp_path / "out", [f"cache={tmp_path / 'features'}"] if cached else [])
    losses = [loss for _, loss in curve(tmp_path / "out/01-only")]
    assert losses[-1] < 0.5 * losses[0]
    assert not (tmp_path / "features").exists()  # no tower looks at the pictures
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "out/01-only"))
    assert {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])} == {"vision_letters"}
    reader = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "out/01-only").model.vision_letters
    processor = MixLoraProcessor.from_pretrained(tmp_path / "out/01-only")
    assert reader.tokens_of("yes") == processor.tokenizer("yes")["input_ids"]
    with pytest.raises(ValueError, match="vision_letters learns by CTC alone, and ctc_weight is 0"):
        entry.train(recipe, tmp_path / "other", ["only.ctc_weight=0"])
    with pytest.raises(ValueError, match="one picture in every row"):
        entry.train(write_recipe(tmp_path, start, rows, ["vision_letters"], ctc_weight=1), tmp_path / "mixed")


@pytest.mark.parametrize("cached", [False, True])
def test_names_are_learnt_from_answers_that_are_names(tmp_path: Path, rows: Path, cached: bool) -> None:
    start = make_start(tmp_path / "start", vision_names={"count": 2, "longest": 4})
    recipe = write_recipe(tmp_path, start, pictures_alone(rows), ["vision_names"], max_steps=40)
    with pytest.raises(RecipeError, match="vision_names has no list of names yet"):
        entry.train(recipe, tmp_path / "unnamed")
    model = MixLoraForConditionalGeneration.from_pretrained(start)
    yes = MixLoraProcessor.from_pretrained(start).tokenizer("yes")["input_ids"]
    model.model.vision_names.learn_names([yes])
    model.save_pretrained(start)
    entry.train(recipe, tmp_path / "out", [f"cache={tmp_path / 'features'}"] if cached else [])
    losses = [loss for _, loss in curve(tmp_path / "out/01-only")]
    assert 0.19 < losses[-1] < 0.45 * losses[0]  # smoothed targets leave 0.2 nats
    trained = MixLoraForConditionalGeneration.from_pretrained(tmp_path / "out/01-only")
    processor = MixLoraProcessor.from_pretrained(tmp_path / "out/01-only")
    pixels = processor.image_processor(
        [Image.open(rows.with_name(f"{i}.png")) for i in range(12)], return_tensors="pt"
    )
    told = trained.model.told(pixels["pixel_values"], trained.model.encode_vision(pixels["pixel_values"]))
    named = trained.model.told_ids(told).tolist()
    nothing = trained.config.text_config.pad_token_id
    assert named == [[nothing] * 4, [nothing] * (4 - len(yes)) + yes] * 6
    with pytest.raises(RecipeError, match="vision_names learns alone"):
        entry.train(recipe, tmp_path / "other", ["only.train=[vision_names, adapter.vision]"])
    with pytest.raises(ValueError, match="names need one picture in every row, got"):
        entry.train(write_recipe(tmp_path, start, rows, ["vision_names"]), tmp_path / "mixed")


def test_of_several_names_places_learn_alone() -> None:
    """A line each; a row without labels teaches nothing."""
    model = tiny_model(vision_names={"count": 4, "longest": 2, "hidden_size": 5})
    part = model.model.vision_names
    part.learn_names([[11], [12, 13]])
    labels = torch.tensor([[12, 13, 7, 11, 9], [11, 9, -100, -100, -100], [-100] * 5])  # 7 breaks a line, 9 ends
    features = list(torch.randn(3, 4, part.norm.normalized_shape[0]))
    step = SupervisedStep(0.0, 0, 9, train=["vision_names"], line_break=7)
    loss, _ = step(model, {"labels": labels, "mm_encoder_outputs": {"image_features": features}}, None)
    stacked = torch.stack(features)
    whole = torch.nn.functional.cross_entropy(part(stacked[1:2]), torch.tensor([1]), label_smoothing=0.1)
    places = place_loss(part.at_places(stacked[:2]), [torch.tensor([2, 1]), torch.tensor([1])])
    torch.testing.assert_close(loss, (whole + places) / 2)


def test_ctc_refuses_a_row_without_a_clip(tmp_path: Path, start: str, rows: Path) -> None:
    recipe = write_recipe(tmp_path, start, rows, ["speech_projector.speech"], ctc_weight=0.5)
    with pytest.raises(ValueError, match="one clip in every row"):
        entry.train(recipe, tmp_path / "out")


def test_accumulated_batches_give_the_gradients_of_one(tmp_path: Path, start: str, rows: Path) -> None:
    """Normalised by the tokens of the step, not by those of each batch."""
    chats = rows.with_name("chats.jsonl")
    chats.write_text("\n".join(rows.read_text().splitlines()[1:]))
    recipe = write_recipe(tmp_path, start, chats, ADAPTERS, warmup=0, max_steps=1, tokens_per_batch=0)
    losses = []
    for accumulation, per_batch in ((1, 12), (4, 3)):
        out = tmp_path / f"out{accumulation}"
        entry.train(recipe, out, [f"only.rows_per_batch={per_batch}", f"only.gradient_accumulation={accumulation}"])
        point = json.loads((out / "01-only/log.json").read_text())[0]
        losses.append((point["loss"], point["grad_norm"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_last_checkpoint_is_one_that_was_finished(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"half'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_killed_run_ends_like_an_unkilled_one(tmp_path: Path, start: str, rows: Path) -> None:
    recipe = write_recipe(tmp_path, start, rows, ADAPTERS, max_steps=40)
    command = [sys.executable, "-m", "mixlora.training.train", str(recipe), "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = tmp_path / "killed"
    run = subprocess.Popen(
        [*command, str(killed)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 600  # a busy machine takes minutes to import
    while (
        last_checkpoint(killed / "01-only/checkpoints") is None and run.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (killed / "01-only/done.json").exists()
    again = subprocess.run([*command, str(killed)], env=environment, capture_output=True, text=True, check=True)
    assert "going on from" in again.stdout
    entry.train(recipe, tmp_path / "whole")
    first, second = curve(killed / "01-only"), curve(tmp_path / "whole/01-only")
    assert [step for step, _ in first] == [step for step, _ in second] == list(range(1, 41))
    assert [loss for _, loss in first] == pytest.approx([loss for _, loss in second], rel=1e-4)


def test_mixed_batch_gives_the_gradients_of_separate_batches(start: str, rows: Path) -> None:
    """Two adapters under gradient checkpointing, the same token normaliser; in fp64, so that only errors show."""
    model = MixLoraForConditionalGeneration.from_pretrained(start, dtype=torch.float64)
    entry.select_parameters(model, ADAPTERS)
    model.activation_checkpointing_enable()
    model.train()
    processor = MixLoraProcessor.from_pretrained(start)
    media = Media(model, processor)
    examples = Tokenizer(processor, media, 64)(read_rows(rows)[1:9])
    collate = Collator(media, processor.tokenizer.pad_token_id)
    total = sum(int((example.labels != -100).sum()) for example in examples)

    def gradients(batches: list[list[Any]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            model(**collate(batch), num_items_in_batch=total).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    mixed = gradients([examples])
    seen = [example for example in examples if example.images]
    heard = [example for example in examples if not example.images]
    for batches in ([[example] for example in examples], [seen, heard]):
        separate = gradients(batches)
        assert mixed.keys() == separate.keys() and any(".speech." in name for name in mixed)
        for name, gradient in mixed.items():
            assert (gradient - separate[name]).norm() <= 1e-9 * separate[name].norm(), name


def test_text_may_train_an_adapter(tmp_path: Path, start: str, rows: Path) -> None:
    """With `routing`, rows of text take the speech adapter in this stage; what is saved routes as before."""
    texts = rows.with_name("texts.jsonl")
    texts.write_text(
        "\n".join(line for line in rows.read_text().splitlines() if '"image"' not in line and '"audio"' not in line)
    )
    recipe = write_recipe(tmp_path, start, texts, ["adapter.speech"], routing={"text": "speech"})
    entry.train(recipe, tmp_path / "out")
    before, after = (
        MixLoraForConditionalGeneration.from_pretrained(folder) for folder in (start, tmp_path / "out/01-only")
    )
    assert after.config.routing == before.config.routing
    changed = {
        name for name, tensor in after.state_dict().items() if not torch.equal(tensor, before.state_dict()[name])
    }
    assert changed and changed <= set(before.parameter_groups()["adapter.speech"])
    with pytest.raises(RecipeError, match="did you mean 'speech'"):
        entry.train(recipe, tmp_path / "two", ["only.routing={text: speach}"])
    with pytest.raises(RecipeError, match="no modality 'txt'"):
        entry.train(recipe, tmp_path / "three", ["only.routing={txt: speech}"])

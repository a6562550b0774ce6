"""A model with Phi-4-Multimodal's towers learns from pictures of several crops and clips, towers frozen or not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.modeling.processing_phi4 import Phi4MMProcessor
from mixlora.training import train as entry
from mixlora.training.data.collate import Collator, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import read_rows
from tests.training.training_fixtures import make_phi4_start, write_recipe, write_rows

SIZE = (70, 100)  # two by two crops, with padding
PARTS = ["adapter.vision", "adapter.speech", "vision_projector", "speech_projector.speech"]
PARTS.append("speech_projector.vision_speech")
TOWERS = ["vision_tower", "speech_tower"]


@pytest.fixture
def start(tmp_path: Path) -> str:
    return make_phi4_start(tmp_path / "start")


@pytest.mark.parametrize("towers", [[], TOWERS], ids=["frozen towers", "trained towers"])
def test_one_step_on_pictures_and_clips_changes_what_is_named(tmp_path: Path, start: str, towers: list[str]) -> None:
    rows = write_rows(tmp_path, rows=4, size=SIZE)
    options = {"max_steps": 1, "warmup": 0, "tokens_per_batch": 0, "rows_per_batch": 8, "max_length": 256}
    entry.train(write_recipe(tmp_path, start, rows, PARTS + towers, **options), tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (Path(start), tmp_path / "out/01-only"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    groups = MixLoraForConditionalGeneration.from_pretrained(start).parameter_groups()
    assert {group for group, names in groups.items() if changed & set(names)} == {*PARTS, *towers}
    assert type(MixLoraProcessor.from_pretrained(tmp_path / "out/01-only")) is Phi4MMProcessor


@torch.no_grad()
def test_placeholders_are_counted_alike_with_and_without_a_cache(tmp_path: Path, start: str) -> None:
    """Where a count were wrong, the forward would raise; cached features give the logits of files."""
    model = MixLoraForConditionalGeneration.from_pretrained(start).eval()
    processor = MixLoraProcessor.from_pretrained(start)
    rows = read_rows(write_rows(tmp_path, rows=4, size=SIZE))[1:]
    found = []
    for cached in (False, True):
        media = Media(model, processor)
        if cached:
            model.requires_grad_(False)
            files = [[path for row in rows for path in kind(row)] for kind in (lambda r: r.images, lambda r: r.audio)]
            media.cache(model, tmp_path / "cache", *files)
        examples = Tokenizer(processor, media, max_length=256)(rows)
        batch = Collator(media, processor.tokenizer.pad_token_id)(examples)
        assert ("mm_encoder_outputs" in batch) == cached and ("image_attention_mask" in batch) != cached
        found.append((batch["input_ids"], model(**batch).logits))
    (ids, files), (cached_ids, features) = found
    assert torch.equal(ids, cached_ids)
    assert (ids == processor.image_token_id).any(1).tolist() == [False, True, False, True]
    assert (ids == processor.audio_token_id).any(1).tolist() == [False, False, True, True]
    assert (files - features).norm() < 1e-2 * files.norm()  # features are kept in fp16

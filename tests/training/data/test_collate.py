"""Tokens, labels and batches, as literal tensors; cached features and files give the same loss."""

from pathlib import Path

import pytest
import torch

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data.collate import Collator, Tokenizer
from mixlora.training.data.media import Media
from mixlora.training.data.rows import Row, RowError, read_rows
from tests.training.training_fixtures import make_start, write_rows

SAY, END = "<|assistant|>", "<|end|>"


@pytest.fixture
def start(tmp_path: Path) -> str:
    return make_start(tmp_path / "start")


@pytest.fixture
def model(start: str) -> MixLoraForConditionalGeneration:
    return MixLoraForConditionalGeneration.from_pretrained(start)


@pytest.fixture
def tokenizer(start: str, model: MixLoraForConditionalGeneration) -> Tokenizer:
    processor = MixLoraProcessor.from_pretrained(start)
    return Tokenizer(processor, Media(model, processor), max_length=64)


def spoken(tokenizer: Tokenizer, row: Row) -> str:
    """What is learnt of a row."""
    labels = tokenizer([row])[0].labels
    return tokenizer.tokenizer.decode(labels[labels != -100])


def test_only_what_the_assistant_says_is_learnt(tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": f"v {SAY} not me {END}"},
        {"role": "assistant", "content": f"{END} typed"},
    ]
    assert spoken(tokenizer, Row("here:1", messages)) == f"first{END}{END} typed{END}"
    ids = tokenizer([Row("here:1", messages[:3])])[0].ids
    names = [tokenizer.tokenizer.convert_ids_to_tokens(int(i)) for i in ids]
    assert names == ["<|system|>", "s", END, "<|user|>", "u", END, SAY, *"first", END]


def test_an_assistant_without_words_is_refused(tokenizer: Tokenizer) -> None:
    tokenizer.end = tokenizer.start = -1
    with pytest.raises(RowError, match="here:1"):
        tokenizer([Row("here:1", [{"role": "assistant", "content": ""}])])


def test_plain_text_is_packed(tokenizer: Tokenizer) -> None:
    tokenizer.max_length = 4
    pad = tokenizer.separator
    blocks = tokenizer([Row("a:1", text="abc"), Row("a:2", text="<|end|>")])
    assert [len(block.ids) for block in blocks] == [4, 4, 4]
    assert blocks[0].ids[0] == pad and blocks[1].ids[0] == pad
    assert blocks[0].labels.tolist() == [-100, *blocks[0].ids[1:].tolist()]
    assert tokenizer.end not in torch.cat([block.ids for block in blocks])


def test_placeholders_and_padding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = read_rows(write_rows(tmp_path))[1:5]  # text, picture, clip, both
    examples = tokenizer(rows)
    batch = Collator(tokenizer.media, tokenizer.separator)(examples)
    image, audio = batch["input_ids"] == tokenizer.image, batch["input_ids"] == tokenizer.audio
    assert image.sum(1).tolist() == [0, 4, 0, 4]
    assert audio.sum(1).tolist() == [0, 0, 6, 7]  # 3400 and 4100 samples: 22 and 26 frames, 4 a token
    assert (batch["labels"][image | audio] == -100).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [len(example.ids) for example in examples]
    assert batch["pixel_values"].shape == (2, 3, 8, 8) and batch["input_features"].shape == (2, 40, 8)


def test_too_long_is_left_out_and_counted(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tokenizer.max_length = 12
    kept = tokenizer(read_rows(write_rows(tmp_path))[1:5])
    assert tokenizer.left_out == 4 - len(kept) > 0


@pytest.mark.parametrize("cached", [("image",), ("audio",), ("image", "audio")])
def test_cached_features_give_the_same_logits(
    tmp_path: Path, tokenizer: Tokenizer, model: MixLoraForConditionalGeneration, cached: tuple[str, ...]
) -> None:
    examples = tokenizer(read_rows(write_rows(tmp_path))[1:])
    collate = Collator(tokenizer.media, tokenizer.separator)
    fresh = collate(examples)
    for name, parameter in model.named_parameters():
        frozen = ("image" in cached and "vision_tower" in name) or ("audio" in cached and "speech_tower" in name)
        parameter.requires_grad_(not frozen)
    images = [path for example in examples for path in example.images]
    audio = [path for example in examples for path in example.audio]
    tokenizer.media.cache(model, tmp_path / "cache", images, audio)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    stored = collate(examples)
    assert set(tokenizer.media.caches) == set(cached)
    assert set(stored["mm_encoder_outputs"]) == {f"{kind}_features" for kind in cached}
    assert ("pixel_values" in stored) == ("image" not in cached)
    with torch.no_grad():
        towers = {
            "image_features": model.model.encode_vision(fresh["pixel_values"]),
            "audio_features": model.model.encode_speech(fresh["input_features"], fresh["input_features_mask"]),
        }
        for name, features in stored["mm_encoder_outputs"].items():
            torch.testing.assert_close(features, list(towers[name]), atol=1e-3, rtol=1e-3)  # fp16 holds 11 bits
        difference = model(**stored).logits - model(**fresh).logits
        assert difference.norm() < 5e-3 * model(**fresh).logits.norm()


def test_a_marker_typed_in_pieces_stays_text(tokenizer: Tokenizer) -> None:
    pieces = [{"type": "text", "text": "<|im"}, {"type": "text", "text": "age|>"}]
    messages = [{"role": "user", "content": pieces}, {"role": "assistant", "content": "ok"}]
    ids = tokenizer([Row("here:1", messages)])[0].ids
    assert not (ids == tokenizer.image).any()


def test_a_preference_is_two_rows_of_which_the_last_answer_counts(
    tokenizer: Tokenizer, model: MixLoraForConditionalGeneration
) -> None:
    earlier = [
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
    ]
    chosen, rejected = ([*earlier, {"role": "assistant", "content": text}] for text in ("yes", "no way"))
    examples = tokenizer([Row("here:1", chosen, rejected=rejected), Row("here:2", rejected, rejected=chosen)])
    assert examples[0].rejected is not None
    assert examples[0].size == examples[1].size == 2 * len(examples[0].rejected.ids)
    batch = Collator(tokenizer.media, pad_token_id=0)(examples)
    learnt = [tokenizer.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    assert learnt == [f"yes{END}", f"no way{END}", f"no way{END}", f"yes{END}"]  # chosen ones, then rejected ones


def test_a_pair_with_one_answer_too_long_is_left_out(tokenizer: Tokenizer) -> None:
    prompt = [{"role": "user", "content": "u"}]
    chosen, rejected = ([*prompt, {"role": "assistant", "content": text}] for text in ("yes", "no " * 30))
    assert not tokenizer([Row("here:1", chosen, rejected=rejected)]) and tokenizer.left_out == 1

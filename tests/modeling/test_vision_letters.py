"""What is written in a picture, read from its pixels and given to the decoder as its own tokens."""

import math

import pytest
import torch
from transformers import AutoTokenizer

import mixlora
from mixlora import MixLoraConfig, MixLoraForConditionalGeneration
from mixlora.modeling.configuration_mixlora import VISION_LETTERS
from mixlora.modeling.media_encoding import Told
from mixlora.modeling.vision_letters import VisionLetters
from mixlora.modeling.word_search import Words
from tests.modeling.model_fixtures import IMAGE, PAD, batch_inputs, row_inputs, tiny_config, tiny_model
from tests.modeling.phi4_fixtures import native_config

SIZES = {"widths": [4, 6], "layers": [1, 2], "patch_size": 2, "tokens": 3, "lines": 2}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(mixlora.default_checkpoint())


@pytest.fixture(scope="module")
def reader(tokenizer) -> VisionLetters:
    reader = VisionLetters(len(tokenizer), **VISION_LETTERS | SIZES)
    reader.read_spelling(tokenizer)
    return reader


def with_picture(seed: int = 0, told: int = 3) -> dict:
    """A row with a picture, and placeholders for what is read in it."""
    row = row_inputs("image", seed)
    place = row["ids"].index(IMAGE)
    row["ids"][place:place] = [IMAGE] * told
    return batch_inputs([row])


def saying(reader: VisionLetters, *lines: str) -> torch.Tensor:
    """Log-probabilities of a picture in which these lines are written, a letter every second column."""
    chances = torch.full((1, 2, 20, 1 + len(reader.alphabet)), -20.0)
    chances[..., 0] = 0
    for number, line in enumerate(lines):
        for column, letter in enumerate(line):
            chances[0, number, 2 * column] = -20.0
            chances[0, number, 2 * column, 1 + reader.alphabet.index(letter)] = 0
    return chances


def test_columns_stay_fine_and_height_is_gathered() -> None:
    reader = VisionLetters(9, **VISION_LETTERS | SIZES)
    read = reader(torch.randn(3, 3, 8, 12))
    assert read.shape == (3, 2, 6, 1 + len(reader.alphabet))
    torch.testing.assert_close(read.exp().sum(-1), torch.ones(3, 2, 6))
    assert reader(reader.blank()).shape[:3] == (1, 2, 2)


def test_a_line_is_read_wherever_it_runs() -> None:
    """The softmax over the height finds it: letters of one line do not depend on the rows it does not look at."""
    reader = VisionLetters(9, **VISION_LETTERS | SIZES | {"widths": [4], "layers": [0]}).eval()
    with torch.no_grad():
        for part in (reader.heights, reader.rows):
            part.weight.zero_()
        reader.heights.weight[0, 0] = 50  # the first line looks where the first channel is greatest
        pictures = torch.randn(1, 3, 8, 8)
        maps = reader.norm(reader.stem(pictures))
        top = maps[0, 0].argmax(0)  # of each column
        wanted = reader.head(torch.stack([maps[0, :, row, column] for column, row in enumerate(top)])).log_softmax(-1)
        torch.testing.assert_close(reader(pictures)[0, 0], wanted, atol=0.05, rtol=0.05)


def test_a_line_stays_in_its_row_where_it_is_over() -> None:
    """What stands in other columns tells where a line runs, also where it has no letter itself."""
    reader = VisionLetters(9, **VISION_LETTERS | SIZES | {"widths": [4], "layers": [0]}).eval()
    with torch.no_grad():
        for part in (reader.heights, reader.rows):
            part.weight.zero_()
        reader.rows.weight[0, 4, 3] = 50  # the row whose first channel has the greatest maximum of all columns
        pictures = torch.randn(1, 3, 8, 8)
        maps = reader.norm(reader.stem(pictures))
        row = int(maps[0, 0].amax(1).argmax())
        wanted = reader.head(maps[0, :, row].T).log_softmax(-1)
        torch.testing.assert_close(reader(pictures)[0, 0], wanted, atol=0.05, rtol=0.05)


def read(reader: VisionLetters, words: Words | None = None) -> str:
    """The likeliest text of one picture."""
    [texts] = reader.likely_texts(torch.zeros(1, 3, 8, 8), words or Words({}))
    return texts[0][0]


def test_a_text_is_read_line_by_line(reader: VisionLetters, monkeypatch) -> None:
    monkeypatch.setattr(reader, "forward", lambda pixels: saying(reader, "two cats", "run"))
    assert read(reader) == "two cats\nrun"
    monkeypatch.setattr(reader, "forward", lambda pixels: saying(reader, "", "run"))
    assert read(reader) == "run"
    monkeypatch.setattr(reader, "forward", lambda pixels: saying(reader))
    assert read(reader) == ""


def test_likely_texts_join_those_of_each_line(reader: VisionLetters, monkeypatch) -> None:
    doubtful = saying(reader, "cat", "run")
    for line, column, pair in ((0, 2, "ao"), (1, 0, "rs")):
        doubtful[0, line, column, [1 + reader.alphabet.index(letter) for letter in pair]] = torch.tensor(
            [0.7, 0.3]
        ).log()
    monkeypatch.setattr(reader, "forward", lambda pixels: doubtful)
    [texts] = reader.likely_texts(torch.zeros(1, 3, 8, 8), Words({}))
    wanted = [("cat\nrun", 0.49), ("cot\nrun", 0.21), ("cat\nsun", 0.21), ("cot\nsun", 0.09)]
    assert len(texts) == 8 and {text for text, _ in texts[:4]} == {text for text, _ in wanted}
    for text, chance in wanted:
        assert dict(texts)[text] == pytest.approx(math.log(chance), abs=1e-3)


def test_known_words_decide_between_letters(reader: VisionLetters, monkeypatch) -> None:
    doubtful = saying(reader, "cat")
    letters = [1 + reader.alphabet.index(letter) for letter in "ao"]
    doubtful[0, 0, 2, letters] = torch.tensor([0.45, 0.55]).log()
    monkeypatch.setattr(reader, "forward", lambda pixels: doubtful)
    assert read(reader) == "cot"
    assert read(reader, Words({"cat": 5, "dog": 5})) == "cat"


def test_a_picture_is_read_by_all_known_words_also_by_those_that_nobody_says(tokenizer, monkeypatch) -> None:
    parts = {
        "speech_letters": {"words": 60},
        "speech_context": {"layers": 1, "kernel_size": 3, "intermediate_size": 12},
    }
    model = tiny_model(vision_letters=SIZES, text={"vocab_size": len(tokenizer)}, **parts).model
    model.vision_letters.read_spelling(tokenizer)
    model.speech_letters.learn_words({"cat": 1, "dog": 5})
    doubtful = saying(model.vision_letters, "cat")
    letters = [1 + model.vision_letters.alphabet.index(letter) for letter in "ao"]
    doubtful[0, 0, 2, letters] = torch.tensor([0.45, 0.55]).log()
    monkeypatch.setattr(model.vision_letters, "forward", lambda pixels: doubtful)
    [told] = model.told(torch.zeros(1, 3, 8, 8), [torch.zeros(4, 6)])
    assert told.texts[0][0] == "cat"


def test_lines_of_a_text_are_its_targets(reader: VisionLetters, tokenizer) -> None:
    def lines(text: str) -> list[str]:
        found = reader.lines_of(torch.tensor(tokenizer(text)["input_ids"]))
        return ["".join(reader.alphabet[letter - 1] for letter in line.tolist()) for line in found]

    assert lines("Two cats\nRUN 30!") == ["two cats", "run 30"]
    assert lines("cats") == ["cats", ""]
    assert lines("one\ntwo\nthree") == ["one", "two"]
    assert lines(".") == ["", ""]


def test_texts_are_cut_into_tokens_as_the_tokenizer_does(reader: VisionLetters, tokenizer) -> None:
    for text in ("green tree", "backache\nareolar\nstartle", "30 pounds", "isn't it", "zyzzyva", ""):
        assert reader.tokens_of(text) == tokenizer(text)["input_ids"]


def test_tokens_come_last_and_a_long_text_is_cut(tokenizer) -> None:
    model = tiny_model(vision_letters=SIZES, text={"vocab_size": len(tokenizer)}).model
    model.vision_letters.read_spelling(tokenizer)
    texts = ["green", "one two three four five", ""]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    told = model.told_ids([Told(texts=[(text, 0.0)]) for text in texts]).tolist()
    assert told == [[PAD] * (3 - len(ids[0])) + ids[0], ids[1][:3], [PAD] * 3]


@torch.no_grad()
def test_what_is_read_stands_behind_a_picture_as_embeddings(monkeypatch) -> None:
    model = tiny_model(vision_letters=SIZES)
    row = with_picture()
    plain = model.model.get_image_features(row["pixel_values"]).pooler_output[0]
    table = model.get_input_embeddings().weight
    assert plain.shape == (7, 32) and torch.equal(plain[4:], table[[PAD] * 3])  # before it has learnt to read
    monkeypatch.setattr(model.model.vision_letters, "likely_texts", lambda pixels, words: [[("ab", 0.0)]])
    monkeypatch.setattr(model.model.vision_letters, "tokens_of", lambda text: [11, 12])
    told = model.model.get_image_features(row["pixel_values"]).pooler_output[0]
    assert torch.equal(told[:4], plain[:4]) and torch.equal(told[4:], table[[PAD, 11, 12]])
    silent = model(**row).logits
    monkeypatch.undo()
    assert not torch.allclose(silent, model(**row).logits, atol=1e-3)


@torch.no_grad()
def test_tower_features_come_with_pixels() -> None:
    model = tiny_model(vision_letters=SIZES)
    row = with_picture()
    features = model.model.encode_vision(row["pixel_values"])
    both = model(**row, mm_encoder_outputs={"image_features": features}).logits
    torch.testing.assert_close(both, model(**row).logits)
    alone = {name: value for name, value in row.items() if name != "pixel_values"}
    with pytest.raises(ValueError, match="vision_letters needs pixel_values beside the tower's features"):
        model(**alone, mm_encoder_outputs={"image_features": features})


def test_it_is_a_group_that_answers_do_not_reach() -> None:
    model = tiny_model(vision_letters=SIZES)
    names = model.parameter_groups()["vision_letters"]
    assert {name.split(".")[2] for name in names} == {"stem", "stages", "norm", "heights", "rows", "head"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names or "vision_projector" in name)
    model.train()(**with_picture()).logits.square().mean().backward()
    assert all(model.get_parameter(name).grad is None for name in names)


def test_it_is_saved_and_loaded(tmp_path, tokenizer) -> None:
    model = tiny_model(vision_letters=SIZES, text={"vocab_size": len(tokenizer)})
    model.model.vision_letters.read_spelling(tokenizer)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert again.config.vision_letters == VISION_LETTERS | SIZES
    assert torch.equal(again(**with_picture()).logits, model(**with_picture()).logits)
    assert again.model.vision_letters.tokens_of("green") == model.model.vision_letters.tokens_of("green")
    fresh = MixLoraForConditionalGeneration(tiny_config(vision_letters=SIZES))
    assert not fresh.model.vision_letters.known and not fresh.model.vision_letters.plain.any()


@pytest.mark.parametrize("part", [{"vision_letters": SIZES}, {"vision_names": {"count": 3}}])
def test_towers_that_cut_pictures_are_refused(part: dict) -> None:
    config = MixLoraConfig.from_dict(native_config().to_dict())
    ((name, settings),) = part.items()
    setattr(config, name, settings)
    with pytest.raises(ValueError, match=f"{name}: phi4_multimodal_vision cuts pictures into crops"):
        MixLoraForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 2}, "unknown width, expected some of alphabet"),
        ({"widths": [0]}, r"widths must be a list of integers of at least 1, got \[0\]"),
        ({"layers": [1]}, r"widths and layers are of each stage, got \[32, 64, 128\] and \[1\]"),
        ({"alphabet": "abc"}, "alphabet needs a space and a line break, got 'abc'"),
        ({"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
    ],
)
def test_wrong_settings_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"vision_letters: {message}"):
        tiny_model(vision_letters=wrong)

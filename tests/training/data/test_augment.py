"""Views of media: decided by seed, content and number; what each operation does; cached, planned and resumed."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mixlora.modeling.audio_processing_mixlora import RATE, load_clip
from mixlora.modeling.image_processing_mixlora import load_picture
from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.modeling.processing_mixlora import MixLoraProcessor
from mixlora.training.data import augment as ops
from mixlora.training.data import feature_cache
from mixlora.training.data.augment import Augmenter
from mixlora.training.data.batches import plan_batches
from mixlora.training.data.collate import Collator, Example, Tokenizer, views_by_row
from mixlora.training.data.feature_cache import FeatureCache, Item, View
from mixlora.training.data.media import Media
from mixlora.training.data.rows import Row, read_rows
from mixlora.training.recipe import load_recipe
from mixlora.training.stages import Augment, RecipeError
from tests.training.training_fixtures import make_start, write_recipe, write_rows

EVERY: dict[str, Any] = {
    "speed": [0.8, 1.25], "room": [0.1, 0.3], "noise": ["white", "pink", "babble"],
    "rotation": 15.0, "shift": 0.1, "scale": [0.8, 1.2], "clutter": 3, "blur": 0.05, "polarity": 0.5,
}  # fmt: skip
ALONE = {**EVERY, "speed": [1.1, 1.25], "noise": ["babble"], "polarity": 1.0}


@pytest.fixture
def row(tmp_path: Path) -> Row:
    """A picture with its subject in the middle, and three clips of noise in syllables."""
    generator = np.random.default_rng(0)
    pixels = np.full((60, 90, 3), 240, dtype=np.uint8)
    pixels[20:40, 30:60] = generator.integers(0, 255, (20, 30, 3))
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    for number in range(3):
        syllables = 0.1 * (1 + np.sin(np.arange(8000) / (300 + 100 * number)))
        soundfile.write(tmp_path / f"{number}.wav", syllables * generator.normal(0, 0.5, 8000), RATE)
    return Row("here:1", images=(tmp_path / "picture.png",), audio=tuple(tmp_path / f"{n}.wav" for n in range(3)))


def made(augmenter: Augmenter, row: Row, number: int) -> list[np.ndarray]:
    """All media of a view as arrays."""
    images, audio = augmenter.media(row, number)
    return [np.asarray(augmenter.picture(item)) for item in images] + [augmenter.clip(item) for item in audio]


def equal(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> list[bool]:
    return [np.array_equal(mine, other) for mine, other in zip(ours, theirs, strict=True)]


def level(samples: torch.Tensor) -> float:
    return 20 * math.log10(samples.norm().item())


def test_a_view_is_decided_by_seed_content_and_number(row: Row, tmp_path: Path) -> None:
    settings = {"views": 3, **EVERY}
    first = made(Augmenter(Augment(**settings), row.audio), row, 1)
    assert all(equal(first, made(Augmenter(Augment(**settings), row.audio[::-1]), row, 1)))
    assert not any(equal(first, made(Augmenter(Augment(**settings), row.audio), row, 2)))
    assert not any(equal(first, made(Augmenter(Augment(**settings, seed=1), row.audio), row, 1)))
    (tmp_path / "copies").mkdir()
    copies = [(tmp_path / "copies" / f"other-{path.name}") for path in (*row.images, *row.audio)]
    for copy, path in zip(copies, (*row.images, *row.audio), strict=True):
        copy.write_bytes(path.read_bytes())
    moved = Row("there:1", images=tuple(copies[:1]), audio=tuple(copies[1:]))
    assert all(equal(first, made(Augmenter(Augment(**settings), moved.audio), moved, 1)))


def test_the_plain_view_is_the_plain_file(row: Row) -> None:
    for augmenter in (Augmenter(), Augmenter(Augment(views=3, **EVERY), row.audio)):
        assert augmenter.media(row, 0) == (row.images, row.audio)  # paths, so cached features are shared
        plain = [np.asarray(load_picture(path)) for path in row.images] + [load_clip(path) for path in row.audio]
        assert all(equal(made(augmenter, row, 0), plain))
    assert Augmenter().count(row) == 1
    assert Augmenter(Augment(views=3, **EVERY), row.audio).count(row) == 3
    assert Augmenter(Augment(views=3, **EVERY), row.audio).count(Row("here:2", text="words")) == 1


@pytest.mark.parametrize("name", ALONE)
def test_each_operation_acts_on_its_own_kind_alone(row: Row, name: str) -> None:
    augmenter = Augmenter(Augment(views=4, **{name: ALONE[name]}), row.audio)
    plain, views = made(augmenter, row, 0), [made(augmenter, row, number) for number in (1, 2, 3)]
    heard = name in ("speed", "room", "noise")
    same = [equal(plain, view) for view in views]
    assert not any(any(view[1:] if heard else view[:1]) for view in same)
    assert all(all(view[:1] if heard else view[1:]) for view in same)
    assert all(view[0].shape == plain[0].shape for view in views)
    assert name == "speed" or all(clip.shape == (8000,) for view in views for clip in view[1:])
    assert all(np.isfinite(clip).all() and np.abs(clip).max() <= 1 for view in views for clip in view[1:])


def test_no_chance_leaves_every_view_plain(row: Row) -> None:
    augmenter = Augmenter(Augment(views=2, chance=0.0, **EVERY), row.audio)
    assert all(equal(made(augmenter, row, 0), made(augmenter, row, 1)))


def test_a_silent_clip_stays_silent(tmp_path: Path, row: Row) -> None:
    soundfile.write(tmp_path / "0.wav", np.zeros(8000), RATE)
    soundfile.write(tmp_path / "1.wav", np.zeros(8100), RATE)
    augmenter = Augmenter(Augment(views=2, room=[0.2, 0.2], noise=["babble"]), row.audio[:2])
    assert not augmenter.clip(augmenter.media(row, 1)[1][0]).any()


def test_speed_keeps_the_tune_and_changes_the_time() -> None:
    tone = torch.sin(2 * math.pi * 500 * torch.arange(RATE) / RATE)
    for factor in (0.8, 1.0, 1.25):
        played = ops.change_speed(tone, factor)
        assert len(played) == pytest.approx(RATE / factor, abs=1)
        peak = torch.fft.rfft(played).abs().argmax().item() * RATE / len(played)
        assert peak == pytest.approx(500 * factor, rel=0.01)
    assert len(ops.change_speed(tone[:410], 1.25)) == 410  # else too short for the model


def test_reverberation_is_down_60_db_after_its_time() -> None:
    rng = np.random.default_rng(0)
    click = torch.zeros(RATE)
    click[0] = 1
    heard = ops.reverberate(click, 0.5, rng)
    assert heard.norm().item() == pytest.approx(1, rel=1e-4) and len(heard) == RATE
    early, late = (level(heard[start : start + 800]) for start in (800, 4800))  # a quarter of a second between
    assert early - late == pytest.approx(30, abs=3)
    assert -10 <= level(heard[1:]) - level(heard[:1]) <= 0.1


@pytest.mark.parametrize("kind", ["white", "pink", "babble"])
def test_noise_is_as_loud_as_asked(row: Row, kind: str) -> None:
    augmenter = Augmenter(Augment(views=2, noise=[kind], snr=[12.0, 12.0]), row.audio)
    plain = torch.from_numpy(load_clip(row.audio[0]))
    noise = torch.from_numpy(augmenter.clip(augmenter.media(row, 1)[1][0])) - plain
    assert level(plain) - level(noise) == pytest.approx(12, abs=0.05)


def test_pink_noise_falls_by_three_db_an_octave() -> None:
    power = torch.fft.rfft(ops.coloured_noise("pink", 2**16, np.random.default_rng(0))).abs() ** 2
    low, high = power[1000:2000].mean(), power[8000:16000].mean()
    assert 10 * math.log10(low / high) == pytest.approx(9, abs=1)


def test_babble_is_of_other_clips(tmp_path: Path) -> None:
    """Tones of other pitches are heard, the clip's own is not."""
    paths, pitches = [], (400, 800, 1600)
    for pitch in pitches:
        paths.append(tmp_path / f"{pitch}.wav")
        soundfile.write(paths[-1], 0.1 * np.sin(2 * np.pi * pitch * np.arange(8000) / RATE), RATE, subtype="FLOAT")
    augmenter = Augmenter(Augment(views=2, noise=["babble"]), paths)
    for own, path in enumerate(paths):
        (item,) = augmenter.media(Row("", audio=(path,)), 1)[1]
        spectrum = torch.fft.rfft(torch.from_numpy(augmenter.clip(item) - load_clip(path))).abs()
        heard = [spectrum[pitch // 2].item() for pitch in pitches]
        assert heard.pop(own) < 0.01 * min(heard)
    with pytest.raises(RecipeError, match="single one"):
        Augmenter(Augment(views=2, noise=["babble"]), [paths[0], paths[0]])
    Augmenter(Augment(views=2, noise=["babble"], blur=0.1))  # no clips to put it on


def test_clutter_stays_around(row: Row) -> None:
    picture = load_picture(row.images[0])
    for seed in range(20):
        changed = np.asarray(ops.clutter(picture, 5, np.random.default_rng(seed))) != np.asarray(picture)
        assert changed.any() and not changed[12:48, 17:73].any()


def test_what_comes_into_view_takes_the_colour_of_the_border(row: Row) -> None:
    augmenter = Augmenter(Augment(views=9, rotation=30, shift=0.2, scale=[0.5, 0.7]))
    for number in range(1, 9):
        pixels = np.asarray(augmenter.picture(augmenter.media(row, number)[0][0]))
        assert (np.concatenate([pixels[0], pixels[-1]]) == 240).all()


def test_polarity_swaps_bright_and_dark(row: Row) -> None:
    augmenter = Augmenter(Augment(views=2, polarity=1.0))
    plain, view = made(augmenter, row, 0)[0], made(augmenter, row, 1)[0]
    assert np.array_equal(view, 255 - plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{views: 3}", "and an operation, or neither"),
        ("{blur: 0.1}", "views of at least 2"),
        ("{views: 2, speed: [1.1, 0.9]}", "speed .* lowest and a highest"),
        ("{views: 2, scale: [0, 1]}", "scale .* lowest and a highest"),
        ("{views: 2, noise: [brown]}", "brown.* not among white"),
        ("{views: 2, noise: [white], snr: []}", "noise needs snr"),
        ("{views: 2, polarity: 2}", "from 0 to 1"),
        ("{views: 2, nois: [white]}", "augment: unknown key 'nois'; did you mean 'noise'"),
        ("{views: 2, speed: 0.9}", "speed: expected a list"),
    ],
)
def test_faults_of_a_recipe_are_named(tmp_path: Path, settings: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tmp_path, "start", Path("rows"), ["decoder"]), [f"only.augment={settings}"])


def test_read_from_yaml(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "start", Path("rows"), ["decoder"])
    assert load_recipe(recipe).stages[0].augment == Augment()
    override = "only.augment={views: 3, speed: [0.9, 1.1], noise: [pink], clutter: 2}"
    wanted = Augment(views=3, speed=[0.9, 1.1], noise=["pink"], clutter=2)
    assert load_recipe(recipe, [override]).stages[0].augment == wanted


def encode(items: Sequence[Item]) -> list[torch.Tensor]:
    return [torch.full((2, 2), float(item.number if isinstance(item, View) else 0)) for item in items]


def test_features_are_kept_for_each_view(row: Row, tmp_path: Path) -> None:
    def items(settings: dict[str, Any], numbers: Sequence[int]) -> list[Item]:
        augmenter = Augmenter(Augment(**settings), row.audio)
        return [item for number in numbers for item in augmenter.media(row, number)[1]]

    settings = {"views": 3, "noise": ["babble"]}
    cache = FeatureCache(tmp_path / "cache")
    assert cache.fill(row.audio, encode) == 3
    assert cache.fill(items(settings, range(3)), encode) == 6  # view 0 is there
    again = FeatureCache(tmp_path / "cache")
    assert again.fill(items({**settings, "views": 4}, range(4)), encode) == 3
    assert [again[item][0, 0].item() for item in items(settings, range(3))] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert again.tokens(items(settings, [2])[0]) == 2
    for change in ({"snr": [0.0, 1.0]}, {"seed": 1}, {"noise": ["pink"]}, {"chance": 0.5}):
        assert FeatureCache(tmp_path / "cache").fill(items({**settings, **change}, range(3)), encode) == 6
    fewer = Augmenter(Augment(**settings), row.audio[:2])  # other voices in the babble
    assert FeatureCache(tmp_path / "cache").fill(fewer.media(row, 1)[1], encode) == 3


def test_a_killed_cache_goes_on(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "SHARD_ITEMS", 4)
    augmenter = Augmenter(Augment(views=4, speed=[0.9, 1.1]))
    items = [item for number in range(4) for item in augmenter.media(row, number)[1]]
    calls = 0

    def killed(batch: Sequence[Item]) -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path / "cache").fill(items, killed)
    cache = FeatureCache(tmp_path / "cache")
    assert len(cache) == 8 and cache.fill(items, encode) == 4
    assert [cache[item][0, 0].item() for item in items] == [number for number in range(4) for _ in range(3)]


def test_rows_take_their_views_in_turn() -> None:
    lengths = [5 + place % 7 for place in range(50)]
    views = [[3 * row, 3 * row + 1, 3 * row + 2] for row in range(10)] + [[place] for place in range(30, 50)]
    weights = [2.0] * 5 + [1.0] * 25

    def drawn(epochs: float) -> list[int]:
        plan = plan_batches(lengths, weights, rows_per_batch=7, epochs=epochs, seed=3, views=views)
        return [place for batch in plan for place in batch]

    assert drawn(6) == drawn(6)
    seen = Counter(drawn(6))
    assert all(seen[place] == (4 if place < 15 else 2 if place < 30 else 6) for place in range(50))
    first = Counter(drawn(1))
    assert all(sum(first[place] for place in places) == weight for places, weight in zip(views, weights, strict=True))
    assert all(first[place] <= 1 for place in range(50))
    assert {place % 3 for place in first if 15 <= place < 30} == {0, 1, 2}  # an epoch holds views of all numbers


class Setup:
    """A stage's data as `mixlora train` makes it."""

    def __init__(self, folder: Path, rows: Sequence[Row], *, trained: Sequence[str] = (), max_length: int = 64):
        processor = MixLoraProcessor.from_pretrained(folder / "start")
        self.model = MixLoraForConditionalGeneration.from_pretrained(folder / "start")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(any(tower in name for tower in trained))
        self.media = Media(self.model, processor)
        settings = Augment(views=3, **{**EVERY, "noise": ["white", "babble"]})
        augmenter = self.media.augmenter = Augmenter(settings, [path for row in rows for path in row.audio])
        views = [augmenter.media(row, view) for row in rows for view in range(augmenter.count(row))]
        images, audio = ([item for view in views for item in view[kind]] for kind in (0, 1))
        self.media.cache(self.model, folder / "cache", images, audio)
        self.tokenizer = Tokenizer(processor, self.media, max_length)
        self.examples = self.tokenizer(rows)
        self.collate = Collator(self.media, processor.tokenizer.pad_token_id)

    def batches(self) -> list[list[Example]]:
        plan = plan_batches(
            [len(example.ids) for example in self.examples],
            [example.weight for example in self.examples if example.view == 0],
            rows_per_batch=5,
            epochs=2,
            views=views_by_row(self.examples),
        )
        return [[self.examples[place] for place in batch] for batch in plan]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_start(tmp_path / "start")
    write_rows(tmp_path)
    return tmp_path


@pytest.fixture
def rows(folder: Path) -> list[Row]:
    return read_rows(folder / "rows.jsonl")


def test_labels_are_untouched_and_placeholders_follow_the_clip(folder: Path, rows: list[Row]) -> None:
    setup = Setup(folder, rows)
    groups = views_by_row(setup.examples)
    assert sorted(Counter(len(group) for group in groups).items()) == [(1, 3 + 3), (3, 9)]  # chats, blocks of text
    audio = setup.tokenizer.audio
    lengths = set()
    for group in groups:
        views = [setup.examples[place] for place in group]
        assert [view.view for view in views] == list(range(len(views)))
        for view in views:
            assert torch.equal(view.labels[view.labels != -100], views[0].labels[views[0].labels != -100])
            assert torch.equal(view.ids[view.ids != audio], views[0].ids[views[0].ids != audio])
            assert (view.ids == audio).sum() == sum(setup.media.audio_tokens(item) for item in view.audio)
            if view.audio:
                lengths.add(len(view.ids) - len(views[0].ids))
    assert min(lengths) < 0 < max(lengths)


def test_a_view_that_is_too_long_is_not_used(folder: Path, rows: list[Row]) -> None:
    heard = [row for row in rows if row.audio]
    every = Setup(folder, heard).examples
    lengths = [[len(every[place].ids) for place in places] for places in views_by_row(every)]
    limit = max(views[0] for views in lengths if max(views) > views[0])
    setup = Setup(folder, heard, max_length=limit)
    wanted = [[length for length in views if length <= limit] for views in lengths if views[0] <= limit]
    kept = [[len(setup.examples[place].ids) for place in places] for places in views_by_row(setup.examples)]
    assert kept == wanted and any(len(views) < 3 for views in kept)
    assert setup.tokenizer.left_out == len(lengths) - len(kept) > 0


def test_views_on_the_fly_are_those_of_the_cache(folder: Path, rows: list[Row]) -> None:
    chats = [row for row in rows if row.messages]
    frozen, trained = Setup(folder, chats), Setup(folder, chats, trained=("vision_tower", "speech_tower"))
    assert set(frozen.media.caches) == {"image", "audio"} and not trained.media.caches
    for stored, fresh in zip(frozen.batches(), trained.batches(), strict=True):
        stored_batch, fresh_batch = frozen.collate(stored), trained.collate(fresh)
        assert torch.equal(stored_batch["input_ids"], fresh_batch["input_ids"])
        features = stored_batch.get("mm_encoder_outputs", {})
        with torch.no_grad():
            if "pixel_values" in fresh_batch:
                seen = trained.model.model.encode_vision(fresh_batch["pixel_values"])
                torch.testing.assert_close(features["image_features"], list(seen), atol=1e-3, rtol=1e-3)
            if "input_features" in fresh_batch:
                inputs = fresh_batch["input_features"], fresh_batch["input_features_mask"]
                heard = trained.model.model.encode_speech(*inputs)
                torch.testing.assert_close(features["audio_features"], list(heard), atol=1e-3, rtol=1e-3)


def test_a_resumed_stage_meets_the_same_batches(folder: Path, rows: list[Row]) -> None:
    first = Setup(folder, rows)
    batches = [first.collate(batch) for batch in first.batches()]
    again = Setup(folder, rows)
    resumed = [again.collate(batch) for batch in again.batches()[3:]]
    for before, after in zip(batches[3:], resumed, strict=True):
        assert torch.equal(before["input_ids"], after["input_ids"]) and torch.equal(before["labels"], after["labels"])
        ours, theirs = (batch.get("mm_encoder_outputs", {}) for batch in (before, after))
        assert ours.keys() == theirs.keys()
        for kind, features in ours.items():
            assert all(torch.equal(mine, other) for mine, other in zip(features, theirs[kind], strict=True))

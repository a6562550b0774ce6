"""Recipes: every shipped one parses, overrides apply, and faults are named."""

from pathlib import Path

import pytest

import mixlora
from mixlora.training.recipe import PACKAGED, find_recipe, load_recipe
from mixlora.training.stages import RecipeError

MINIMAL = """
model: start
stages:
  - {name: text, train: [decoder], data: [{path: a.jsonl}], learning_rate: 2e-3, max_steps: 3, rows_per_batch: 2}
  - {name: more, train: [decoder], data: [{path: a.jsonl}], learning_rate: 1, epochs: 0.5, tokens_per_batch: 64}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


STAGES = {
    "default": [
        "text", "text_copy", "text_chat", "letters", "letters_more", "names", "names_places",
        "vision_align", "vision_sft",
        "speech_align", "speech_copy", "speech_sft", "speech_voices", "speech_more", "speech_mend",
        "vision_polish", "vision_speech", "vision_mix", "vision_detail", "vision_numbers", "vision_digits",
        "vision_practice", "vision_listen", "vision_views", "vision_questions", "vision_answers", "vision_verify",
        "vision_told", "vision_read", "vision_more", "vision_heard", "vision_asked", "vision_spoken",
    ],
    "smoke": [
        "text", "vision_align", "vision_tower", "speech_align", "speech_sft", "vision_speech", "streamed", "mimic",
        "preference",
    ],
    "tiny": ["shapes", "tones", "both"],
    "llava_mod": ["dense_mimic", "sparse_mimic", "preference"],
    "phi4/vision": ["align", "joint", "generative", "frames"],
    "phi4/speech": ["pretrain", "posttrain"],
    "phi4/vision_speech": ["vision_speech"],
    "phi4/follow": ["mimic", "preference"],
}  # fmt: skip


@pytest.mark.parametrize("path", sorted(PACKAGED.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    name = str(path.relative_to(PACKAGED).with_suffix(""))
    stages = [stage.name for stage in load_recipe(path).stages]
    assert stages == STAGES.get(name, stages) and stages
    assert find_recipe(name) == path


@pytest.mark.parametrize("name", ["tiny", "smoke"])
def test_these_recipes_need_nothing_that_is_not_in_the_package(name: str) -> None:
    recipe = load_recipe(find_recipe(name))
    assert Path(recipe.model) == Path(mixlora.default_checkpoint())
    files = [Path(source.path) for stage in recipe.stages for source in stage.data]
    assert files and all(file.is_file() and file.is_relative_to(PACKAGED) for file in files)


def test_paths_beside_the_recipe(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["text.data=[{path: 'recipe:rows/a.jsonl'}, {path: b.jsonl}]"])
    assert [source.path for source in loaded.stages[0].data] == [str(recipe.parent / "rows/a.jsonl"), "b.jsonl"]


def test_learning_rates_of_groups(recipe: Path) -> None:
    both = "text.train=[decoder, vision_projector]"
    loaded = load_recipe(recipe, [both, "text.learning_rate={default: 1e-4, decoder: 2e-5}"])
    assert [loaded.stages[0].rate_of(group) for group in loaded.stages[0].train] == [2e-5, 1e-4]
    for rates, message in {
        "{decoder: 1e-4}": "no learning_rate for vision_projector; name it, or give a default",
        "{default: 1, decodr: 1}": "of decodr, which this stage does not train; did you mean 'decoder'",
        "{default: -1}": "learning_rate of default is -1.0, and must be above 0",
        "{default: fast}": "learning_rate: default: expected float, got 'fast'",
        "0": "must be above 0",
        "[1]": r"expected float, got \[1\]",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_recipe(recipe, [both, f"text.learning_rate={rates}"])


def test_numbers_are_converted(recipe: Path) -> None:
    text, more = load_recipe(recipe).stages
    assert text.learning_rate == 0.002 and text.epochs == 0 and text.data[0].weight == 1.0
    assert more.learning_rate == 1.0 and isinstance(more.learning_rate, float)


def test_overrides(recipe: Path) -> None:
    loaded = load_recipe(
        recipe, ["seed=7", "text.learning_rate=3e-4", "text.data=[{path: b, weight: 2}]", "stages=[text]"]
    )
    assert loaded.seed == 7 and len(loaded.stages) == 1
    assert loaded.stages[0].learning_rate == 3e-4 and loaded.stages[0].data[0].path == "b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown key 'sed'; did you mean 'seed'"),
        ("text.learning_rat=1", "did you mean 'learning_rate'"),
        ("txt.epochs=1", "no stage 'txt'; did you mean 'text'"),
        ("stages=[mor]", "did you mean 'more'"),
        ("seed", "expected key=value"),
        ("text.learning_rate=fast", "expected float, got 'fast'"),
        ("text.max_steps=1.5", "expected int"),
        ("text.epochs=1", "exactly one of epochs and max_steps"),
        ("text.schedule=step", "not one of cosine"),
        ("text.save_steps=15", "not a multiple of logging_steps"),
        ("text.copy={adapter.vision: decoder}", "copy into adapter.vision"),
        ("text.data=[{pat: x}]", "did you mean 'path'"),
        ("text.data=[{weight: 1}]", "path is missing"),
        ("more.name=text", "each with its own name"),
        ("more.streaming=true", "streaming needs max_steps"),
        ("text.max_broken=-1", "max_broken -1 must be at least 0"),
        ("text.bf16=3", "expected bool, got 3"),
        ("text.epochs=-1", "exactly one of epochs and max_steps"),
        ("text.tokens_per_batch=-1", "exactly one of tokens_per_batch and rows_per_batch"),
        ("text.max_steps=-1", "exactly one of epochs and max_steps, above 0"),
        ("text.beta2=2", "beta2 2.0 must be from 0 to below 1"),
        ("text.weight_decay=-1", "weight_decay -1.0"),
        ("text.max_grad_norm=-1", "max_grad_norm -1.0 at least 0"),
        ("text.train=[decoder, decoder]", "train names a group twice"),
        ("seed=-1", "seed -1 must lie from 0"),
        ("text.epochs=[", "the value is not YAML: while parsing"),
        ("text.augment={views: 2, views: 3, rotation: 1}", "views twice"),
    ],
)
def test_faults_are_named(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        load_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: [", "is not YAML: while parsing"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"model: a\nmodel: b\nstages: []", "is not YAML: model twice"),
        (b"- a", "expected a mapping with a list of stages"),
    ],
)
def test_what_is_no_recipe_is_named_in_a_line(recipe: Path, content: bytes, message: str) -> None:
    recipe.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as fault:
        load_recipe(recipe)
    assert str(fault.value).startswith(str(recipe)) and "\n" not in str(fault.value)


def test_unknown_recipe_names_the_packaged_ones() -> None:
    with pytest.raises(RecipeError, match="default, llava_mod, .*phi4/vision, .*smoke, .*tiny"):
        find_recipe("nothing")

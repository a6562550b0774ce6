"""Recipes: every shipped one parses, overrides apply, and faults are named."""

from pathlib import Path

import pytest

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


@pytest.mark.parametrize("path", sorted(PACKAGED.rglob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    text, speech = ["text", "text_copy"], ["speech_copy", "speech_sft"]
    pictures = ["vision_polish", "vision_speech", "vision_mix"]
    default = ["vision_align", "vision_sft", "speech_align", "speech_sft", "vision_speech"]
    stages = {
        "default": [*text, *default[:3], *speech, *pictures],
        "smoke": ["text", *default, "mimic", "preference"],
        "llava_mod": ["dense_mimic", "sparse_mimic", "preference"],
    }[path.stem]
    assert [stage.name for stage in load_recipe(path).stages] == stages
    assert find_recipe(path.stem) == path


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
    ],
)
def test_faults_are_named(recipe: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace("(", r"\(")):
        load_recipe(recipe, [override])


def test_unknown_recipe_names_the_packaged_ones() -> None:
    with pytest.raises(RecipeError, match="default, llava_mod, smoke"):
        find_recipe("nothing")

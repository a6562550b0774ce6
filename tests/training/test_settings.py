"""A stage that was begun by an older version goes on: fields that are new had their defaults."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mixlora.training.begun import check_settings
from mixlora.training.stages import Experts, Mimic, RecipeError

BEGUN: dict[str, Any] = {"start": "a", "name": "x", "learning_rate": 0.1, "mimic": {"temperature": 2.0}}
NOW = BEGUN | {"mimic": asdict(Mimic(temperature=2.0)), "experts": asdict(Experts()), "mask_time": 0.0}


def begin(folder: Path) -> None:
    (folder / "stage.json").write_text(json.dumps(BEGUN))
    (folder / "checkpoints/checkpoint-2").mkdir(parents=True)


def test_new_fields_at_their_defaults_change_nothing(tmp_path: Path) -> None:
    begin(tmp_path)
    check_settings(tmp_path, NOW)


@pytest.mark.parametrize("change", [{"mask_time": 0.1}, {"experts": asdict(Experts(count=4))}, {"learning_rate": 1}])
def test_other_values_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    begin(tmp_path)
    with pytest.raises(RecipeError, match=f"begun with other settings .*{next(iter(change))}"):
        check_settings(tmp_path, NOW | change)


def test_before_the_first_checkpoint_they_may_change(tmp_path: Path) -> None:
    """Such as after a typing error that ended the run."""
    check_settings(tmp_path, BEGUN)
    check_settings(tmp_path, NOW | {"learning_rate": 1})
    assert json.loads((tmp_path / "stage.json").read_text())["learning_rate"] == 1
    (tmp_path / "done.json").write_text("{}")
    with pytest.raises(RecipeError, match="learning_rate: 1 -> 0.1"):
        check_settings(tmp_path, NOW)


def test_a_note_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "stage.json").write_text("{")
    with pytest.raises(RecipeError, match="stage.json: not JSON .* remove"):
        check_settings(tmp_path, NOW)

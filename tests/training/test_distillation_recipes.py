"""The packaged recipes that follow a teacher run their first steps, at a tiny size."""

import json
from pathlib import Path

import pytest
import torch

from mixlora.training.recipe import find_recipe, load_recipe
from mixlora.training.train import train
from tests.training.taught_fixtures import load, log, louder


def few_steps(recipe: Path, data: dict[str, Path], teacher: str) -> list[str]:
    """Overrides of every stage: two steps of the reader's rows and teacher."""
    found = []
    for stage in load_recipe(recipe).stages:
        rows = data[stage.objective]
        found += [f"{stage.name}.data=[{{path: {rows}}}]", f"{stage.name}.epochs=0", f"{stage.name}.max_steps=2"]
        found += [f"{stage.name}.gradient_accumulation=2", f"{stage.name}.logging_steps=1"]
        if stage.teacher not in ("", "self"):
            found.append(f"{stage.name}.teacher={teacher}")
        found.append(f"{stage.name}.save_steps=2")
    return found


@pytest.mark.parametrize("name", ["llava_mod", "smoke"])
def test_the_first_steps(tmp_path: Path, start: str, rows: Path, pairs: Path, name: str) -> None:
    recipe = find_recipe(name)
    data = {"sft": rows, "mimic": rows, "preference": pairs}
    overrides = [f"model={start}", *few_steps(recipe, data, louder(start, tmp_path / "teacher"))]
    chosen = [stage.name for stage in load_recipe(recipe).stages if stage.objective != "sft"]
    train(recipe, tmp_path / "out", [*overrides, f"stages=[{', '.join(chosen)}]"])
    folders = sorted(folder for folder in (tmp_path / "out").iterdir() if (folder / "done.json").is_file())
    assert [folder.name[3:] for folder in folders] == chosen
    for folder in folders:
        losses = log(folder, "loss")
        assert len(losses) == 2 and torch.tensor(losses).isfinite().all()
    last = load(str(folders[-1]))
    assert last.config.adapters["vision"]["experts"] == 4
    if name == "llava_mod":
        assert (
            not (folders[0] / "experts").exists() and "experts" not in load(str(folders[0])).config.adapters["vision"]
        )
        assert log(folders[1], "balance") and log(folders[2], "balance") and log(folders[2], "rewards/margins")


def test_published_values_are_as_published() -> None:
    dense, sparse, preference = load_recipe(find_recipe("llava_mod")).stages
    assert [stage.learning_rate for stage in (dense, sparse, preference)] == [2e-5, 2e-5, 2e-6]
    assert (dense.mimic.divergence, dense.mimic.sft_weight, sparse.mimic.sft_weight) == ("forward_kl", 0, 0.5)
    assert (sparse.experts.count, sparse.experts.top_k, sparse.experts.balance_weight) == (4, 2, 0.01)
    assert (preference.preference.kind, preference.preference.beta) == ("kto_pair", 0.1)
    assert {stage.warmup for stage in (dense, sparse, preference)} == {0.03}
    assert json.dumps([stage.max_length for stage in (dense, sparse, preference)]) == "[2048, 2048, 2048]"

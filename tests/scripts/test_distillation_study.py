"""The study of distillation: its runs are recipes that can be run, its scores those of greedy decoding."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_data import asked, word_rows
from distillation_measure import Examination
from distillation_study import RECIPES, Study, hacking_runs, runs_of
from distillation_table import preferences, read_results, spread, write_table

from mixlora.modeling.modeling_mixlora import MixLoraForConditionalGeneration
from mixlora.training.recipe import load_recipe
from tests.training.training_fixtures import chat, make_start, write_rows


def test_every_run_is_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: dict[str, Any] = {}

    def load(study: Study, recipe: str, folder: Path, overrides: list[str]) -> None:
        plans[folder.name] = load_recipe(RECIPES / f"{recipe}.yaml", overrides)
        folder.mkdir(parents=True)

    monkeypatch.setattr(Study, "_train", load)
    monkeypatch.setattr(Study, "_note", lambda *args: None)
    monkeypatch.setattr(Study, "teach", lambda study, which: study._end(study.teachers[which]))
    for end in ("runs/ready-1/01-mimic_sft", "teacher/02-strong_2", "weak_teacher/01-weak_1"):
        (tmp_path / end).mkdir(parents=True)
    study = Study(tmp_path, tmp_path / "results", seeds=3)
    for run in [*runs_of(1)[1:], *hacking_runs(1)]:
        if run.name != "ready-1":
            study.run(run)
    assert len(plans) == 13 and {plan.seed for plan in plans.values()} == {1}
    assert (
        plans["mimic-experts-1"].stages[0].experts.count == 4 and plans["mimic-dense-1"].stages[0].experts.count == 0
    )
    assert plans["mimic-dense-1"].model == str(tmp_path / "starts" / "student-1")
    start = plans["prefer-none-kto_pair-1"]
    assert start.model == str(tmp_path / "runs" / "ready-1" / "01-mimic_sft")
    references = {name: plan.stages[0].teacher for name, plan in plans.items() if name.startswith("prefer")}
    assert references["prefer-none-sigmoid-1"] == "" and references["prefer-self-sigmoid-1"] == "self"
    assert references["prefer-teacher-kto_pair-1"] == str(tmp_path / "teacher" / "02-strong_2")
    fresh, fixed = ([stage.data[0].path for stage in plans[f"hacking-{rows}-1"].stages] for rows in ("fresh", "fixed"))
    assert len(set(fresh)) == 4 and len(set(fixed)) == 1


def test_what_is_done_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "_train", lambda *args: pytest.fail("trained again"))
    (tmp_path / "sft-dense-0.json").write_text("{}")
    Study(tmp_path, tmp_path, seeds=1).run(runs_of(0)[0])


def test_a_score_is_that_of_greedy_decoding(tmp_path: Path) -> None:
    """Answers that the model gives itself are right, others wrong, whatever kind of row."""
    start = make_start(tmp_path / "start")
    write_rows(tmp_path)
    model = MixLoraForConditionalGeneration.from_pretrained(start)
    rows = [chat(kinds, "hm", number) for number, kinds in enumerate(("i", "a", "", "ia"))]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exam = Examination(path, ["clothes", "digits", "seen_objects", "heard_digits"], tmp_path / "cache", Path(start))
    for place, example in enumerate(exam.examples):
        begin = int((example.labels != -100).nonzero()[0])
        inputs = exam.collator([example])
        prompt = {"input_ids": inputs["input_ids"][:, :begin], "attention_mask": inputs["attention_mask"][:, :begin]}
        media = {name: value for name, value in inputs.items() if name not in (*prompt, "labels")}
        drawn = model.generate(**prompt, **media, do_sample=False, max_new_tokens=2, eos_token_id=None)[0]
        ids = drawn if place % 2 == 0 else torch.cat([drawn[:-1], torch.where(drawn[-1:] == 40, 41, 40)])
        labels = torch.where(torch.arange(len(ids)) < begin, -100, ids)
        exam.examples[place] = type(example)(ids, labels, example.images, example.audio)
    figures = exam.of(Path(start), exam.taught_by(Path(start)))
    assert figures["score"] == {"clothes": 1.0, "digits": 0.0, "seen_objects": 1.0, "heard_digits": 0.0}
    assert set(figures["yes_no"]) == {"seen_objects", "heard_digits"}
    assert figures["agreement"] == dict.fromkeys(figures["score"], 1.0)  # with itself
    assert all(abs(value) < 1e-5 for value in figures["kl"].values())
    assert figures["truth"]["digits"] > figures["truth"]["clothes"] > 0


def test_questions_about_digits_are_true() -> None:
    rows = [asked({"messages": [{"content": []}]}, "spoken_digit", "?", str(i % 10)) for i in range(40)]
    for row in word_rows(rows, random.Random(0)):
        question, answer = row["messages"][0]["content"][-1]["text"], row["messages"][1]["content"]
        assert question.startswith('Does the voice say "') and answer in ("yes", "no")
    assert [row["messages"][1]["content"] for row in word_rows(rows, random.Random(0))].count("yes") == 20


def stage(score: float, wrong: float) -> dict[str, Any]:
    told = {"accuracy": 0.5, "f1": 0.5, "yes_share": 0.5, "wrong_yes": wrong}
    return {"score": {"digits": score, "seen_objects": 0.5}, "yes_no": {"seen_objects": told}}


def test_tables_hold_means_and_spreads_over_seeds(tmp_path: Path) -> None:
    def put(name: str, figures: dict[str, Any]) -> None:
        taught = figures | {"kl": {"digits": 0.5}, "agreement": {"digits": 0.75}, "truth": {"digits": 1.0}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"stages": {"last": taught}}))

    put("strong_teacher", stage(1.0, 0.1))
    for seed, (before, after) in enumerate(((0.8, 0.7), (0.6, 0.62))):
        put(f"mimic_sft-dense-{seed}", stage(before, 0.4))
        put(f"ready-{seed}", stage(before, 0.4))
        put(f"prefer-self-sigmoid-{seed}", stage(after, 0.2 + 0.1 * seed))
    write_table(tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| mimic_sft-dense | 2 | 60.0 ± 7.1 | 70.0 ± 14.1 | 50.0 ± 0.0 | 75.0 ± 0.0 | 0.50 ± 0.00 |" in text
    line = next(line for line in preferences(read_results(tmp_path)).splitlines() if "prefer-self" in line)
    assert line.split(" | ")[-3:-2] == ["25.0 ± 7.1"] and line.endswith("| 4.0 ± 8.5 |")  # lost 10, won 2
    assert spread([1.0]) == "1.0"

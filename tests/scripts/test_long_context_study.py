"""The study of long rows: its questions can be answered from the prompt, and a run goes on where it was stopped."""

import json
from pathlib import Path

import pytest
import torch
from long_context_study import Study, main, method_config
from retrieval_tasks import ANSWER, ASK, FACT, IGNORED, NOTE, TASKS, WORDS, prompt_at, training_row


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def facts(ids: list[int]) -> dict[tuple[int, int], list[int]]:
    return {(ids[i + 1], ids[i + 2]): ids[i + 3 : i + 3 + ANSWER] for i, token in enumerate(ids) if token == NOTE}


@pytest.mark.parametrize("task", TASKS)
def test_what_is_taught_stands_before(task: str) -> None:
    ids, labels = training_row(task, 400, generator())
    assert len(ids) == len(labels) == 400
    taught = [i for i, label in enumerate(labels) if label != IGNORED]
    assert len(taught) > 400 / 8  # dense
    assert all(labels[i] == ids[i] for i in taught)
    for i in range(390):
        if ids[i] == ASK:
            assert (
                facts(ids[:i])[ids[i + 1], ids[i + 2]] == ids[i + 3 : i + 3 + ANSWER] == labels[i + 3 : i + 3 + ANSWER]
            )
    count = len(facts(ids[:393]))
    assert count == {"passkey": 1, "needles": 8}.get(task, count) and (task != "lookup" or count > 10)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_holds_the_answers_at_its_depth(task: str, depth: float) -> None:
    prompt = prompt_at(task, 501, depth, 10, generator(3))
    assert len(prompt.ids) == 501
    assert len(prompt.questions) == {"passkey": 1, "needles": 8, "lookup": 10}[task]
    held = facts(prompt.ids)
    assert len(held) == (len(prompt.questions) if task != "lookup" else len(held)) and len(held) <= 501 // FACT
    for asked, answer in prompt.questions:
        assert held[asked[1], asked[2]] == answer
    first = next(i for i in range(501) if prompt.ids[i : i + 3] == [NOTE, *prompt.questions[0][0][1:]])
    assert first == round(depth * (501 - len(prompt.questions) * FACT))
    assert (prompt.ids[0] in WORDS) == (depth > 0 and task != "lookup")


def test_every_method_is_a_config_of_the_same_weights() -> None:
    study = Study(width=32, layers=2, heads=2, train_length=64)
    for method in ("plain", "linear", "yarn", "longrope", "dual_chunk", "dual_chunk_temperature"):
        text = method_config(study, method, 256).text_config
        assert text.max_position_embeddings == 64 if method != "longrope" else 256
        assert (text.long_context is not None) == method.startswith("dual_chunk")
    with pytest.raises(ValueError, match="method 'ring' is not one of"):
        method_config(study, "ring", 256)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    small = "--width 32 --layers 2 --heads 2 --train-length 64 --rows 4 --save-every 2".split()
    small += "--lengths 64 128 --depths 2 --questions 3 --methods plain dual_chunk".split()
    main([*small, "--steps", "6", "--output", str(tmp_path / "whole")])
    main([*small, "--steps", "6", "--output", str(tmp_path / "parts"), "--stop-after", "3"])
    assert not (tmp_path / "parts" / "results.json").exists()
    main([*small, "--steps", "6", "--output", str(tmp_path / "parts")])
    whole, parts = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 3 * 2 * 2 * 2 and all(cell["asked"] >= 3 for cell in whole)
    curves = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "parts")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 6
    assert (tmp_path / "whole" / "table.md").read_text().count("dual_chunk") >= 3

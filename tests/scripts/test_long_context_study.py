"""The study of long rows: its questions can be answered from the row, and a run goes on where it was stopped."""

import json
from pathlib import Path

import long_context_study
import pytest
import torch
from long_context_results import DEPTHS, table
from long_context_study import main
from retrieval_media import Media, readable
from retrieval_reader import METHODS, Reader, Study, method_config
from retrieval_tasks import FACT, NUMBERS, TASKS, facts_of, make_rows
from retrieval_training import FullMuon, idle_tokens, unrest

from mixlora.modeling.rope import apply_rotary


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("length", [64, 501, 2048])
@pytest.mark.parametrize("task", list(TASKS))
def test_each_answer_stands_in_the_row_once_before_its_question(task: str, length: int) -> None:
    rows, room = make_rows(task, 2, length, generator(3)), length - FACT * facts_of(TASKS[task], length)
    assert rows.ids.shape == (2, length) and rows.answers.shape == rows.depth.shape
    for row in range(2):
        ids, shown = rows.ids[row].tolist(), iter(rows.digits[row].tolist() if rows.digits is not None else [])
        held = {}
        for place in range(room - 2):
            if ids[place + 2] == TASKS[task].media:
                held[ids[place], ids[place + 1]] = (place, next(shown) + NUMBERS.start)
            elif ids[place + 2] in NUMBERS:
                held[ids[place], ids[place + 1]] = (place, ids[place + 2])
        assert len(held) == len(rows.asked)
        for question, depth in zip(rows.asked.tolist(), rows.depth[row].tolist(), strict=True):
            place, answer = held[ids[question - 2], ids[question - 1]]
            assert ids[question] == answer and depth == pytest.approx(place / room)
            assert room <= question - 2


def test_facts_of_a_task_lie_as_it_says() -> None:
    rows = make_rows("needles", 1, 1024, generator())
    places = (rows.depth[0] * (1024 - FACT * 16)).round().long().sort().values
    assert places[1:8].diff().tolist() == [FACT] * 6 and places[9:].diff().tolist() == [FACT] * 6
    with pytest.raises(ValueError, match="100 facts and their questions do not fit into 599"):
        make_rows("lookup", 1, 599, generator(), facts=100)
    with pytest.raises(ValueError, match="task 'song' is not one of"):
        make_rows("song", 1, 64, generator())
    with pytest.raises(ValueError, match="4 names, 17 facts need at least 5"):
        make_rows("lookup", 1, 512, generator(), facts=17, names=4)


def test_few_names_make_keys_alike() -> None:
    """No key comes twice all the same."""
    rows = make_rows("lookup", 3, 512, generator(), facts=30, names=6)
    keys = [row[(rows.asked[:, None] - torch.tensor([2, 1]))].tolist() for row in rows.ids]
    assert all(len(set(map(tuple, row))) == 30 for row in keys)
    assert all(len({key[side] for key in row}) == 6 for row in keys for side in range(2))


def fake_media() -> dict[str, dict[str, Media]]:
    """A vector for each digit, and a little noise."""
    digits = torch.arange(40) % 10
    vectors = torch.nn.functional.one_hot(digits, 16) + 0.01 * torch.randn(40, 16, generator=generator())
    both = {part: Media(vectors, digits) for part in ("train", "test")}
    return {"picture": both, "speech": both}


def test_only_what_can_be_read_is_asked_for() -> None:
    train = fake_media()["picture"]["train"]
    wrong = Media(train.vectors, (train.digits + (torch.arange(40) == 7)) % 10)
    kept = readable(train, wrong)
    assert len(kept.digits) == 39 and torch.equal(kept.digits, train.digits[torch.arange(40) != 7])
    drawn = train.draw(torch.tensor([[3, 9], [0, 3]]), generator())
    assert drawn.shape == (2, 2, 16) and drawn.argmax(-1).tolist() == [[3, 9], [0, 3]]


def test_every_method_is_a_config_of_the_same_weights() -> None:
    study = Study(train_length=64)
    for method in METHODS:
        text = method_config(study, method, 256).text_config
        assert text.max_position_embeddings == 64 if method != "longrope" else 256
        assert (text.long_context is not None) == method.startswith("dual_chunk")
    with pytest.raises(ValueError, match="method 'ring' is not one of"):
        method_config(study, "ring", 256)


@torch.no_grad()
def test_two_heads_begin_by_looking_back() -> None:
    """One and two tokens, near the start of a row and far from it."""
    reader = Reader(Study(), fake_media()).eval()
    reader.begin()
    attention = reader.model.model.language_model.layers[0].self_attn
    for head, back in enumerate((1, 2)):
        mine = slice(head * attention.head_dim, (head + 1) * attention.head_dim)
        biases = [
            each.base_layer.bias[mine][None, None, None].repeat(1, 1, 600, 1)
            for each in (attention.q_proj, attention.k_proj)
        ]
        turned = reader.model.model.language_model.rotary_emb(biases[0][0], torch.arange(600)[None])
        query, key = (apply_rotary(each, *turned)[0, 0] for each in biases)
        scores = query @ key.T * attention.scaling
        scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        assert (scores.argmax(-1)[back:] == torch.arange(600)[back:] - back).all()
        assert scores.softmax(-1).diagonal(-back)[10:].min() > 0.8


@torch.no_grad()
def test_digits_become_the_numbers_that_they_show() -> None:
    reader, media = Reader(Study(), fake_media()), fake_media()
    reader.learn_digits(media)
    numbers = reader.model.model.language_model.embed_tokens.weight[NUMBERS.start : NUMBERS.start + 10]
    for task, parts in media.items():
        shown = reader.projectors[task](parts["test"].vectors)
        nearest = torch.nn.functional.cosine_similarity(shown[:, None], numbers, dim=-1)
        assert nearest.argmax(-1).tolist() == parts["test"].digits.tolist()


@torch.no_grad()
def test_tokens_rest_where_the_last_layer_looks() -> None:
    reader, rows = Reader(Study(), {}).eval(), [make_rows("lookup", 1, 200, generator(seed)) for seed in range(2)]
    idle = idle_tokens(rows, 30, generator())
    for row, each in enumerate(rows):
        assert len(set(idle[row].tolist())) == 30 and not set(idle[row].tolist()) & {0, *(each.asked - 1).tolist()}
    ids = torch.cat([each.ids for each in rows])
    hidden, scores = reader.read(ids, idle)
    assert torch.equal(hidden, reader(ids, {}))
    reader.model.set_attn_implementation({"text_config": "eager"})
    weights = reader.model.model(ids, output_attentions=True).attentions[-1]
    first = torch.stack([weights[row, :, places, 0] for row, places in enumerate(idle)])  # [rows, heads, places]
    loss, mean = unrest(scores, idle, crowd=32.0)
    torch.testing.assert_close(mean, first.mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, (32 * (1 - first) / first).log1p().mean(), rtol=1e-4, atol=1e-5)


def test_the_optimizer_steps_as_that_of_torch() -> None:
    """Which rounds to bf16 on its way."""
    ours, theirs = (torch.nn.Parameter(torch.randn(24, 16, generator=generator())) for _ in range(2))
    start = ours.detach().clone()
    options = {"lr": 0.1, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    steps = [FullMuon([ours], lr=0.1), torch.optim.Muon([theirs], **options)]
    for seed in range(3):
        for weight, optimizer in zip((ours, theirs), steps, strict=True):
            weight.grad = torch.randn(24, 16, generator=generator(seed + 1))
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_context_study, "load_media", lambda file: fake_media())
    small = "--width 32 --head-dim 16 --train-length 64 --tokens 320 --save-every 2 --steps 6".split()
    small += "--lengths 64 128 --questions 2 --methods plain dual_chunk".split()
    main([*small, "--output", str(tmp_path / "whole")])
    main([*small, "--output", str(tmp_path / "parts"), "--stop-after", "3"])
    assert not (tmp_path / "parts" / "results.json").exists()
    main([*small, "--output", str(tmp_path / "parts")])
    whole, parts = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 2 * 2 * len(TASKS) and all(min(cell["asked"]) >= 2 for cell in whole)
    curves = [(tmp_path / name / "training.jsonl").read_text() for name in ("whole", "parts")]
    assert curves[0] == curves[1] and len(curves[0].splitlines()) == 6
    assert (tmp_path / "whole" / "table.md").read_text() == table(whole, tuple(TASKS))
    assert (tmp_path / "whole" / "picture.png").stat().st_size > 1000


def test_the_table_holds_percent_over_all_depths() -> None:
    cells = [
        {"method": "plain", "task": "lookup", "length": n, "asked": [4] * DEPTHS, "right": [r] * DEPTHS}
        for n, r in ((64, 4), (2048, 1))
    ]
    assert table(cells, ("lookup",)).splitlines()[2] == "| lookup | plain | 100.0 | 25.0 |"

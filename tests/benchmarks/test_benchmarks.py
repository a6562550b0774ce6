"""Every benchmark runs at toy shapes, checks its answers, and its figures become a page."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.pair import Feeder, build_pair, check_agreement
from benchmarks.report import TARGETS, Target, judged, read, render
from benchmarks.shapes import FULL, TOY

NAMES = ("decode", "mixed_step", "towers", "training_step", "processing", "routed_linear", "growth")


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"{name}.json"
    found = import_module(f"benchmarks.{name}").main(["--quick", "--json", str(path)])
    assert json.loads(path.read_text())["benchmark"] == name == found["benchmark"]
    ratios = found.get("ratios", {})
    assert {target.ratio for target in TARGETS if target.benchmark == name} - {"peak memory, ours of the peer's"} <= (
        ratios.keys()
    )
    assert capsys.readouterr().out


def test_answers_that_differ_are_refused() -> None:
    pair, feeder = build_pair(TOY), Feeder(TOY)
    rows = feeder.rows(TOY.answered)
    assert check_agreement(pair, feeder, rows) < 1e-3
    pair.ours.model.language_model.layers[0].mlp.down_proj.lora_B["vision"].weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="standard deviations"):
        check_agreement(pair, feeder, rows)


def test_shapes_are_phi4s_in_proportion() -> None:
    assert (FULL.inner / FULL.width, FULL.heads / FULL.key_value_heads) == (8192 / 3072, 24 / 8)
    assert {name: rank / FULL.width for name, rank in FULL.ranks} == {"vision": 256 / 3072, "speech": 320 / 3072}
    assert (FULL.image_id, FULL.audio_id) == (200010, 200011)


def test_ways_take_turns() -> None:
    seen: list[str] = []
    times = measure.alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 2)
    assert seen == ["a", "b"] * 3 and [len(each) for each in times.values()] == [2, 2]
    assert measure.ratio({"peer": [2.0, 9.0, 8.0], "ours": [1.0, 3.0, 2.0]}, "peer", "ours") == 3


def test_to_enter_a_context_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append("enter")
        yield
        seen.append("leave")

    def timed(way: Callable[[], None], device: str) -> float:
        seen.append("timed")
        way()
        return 0.0

    monkeypatch.setattr(measure, "timed", timed)
    measure.alternate({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, 1, within={"b": around})
    assert seen == ["timed", "a", "enter", "timed", "b", "leave"] * 2


def test_a_miss_is_shown_with_its_profile(tmp_path: Path) -> None:
    where = {"shapes": "toy", "device": "x86_64", "threads": 2, "torch": "2", "transformers": "5", "dtype": "float32"}
    step = {"benchmark": "mixed_step", "ratios": {"in order": 1.5}, "medians": {"base, ours": 1.0}, **where}
    step |= {"adapters": {"in order, ours": 0.2}, "shares": {"in order, ours": 0.2}, "bound": 0.1}
    step["profiles"] = {"ours": {"aten::mm": 0.75, "others": 0.25}}
    startup = {
        "benchmark": "startup",
        "ratios": {"mixlora --help": 0.2, "import mixlora": 0.1},
        "medians": {},
        **where,
    }
    points = [{"at": at, "ours": 1.0, "base": 2.0, "bound": 1.5} for at in (1.0, 2.0)]
    growth = {"benchmark": "growth", "axes": {"rank": points, "spread": points}, **where}
    training = {
        "benchmark": "training_step",
        "medians": {"ours": 1.0, "peer": 2.0},
        "peak_mib": {"ours": 7.0},
        **where,
    }
    training |= {"phases": {who: {"backward": 0.5, "rest": 0.5} for who in ("ours", "peer")}}
    training |= {"through": {"ours": {"forward": 6, "backward": 4}, "peer": {"forward": 8, "backward": 7}}}
    (tmp_path / "serving.txt").write_text("a table\n")
    for each in (step, startup, growth, training):
        (tmp_path / f"{each['benchmark']}.json").write_text(json.dumps(each))
    page = tmp_path / "performance.md"
    render(tmp_path, page)
    text = page.read_text()
    assert "| 1.50 x | **no** |" in text and "| `aten::mm` | 75.0% |" in text and "| 0.20 x | yes |" in text
    assert "Not measured in this run: decode, towers, processing, routed_linear." in text and "a table" in text
    assert "the peer has 1.50 times the tokens" in text
    assert (tmp_path / "performance" / "rank.svg").is_file() and "](performance/spread.svg)" in text
    assert [(target.ratio, value) for target, value in judged(read(tmp_path), "mixed_step")] == [("in order", 1.5)]
    with pytest.raises(ValueError, match="no results"):
        render(tmp_path / "performance", page)


def test_what_is_met() -> None:
    assert Target("", "", "", "", 2.0).met(2.0) and not Target("", "", "", "", 2.0).met(1.9)
    assert Target("", "", "", "", 1.0, at_most=True).met(0.9) and not Target("", "", "", "", 1.0, at_most=True).met(
        1.1
    )

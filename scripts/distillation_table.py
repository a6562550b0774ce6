"""The tables of the study of distillation, from the files of its runs."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
YES_NO = {"accuracy": "right", "f1": "F1", "yes_share": "share of yes", "wrong_yes": "wrong yes"}
WAYS = ("sft", "mimic", "mimic_sft")
HACKED = ("clothes", "digits")
"""Tasks of the long mimicry."""
START = "ready"
"""What preferences start from."""


def read_results(folder: Path) -> dict[str, dict[int, Figures]]:
    """Name of an arm -> seed -> figures of its stages."""
    arms: dict[str, dict[int, Figures]] = {}
    for path in sorted(folder.glob("*.json")):
        found = re.fullmatch(r"(.+)-(\d+)", path.stem)
        arm, seed = (found[1], int(found[2])) if found else (path.stem, 0)
        arms.setdefault(arm, {})[seed] = json.loads(path.read_text(encoding="utf-8"))["stages"]
    return arms


def mean_score(stage: Figures) -> float:
    """Over tasks, in percent."""
    return 100 * statistics.mean(stage["score"].values())


def yes_no(stage: Figures, name: str) -> float:
    """A figure of yes or no questions, the mean of their tasks, in percent."""
    return 100 * statistics.mean(each[name] for each in stage["yes_no"].values())


def spread(values: Iterable[float], digits: int = 1) -> str:
    """Mean and standard deviation, as `83.1 ± 0.4`."""
    every = list(values)
    mean = f"{statistics.mean(every):.{digits}f}"
    return f"{mean} ± {statistics.stdev(every):.{digits}f}" if len(every) > 1 else mean


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Of Markdown; all columns but the first are numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *lines))


def ends(seeds: dict[int, Figures]) -> dict[int, Figures]:
    """Figures of each seed's last stage."""
    return {seed: list(stages.values())[-1] for seed, stages in seeds.items()}


def students(arms: dict[str, dict[int, Figures]]) -> str:
    """Scores of each way to learn."""
    shown = {name: ends(seeds) for name, seeds in arms.items() if re.match(r"(strong|sft|mimic)", name)}
    tasks = list(next(iter(next(iter(shown.values())).values()))["score"])
    order = ["strong_teacher", *(f"{way}-{kind}" for kind in ("dense", "experts") for way in WAYS)]
    lines = []
    for name in order:
        if name not in shown:
            continue
        runs = shown[name].values()
        line = [name.replace("strong_", ""), str(len(runs)), spread(mean_score(each) for each in runs)]
        line += [spread(100 * each["score"][task] for each in runs) for task in tasks]
        agree: list[Callable[[Figures], float]] = [
            lambda each: 100 * statistics.mean(each["agreement"].values()),
            lambda each: statistics.mean(each["kl"].values()),
        ]
        if "teacher" in name:
            line += ["", ""]
        else:
            line += [spread((get(each) for each in runs), 1 + i) for i, get in enumerate(agree)]
        lines.append(line)
    return table(["arm", "runs", "mean", *tasks, "agreement", "KL"], lines)


def preferences(arms: dict[str, dict[int, Figures]]) -> str:
    """What each reference and each loss makes of the yes or no questions, beside what they start from."""
    start = ends(arms.get(START, {}))
    lines = []
    for name in [START, *(arm for arm in arms if arm.startswith("prefer-"))]:
        found = ends(arms.get(name, {}))
        seeds = [seed for seed in found if seed in start]
        if not seeds:
            continue
        runs = [found[seed] for seed in seeds]
        others = [task for task in runs[0]["score"] if task not in runs[0]["yes_no"]]
        lost = [
            max(100 * (start[seed]["score"][task] - found[seed]["score"][task]) for task in others) for seed in seeds
        ]
        line = [name, str(len(seeds))]
        line += [spread(yes_no(each, figure) for each in runs) for figure in YES_NO]
        line += [spread(mean_score(each) for each in runs), "" if name == START else spread(lost)]
        lines.append(line)
    return table(["arm", "runs", *YES_NO.values(), "mean", "most lost by another task"], lines)


def hacking(arms: dict[str, dict[int, Figures]]) -> str:
    """Nearness to the teacher and to the truth, after each part of a long mimicry, over the tasks that it trains."""
    lines = []
    for data in ("fixed", "fresh"):
        runs = list(arms.get(f"hacking-{data}", {}).values())
        for part in runs[0] if runs else ():
            stages = [each[part] for each in runs]

            def over(name: str, factor: float = 1.0, stages: list[Figures] = stages) -> list[float]:
                return [factor * statistics.mean(stage[name][task] for task in HACKED) for stage in stages]

            line = [f"{data}, {part.replace('_', ' ')}", str(len(runs)), spread(over("kl"), 2)]
            line += [spread(over("agreement", 100)), spread(over("truth"), 2), spread(over("score", 100))]
            lines.append(line)
    return table(["rows", "runs", "KL from the teacher", "agreement", "nats of the truth", "score"], lines)


def write_table(folder: Path) -> None:
    """Writes `table.md`, of as many runs as there are."""
    arms = read_results(folder)
    parts = {"Ways to learn": students, "Preferences": preferences, "A long mimicry of a weak teacher": hacking}
    text = "# The study's tables\n\nWritten by `scripts/distillation_study.py`; see ../distillation.md.\n"
    for title, make in parts.items():
        text += f"\n## {title}\n{make(arms)}"
    (folder / "table.md").write_text(text, encoding="utf-8")

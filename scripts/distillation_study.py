"""Trains a teacher and students that learn from it in different ways, and compares them; see docs/distillation.md.

python scripts/distillation_study.py --output build/study [--seeds 3] [--results docs/study] [--only PREFIX]

The rows are those of prepare_pictures.py, prepare_speech.py and prepare_hallucinations.py. Each run leaves a JSON file
in `--results`; a run that has one is skipped, so the same command goes on after a kill. At the end the files become
`table.md` there. On one core a run takes a minute or two, the teacher some ten.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import ROOT, read_jsonl
from distillation_data import STEPS, write_all, write_starts
from distillation_table import write_table

RECIPES = ROOT / "training" / "recipes" / "study"
EXPERTS = "{count: 4, top_k: 2, balance_weight: 0.01}"
WAYS = ("sft", "mimic", "mimic_sft")
REFERENCES = ("teacher", "self", "none")
KINDS = ("sigmoid", "kto_pair")
WAYS_OF_ROWS = ("fixed", "fresh")


@dataclass(frozen=True)
class Run:
    """A training.

    Attributes:
        name: of its folder and its file.
        recipe: of `RECIPES`; stages: those that it runs, in order.
        settings: overrides beside the paths.
        student: it starts from this run's end; else from `start`, or from the seed's fresh student.
        measured: stages to measure; the last one by default.
        start: a starting checkpoint.
        rows: the file of its rows, where it is another one than its recipe's others have.
    """

    name: str
    recipe: str
    stages: tuple[str, ...]
    seed: int = 0
    settings: tuple[str, ...] = ()
    student: str = ""
    measured: tuple[str, ...] = field(default=())
    start: str = ""
    rows: str = ""


def runs_of(seed: int) -> list[Run]:
    """All runs of a seed but those about hacking."""
    runs = []
    for way in WAYS:
        runs.append(Run(f"{way}-dense-{seed}", "student", (way,), seed))
        runs.append(Run(f"{way}-experts-{seed}", "student", (way,), seed, (f"{way}.experts={EXPERTS}",)))
    more = ("mimic_sft.epochs=2", "mimic_sft.learning_rate=1e-3")
    runs.append(Run(f"ready-{seed}", "student", ("mimic_sft",), seed, more, start="teacher", rows="ready"))
    for reference in REFERENCES:
        for kind in KINDS:
            settings = [f"prefer.preference={{kind: {kind}, beta: 0.1}}"]
            if reference == "self":
                settings.append("prefer.teacher=self")
            if reference == "none":
                settings += ["prefer.teacher=''", "prefer.teacher_cache=''"]
            name = f"prefer-{reference}-{kind}-{seed}"
            runs.append(Run(name, "preference", ("prefer",), seed, tuple(settings), f"ready-{seed}"))
    return runs


def hacking_runs(seed: int) -> list[Run]:
    """Long mimicry of a weak teacher on the same few rows, and on other rows each time."""
    stages = tuple(f"part_{number + 1}" for number in range(len(STEPS)))
    steps = tuple(f"{stage}.max_steps={count}" for stage, count in zip(stages, STEPS, strict=True))
    return [Run(f"hacking-{rows}-{seed}", "hacking", stages, seed, steps, measured=stages) for rows in WAYS_OF_ROWS]


class Study:
    """Where the study keeps its files, and what it runs."""

    def __init__(self, output: Path, results: Path, seeds: int):
        self.output, self.results, self.seeds = output, results, seeds
        self.rows, self.cache = output / "rows", output / "features"
        self.teachers = {"strong": output / "teacher", "weak": output / "weak_teacher"}
        self._exams: dict[str, Any] = {}

    def prepare(self) -> None:
        """Rows and starts, where they are not there yet."""
        if not (self.rows / "weak.jsonl").is_file():
            write_all(self.rows)
        write_starts(self.output / "starts", range(self.seeds))

    def teach(self, which: str) -> Path:
        """The checkpoint of the strong or the weak teacher, trained where it is not there yet."""
        folder = self.teachers[which]
        if not (self.results / f"{which}_teacher.json").is_file():
            rows = {"strong": ("many_clips", "many_pictures"), "weak": ("weak",)}[which]
            began, stages = time.process_time(), [f"{which}_{number + 1}" for number in range(len(rows))]
            data = [f"{s}.data=[{{path: {self.rows / r}.jsonl}}]" for s, r in zip(stages, rows, strict=True)]
            start = self.output / "starts" / ("teacher" if which == "strong" else "student-0")
            self._train("teacher", folder, [f"model={start}", f"stages=[{', '.join(stages)}]", *data])
            self._note(f"{which}_teacher", [self._end(folder)], began)
        return self._end(folder)

    def run(self, run: Run) -> None:
        """Trains and measures, unless that was done before."""
        if (self.results / f"{run.name}.json").is_file():
            print(f"==> {run.name}: done before", flush=True)
            return
        weak = run.recipe == "hacking"
        teacher = self.teach("weak" if weak else "strong")
        print(f"==> {run.name}", flush=True)
        began, folder = time.process_time(), self.output / "runs" / run.name
        model = self.output / "starts" / (run.start or f"student-{run.seed}")
        if run.student:
            model = self._end(self.output / "runs" / run.student)
        overrides = [f"model={model}", f"seed={run.seed}", f"stages=[{', '.join(run.stages)}]"]
        for number, stage in enumerate(run.stages):
            rows = run.rows or {"student": "few", "preference": "pairs", "hacking": "fixed"}[run.recipe]
            if "fresh" in run.name:
                rows = f"fresh_{number + 1}"
            overrides.append(f"{stage}.data=[{{path: {self.rows / rows}.jsonl}}]")
            if stage != "sft":
                overrides.append(f"{stage}.teacher={teacher}")
        self._train(run.recipe, folder, overrides + list(run.settings))
        stages = [folder / f"{run.stages.index(s) + 1:02d}-{s}" for s in run.measured or run.stages[-1:]]
        self._note(run.name, stages, began, "weak" if weak else "strong")
        if not run.name.startswith("ready"):  # where preferences start
            shutil.rmtree(folder)

    @staticmethod
    def _end(folder: Path) -> Path:
        """The last stage of a run."""
        return sorted(folder.glob("[0-9][0-9]-*"))[-1]

    def _train(self, recipe: str, folder: Path, overrides: list[str]) -> None:
        from mixlora.training.train import train

        train(RECIPES / f"{recipe}.yaml", folder, [*overrides, f"cache={self.cache}"])

    def _note(self, name: str, stages: list[Path], began: float, teacher: str = "") -> None:
        """Measures the checkpoints of stages, and writes the run's file, whole or not at all."""
        trained = time.process_time() - began
        exam, taught = self._examination(), self._taught(teacher) if teacher else None
        last = json.loads((stages[-1] / "log.json").read_text(encoding="utf-8"))
        figures = {
            "run": name,
            "cpu_seconds": round(trained, 1),
            "steps": last[-1]["step"],
            "log": [{k: v for k, v in each.items() if k not in ("grad_norm", "epoch")} for each in last[-2:]],
            "stages": {stage.name.partition("-")[2]: exam.of(stage, taught) for stage in stages},
        }
        self.results.mkdir(parents=True, exist_ok=True)
        partial = self.results / f"{name}.partial"
        partial.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        partial.rename(self.results / f"{name}.json")
        shown = figures["stages"][stages[-1].name.partition("-")[2]]
        print(f"    {name}: {trained:.0f} s of CPU, {json.dumps(shown)}", flush=True)

    def _examination(self) -> Any:
        from distillation_measure import Examination

        if "exam" not in self._exams:
            rows = self.rows / "test.jsonl"
            tasks = [row["task"] for row in read_jsonl(rows)]
            self._exams["exam"] = Examination(rows, tasks, self.cache, self.output / "starts" / "teacher")
        return self._exams["exam"]

    def _taught(self, which: str) -> Any:
        if which not in self._exams:
            self._exams[which] = self._examination().taught_by(self._end(self.teachers[which]))
        return self._exams[which]


def main() -> None:
    """Everything that is not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/study"))
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "study")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="run only what begins so, such as sft-dense")
    args = parser.parse_args()
    study = Study(args.output, args.results, args.seeds)
    study.prepare()
    seeds = range(args.seeds)
    for run in [run for make in (runs_of, hacking_runs) for seed in seeds for run in make(seed)]:
        if run.name.startswith(args.only):
            study.run(run)
            write_table(args.results)


if __name__ == "__main__":
    main()

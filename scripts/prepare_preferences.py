"""Write preference rows from rows whose answers are known: the right answer is chosen, that of another row rejected.

Run: python scripts/prepare_preferences.py     (after prepare_pictures.py, prepare_speech.py and prepare_pairs.py)
"""

from __future__ import annotations

import random
from typing import Any

from common import DATA, SEED, read_jsonl, run_main, write_jsonl

TASKS = ("digits", "clothes", "transcribe", "spoken_digit", "pairs")
ROWS = 200
"""Of each task."""


def preferences(rows: list[dict[str, Any]], count: int, rng: random.Random) -> list[dict[str, Any]]:
    """`count` rows of a task as preferences; a wrong answer is as likely as it is among the task's rows."""
    answers = [row["messages"][-1]["content"] for row in rows]
    if len(set(answers)) < 2:
        raise ValueError(f"all {len(rows)} rows have the same answer: there is none to reject")
    found = []
    for row in rng.sample(rows, min(count, len(rows))):
        *prompt, last = row["messages"]
        wrong = last["content"]
        while wrong == last["content"]:
            wrong = rng.choice(answers)
        found.append({"prompt": prompt, "chosen": last["content"], "rejected": wrong, "task": row.get("task", "")})
    return found


def main() -> None:
    """Write all tasks' preferences in one file."""
    rng = random.Random(SEED)
    rows = [pair for task in TASKS for pair in preferences(read_jsonl(DATA / f"{task}.jsonl"), ROWS, rng)]
    rng.shuffle(rows)
    write_jsonl(DATA / "preferences.jsonl", rows)


if __name__ == "__main__":
    run_main(main)

"""Does what users do with transformers' Phi-4-Multimodal and with ours, and writes what came out as a table.

python scripts/compare_differences.py docs/differences.md

The models are tiny and their weights random and loud, so that an error shows; they are those of the tests.
"""

import argparse
import sys
import warnings
from pathlib import Path

import transformers
from differences import Case, outcome

ROOT = Path(__file__).resolve().parents[1]
HEAD = """\
# What is different here

What a user does, what transformers' own Phi-4-Multimodal gives, what vLLM says of itself, and what mixlora gives.
`scripts/compare_differences.py` wrote this page. It ran each case with transformers {version} and with mixlora, on a
CPU, with tiny models of random weights and with the sizes of the processor as released. No released weights were run:
the page shows that something differs, not how much it matters there. vLLM was not run: its column says what its code
and its threads state of Phi-4-Multimodal, and is empty (-) where they state nothing that concerns the case.

*The same logits* are within 0.001 of their standard deviation. What is not as wanted, yet comes without an error, is
in bold type. `tests/scripts/test_compare_differences.py` runs the last column of each case.

| what you do | what you want | transformers {version} | vLLM, as documented | mixlora |
|---|---|---|---|---|
"""


def all_cases() -> list[Case]:
    """Every case, in the order of the page."""
    sys.path.insert(0, str(ROOT))  # models and processors are those of the tests
    import differences_adapters
    import differences_calls
    import differences_length
    import differences_media
    import differences_pipelines
    import differences_prompts
    import differences_ranks
    import differences_rows

    model = [differences_length, differences_rows, differences_adapters, differences_calls, differences_ranks]
    modules = [*model, differences_media, differences_prompts, differences_pipelines]
    return [case for module in modules for case in module.CASES]


def table_row(case: Case, theirs: str, ours: str) -> str:
    """One line of the table."""
    cells = (case.what.replace("|", "\\|"), case.wanted, theirs, case.vllm or "-", ours)
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Runs all cases and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?", default=ROOT / "docs" / "differences.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    lines = []
    for case in all_cases():
        lines.append(table_row(case, outcome(case.theirs), outcome(case.ours)))
        print(lines[-1], flush=True)
    page = HEAD.format(version=transformers.__version__) + "\n".join(lines) + "\n"
    args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()

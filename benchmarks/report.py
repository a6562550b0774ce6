"""Renders docs/performance.md and its plots from what `make bench` measured.

python -m benchmarks.report FOLDER [--page docs/performance.md]

FOLDER holds one JSON file a benchmark; those of a GPU lie in FOLDER/cuda. A target that is missed is shown with the
profile that explains it.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Results = dict[str, dict[str, Any]]
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Target:
    """A line of the table.

    Attributes:
        what, beside: what is measured, and next to what.
        benchmark: its file; ratio: its name there.
        bound: the ratio must be at least this, or at most where `at_most`.
    """

    what: str
    beside: str
    benchmark: str
    ratio: str
    bound: float
    at_most: bool = False

    def met(self, value: float) -> bool:
        """Whether a ratio is good enough."""
        return value <= self.bound if self.at_most else value >= self.bound


CALLS = "transformers + PEFT, three calls"
TARGETS = (
    Target("decode, 4 text + 4 image + 4 speech rows in one call", CALLS, "decode", "decode", 2.2),
    Target(
        "the same, over what the bare decoder gains from one call",
        "bare, three calls and one",
        "decode",
        "decode, of what the bare decoder gains",
        0.9,
    ),
    Target("prefill of the same rows", CALLS, "decode", "prefill", 1.5),
    Target("towers and prefill of the same rows", CALLS, "decode", "towers and prefill", 1.5),
    Target("adapters' own time in a mixed step", "PEFT's mixed batch", "mixed_step", "in order", 2.0),
    Target("encode one 2688 x 2688 and seven 448 x 448 pictures", "transformers", "towers", "pictures", 5.0),
    Target(
        "training step, 2 text + 3 image + 3 speech rows, tokens/s",
        "transformers + PEFT, a micro-batch a modality",
        "training_step",
        "tokens per second",
        1.5,
    ),
    Target("its peak memory", "the same", "training_step", "peak memory, ours of the peer's", 1.0, at_most=True),
    Target("process 64 pictures of 640 x 480", "transformers' processor", "processing", "pictures", 1.5),
    Target("process 64 clips of 10 s", "transformers' processor", "processing", "clips", 1.5),
    Target("`mixlora --help`", "`import transformers`", "startup", "mixlora --help", 0.6, at_most=True),
    Target("`import mixlora`", "`import transformers`", "startup", "import mixlora", 1.1, at_most=True),
)
AXES = {
    "batch": "rows of a step",
    "rank": "rank",
    "adapters": "adapters, a third of 24 rows and more on each",
    "share": "share of rows with an adapter",
    "spread": "spread of prompt lengths",
}


def markdown(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table; numbers with three digits."""
    shown = [tuple(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row) for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in (head, *shown)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def judged(results: Results, benchmark: str = "") -> list[tuple[Target, float]]:
    """The targets that were measured, all or those of a benchmark, and what was found."""
    return [
        (target, results[target.benchmark]["ratios"][target.ratio])
        for target in TARGETS
        if target.ratio in results.get(target.benchmark, {}).get("ratios", {}) and benchmark in ("", target.benchmark)
    ]


def targets(results: Results) -> str:
    """What was to be shown, and what was found."""
    rows: list[tuple[Any, ...]] = []
    for target, value in judged(results):
        wanted = f"≤ {target.bound:g} x" if target.at_most else f"≥ {target.bound:g} x"
        rows.append((target.what, target.beside, wanted, f"{value:.2f} x", "yes" if target.met(value) else "**no**"))
    return markdown(("what", "beside", "wanted", "found", "met"), rows)


def misses(results: Results) -> str:
    """For each benchmark with a miss, where the time goes."""
    parts = []
    for name in dict.fromkeys(target.benchmark for target in TARGETS):
        found = results.get(name)
        if found is None or "profiles" not in found:
            continue
        missed = [target.what for target, value in judged(results, name) if not target.met(value)]
        if not missed:
            continue
        parts.append(f"### Where the time goes: {name}\nMissed: {'; '.join(missed)}.")
        for who, shares in found["profiles"].items():
            rows = [(f"`{operation}`", f"{share:.1%}") for operation, share in shares.items()]
            parts.append(f"{who}:\n\n" + markdown(("operation", "share of the time"), rows))
    return "\n\n".join(parts) if parts else "All were met."


def details(results: Results) -> str:
    """Medians of each benchmark."""
    parts = []
    for name, found in results.items():
        if "medians" not in found:
            continue
        medians = found["medians"]
        if name == "decode":
            ways = list(medians["decode"])
            rows = [(way, *(medians[part][way] for part in medians)) for way in ways]
            parts.append(
                f"### {name}\nSeconds; of decoding, a step. Prompts of {', '.join(map(str, found['lengths']))} "
                f"tokens; answers differ from the peer's, row by row, by at most {found['differ']:.1g} of the "
                f"logits' standard deviation.\n\n" + markdown(("", *medians), rows)
            )
        else:
            parts.append(f"### {name}\n" + markdown(("", "seconds"), list(medians.items())))
        if name == "mixed_step":
            rows = [(who, seconds, found["shares"][who]) for who, seconds in found["adapters"].items()]
            parts.append(
                f"The adapters' weights are {found['bound']:.2f} of what a base step reads.\n\n"
                + markdown(("adapters' own time", "seconds", "of a base step"), rows)
            )
        if name == "training_step" and found["peak_mib"]:
            parts.append(markdown(("peak memory of a step", "MiB"), list(found["peak_mib"].items())))
    return "\n\n".join(parts)


def routed_linear(results: Results) -> str:
    """The table of ways to route a layer."""
    if "routed_linear" not in results:
        return ""
    found = results["routed_linear"]["of_base"]
    ways = list(dict.fromkeys(way for each in found.values() for way in each))
    rows = [(case, *(f"{each[way]:.2f}" if way in each else "-" for way in ways)) for case, each in found.items()]
    return markdown(("time over the base layer's", *ways), rows)


def plot(results: Results, folder: Path) -> list[Path]:
    """One picture for each axis of growth."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "performance"
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for axis, points in results.get("growth", {}).get("axes", {}).items():
        figure, area = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
        at = [point["at"] for point in points]
        other = "padded" if axis == "spread" else "no adapters"
        for name, label, style in (("bound", "bound", "k:"), ("base", other, "C1s--"), ("ours", "ours", "C0o-")):
            area.plot(at, [point[name] for point in points], style, label=label)
        area.set(xlabel=AXES[axis], ylabel="tokens/s", ylim=(0, None))
        if axis in ("batch", "rank", "adapters"):
            area.set_xscale("log", base=2)
            area.set_xticks(at, [f"{value:g}" for value in at])
        area.legend()
        path = folder / f"{axis}.svg"
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
        made.append(path)
    return made


PAGE = """# Performance

<!-- Rendered by benchmarks/report.py from the files of `make bench`. -->

Each figure stands beside what people use now, measured in the same run: both ways take turns, and what counts is the
median of the rounds' ratios. Both have the same weights and must give the same answers where the peer is right, else
the benchmark fails. `make bench` measures all of it again and renders this page; a single one is
`python -m benchmarks.decode --help`. The shapes are those of `benchmarks/shapes.py`: a decoder of Phi-4's proportions,
a quarter as wide.

Measured on: {where}.

## What it must show
{targets}

{misses_text}

{misses}

## How the cost grows
Tokens per second of a decoder of four layers. The bound is the speed without adapters, slowed by the weights that
adapters add to what a step reads; for prompts it is the speed where all are of one length.

{plots}

## Ways of routing a layer
The layer is a decoder's largest projection. What the package does is in the first column: rows that follow each other
as a slice, to which the product itself is added (up to 16 tokens on a CPU with the wide matrix first, since the other
order is slower there); other rows by index in decoding, as several slices where rows are long. In training one
autograd function stands for the layer and its adapters: the gradient of the input is summed in place as well.

{routed_linear}

## All figures
{details}
"""


def machine(results: Results) -> str:
    """Where it was measured, in words."""
    first = next(iter(results.values()))
    shapes = ", ".join(sorted({f"`{found['shapes']}`" for found in results.values()}))
    return (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, "
        f"transformers {first['transformers']}, {first['dtype']}, shapes {shapes}"
    )


def read(folder: Path) -> Results:
    """The results in a folder, by benchmark."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return {each["benchmark"]: each for each in found}


def render(folder: Path, page: Path) -> None:
    """Writes the page and its plots.

    Raises:
        ValueError: there is no result in `folder`.
    """
    results = read(folder)
    if not results:
        raise ValueError(f"{folder}: no results of benchmarks, such as decode.json")
    plots = plot(results, page.parent / page.stem)
    missed = misses(results)
    text = PAGE.format(
        where=machine(results),
        targets=targets(results),
        misses=missed,
        misses_text=notes(page),
        plots="\n".join(f"![{AXES[path.stem]}]({page.stem}/{path.name})" for path in plots),
        routed_linear=routed_linear(results),
        details=details(results),
    )
    if gpu := read(folder / "cuda"):
        text += f"\n## On a GPU\n{machine(gpu)}.\n\n{targets(gpu)}\n\n{routed_linear(gpu)}\n\n{details(gpu)}\n"
    page.write_text(text, encoding="utf-8")


def notes(page: Path) -> str:
    """What was written by hand about the misses, beside the page's plots."""
    path = page.parent / page.stem / "notes.md"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def main(argv: list[str] | None = None) -> None:
    """Renders the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args(argv)
    render(args.folder, args.page)
    print(f"wrote {args.page}")


if __name__ == "__main__":
    main()

"""Renders docs/performance.md and its plots from what `make bench` measured.

python -m benchmarks.report FOLDER [--page docs/performance.md]

FOLDER holds one JSON file a benchmark, and for those that only print a table a text file; those of a GPU lie in
FOLDER/cuda. A target that is missed is shown with the profile that explains it, and what is not there is named.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.targets import TARGETS, Results, Target, judged

__all__ = ["TARGETS", "Target", "judged", "read", "render"]
ROOT = Path(__file__).resolve().parents[1]


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


def absent(results: Results) -> str:
    """Which benchmarks gave nothing."""
    wanted = (*dict.fromkeys(target.benchmark for target in TARGETS), "growth", "routed_linear")
    missing = [name for name in wanted if name not in results]
    return f"Not measured in this run: {', '.join(missing)}." if missing else ""


def adapters_limit(found: dict[str, Any]) -> str:
    """What the weights of adapters allow, in words."""
    said = f"The adapters' weights are {found['bound']:.2f} of what a base step reads."
    if "least" not in found:
        return said
    most = " and ".join(f"{value:.2f} x ({order})" for order, value in found["limits"].items())
    return (
        f"{said} At the rate at which our base step reads its own, reading them takes {found['least']:.2g} s. "
        f"Were there nothing else to do, the ratio would be {most}."
    )


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
                f"{adapters_limit(found)}\n\n" + markdown(("adapters' own time", "seconds", "of a base step"), rows)
            )
        if name == "training_step":
            parts += training(found)
    return "\n\n".join(parts)


def training(found: dict[str, Any]) -> list[str]:
    """The parts of a training step."""
    parts = []
    if found["peak_mib"]:
        parts.append(markdown(("peak memory of a step", "MiB"), list(found["peak_mib"].items())))
    rows = [(who, *seconds.values()) for who, seconds in found["phases"].items()]
    parts.append(markdown(("seconds of one step", *found["phases"]["ours"]), rows))
    tokens = found["through"]
    rows = [(who, each["forward"], each["backward"]) for who, each in tokens.items()]
    ratio = sum(tokens["peer"].values()) / sum(tokens["ours"].values())
    parts.append(
        markdown(("tokens through the decoder", "forward", "backward"), rows)
        + f"\n\nIn products with the decoder's frozen matrices the peer has {ratio:.2f} times the tokens."
    )
    return parts


def others(folder: Path) -> str:
    """What benchmarks without a target print."""
    found = {path.stem: path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))}
    return "\n\n".join(f"### {name}\n```\n{printed}\n```" for name, printed in found.items() if printed)


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

{absent}

{notes}

{misses}

## How the cost grows
Tokens per second of a decoder of four layers. The bound is the speed without adapters, slowed by the weights that
adapters add to what a step reads; for prompts it is the speed where all are of one length.

{plots}

## Ways of routing a layer
The layer is a decoder's largest projection. What the package does is in the first column: rows that follow each other
as a slice, to which the product itself is added; other rows by index in decoding, as several slices where rows are
long. Fewer than 32 tokens are multiplied with the matrix first on a CPU, since the other order is slower there. In
training one autograd function stands for the layer and its adapters: the gradient of the input is summed in place as
well.

{routed_linear}

## All figures
{details}

## Others
{others}
"""


def machine(results: Results) -> str:
    """Where it was measured, in words."""
    first = next(iter(results.values()))
    shapes = ", ".join(sorted({f"`{found['shapes']}`" for found in results.values()}))
    return (
        f"{first['device']}, {first['threads']} threads, torch {first['torch']}, "
        f"transformers {first['transformers']}, {first['dtype']}, shapes {shapes}; "
        f"{sum(found.get('took', 0) for found in results.values()) / 60:.0f} minutes"
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
    text = PAGE.format(
        where=machine(results),
        targets=targets(results),
        absent=absent(results),
        misses=misses(results),
        notes=notes(page),
        others=others(folder),
        plots="\n".join(f"![{AXES[path.stem]}]({page.stem}/{path.name})" for path in plots),
        routed_linear=routed_linear(results),
        details=details(results),
    )
    if gpu := read(folder / "cuda"):
        text += f"\n## On a GPU\n{machine(gpu)}.\n\n{targets(gpu)}\n\n{routed_linear(gpu)}\n\n{details(gpu)}\n"
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    page.write_text(text, encoding="utf-8")


def notes(page: Path) -> str:
    """What is written by hand, and holds for any run; it lies beside the page's plots."""
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

"""What a study of long rows found: a table, and a heat map (depth by length) of each task."""

from pathlib import Path
from typing import Any, TypeAlias

DEPTHS = 5
"""Parts of a row that are told apart by where the fact stands, the first being the row's start."""
Cell: TypeAlias = dict[str, Any]
"""`method`, `task`, `length`; `asked` and `right`, each a list of `DEPTHS` numbers."""


def percent(cells: list[Cell]) -> str:
    """Right answers of some cells; a dash where nothing was asked."""
    asked = sum(sum(cell["asked"]) for cell in cells)
    return f"{100 * sum(sum(cell['right']) for cell in cells) / asked:.1f}" if asked else "-"


def table(cells: list[Cell], tasks: tuple[str, ...]) -> str:
    """A Markdown table: right answers in percent by task, method and length, over all depths."""
    lengths = sorted({cell["length"] for cell in cells})
    lines = ["| task | method | " + " | ".join(f"{length:,}" for length in lengths) + " |"]
    lines.append("|---" * (len(lengths) + 2) + "|")
    for task in tasks:
        for method in dict.fromkeys(cell["method"] for cell in cells):
            mine = [cell for cell in cells if (cell["task"], cell["method"]) == (task, method)]
            shown = [percent([cell for cell in mine if cell["length"] == length]) for length in lengths]
            lines.append(f"| {task} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def heat_maps(cells: list[Cell], tasks: tuple[str, ...], folder: Path) -> None:
    """Writes `TASK.png` for each task: a panel a method, green where answers are right, white where none was asked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lengths = sorted({cell["length"] for cell in cells})
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    for task in tasks:
        figure, panels = pyplot.subplots(
            2, -(-len(methods) // 2), figsize=(11, 5), sharex=True, sharey=True, squeeze=False, layout="constrained"
        )
        for axes, method in zip(panels.T.flat, methods, strict=False):
            shares = [[float("nan")] * len(lengths) for _ in range(DEPTHS)]
            for cell in cells:
                if (cell["task"], cell["method"]) == (task, method):
                    for depth, (asked, right) in enumerate(zip(cell["asked"], cell["right"], strict=True)):
                        shares[depth][lengths.index(cell["length"])] = 100 * right / asked
            image = axes.imshow(shares, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
            for depth, row in enumerate(shares):
                for place, share in enumerate(row):
                    if share == share:
                        axes.text(place, depth, f"{share:.0f}", ha="center", va="center", fontsize=7)
            axes.set_title(method, fontsize=9)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7, rotation=30)
            names = [f"{100 * depth // DEPTHS}-{100 * (depth + 1) // DEPTHS} %" for depth in range(DEPTHS)]
            axes.set_yticks(range(DEPTHS), names, fontsize=7)
        figure.supxlabel("tokens of the row", fontsize=9)
        figure.supylabel("where the fact stands", fontsize=9)
        figure.colorbar(image, ax=panels, label="right answers, %")
        figure.suptitle(task)
        figure.savefig(folder / f"{task}.png", dpi=80)
        pyplot.close(figure)

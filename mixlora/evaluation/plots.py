"""Plots of a report, each as two SVG files: `NAME.light.svg` and `NAME.dark.svg`. Needs the extra `report`.

No text here is markup: a dollar sign of an answer stays a dollar sign.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torchaudio.transforms import AmplitudeToDB, MelSpectrogram

from mixlora.evaluation.breakdown import Confusion, Part
from mixlora.modeling.audio_processing_mixlora import RATE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = Mapping[str, Sequence[Part]]
"""System -> its figures, of the same parts in the same order."""
SCHEMES: dict[str, dict[str, Any]] = {
    "light": {
        "face": "#ffffff",
        "ink": "#24292f",
        "line": "#d0d7de",
        "hues": ("#0b68cb", "#d4691b", "#2d8a4e", "#8250df"),
    },
    "dark": {
        "face": "#161b22",
        "ink": "#e6edf3",
        "line": "#3d444d",
        "hues": ("#58a6ff", "#f0883e", "#56d364", "#bc8cff"),
    },
}
"""Colours that fit the page in either scheme."""
WIDTH = 7.6
"""Inches."""
MOST_BARS = 24
LONGEST_NAME = 28


def require() -> None:
    """Raises ValueError, naming the extra, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("--report needs matplotlib: pip install 'mixlora-multimodal[report]'") from error


def bars(stem: Path, series: Series) -> None:
    """Shares in percent with their intervals, a group of bars a part; at most `MOST_BARS` parts."""
    names = [part.name for part in next(iter(series.values()))][:MOST_BARS]
    thick = 0.8 / len(series)

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for place, (system, parts) in enumerate(series.items()):
            shown = parts[:MOST_BARS]
            middle = [row + (place + 0.5) * thick - 0.4 for row in range(len(shown))]
            errors = _errors(shown)
            values = [100 * part.value for part in shown]
            style: dict[str, Any] = {
                "ecolor": axes.xaxis.label.get_color(),
                "capsize": 2,
                "error_kw": {"linewidth": 1},
            }
            axes.barh(middle, values, thick * 0.9, xerr=errors, label=short(system), **style)
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)  # the first at the top
        axes.set_xlabel("%")
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        _legend(figure, axes, len(series))

    _draw(stem, (WIDTH, 1.0 + len(names) * max(0.3, 0.17 * len(series))), paint)


def levels(stem: Path, series: Series, quantity: str) -> None:
    """Shares in percent over ordered levels, with their intervals."""
    names = [part.name for part in next(iter(series.values()))]

    def paint(figure: "Figure") -> None:
        axes = figure.subplots()
        for system, parts in series.items():
            values = [100 * part.value for part in parts]
            axes.errorbar(range(len(names)), values, _errors(parts), marker="o", capsize=3, label=short(system))
        axes.set_xticks(range(len(names)), [short(name) for name in names])
        axes.set_xlabel(quantity)
        axes.set_ylabel("%")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        _legend(figure, axes, len(series))

    _draw(stem, (WIDTH, 3.4), paint)


def matrix(stem: Path, found: Confusion) -> None:
    """Expected answers down, given ones across; every count that is not zero is written."""
    rows, columns = len(found.expected), len(found.given)
    side = 0.42 if rows <= 12 else 0.3

    def paint(figure: "Figure") -> None:
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.subplots()
        face, ink = axes.get_facecolor(), axes.xaxis.label.get_color()
        shades = LinearSegmentedColormap.from_list("shades", [face, _first_hue()])
        axes.imshow(found.counts, cmap=shades, vmin=0)
        most = max(max(line) for line in found.counts)
        for row, line in enumerate(found.counts):
            for column, count in enumerate(line):
                if count:
                    colour = face if count > most / 2 else ink
                    axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
        names = [short(name) for name in found.given]
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right"} if max(map(len, found.expected)) > 3 else {}
        axes.set_xticks(range(columns), names, **slanted)
        axes.set_yticks(range(rows), [short(name) for name in found.expected])
        axes.set_xlabel("given")
        axes.set_ylabel("expected")

    _draw(stem, (1.8 + side * columns, 1.5 + side * rows), paint)


def clip(stem: Path, samples: Any) -> None:
    """The wave and the mel spectrogram of a clip.

    Args:
        samples: float32 `[n]` at 16 kHz.
    """
    seconds = len(samples) / RATE
    mel = MelSpectrogram(RATE, n_fft=400, hop_length=160, n_mels=64)(torch.as_tensor(samples))  # [mels, frames]
    decibels = AmplitudeToDB(top_db=70)(mel).numpy()

    def paint(figure: "Figure") -> None:
        wave, spectrum = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        stride = max(1, len(samples) // 1200)  # more points than pixels only make the file large
        usable = samples[: len(samples) // stride * stride].reshape(-1, stride)  # [points, stride]
        times = [seconds * (point + 0.5) / len(usable) for point in range(len(usable))]
        wave.fill_between(times, usable.min(axis=1), usable.max(axis=1), linewidth=0.4, edgecolor="face")
        wave.set_yticks([])
        spectrum.imshow(decibels, origin="lower", aspect="auto", extent=(0, seconds, 0, len(decibels)), cmap="magma")
        spectrum.set_ylabel("mel")
        spectrum.set_xlabel("seconds")

    _draw(stem, (4.2, 2.4), paint)


def short(name: str) -> str:
    """A name that fits on an axis; what no font can hold becomes a question mark."""
    name = "".join(char if char.isprintable() else "?" for char in name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _draw(stem: Path, size: tuple[float, float], paint: Callable[["Figure"], None]) -> None:
    """Paints a figure once in each colour scheme. `size` is in inches."""
    import matplotlib
    from matplotlib.figure import Figure

    for scheme, colours in SCHEMES.items():
        with matplotlib.rc_context(_settings(**colours)):
            figure = Figure(figsize=size, layout="constrained")
            paint(figure)
            figure.savefig(stem.with_name(f"{stem.name}.{scheme}.svg"), metadata={"Date": None})


def _settings(face: str, ink: str, line: str, hues: tuple[str, ...]) -> Any:
    """matplotlib's settings of a colour scheme."""
    from cycler import cycler

    inked = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    lined = ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color")
    return {
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), face),
        **dict.fromkeys(inked, ink),
        **dict.fromkeys(lined, line),
        "axes.prop_cycle": cycler(color=hues),
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "legend.frameon": False,
        "text.parse_math": False,
        "svg.hashsalt": "mixlora",  # the same figures give the same file
    }


def _first_hue() -> str:
    import matplotlib

    return matplotlib.rcParams["axes.prop_cycle"].by_key()["color"][0]


def _errors(parts: Sequence[Part]) -> list[list[float]]:
    """Percent below and above each value, `[2, parts]`; a bootstrap's bound may lie a hair on the wrong side."""
    below = [100 * max(0.0, part.value - part.interval[0]) for part in parts]
    return [below, [100 * max(0.0, part.interval[1] - part.value) for part in parts]]


def _legend(figure: "Figure", axes: "Axes", systems: int) -> None:
    """A legend above the plot, where there is more than one system."""
    if systems > 1:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=systems)

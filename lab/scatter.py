"""The picture of a comparison: accuracy of runs against what they cost."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.plots import COLOURS, new_figure, png, short, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COSTS = {"multiply-adds": "multiply-adds of one image", "seconds": "seconds to train"}
MARKERS = "osD^vP*"
TICKS = 8  # labels of an axis at most
HEIGHTS = (4, -12, 16, -24, 28, -36, 40, -48)  # of a label above its point, in typographic points


def accuracy_against_cost(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws test accuracy over multiply-adds and over training time; whether there was anything to.

    `rows` as `lab.comparison.rows` gives them.
    """
    if not any(row[key] for row in rows for key in COSTS):
        return False
    write_picture(path, png(lambda: _draw(rows)))
    return True


def _draw(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = new_figure(11, 4.5)
    datasets = sorted({row["data set"] for row in rows})
    for axes, (key, label) in zip(figure.subplots(1, 2), COSTS.items(), strict=True):
        for number, dataset in enumerate(datasets):
            points = [row for row in rows if row["data set"] == dataset and row[key]]
            xs, ys = [row[key] for row in points], [row["accuracy"] for row in points]
            axes.scatter(xs, ys, color=COLOURS[number % len(COLOURS)], label=short(dataset, 30),
                         marker=MARKERS[number % len(MARKERS)], zorder=3)  # fmt: skip
        axes.set(xlabel=label, ylabel="test accuracy", xscale="log")
        axes.margins(0.15)
        low, high = axes.get_xlim()
        at = ticks(low, high)
        axes.set_xticks(at, [plain(value) for value in at])
        axes.set_xticks([], minor=True)
        axes.set_xlim(low, high)
        axes.grid()
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, title="data set", loc="outside right upper")
    figure.draw_without_rendering()  # the layout is known from here on
    for axes, key in zip(figure.axes, COSTS, strict=True):
        shown = [(row, name) for row, name in zip(rows, labels(rows), strict=True) if row[key]]
        _name(axes, [(row[key], row["accuracy"], name) for row, name in shown])
    return figure


def labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The name of each point: the model, or the run where a data set has several of the model."""
    times = Counter((row["data set"], row["model"]) for row in rows)
    folders = Counter(Path(row["run"]).name for row in rows)
    found = []
    for row in rows:
        folder = Path(row["run"]).name
        run = folder if folders[folder] == 1 and folder else row["run"]
        found.append(row["model"] if times[row["data set"], row["model"]] == 1 else run)
    return found


def ticks(low: float, high: float) -> list[float]:
    """Where a logarithmic axis has its labels: 2 to 8 round numbers within its limits."""
    from matplotlib.ticker import MaxNLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in (1, 2, 5), (1,):
        found = [step * 10.0**decade for decade in decades for step in steps]
        found = [value for value in found if low <= value <= high]
        if len(found) <= TICKS:
            break
    if len(found) < 3:  # less than a decade
        found = [
            float(v)
            for v in MaxNLocator(6, steps=(1, 2, 5, 10)).tick_values(low, high)
            if low <= v <= high
        ]
    return found[:: -(-len(found) // TICKS)]


def plain(value: float) -> str:
    """A number of an axis as people write it: 0.5, 20, 3,000, 1.5 M."""
    for power, unit in (12, " T"), (9, " G"), (6, " M"):
        if value >= 10**power:
            return f"{value / 10**power:,.6g}{unit}"
    return f"{value:,.6g}"


def _name(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Writes names beside points, each where it covers nothing; where there is no room, none."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    pixels = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in pixels]
    room = axes.get_window_extent()
    sides = ((5, "left"), (-5, "right"))
    for x, y, name in points:
        text = axes.annotate(
            short(name, 30), (x, y), xytext=(0, 0), textcoords="offset points", fontsize=8,
            parse_math=False, in_layout=False, zorder=2,
            arrowprops={"arrowstyle": "-", "color": "#888888", "lw": 0.5, "shrinkB": 3},
        )  # fmt: skip
        for height, (aside, align) in itertools.product(HEIGHTS, sides):
            text.set(position=(aside, height), horizontalalignment=align)
            text.get_window_extent()  # places it, and counts the line to its point, unlike
            box = Text.get_window_extent(text)
            if box.x0 >= room.x0 and box.x1 <= room.x1 and not box.count_overlaps(taken):
                taken.append(box)
                break
        else:
            text.remove()

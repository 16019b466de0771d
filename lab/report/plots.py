"""The picture of a comparison: accuracy of runs against what they cost."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lab import console
from lab.checkpoint.atomic_io import os_errors_as_user_errors, write_atomically
from lab.checkpoint.run_dir import IMAGES, PLOTS, PREDICTIONS
from lab.report.run_reader import RunResult, read_run

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# Okabe and Ito's colours (2008), told apart by colour-blind readers too. Where two stand for one
# thing each, their markers differ as well.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")
BLUE, ORANGE, GREEN, RED = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[4]
INK = "#222222"
STYLE: Any = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "axes.facecolor": "white",
    "text.color": INK, "axes.edgecolor": "#888888", "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": 11, "grid.alpha": 0.3, "font.size": 10,
    "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip
WRITTEN_OUT = 20  # classes whose cells have room for numbers
LISTED = 100  # classes that have a line each
FEW = 30  # points of a curve that are marked each
MAX_NAME_LENGTH = 18  # characters of a class name
MAX_LONG_NAME_LENGTH = 36  # where there is room
LETTER = 0.08  # inches that a plot grows for each further character


def draw(path: Path) -> None:
    """Draws the pictures of the run in a folder into its plots/; raises `UserError`."""
    run = read_run(path)
    drawings: dict[str, Callable[[], Figure]] = {
        "curves": partial(curves, run),
        "confusion_matrix": partial(confusion_matrix, run),
        "per_class": partial(per_class, run),
    }
    if (pictures := run.pictures()) is not None and run.predictions is not None:
        drawings["mistakes"] = partial(mistakes, run, pictures)
        drawings["batch"] = partial(batch, run, pictures)
    else:
        console.warn(f"no mistakes and no batch: {path} has no {IMAGES} or no {PREDICTIONS}")
    folder = path / PLOTS
    with os_errors_as_user_errors(folder):
        folder.mkdir(exist_ok=True)
    for name, figure in drawings.items():
        write_picture(folder / f"{name}.png", png(figure))


def write_picture(path: Path, content: bytes) -> None:
    """Writes a picture whole, or not at all."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def png(figure: Callable[[], Figure]) -> bytes:
    """The figure that a function makes, as a PNG file."""
    from matplotlib import rc_context

    file = io.BytesIO()
    # A class name in a script that the font lacks is drawn as boxes, without a word on the console.
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure().savefig(file, format="png")
    return file.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curves(run: RunResult) -> Figure:
    """Loss and accuracy over epochs, the learning rate over steps; the best epoch is marked."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(12, 3.6)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in run.history]
    chosen_on = "test" if run.report["selection_split"] == "test" else "validation"
    best = next((row for row in run.history if row["epoch"] == run.report["best_epoch"]), None)
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        few = len(epochs) <= FEW
        for part, label, colour, marker in (
            ("train", "train", BLUE, "o"), ("val", chosen_on, RED, "s"),
        ):  # fmt: skip
            values = [row[f"{part}_{key}"] for row in run.history]
            values = [math.nan if value is None else value for value in values]
            axes.plot(epochs, values, color=colour, marker=marker if few else "", ms=4, label=label)
        if best:
            axes.axvline(best["epoch"], color="#888888", ls="--", lw=1, zorder=0)
            height = math.nan if best[f"val_{key}"] is None else best[f"val_{key}"]
            axes.plot(best["epoch"], height, "*", ms=13, color=RED, mec=INK, mew=0.7,
                      zorder=4, label=f"best epoch: {best['epoch']}")  # fmt: skip
        axes.set(title=key)
        axes.legend(fontsize=9)
    steps = run.steps()
    by_step = len(steps) >= len(epochs)  # a short run may log fewer steps than it has epochs
    if by_step:
        xs, ys = [s["step"] for s in steps], [s["learning_rate"] for s in steps]
    else:
        xs, ys = epochs, [row["learning_rate"] for row in run.history]
    rate.plot(xs, ys, color=GREEN, marker="o" if len(xs) <= FEW else "", ms=4)
    rate.set(title="learning rate", ylim=(0, None))
    for axes in figure.axes:
        axes.set_xlabel("step" if axes is rate and by_step else "epoch")
        at = xs if axes is rate else epochs
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        if len(at) == 1:
            axes.set_xlim(at[0] - 0.5, at[0] + 0.5)
        axes.grid()
    return figure


def confusion_matrix(run: RunResult) -> Figure:
    """Shares of each true class, with counts; of many classes a list of the largest instead."""
    import numpy as np
    from matplotlib.colors import PowerNorm

    matrix, names = np.array(run.report["confusion_matrix"]), run.report["class_names"]
    num_classes = len(names)
    share = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    numbers = num_classes <= WRITTEN_OUT
    shown = [short(name, MAX_LONG_NAME_LENGTH if numbers else MAX_NAME_LENGTH) for name in names]
    if numbers:
        side = max(5.0, 0.62 * num_classes + 1.8) + _growth(shown)
        figure = new_figure(side + 0.6, side)
        axes = figure.subplots()
    else:
        figure = new_figure(16, 11)
        axes, beside = figure.subplots(1, 2, width_ratios=(11, 5))
        _list_confusions(beside, run, 25)
    # The root makes small shares visible beside a full diagonal.
    image = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    every = -(-num_classes // LISTED)  # more classes than lines: every n-th is named
    ticks = range(0, num_classes, every)
    size = 9 if numbers else max(5.0, min(9.0, 500 / len(ticks) / 1.15))
    labels = [shown[k] for k in ticks]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, labels, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(_title(run, "confusion matrix"), parse_math=False)
    for i, j in zip(*np.nonzero(matrix), strict=True) if numbers else ():
        colour = "white" if share[i, j] > 0.35 else INK
        text = f"{matrix[i, j]:,}\n{100 * share[i, j]:.1f} %"
        axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=colour)
    bar = figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.6)
    bar.ax.set_yticks([0, 0.05, 0.25, 0.5, 1], ["0 %", "5 %", "25 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    return figure


def _list_confusions(axes: Axes, run: RunResult, count: int) -> None:
    """Writes the most frequent confusions into empty axes."""
    axes.set_axis_off()
    axes.set_title("most frequent confusions: true → predicted")
    names = run.report["class_names"]
    for line, (i, j, number, share) in enumerate(run.confusions(count)):
        y = 1 - (line + 1) / (count + 1)
        pair = f"{short(names[i])} → {short(names[j])}"
        columns = ((0.12, f"{number:,}", "right"), (0.28, f"{100 * share:.1f} %", "right"),
                   (0.32, pair, "left"))  # fmt: skip
        for x, text, align in columns:
            axes.text(x, y, text, ha=align, va="center", parse_math=False)


def per_class(run: RunResult) -> Figure:
    """Precision, recall and F1 of each class, a line each, the lowest F1 at the bottom."""
    rows = sorted(run.report["per_class"], key=lambda row: row["f1"])
    shown = rows[:LISTED]
    names = [short(row["class"], MAX_LONG_NAME_LENGTH) for row in shown]
    height = 1.6 + max(6, len(shown)) * (0.3 if len(shown) <= 30 else 0.17)
    figure = new_figure(8.5 + _growth(names), height)
    axes = figure.subplots()
    ys = range(len(shown))
    left, right = ([row[key] for row in shown] for key in ("precision", "recall"))
    axes.hlines(ys, left, right, color="#bbbbbb", lw=2, zorder=1)
    for key, label, colour, marker in (
        ("precision", "precision", BLUE, ">"), ("recall", "recall", ORANGE, "<"),
        ("f1", "F1", INK, "o"),
    ):  # fmt: skip
        values = [row[key] for row in shown]
        axes.scatter(values, ys, color=colour, marker=marker, s=30, label=label, zorder=3)
    labels = [f"{name} ({row['support']:,})" for name, row in zip(names, shown, strict=True)]
    size = 9 if len(shown) <= 30 else 7
    axes.set_yticks(ys, labels, fontsize=size, parse_math=False)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    low = min(min(row[key] for key in ("precision", "recall", "f1")) for row in shown)
    # Where all are good, from 0 on none could be told from another; the axis says where it begins.
    axes.set_xlim(max(0, low - 0.05) if low > 0.5 else -0.02, 1.02 if low <= 0.5 else 1.005)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    which = f"the {LISTED} classes of lowest F1 of {len(rows)}" if len(rows) > LISTED else "classes"
    axes.set_title(_title(run, f"{which} (samples), by F1"), parse_math=False)
    axes.axvline(run.report["macro_f1"], color="#888888", ls="--", lw=1, zorder=0, label="macro-F1")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def mistakes(run: RunResult, pictures: dict[str, np.ndarray], count: int = 24) -> Figure:
    """The most confident wrong predictions, with true and predicted class."""
    assert run.predictions is not None
    assert run.confidence is not None
    index = pictures["mistakes_index"]
    order = (-run.confidence[index]).argsort(kind="stable")[:count]
    names, captions = run.report["class_names"], []
    for label, i in zip(pictures["mistakes_labels"][order], index[order], strict=True):
        predicted = short(names[run.predictions[i]], 12)
        sure = f"{100 * run.confidence[i]:.1f} % sure"
        file = f"\n{short(PurePosixPath(run.files[i]).name[::-1])[::-1]}" if run.files else ""
        captions.append(f"true: {short(names[label], 12)}\npredicted: {predicted}\n{sure}{file}")
    wrong = int((run.predictions != run.labels).sum())
    title = f"{len(order)} most confident of {wrong:,} mistakes"
    return _grid(pictures["mistakes"][order], captions, 6, _title(run, title))


def batch(run: RunResult, pictures: dict[str, np.ndarray]) -> Figure:
    """The first training batch as the network saw it."""
    names = run.report["class_names"]
    captions = [short(names[label], 17) for label in pictures["batch_labels"]]
    how = str(run.config.get("augment", "none"))
    title = f"{len(captions)} pictures of the first training batch; augmentation: {how}"
    return _grid(pictures["batch"], captions, 8, _title(run, title))


def _grid(images: np.ndarray, captions: Sequence[str], columns: int, title: str) -> Figure:
    """Pictures uint8 [n, C, H, W] in rows, each above its caption."""
    lines = 1 + max([caption.count("\n") for caption in captions], default=0)
    num_rows = max(1, -(-len(images) // columns))
    wide, high = 1.12, 1.08 + 0.13 * lines  # of a place, in widths of a picture
    figure = new_figure(1.35 * columns * wide, 1.35 * num_rows * high + 0.4)
    axes = figure.subplots()
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = number % columns * wide, -(number // columns) * high
        pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
        axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(x, x + 1, y, y + 1),
                    interpolation="nearest")  # fmt: skip
        axes.text(x, y - 0.03, caption, va="top", fontsize=8, linespacing=1.1, parse_math=False)
    axes.set(xlim=(0, columns * wide), ylim=(1 - num_rows * high, 1))
    axes.set_axis_off()
    axes.set_title(title, parse_math=False)
    return figure


def _growth(names: Sequence[str]) -> float:
    """Return the inches that names need beyond those of MAX_NAME_LENGTH characters."""
    return LETTER * (max(MAX_NAME_LENGTH, *map(len, names)) - MAX_NAME_LENGTH)


def _title(run: RunResult, text: str) -> str:
    return f"{run.config['model']} on {short(run.config['dataset'])}: {text}"


def short(name: str, width: int = MAX_NAME_LENGTH) -> str:
    """A class name, which may be a stranger's, for one line of at most `width` characters.

    It is cut in the middle: names of many classes often differ at their ends.
    """
    name = "".join(c if c.isprintable() else "?" for c in name)
    if len(name) > width:
        name = name[: width // 2] + "…" + name[len(name) - (width - 1) // 2 :]
    return name or "(no name)"


COSTS = {"multiply-adds": "multiply-adds of one image", "seconds": "seconds to train"}
MARKERS = "osD^vP*"
TICKS = 8  # labels of an axis at most
HEIGHTS = (4, -12, 16, -24, 28, -36, 40, -48)  # of a label above its point, in typographic points


def accuracy_against_cost(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws test accuracy over multiply-adds and over training time; whether there was anything to.

    `rows` as `lab.report.compare.rows` gives them.
    """
    if not any(row[key] for row in rows for key in COSTS):
        return False
    write_picture(path, png(lambda: _draw_scatter(rows)))
    return True


def _draw_scatter(rows: Sequence[dict[str, Any]]) -> Figure:
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
        shown = [
            (row, name) for row, name in zip(rows, label_offsets(rows), strict=True) if row[key]
        ]
        _short_name(axes, [(row[key], row["accuracy"], name) for row, name in shown])
    return figure


def label_offsets(rows: Sequence[dict[str, Any]]) -> list[str]:
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


def _short_name(axes: Axes, points: Sequence[tuple[float, float, str]]) -> None:
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

"""Draw the plots of a run."""

from __future__ import annotations

import io
import math
import warnings
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


# From the palette of Okabe and Ito (2008), which color-blind readers can distinguish. Series of a
# plot also differ in their markers.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
INK = "#222222"
STYLE: Any = {
    "figure.facecolor": "white", "savefig.facecolor": "white", "axes.facecolor": "white",
    "text.color": INK, "axes.edgecolor": "#888888", "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlelocation": "left", "axes.titlesize": 11, "grid.alpha": 0.3, "font.size": 10,
    "legend.frameon": False, "savefig.dpi": 150,
}  # fmt: skip
MAX_NUMBERED = 20  # classes; the cells of a larger confusion matrix have no room for numbers
MAX_LISTED = 100  # classes that are drawn by name
MAX_MARKED = 30  # points of a curve; a longer curve has no markers
MAX_NAME_LENGTH = 18  # characters of a class name
MAX_LONG_NAME_LENGTH = 36  # if there is room
CHAR_WIDTH = 0.08  # inches that a plot grows for each character beyond MAX_NAME_LENGTH


def draw(path: Path) -> None:
    """Draw the plots of the run in a directory into plots/.

    Raises `UserError` if the run is damaged or a file cannot be written.
    """
    run = read_run(path)
    figures: dict[str, Callable[[], Figure]] = {
        "curves": partial(curves, run),
        "confusion_matrix": partial(confusion_matrix, run),
        "per_class": partial(per_class, run),
    }
    if run.predictions is not None:
        figures["calibration"] = partial(calibration, run)
    if (images := run.images()) is not None and run.predictions is not None:
        figures["mistakes"] = partial(mistakes, run, images)
        figures["batch"] = partial(batch, run, images)
    else:
        console.warn(f"no plots of images: {path} has no {IMAGES} or no {PREDICTIONS}")
    directory = path / PLOTS
    with os_errors_as_user_errors(directory):
        directory.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save(directory / f"{name}.png", figure)


def save(path: Path, figure: Callable[[], Figure]) -> None:
    """Write the figure that a function creates to a PNG file."""
    write_atomically(path, png(figure))


def png(figure: Callable[[], Figure]) -> bytes:
    """Return the figure that a function creates as the content of a PNG file."""
    from matplotlib import rc_context

    file = io.BytesIO()
    # If the font lacks a character of a class name, matplotlib draws a box and warns.
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        figure().savefig(file, format="png")
    return file.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curves(run: RunResult) -> Figure:
    """Plot loss and accuracy over epochs, with the best epoch marked, and the learning rate."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(12, 3.6)
    loss, accuracy, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in run.history]
    selection_split = "test" if run.report["selection_split"] == "test" else "validation"
    best = next((row for row in run.history if row["epoch"] == run.report["best_epoch"]), None)
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        marked = len(epochs) <= MAX_MARKED
        for part, label, color, marker in (
            ("train", "train", BLUE, "o"), ("val", selection_split, RED, "s"),
        ):  # fmt: skip
            values = [row[f"{part}_{key}"] for row in run.history]
            values = [math.nan if value is None else value for value in values]
            marker = marker if marked else ""
            axes.plot(epochs, values, color=color, marker=marker, ms=4, label=label)
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
    rate.plot(xs, ys, color=GREEN, marker="o" if len(xs) <= MAX_MARKED else "", ms=4)
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
    """Plot the confusion matrix: fractions of each true class, with counts if there is room.

    With many classes, list the most frequent confusions beside it.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm

    matrix, names = np.array(run.report["confusion_matrix"]), run.report["class_names"]
    num_classes = len(names)
    fraction = matrix / matrix.sum(1, keepdims=True).clip(min=1)
    numbered = num_classes <= MAX_NUMBERED
    shown = [short(name, MAX_LONG_NAME_LENGTH if numbered else MAX_NAME_LENGTH) for name in names]
    if numbered:
        side = max(5.0, 0.62 * num_classes + 1.8) + _growth(shown)
        figure = new_figure(side + 0.6, side)
        axes = figure.subplots()
    else:
        figure = new_figure(16, 11)
        axes, list_axes = figure.subplots(1, 2, width_ratios=(11, 5))
        _list_confusions(list_axes, run, 25)
    # The square root makes small fractions visible beside the diagonal.
    image = axes.imshow(fraction, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    every = -(-num_classes // MAX_LISTED)  # with more classes, only every n-th is named
    ticks = range(0, num_classes, every)
    size = 9 if numbered else max(5.0, min(9.0, 500 / len(ticks) / 1.15))
    labels = [shown[k] for k in ticks]
    axes.set_xticks(ticks, labels, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, labels, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title(_title(run, "confusion matrix"), parse_math=False)
    for i, j in zip(*np.nonzero(matrix), strict=True) if numbered else ():
        color = "white" if fraction[i, j] > 0.35 else INK
        text = f"{matrix[i, j]:,}\n{100 * fraction[i, j]:.1f} %"
        axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=color)
    bar = figure.colorbar(image, ax=axes, label="fraction of the true class", shrink=0.6)
    bar.ax.set_yticks([0, 0.05, 0.25, 0.5, 1], ["0 %", "5 %", "25 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    return figure


def _list_confusions(axes: Axes, run: RunResult, count: int) -> None:
    """Write the most frequent confusions into empty axes."""
    axes.set_axis_off()
    axes.set_title("most frequent confusions: true → predicted")
    names = run.report["class_names"]
    for line, (i, j, number, fraction) in enumerate(run.confusions(count)):
        y = 1 - (line + 1) / (count + 1)
        pair = f"{short(names[i])} → {short(names[j])}"
        columns = ((0.07, f"{number:,}", "right"), (0.23, f"{100 * fraction:.1f} %", "right"),
                   (0.26, pair, "left"))  # fmt: skip
        for x, text, align in columns:
            axes.text(x, y, text, ha=align, va="center", parse_math=False)


def per_class(run: RunResult) -> Figure:
    """Plot precision, recall and F1 of each class, sorted by F1, the lowest at the bottom."""
    rows = sorted(run.report["per_class"], key=lambda row: row["f1"])
    shown = rows[:MAX_LISTED]
    names = [short(row["class"], MAX_LONG_NAME_LENGTH) for row in shown]
    height = 1.6 + max(6, len(shown)) * (0.3 if len(shown) <= 30 else 0.17)
    figure = new_figure(8.5 + _growth(names), height)
    axes = figure.subplots()
    ys = range(len(shown))
    left, right = ([row[key] for row in shown] for key in ("precision", "recall"))
    axes.hlines(ys, left, right, color="#bbbbbb", lw=2, zorder=1)
    for key, label, color, marker in (
        ("precision", "precision", BLUE, ">"), ("recall", "recall", ORANGE, "<"),
        ("f1", "F1", INK, "o"),
    ):  # fmt: skip
        values = [row[key] for row in shown]
        axes.scatter(values, ys, color=color, marker=marker, s=30, label=label, zorder=3)
    labels = [f"{name} ({row['support']:,})" for name, row in zip(names, shown, strict=True)]
    size = 9 if len(shown) <= 30 else 7
    axes.set_yticks(ys, labels, fontsize=size, parse_math=False)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    low = min(min(row[key] for key in ("precision", "recall", "f1")) for row in shown)
    # If all are high, an axis from 0 would not show their differences.
    axes.set_xlim(max(0, low - 0.05) if low > 0.5 else -0.02, 1.02 if low <= 0.5 else 1.005)
    axes.grid(axis="x")
    axes.tick_params(axis="y", length=0)
    subset = f", the lowest {MAX_LISTED} of {len(rows)} F1" if len(rows) > MAX_LISTED else ""
    axes.set_title(_title(run, f"classes (samples){subset}"), parse_math=False)
    axes.axvline(run.report["macro_f1"], color="#888888", ls="--", lw=1, zorder=0, label="macro-F1")
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def calibration(run: RunResult) -> Figure:
    """Plot the accuracy over the confidence, and over the coverage: a reliability diagram, and what
    is gained by leaving the least confident predictions undecided.
    """
    import torch

    from lab.engine.calibration import (
        NUM_BINS,
        coverage_curve,
        expected_calibration_error,
        reliability_bins,
    )

    confidence = torch.from_numpy(run.confidence)
    correct = torch.from_numpy(run.predictions == run.labels)
    counts, accuracy, mean = reliability_bins(confidence, correct)
    figure = new_figure(11, 4.5)
    reliability, selective = figure.subplots(1, 2)
    used, fractions = counts > 0, (counts / counts.sum()).tolist()
    middles = [(k + 0.5) / NUM_BINS for k in range(NUM_BINS)]
    reliability.bar(middles, fractions, 0.9 / NUM_BINS, color="#dddddd", zorder=1,
                    label="fraction of the samples")  # fmt: skip
    reliability.plot((0, 1), (0, 1), color="#888888", ls="--", lw=1, label="perfectly calibrated")
    reliability.plot(mean[used], accuracy[used], color=BLUE, marker="o", ms=5, label="accuracy")
    error = expected_calibration_error(confidence, correct)
    reliability.set(xlabel="confidence", xlim=(0, 1), ylim=(0, 1.02))
    reliability.set_title(_title(run, f"calibration error {error:.4f}"), parse_math=False)
    reliability.legend(fontsize=9, loc="upper left")
    threshold, coverage, accuracy = coverage_curve(confidence, correct)
    selective.plot(coverage, accuracy, color=BLUE, label="accuracy of the decided")
    selective.plot(coverage, threshold, color=ORANGE, ls=":", label="smallest confidence")
    selective.set(xlabel="coverage: fraction of the samples that are decided", xlim=(0, 1.005))
    selective.set_title("the most confident predictions only")
    selective.legend(fontsize=9, loc="lower left")
    for axes in figure.axes:
        axes.grid()
    return figure


def mistakes(run: RunResult, images: dict[str, np.ndarray]) -> Figure:
    """Plot the 24 most confident wrong predictions with their true and predicted classes."""
    assert run.predictions is not None
    assert run.confidence is not None
    index = images["mistakes_index"]
    order = (-run.confidence[index]).argsort(kind="stable")[:24]
    names, captions = run.report["class_names"], []
    for label, i in zip(images["mistakes_labels"][order], index[order], strict=True):
        predicted = short(names[run.predictions[i]], 12)
        confidence = f"confidence {100 * run.confidence[i]:.1f} %"
        file = f"\n{short(PurePosixPath(run.files[i]).name[::-1])[::-1]}" if run.files else ""
        captions.append(
            f"true: {short(names[label], 12)}\npredicted: {predicted}\n{confidence}{file}"
        )
    wrong = int((run.predictions != run.labels).sum())
    title = f"the {len(order)} most confident of {wrong:,} mistakes"
    return _grid(images["mistakes"][order], captions, 6, _title(run, title))


def batch(run: RunResult, images: dict[str, np.ndarray]) -> Figure:
    """Plot images of the first training batch as the model saw them."""
    names = run.report["class_names"]
    captions = [short(names[label], 17) for label in images["batch_labels"]]
    augment = str(run.config.get("augment", "none"))
    title = f"{len(captions)} images of the first training batch, augmentation: {augment}"
    return _grid(images["batch"], captions, 8, _title(run, title))


def _grid(images: np.ndarray, captions: Sequence[str], columns: int, title: str) -> Figure:
    """Plot images uint8 [n, C, H, W] in rows, each above its caption."""
    lines = 1 + max([caption.count("\n") for caption in captions], default=0)
    num_rows = max(1, -(-len(images) // columns))
    wide, high = 1.12, 1.08 + 0.13 * lines  # of a cell, in widths of an image
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
    return CHAR_WIDTH * (max(MAX_NAME_LENGTH, *map(len, names)) - MAX_NAME_LENGTH)


def _title(run: RunResult, text: str) -> str:
    return f"{run.model} on {short(run.dataset)}: {text}"


def short(name: str, width: int = MAX_NAME_LENGTH) -> str:
    """Return a name on one line of at most `width` printable characters, shortened in the middle.

    The names of many classes differ only at their ends.
    """
    name = "".join(c if c.isprintable() else "?" for c in name)
    if len(name) > width:
        name = name[: width // 2] + "…" + name[len(name) - (width - 1) // 2 :]
    return name or "(no name)"

"""Pictures of finished runs; the only importer of matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.rundir import write_atomically

# Okabe and Ito's colours (2008), told apart by colour-blind readers too; a data set each.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442")


def accuracy_against_cost(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draws test accuracy over multiply-adds and over training time; whether there was anything to.

    `rows` as `lab.comparison.rows` gives them.
    """
    from matplotlib.figure import Figure

    axes_of = {"multiply-adds": "multiply-adds of one image", "seconds": "seconds to train"}
    shown = {key: [row for row in rows if row[key]] for key in axes_of}
    if not any(shown.values()):
        return False
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    datasets = sorted({row["data set"] for row in rows})
    for axes, (key, label) in zip(figure.subplots(1, 2), axes_of.items(), strict=True):
        for number, dataset in enumerate(datasets):
            points = [row for row in shown[key] if row["data set"] == dataset]
            colour = COLOURS[number % len(COLOURS)]
            xs, ys = [row[key] for row in points], [row["accuracy"] for row in points]
            axes.scatter(xs, ys, color=colour, label=dataset, zorder=3)
            for row in points:
                axes.annotate(
                    row["model"],
                    (row[key], row["accuracy"]),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.set(xlabel=label, ylabel="test accuracy", xscale="log")
        axes.margins(0.15)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(title="data set", frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return True

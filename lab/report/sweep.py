"""Write the page of a sweep: its best settings, trials, and the importance of the settings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.checkpoint.run_dir import PAGE
from lab.report.html import data_uri, write_page
from lab.report.plots import BLUE, INK, new_figure, png, short
from lab.report.run_reader import RunResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_TRIALS = 10  # completed ones, for the importance of the settings
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}  # Optuna's, and in words
NUM_TICKS = 5  # of an axis of numbers


@dataclass(frozen=True)
class SweepTrial:
    """One trial of a sweep."""

    name: str  # of its run
    state: str  # one of the words in STATES
    settings: Mapping[str, Any]  # the searched ones
    value: float | None  # of the metric; of a pruned trial, in its last epoch
    num_epochs: int


def write(
    directory: Path,
    metric: str,
    trials: Sequence[SweepTrial],
    importance: Mapping[str, float],
    seeds: Sequence[RunResult],
    log_scale: Sequence[str],
) -> Path:
    """Write the page of the sweep in a directory, and return its path.

    `metric` is a column of history.jsonl. `importance` of each setting is empty if too few trials
    are complete; `seeds` are the runs of the best settings with other seeds; `log_scale` names the
    settings that were searched on a logarithmic scale. Raises `UserError` if it cannot be written.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    complete.sort(key=lambda t: t.value or 0.0, reverse=metric != "val_loss")
    others = [t for t in trials if t.state != "complete"]
    rows = [
        (run.path.name, best_value(run, metric), run.report["accuracy"], run.report["macro_f1"])
        for run in seeds
    ]
    context = {
        "directory": str(directory),
        "metric": metric,
        "trials": [*complete, *others],
        "names": list(complete[0].settings),
        "counts": {state: sum(t.state == state for t in trials)
                   for state in STATES.values()},
        "seeds": rows,
        "summary": [summary(column) for column in [*zip(*rows, strict=True)][1:]]
        if len(rows) > 1 else [],
        "coordinates": data_uri(
            png(partial(parallel_coordinates, complete, metric, log_scale)), "png"
        ),
        "importance": data_uri(png(partial(bars, importance)), "png") if importance else "",
        "min_trials": MIN_TRIALS,
    }  # fmt: skip
    write_page(directory / PAGE, "sweep.html", context)
    return directory / PAGE


def best_value(run: RunResult, metric: str) -> float | None:
    """Return the value of a column of history.jsonl in the best epoch of a run."""
    return next(row[metric] for row in run.history if row["epoch"] == run.report["best_epoch"])


def summary(values: Sequence[Any]) -> tuple[float, float]:
    """Return mean and standard deviation."""
    return statistics.mean(values), statistics.stdev(values)


def parallel_coordinates(
    trials: Sequence[SweepTrial], metric: str, log_scale: Sequence[str]
) -> Figure:
    """Plot each trial as a line through its settings and its value, colored by the value."""
    from matplotlib import colormaps

    columns = {name: [t.settings[name] for t in trials] for name in trials[0].settings}
    columns[metric] = [t.value for t in trials]
    scaled = [scale(values, name in log_scale) for name, values in columns.items()]
    figure = new_figure(max(7.0, 2.0 * len(columns)), 4.5)
    axes = figure.subplots()
    # The best trial is the first, and is drawn last.
    for heights in reversed([*zip(*(heights for heights, _ in scaled), strict=True)]):
        rank = heights[-1] if metric != "val_loss" else 1 - heights[-1]
        axes.plot(range(len(columns)), heights, color=colormaps["viridis"](1 - rank), lw=1.2)
    for x, (_, ticks) in enumerate(scaled):
        axes.axvline(x, color="#888888", lw=1, zorder=0)
        for height, text in ticks:
            axes.text(x + 0.03, height, short(text), fontsize=8, va="center", color=INK,
                      parse_math=False, bbox={"fc": "white", "ec": "none", "alpha": 0.7,
                      "pad": 0.5})  # fmt: skip
    axes.set_xticks(range(len(columns)), [short(name) for name in columns], parse_math=False)
    axes.set(xlim=(-0.1, len(columns) - 0.6), yticks=[])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set_title("settings of the complete trials, the best in dark")
    return figure


def scale(values: Sequence[Any], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Return the height of each value on an axis from 0 to 1, and the (height, text) of ticks.

    Choices that are not numbers have equal distances.
    """
    if any(isinstance(value, (str, bool)) for value in values):
        choices = sorted(set(values), key=str)
        step = 1 / max(1, len(choices) - 1)
        return [choices.index(v) * step for v in values], [
            (i * step, str(choice)) for i, choice in enumerate(choices)
        ]
    numbers = [math.log(value) if log else float(value) for value in values]
    low, high = min(numbers), max(numbers)
    heights = [(number - low) / (high - low) if high > low else 0.5 for number in numbers]
    if len(set(values)) <= NUM_TICKS:
        return heights, [*{(h, f"{v:.4g}") for h, v in zip(heights, values, strict=True)}]
    ticks = [low + (high - low) * i / (NUM_TICKS - 1) for i in range(NUM_TICKS)]
    texts = [f"{math.exp(t) if log else t:.3g}" for t in ticks]
    return heights, [(i / (NUM_TICKS - 1), text) for i, text in enumerate(texts)]


def bars(importance: Mapping[str, float]) -> Figure:
    """Plot the importance of each setting, the largest at the top."""
    rows = sorted(importance.items(), key=lambda row: row[1])
    figure = new_figure(11, 1.2 + 0.35 * len(rows))
    axes = figure.subplots()
    axes.barh([short(name) for name, _ in rows], [value for _, value in rows], color=BLUE)
    axes.set(xlabel="importance (PED-ANOVA); the sum is 1", xlim=(0, 1))
    axes.grid(axis="x")
    return figure

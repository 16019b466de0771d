"""Compare finished runs by their files: a row for each run, and confidence intervals."""

from __future__ import annotations

import csv
import html
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import console
from lab.checkpoint.atomic_io import os_errors_as_user_errors, write_atomically
from lab.config.schema import DEBUG, option
from lab.errors import UserError
from lab.report.markdown import table
from lab.report.run_reader import RunResult, read_run

NUM_RESAMPLES = 10_000  # of the bootstrap
COMPARISON_TABLE, COMPARISON_CSV = "comparison.md", "comparison.csv"
RECALL_TITLE = "Recall of each class"
INTERVAL_NOTE = """\
"vs. best" is the difference in accuracy to the best run on the same test split, with the 95 %
confidence interval of a paired bootstrap over the test samples. If the interval contains 0, the
difference may be due to chance. The interval does not include the variation between random seeds.
"""


@dataclass(frozen=True)
class CompareConfig:
    """The settings of a comparison."""

    # fmt: off
    runs: tuple[str, ...] = option((), "what to compare",
        "directories of finished runs", positional=True, nargs="*")
    output: str = option("comparison", "what to write",
        "directory for the table", metavar="DIR")
    debug: bool = DEBUG(group="what to write")
    # fmt: on

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no runs to compare", "Give the directories of one or more runs")


def read_runs(paths: Sequence[str]) -> list[RunResult]:
    """Read the finished runs in directories, and warn of each that cannot be read.

    Raises `UserError` if none can be read.
    """
    runs, errors = [], []
    for path in paths:
        try:
            runs.append(read_run(Path(path)))
        except UserError as error:
            errors.append(error)
    if not runs:
        raise errors[0]
    for skipped in errors:
        console.warn(f"skipped: {skipped}")
    return runs


def rows(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """Return one row for each run, sorted by dataset and by decreasing accuracy.

    "vs. best" is (difference, low, high): the difference in accuracy to the best run on the same
    test split, and its 95 % confidence interval. It is None for the best run itself and for runs
    without predictions.csv.
    """
    result = []
    for run in sorted(runs, key=lambda run: (run.dataset, -run.report["accuracy"])):
        best = max(
            (other for other in runs if other.has_same_test_split(run)),
            key=lambda other: other.report["accuracy"],
        )
        comparable = best is not run and run.predictions is not None
        result.append(_row(run) | {"vs. best": difference(run, best) if comparable else None})
    return result


def _row(run: RunResult) -> dict[str, Any]:
    config, report, history = run.config, run.report, run.history
    return {
        "run": str(run.path),
        "model": config["model"],
        "dataset": run.dataset,
        "accuracy": float(report["accuracy"]),
        "macro-F1": float(report["macro_f1"]),
        "vs. best": None,  # needs the other runs
        "selected on": report["selection_split"],
        "parameters": config.get("parameters"),
        "MACs": config.get("macs"),
        "epochs": len(history),
        "images/s": statistics.median(row["images_per_second"] for row in history),
        "seconds": run.seconds,
    }


def difference(run: RunResult, other: RunResult) -> tuple[float, float, float]:
    """Return the difference in accuracy and its 2.5 % and 97.5 % quantiles by the paired bootstrap.

    Test samples are drawn with replacement, the same ones for both runs (Efron, Tibshirani 1993,
    "An Introduction to the Bootstrap"). Each sample contributes -1, 0 or 1 to the difference, so it
    is enough to draw how often each of these occurs, which is fast.
    """
    import numpy as np

    assert run.predictions is not None
    assert other.predictions is not None
    correct = run.predictions == run.labels
    other_correct = other.predictions == other.labels
    counts = np.array(
        [
            (~correct & other_correct).sum(),
            (correct == other_correct).sum(),
            (correct & ~other_correct).sum(),
        ]
    )
    total = counts.sum()
    resampled = np.random.default_rng(0).multinomial(total, counts / total, NUM_RESAMPLES)
    low, high = np.quantile((resampled[:, 2] - resampled[:, 0]) / total, [0.025, 0.975])
    return float((counts[2] - counts[0]) / total), float(low), float(high)


def group_by_classes(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """Group the runs that have the same classes."""
    groups: dict[tuple[str, ...], list[RunResult]] = {}
    for run in runs:
        groups.setdefault(tuple(run.report["class_names"]), []).append(run)
    return list(groups.values())


def text(name: str, value: Any) -> str:
    """Format the value of column `name`."""
    if value is None:
        return "-"
    if name == "vs. best":
        return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*value)
    formats = {"images/s": ",.0f", "seconds": ",.0f", "parameters": ",d", "MACs": ",d"}
    return f"{value:{formats.get(name, '.4f' if isinstance(value, float) else '')}}"


def write(directory: Path, runs: Sequence[RunResult], rows: Sequence[dict[str, Any]]) -> None:
    """Write the table as Markdown and as CSV, both with the recall of each class.

    Create the directory if necessary. Raises `UserError` if a file cannot be written.
    """
    with os_errors_as_user_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    cells = [list(rows[0]), *([text(name, row[name]) for name in row] for row in rows)]
    parts = ["# Comparison\n", _markdown(cells), INTERVAL_NOTE, f"## {RECALL_TITLE}\n"]
    parts += [_markdown(_recall_table(group)) for group in group_by_classes(runs)]
    # Directory names need not be UTF-8.
    content = "\n".join(parts).encode("utf-8", "replace")
    write_atomically(directory / COMPARISON_TABLE, content)
    file = io.StringIO()
    names = list(rows[0])
    after = names.index("vs. best") + 1
    names[after:after] = ["low", "high"]
    writer = csv.DictWriter(file, [*names, "class recalls"])
    writer.writeheader()
    for row in rows:
        run = next(run for run in runs if str(run.path) == row["run"])
        recalls = ";".join(f"{r['class']}={r['recall']}" for r in run.report["per_class"])
        interval = zip(("vs. best", "low", "high"), row["vs. best"] or ("",) * 3, strict=True)
        writer.writerow(row | dict(interval) | {"class recalls": recalls})
    write_atomically(directory / COMPARISON_CSV, file.getvalue().encode("utf-8", "replace"))


def _recall_table(runs: Sequence[RunResult]) -> list[list[str]]:
    """Return a heading and one row for each class; each run has a column."""
    classes = zip(*(run.report["per_class"] for run in runs), strict=True)
    rows = [[row[0]["class"], *(f"{r['recall']:.4f}" for r in row)] for row in classes]
    return [["class", *(str(run.path) for run in runs)], *rows]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of a heading and rows."""
    heading, *body = (
        [html.escape(" ".join(c.split()), quote=False).replace("|", "\\|") for c in row]
        for row in rows
    )
    return table(heading, body) + "\n"

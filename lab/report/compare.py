"""Finished runs side by side, from their files alone: a row each, and what may be chance."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import console
from lab.checkpoint.atomic_io import os_errors_as_user_errors, write_atomically
from lab.config.schema import option
from lab.errors import UserError
from lab.report.markdown import table
from lab.report.run_reader import RunResult, read_run

RESAMPLES = 10_000
COMPARISON_TABLE, COMPARISON_CSV, COMPARISON_PLOT = (
    "comparison.md",
    "comparison.csv",
    "comparison.png",
)
COMPARISON_PAGE = "compare.html"


@dataclass(frozen=True)
class CompareConfig:
    """The settings of a comparison."""

    # fmt: off
    runs: tuple[str, ...] = option((), "what to compare",
        "folders of finished runs", positional=True, nargs="*")
    output: str = option("comparison", "what to write",
        "folder for the table, the picture and the page", metavar="DIR")
    debug: bool = option(False, "what to write", "show the traceback of an error")
    # fmt: on

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("no runs to compare", "Name the folders of runs")


def read_runs(paths: Sequence[str]) -> list[RunResult]:
    """The finished runs in folders; others are warned of. `UserError` where there is none."""
    runs, mistakes = [], []
    for path in paths:
        try:
            runs.append(read_run(Path(path)))
        except UserError as error:
            mistakes.append(error)
    if not runs:
        raise mistakes[0]
    for mistake in mistakes:
        console.warn(f"left out: {mistake}")
    return runs


def _row(run: RunResult) -> dict[str, Any]:
    """The row of a run, but for its difference to others."""
    config, report, history = run.config, run.report, run.history
    return {
        "run": str(run.path),
        "model": config["model"],
        "data set": run.dataset,
        "accuracy": float(report["accuracy"]),
        "macro-F1": float(report["macro_f1"]),
        "to best": None,
        "chosen on": report["selection_split"],
        "parameters": config.get("parameters"),
        "multiply-adds": config.get("macs"),
        "epochs": len(history),
        "images/s": statistics.median(row["images_per_second"] for row in history),
        "seconds": sum(row["train_seconds"] + row["eval_seconds"] for row in history),
    }


def rows(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """A row a run, the most accurate of a data set first.

    "to best" is (difference, low, high): of its accuracy to that of the best run on the same
    test split, with the 95 % interval; None for the best one, and without predictions.csv.
    """
    found = []
    for run in sorted(runs, key=lambda r: (r.dataset, -r.report["accuracy"])):
        best = max(
            (other for other in runs if other.has_same_test_split(run)),
            key=lambda other: other.report["accuracy"],
        )
        comparable = best is not run and run.predictions is not None
        found.append(_row(run) | {"to best": difference(run, best) if comparable else None})
    return found


def difference(run: RunResult, other: RunResult, seed: int = 0) -> tuple[float, float, float]:
    """(difference of accuracies, 2.5 % and 97.5 % quantile) by the paired bootstrap.

    Samples are drawn with replacement, the same ones for both runs (Efron, Tibshirani 1993,
    "An Introduction to the Bootstrap"). A sample counts -1, 0 or 1, so that drawing how many there
    are of each is the same, and takes no time. It is the noise of the test split alone: another
    seed of the training adds its own.
    """
    import numpy as np

    assert run.predictions is not None
    assert other.predictions is not None
    right, others = run.predictions == run.labels, other.predictions == other.labels
    counts = np.array([(~right & others).sum(), (right == others).sum(), (right & ~others).sum()])
    total = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(total, counts / total, RESAMPLES)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / total, [0.025, 0.975])
    return float((counts[2] - counts[0]) / total), float(low), float(high)


def by_classes(runs: Sequence[RunResult]) -> list[list[RunResult]]:
    """The runs, those with the same classes together."""
    groups: dict[tuple[str, ...], list[RunResult]] = {}
    for run in runs:
        groups.setdefault(tuple(run.report["class_names"]), []).append(run)
    return list(groups.values())


def text(name: str, value: Any) -> str:
    """A cell of the table, for people."""
    if value is None:
        return "-"
    if name == "to best":
        return "{:+.4f} [{:+.4f}, {:+.4f}]".format(*value)
    forms = {"images/s": ",.0f", "seconds": ",.0f", "parameters": ",d", "multiply-adds": ",d"}
    form = forms.get(name, ".4f" if isinstance(value, float) else "")
    return f"{value:{form}}"


def brief(count: int) -> str:
    """A count to three digits, with k, M, G or T for its thousands: 14.9 M."""
    for power, unit in (12, " T"), (9, " G"), (6, " M"), (3, " k"):
        if count >= 0.9995 * 10**power:  # which is rounded up to it
            return f"{count / 10**power:#.3g}".rstrip(".") + unit
    return str(count)


def _recalls(runs: Sequence[RunResult]) -> list[list[str]]:
    """A head, then a row a class of the recall that each run, a column, has of it."""
    classes = zip(*(run.report["per_class"] for run in runs), strict=True)
    rows = [[row[0]["class"], *(f"{r['recall']:.4f}" for r in row)] for row in classes]
    return [["class", *(str(run.path) for run in runs)], *rows]


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of a head and rows."""
    heads, *others = ([" ".join(c.split()).replace("|", "\\|") for c in row] for row in rows)
    return table(heads, others) + "\n"


def make(folder: Path) -> None:
    """Makes the folder of the comparison's files, unless it is there; raises `UserError`."""
    with os_errors_as_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def write(folder: Path, runs: Sequence[RunResult], rows: Sequence[dict[str, Any]]) -> None:
    """The table as Markdown and as COMPARISON_CSV, the latter with each class's recall."""
    cells = [list(rows[0]), *([text(name, row[name]) for name in row] for row in rows)]
    parts = ["# Comparison\n", _markdown(cells), INTERVAL, f"## {RECALLS}\n"]
    parts += [_markdown(_recalls(group)) for group in by_classes(runs)]
    content = "\n".join(parts).encode("utf-8", "replace")  # names of folders need not be UTF-8
    write_atomically(folder / COMPARISON_TABLE, lambda p: p.write_bytes(content))

    def write_csv(path: Path) -> None:
        with open(path, "w", newline="", encoding="utf-8", errors="replace") as file:
            names = list(rows[0])
            after = names.index("to best") + 1
            names[after:after] = ["low", "high"]
            writer = csv.DictWriter(file, [*names, "class accuracies"])
            writer.writeheader()
            for row in rows:
                run = next(run for run in runs if str(run.path) == row["run"])
                recalls = ";".join(f"{r['class']}={r['recall']}" for r in run.report["per_class"])
                bounds = zip(("to best", "low", "high"), row["to best"] or ("",) * 3, strict=True)
                writer.writerow(row | dict(bounds) | {"class accuracies": recalls})

    write_atomically(folder / COMPARISON_CSV, write_csv)


RECALLS = "Recall of each class (its own accuracy)"
INTERVAL = """\
"to best" is the difference in accuracy to the best run on the same test split, with the 95 %
interval of a paired bootstrap over its samples. An interval that holds 0 says that the difference
may be chance. Another seed of the training would add noise of its own.
"""

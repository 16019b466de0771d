"""Write the results of a cross-validation: of each fold, and of the predictions of all folds."""

from __future__ import annotations

import os
import shlex
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab import console
from lab.checkpoint.atomic_io import os_errors_as_user_errors
from lab.checkpoint.run_dir import PLOTS, PROBABILITIES, RunDir
from lab.data.fingerprint import changed_splits
from lab.engine import evaluation
from lab.engine.evaluation import Predictions
from lab.errors import UserError
from lab.report import plots
from lab.report.results import DRAW_VARIABLE
from lab.report.run_reader import RunResult, read_run

METRICS = {"accuracy": "accuracy", "macro_f1": "macro-F1"}  # of each fold, with names to print


def read_folds(paths: Sequence[Path]) -> list[RunResult]:
    """Return the finished runs of all folds.

    Raises `UserError` if one is unfinished or damaged, or if their images are not the same ones.
    """
    runs = [read_run(path) for path in paths]
    for run in runs:
        if run.predictions is None or (run.probabilities() is None and not _is_too_large(run)):
            raise UserError(
                f"{run.path} has no {PROBABILITIES}",
                "Write it again: "
                + shlex.join(["evaluate.py", str(run.path), "--output", str(run.path)]),
            )
        if changed_splits(_folds(runs[0]), _folds(run)):
            raise UserError(
                f"the images have changed between the training of {runs[0].path} and {run.path}",
                "Start again with another --name",
            )
    return runs


def _is_too_large(run: RunResult) -> bool:
    """Return whether the probabilities of a fold are not gathered, because of their size."""
    size = 4 * run.report["num_samples"] * len(run.report["class_names"])
    return size > evaluation.MAX_LOGITS_BYTES


def _folds(run: RunResult) -> dict[str, Any]:
    """Return the fingerprint of all images that were divided into folds."""
    return {"folds": run.config["fingerprints"]["folds"]}


def write_results(directory: Path, paths: Sequence[Path]) -> None:
    """Print the metrics of all folds; write the report, the predictions and the plots of all.

    `paths` are the directories of the runs, one for each fold. If the probabilities of a fold are
    too large to be saved, nothing is written.
    """
    runs = read_folds(paths)
    folds = [{"num_samples": run.report["num_samples"]}
             | {name: run.report[name] for name in METRICS} for run in runs]  # fmt: skip
    summary: dict[str, Any] = {"folds": folds}
    for name in METRICS:
        values = [fold[name] for fold in folds]
        summary |= {
            f"{name}_mean": statistics.mean(values),
            f"{name}_std": statistics.stdev(values),
        }
    rows = [(path.name, f"{fold['num_samples']:,}", *(f"{fold[name]:.4f}" for name in METRICS))
            for path, fold in zip(paths, folds, strict=True)]  # fmt: skip
    for text, key in (("mean", "mean"), ("standard deviation", "std")):
        rows.append((text, "", *(f"{summary[f'{name}_{key}']:.4f}" for name in METRICS)))
    console.print_table(("fold", "samples", *METRICS.values()), rows)
    if any(map(_is_too_large, runs)):
        console.warn(
            "no report of all folds: the probabilities of a fold would be larger than 200 MB"
        )
        return
    report = _write_pooled(directory, runs, summary)
    first = runs[0]
    title = f"{first.model} on {first.dataset}, predictions of all folds"
    console.report(report, title=title, files={"report": str(directory)})


def _write_pooled(
    directory: Path, runs: Sequence[RunResult], summary: dict[str, Any]
) -> dict[str, Any]:
    """Write and return the report of all folds, with `summary`; write predictions and plots."""
    first = runs[0]
    labels = np.concatenate([run.labels for run in runs])
    probabilities = torch.from_numpy(np.concatenate([run.probabilities() for run in runs]))
    predictions = Predictions.of(
        probabilities.clamp(min=1e-45).log(), torch.from_numpy(labels),
        tuple(first.report["class_names"]),
    )  # fmt: skip
    report: dict[str, Any] = {"split": "test", **predictions.report(), **summary}
    report["selection_split"] = first.report["selection_split"]
    files = [file for run in runs for file in run.files or ()] or None
    output = RunDir(directory)
    output.write_predictions(predictions.csv(files), predictions.safetensors())
    output.write_report(report)
    if os.environ.get(DRAW_VARIABLE) != "0":
        whole = RunResult(
            directory, first.config, report, [], labels, predictions.predictions.numpy(),
            predictions.confidence.numpy(), files,
        )  # fmt: skip
        with os_errors_as_user_errors(directory / PLOTS):
            (directory / PLOTS).mkdir(exist_ok=True)
        for draw in (plots.confusion_matrix, plots.per_class, plots.calibration):
            plots.save(directory / PLOTS / f"{draw.__name__}.png", partial(draw, whole))
    return report

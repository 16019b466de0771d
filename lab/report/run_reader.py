"""Read the files of a finished run and check their contents, without importing PyTorch."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from lab.checkpoint.atomic_io import check_types
from lab.checkpoint.run_dir import (
    CONFIG,
    HISTORY,
    IMAGES,
    PREDICTIONS,
    PROBABILITIES,
    REPORT,
    STEPS,
)
from lab.config.schema import TrainConfig, dataset_title, model_title
from lab.data.fingerprint import changed_splits
from lab.errors import UserError

if TYPE_CHECKING:
    import numpy as np


# The JSON keys that reports need, and their types.
FLOAT_OR_NULL = int | float | None  # null: not finite, or a mean over no samples
CONFIG_KEYS = {
    "model": str,
    "dataset": str,
    "recipe": str,
    "split_seed": int,
    "versions": dict,
    "world_size": int,
    "device": str,
    "precision": str,
}
REPORT_KEYS = {
    "accuracy": float,
    "macro_f1": float,
    "loss": FLOAT_OR_NULL,
    "num_samples": int,
    "best_epoch": int,
    "selection_split": str,
    "per_class": list,
    "confusion_matrix": list,
    "class_names": list,
}
EPOCH_KEYS = {
    "epoch": int,
    "train_loss": FLOAT_OR_NULL,
    "train_accuracy": FLOAT_OR_NULL,
    "val_loss": FLOAT_OR_NULL,
    "val_accuracy": float,
    "learning_rate": float,
    "train_seconds": float,
    "eval_seconds": float,
    "images_per_second": float,
}
CLASS_KEYS = {"class": str, "precision": float, "recall": float, "f1": float, "support": int}


@dataclass(frozen=True)
class RunResult:
    """The contents of a finished run's files."""

    path: Path
    config: dict[str, Any]
    report: dict[str, Any]
    history: list[dict[str, Any]]
    labels: np.ndarray | None  # int64 [N]; None if the run has no predictions.csv
    predictions: np.ndarray | None  # int64 [N]
    confidence: np.ndarray | None = None  # float64 [N]
    files: list[str] | None = None  # [N], relative to the data directory; None without files

    @property
    def dataset(self) -> str:
        """The name of the dataset to show."""
        return dataset_title(self.config["dataset"])

    @property
    def model(self) -> str:
        """The name of the model to show."""
        return model_title(self.config["model"])

    @property
    def seconds(self) -> float:
        """The duration of training and validation."""
        return sum(row["train_seconds"] + row["eval_seconds"] for row in self.history)

    def has_same_test_split(self, other: RunResult) -> bool:
        """Return whether two runs were tested on the same samples, as far as their files show."""
        recorded, current = (run.config.get("fingerprints", {}) for run in (self, other))
        if "test" in changed_splits(recorded, current):
            return False
        is_proven = "test" in recorded and recorded["test"] == current.get("test")
        same_seed = is_proven or self.config["split_seed"] == other.config["split_seed"]
        labels = [None if run.labels is None else run.labels.tobytes() for run in (self, other)]
        return self.dataset == other.dataset and same_seed and labels[0] == labels[1]

    def settings(self) -> TrainConfig:
        """Return the settings of train.py in config.json; raise `UserError` if one is invalid."""
        types = get_type_hints(TrainConfig)
        known = {f.name: self.config[f.name] for f in fields(TrainConfig) if f.name in self.config}
        with _damage_as_user_error(self.path / CONFIG):
            check_types(known, {name: types[name] for name in known})
        return TrainConfig(**known)

    def steps(self) -> list[dict[str, Any]]:
        """Return the rows of steps.jsonl, or an empty list if the file does not exist."""
        path = self.path / STEPS
        with _damage_as_user_error(path):
            lines = path.read_text().splitlines() if path.is_file() else []
            rows = [json.loads(line) for line in lines]
            for row in rows:
                check_types(row, {"step": int, "learning_rate": float})
        return rows

    def confusions(self, count: int) -> list[tuple[int, int, int, float]]:
        """Return the `count` largest cells off the diagonal of the confusion matrix.

        Each is (true class, predicted class, number of samples, fraction of the true class).
        """
        matrix = self.report["confusion_matrix"]
        cells = [(i, j, n) for i, row in enumerate(matrix) for j, n in enumerate(row)]
        errors = sorted((c for c in cells if c[0] != c[1] and c[2]), key=lambda c: -c[2])
        return [(i, j, n, n / sum(matrix[i])) for i, j, n in errors[:count]]

    def images(self) -> dict[str, np.ndarray] | None:
        """Return the tensors that `lab.report.mistakes.save_images` saved, or None without them.

        Without heat maps, `heatmaps` is empty.

        Raises `UserError` if their file is damaged.
        """
        import numpy as np
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.path / IMAGES
        if not path.is_file():
            return None
        with _damage_as_user_error(path, SafetensorError):
            tensors = load_file(path)
            num_classes = len(self.report["class_names"])
            for kind in ("batch", "mistakes"):
                images, labels = tensors[kind], tensors[f"{kind}_labels"]
                fits = images.ndim == 4 and images.shape[1] in (1, 3) and images.dtype == "uint8"
                if not fits or labels.shape != images.shape[:1]:
                    raise ValueError(f"{kind} is not a tensor of images")
                if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
                    raise ValueError(f"a label in {kind}_labels is not a class")
            if tensors["mistakes_index"].shape != tensors["mistakes_labels"].shape:
                raise ValueError("the shape of mistakes_index is wrong")
            heatmaps = tensors.setdefault("heatmaps", np.empty((0, 1, 1), np.uint8))
            fits = heatmaps.ndim == 3 and heatmaps.dtype == "uint8" and min(heatmaps.shape[1:]) > 0
            if not fits or len(heatmaps) > len(tensors["mistakes"]):
                raise ValueError("heatmaps is not a tensor of heat maps of the mistakes")
        return tensors

    def probabilities(self) -> np.ndarray | None:
        """Return the probabilities of all classes, float32 [N, K], or None if no file has them.

        Raises `UserError` if their file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.path / PROBABILITIES
        if not path.is_file():
            return None
        with _damage_as_user_error(path, SafetensorError):
            table = load_file(path)["probabilities"]
            if table.shape != (self.report["num_samples"], len(self.report["class_names"])):
                raise ValueError("the shape of probabilities is wrong")
        return table


def read_run(path: Path) -> RunResult:
    """Read the run in a directory.

    Raises `UserError` if it is not the directory of a run, or the run is unfinished or damaged.
    """
    import numpy as np

    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path} is not the directory of a run: it has no {CONFIG}",
            "Give a directory that train.py has written",
        )
    if not (path / REPORT).is_file():
        command = shlex.join(["train.py", "--resume", str(path)])
        raise UserError(f"the run {path} is not finished", f"Finish it: {command}")
    with _damage_as_user_error(path / CONFIG) as file:
        config = json.loads(file.read_bytes())
        check_types(config, CONFIG_KEYS)
    with _damage_as_user_error(path / REPORT) as file:
        report = json.loads(file.read_bytes())
        check_types(report, REPORT_KEYS)
        num_classes = len(report["class_names"])
        for row in report["per_class"]:
            check_types(row, CLASS_KEYS)
        matrix = np.array(report["confusion_matrix"], dtype=np.int64)
        if len(report["per_class"]) != num_classes or matrix.shape != (num_classes,) * 2:
            raise ValueError("per_class or confusion_matrix does not match class_names")
    with _damage_as_user_error(path / HISTORY) as file:
        history = [json.loads(line) for line in file.read_text().splitlines()]
        for row in history or [None]:
            check_types(row, EPOCH_KEYS)
    labels = predictions = confidence = files = None
    if (path / PREDICTIONS).is_file():
        with _damage_as_user_error(path / PREDICTIONS) as file:
            table, files = _read_predictions(file)
            if len(table) != report["num_samples"]:
                raise ValueError(f"{len(table)} rows for {report['num_samples']} samples")
            confidence = table[:, 2].copy()
            labels, predictions = table[:, :2].astype(np.int64).T
            for classes in (labels, predictions):
                if not 0 <= classes.min() <= classes.max() < num_classes:
                    raise ValueError("a label or prediction is not a class")
    return RunResult(path, config, report, history, labels, predictions, confidence, files)


def _read_predictions(file: Path) -> tuple[np.ndarray, list[str] | None]:
    """Return (float64 [N, 3]: label, prediction, confidence; the images' files, if any).

    Rows are converted one by one, as a dictionary for each of a million would take gigabytes.
    """
    import numpy as np

    files: list[str] = []
    # File names need not be UTF-8.
    with open(file, encoding="utf-8", errors="surrogateescape", newline="") as text:
        rows = csv.reader(text)
        header = next(rows, [])
        names = [header.index(name) for name in ("label", "prediction", "confidence")]
        file_column = header.index("file") if "file" in header else None

        def numbers() -> Iterator[tuple[float, ...]]:
            for row in rows:
                if file_column is not None:
                    files.append(row[file_column])
                yield tuple(float(row[i]) for i in names)

        table = np.fromiter(numbers(), np.dtype((np.float64, 3)))
    return table, files if file_column is not None else None


@contextmanager
def _damage_as_user_error(file: Path, kind: type[Exception] = ValueError) -> Iterator[Path]:
    """Yield `file`; turn the errors of reading a damaged file, also `kind`, into `UserError`."""
    try:
        yield file
    except (OSError, ValueError, LookupError, TypeError, kind) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error) or repr(error)
        run = shlex.quote(str(file.parent))
        hint = "Restore it from a backup: only training writes it"
        if file.name in (REPORT, PREDICTIONS, PROBABILITIES):
            hint = f"Write it again: evaluate.py {run} --output {run}"
        elif file.name in (IMAGES, STEPS):
            hint = "Delete it: it is optional"
        raise UserError(
            f"the run {file.parent} is damaged: {file.name} ({reason})", hint
        ) from error

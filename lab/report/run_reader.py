"""What a finished run left, read from its files; it imports no PyTorch."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from lab.checkpoint.run_dir import CONFIG, HISTORY, IMAGES, PREDICTIONS, REPORT, STEPS
from lab.config.schema import TrainConfig
from lab.data.fingerprint import changed_splits
from lab.errors import UserError

if TYPE_CHECKING:
    import numpy as np


# What is drawn and told of a run, and its types in JSON.
NUMBER = (int, float)
OR_NULL = (int, float, type(None))  # null: not finite, or a mean over no samples
SETTINGS = {"model": str, "dataset": str, "recipe": str, "split_seed": int, "versions": dict,
            "world_size": int, "device": str, "precision": str}  # fmt: skip
NUMBERS = {"accuracy": NUMBER, "macro_f1": NUMBER, "loss": OR_NULL, "num_samples": int,
           "best_epoch": int, "selection_split": str, "per_class": list, "confusion_matrix": list,
           "class_names": list}  # fmt: skip
EPOCH = {"epoch": int, "train_loss": OR_NULL, "train_accuracy": OR_NULL, "val_loss": OR_NULL,
         "val_accuracy": NUMBER, "learning_rate": NUMBER, "train_seconds": NUMBER,
         "eval_seconds": NUMBER, "images_per_second": NUMBER}  # fmt: skip
CLASS = {"class": str, "precision": NUMBER, "recall": NUMBER, "f1": NUMBER, "support": int}


@dataclass(frozen=True)
class RunResult:
    """What a finished run left."""

    path: Path
    config: dict[str, Any]
    report: dict[str, Any]
    history: list[dict[str, Any]]
    labels: np.ndarray | None  # int64 [N]; None where the run has no predictions.csv
    predictions: np.ndarray | None  # int64 [N]
    confidence: np.ndarray | None = None  # float64 [N]
    files: list[str] | None = None  # [N], below the data folder; None where samples have none

    @property
    def dataset(self) -> str:
        """The data set's name for people: `folder (pics)` of pictures in a folder pics."""
        name = str(self.config["dataset"])
        if name != "folder":
            return name
        place = str(self.config.get("data_dir"))
        return f"{name} ({Path(place).name or place})"

    def has_same_test_split(self, other: RunResult) -> bool:
        """Return whether two runs were tested on the same samples, as far as their files tell."""

        def split(run: RunResult) -> tuple[Any, ...]:
            labels = None if run.labels is None else run.labels.tobytes()
            return run.config["dataset"], run.config["split_seed"], labels

        recorded, current = (run.config.get("fingerprints", {}) for run in (self, other))
        return split(self) == split(other) and "test" not in changed_splits(recorded, current)

    def settings(self) -> TrainConfig:
        """What train.py was told, of what config.json holds."""
        types = get_type_hints(TrainConfig)
        known = {f.name: self.config[f.name] for f in fields(TrainConfig) if f.name in self.config}
        with _reading(self.path / CONFIG):
            for name, value in known.items():
                if not isinstance(value, NUMBER if types[name] is float else types[name]):
                    raise ValueError(f"{name} is {value!r}")
        return TrainConfig(**known)

    def steps(self) -> list[dict[str, Any]]:
        """The rows of steps.jsonl; none where there is no such file."""
        path = self.path / STEPS
        with _reading(path):
            lines = path.read_text().splitlines() if path.is_file() else []
            rows = [json.loads(line) for line in lines]
            for row in rows:
                _check_types(row, {"step": int, "learning_rate": NUMBER})
        return rows

    def confusions(self, count: int) -> list[tuple[int, int, int, float]]:
        """(true class, predicted class, samples, their share of the true class), largest first."""
        matrix = self.report["confusion_matrix"]
        cells = [(i, j, n) for i, row in enumerate(matrix) for j, n in enumerate(row)]
        errors = sorted((c for c in cells if c[0] != c[1] and c[2]), key=lambda c: -c[2])
        return [(i, j, n, n / sum(matrix[i])) for i, j, n in errors[:count]]

    def pictures(self) -> dict[str, np.ndarray] | None:
        """The tensors of `lab.report.mistakes.keep`; None where the run has none."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        path = self.path / IMAGES
        if not path.is_file():
            return None
        with _reading(path, SafetensorError):
            found = load_file(path)
            num_classes = len(self.report["class_names"])
            for kind in ("batch", "mistakes"):
                images, labels = found[kind], found[f"{kind}_labels"]
                fits = images.ndim == 4 and images.shape[1] in (1, 3) and images.dtype == "uint8"
                if not fits or labels.shape != images.shape[:1]:
                    raise ValueError(f"{kind} are no pictures")
                if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
                    raise ValueError(f"a label of {kind} is no class")
            if found["mistakes_index"].shape != found["mistakes_labels"].shape:
                raise ValueError("a mistake has no index")
        return found


def read_run(path: Path) -> RunResult:
    """The run in a folder; raises `UserError` where it is none, is not finished, or damaged."""
    import numpy as np

    if not (path / CONFIG).is_file():
        raise UserError(f"{path} is no run's folder: it has no {CONFIG}", "Name one of train.py's")
    if not (path / REPORT).is_file():
        raise UserError(f"the run {path} is not finished", f"Finish it: train.py --resume {path}")
    with _reading(path / CONFIG) as file:
        config = json.loads(file.read_bytes())
        _check_types(config, SETTINGS)
    with _reading(path / REPORT) as file:
        report = json.loads(file.read_bytes())
        _check_types(report, NUMBERS)
        num_classes = len(report["class_names"])
        for row in report["per_class"]:
            _check_types(row, CLASS)
        matrix = np.array(report["confusion_matrix"], dtype=np.int64)
        if len(report["per_class"]) != num_classes or matrix.shape != (num_classes,) * 2:
            raise ValueError("the numbers of the classes do not fit the classes")
    with _reading(path / HISTORY) as file:
        history = [json.loads(line) for line in file.read_text().splitlines()]
        for row in history or [None]:
            _check_types(row, EPOCH)
    labels = predictions = confidence = files = None
    if (path / PREDICTIONS).is_file():
        with _reading(path / PREDICTIONS) as file:
            # A picture's name need not be UTF-8.
            text = file.read_bytes().decode("utf-8", "surrogateescape")
            lines = list(csv.DictReader(io.StringIO(text, newline="")))
            names = ("label", "prediction", "confidence")
            rows = [tuple(float(line[name]) for name in names) for line in lines]
            labels, predictions, confidence = np.array(rows).T
            if "file" in lines[0]:
                files = [line["file"] for line in lines]
                if None in files:
                    raise ValueError("a prediction has no file")
            labels, predictions = labels.astype(np.int64), predictions.astype(np.int64)
            for classes in (labels, predictions):
                if not 0 <= classes.min() <= classes.max() < num_classes:
                    raise ValueError("a prediction is no class")
    return RunResult(path, config, report, history, labels, predictions, confidence, files)


@contextmanager
def _reading(file: Path, kind: type[Exception] = ValueError) -> Iterator[Path]:
    """The file; turns what it raises where it is damaged, `kind` too, into a `UserError`."""
    try:
        yield file
    except (OSError, ValueError, LookupError, TypeError, kind) as error:
        said = error.strerror if isinstance(error, OSError) else str(error) or repr(error)
        run = shlex.quote(str(file.parent))
        hint = "Copy it back from where it is whole: only a training makes it"
        if file.name in (REPORT, PREDICTIONS):
            hint = f"Make it again: evaluate.py {run} --output {run}"
        elif file.name in (IMAGES, STEPS):
            hint = "Delete it: the rest can do without"
        raise UserError(f"the run {file.parent} is damaged: {file.name} ({said})", hint) from error


def _check_types(group: Any, types: dict[str, Any]) -> None:
    """Nothing; raises ValueError where `group` is no dict that has these."""
    for name, kind in types.items():
        if not isinstance(group, dict) or not isinstance(group.get(name, ...), kind):
            raise ValueError(f"no {name} in {str(group)[:40]}")

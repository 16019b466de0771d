"""Exact classification metrics from labels and predictions; equal to scikit-learn's (promise P1).

As there with `labels=range(K)` and `zero_division=0`: a class that is never predicted has precision
0, one that never occurs has recall 0, and macro-F1 is the mean over all K classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Return counts, int64 [K, K]: row = true class, column = predicted class; from int64 [N] each.

    Raises `ValueError` if a class is not in 0 ... K - 1, or the counts do not sum to N.
    """
    for name, classes in (("label", labels), ("prediction", predictions)):
        # It would be counted in the cell of other classes.
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"a {name} is not one of the {num_classes} classes")
    cells = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    matrix = cells.view(num_classes, num_classes)
    if not int(matrix.sum()) == len(labels) == len(predictions):
        raise ValueError(
            f"the confusion matrix of {len(labels)} labels and {len(predictions)} predictions "
            f"holds {int(matrix.sum())} samples"
        )
    return matrix


def per_class(matrix: Tensor) -> dict[str, Tensor]:
    """precision, recall, f1 (float64 [K]) and support (int64 [K]) of a confusion matrix."""
    hits = matrix.diagonal().double()
    predicted, support = matrix.sum(0), matrix.sum(1)
    return {
        "precision": hits / predicted.clamp(min=1),
        "recall": hits / support.clamp(min=1),
        "f1": 2 * hits / (predicted + support).clamp(min=1),
        "support": support,
    }


def report(
    labels: Tensor, predictions: Tensor, losses: Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    """The numbers of report.json from int64 [N], int64 [N], float64 [N]; N >= 1."""
    matrix = confusion_matrix(labels, predictions, len(class_names))
    classes = per_class(matrix)
    return {
        "num_samples": len(labels),
        "loss": losses.mean().item(),
        "accuracy": matrix.diagonal().sum().item() / len(labels),
        "macro_f1": classes["f1"].mean().item(),
        "per_class": [
            {"class": name, **{key: values[i].item() for key, values in classes.items()}}
            for i, name in enumerate(class_names)
        ],
        "confusion_matrix": matrix.tolist(),
        "class_names": list(class_names),
    }


def is_better(row: Mapping[str, float], best: Mapping[str, float], by: str) -> bool:
    """Whether an epoch's row of history.jsonl beats the `best` so far (empty before the first).

    A tie does not: the earlier epoch is kept. An epoch whose number is not finite never beats one
    whose number is.
    """
    if not best:
        return True
    new, old = row[f"val_{by}"], best[f"val_{by}"]
    if not math.isfinite(new):
        return False
    return not math.isfinite(old) or (new < old if by == "loss" else new > old)


def caveat(split: str, selected_on: str | None) -> str:
    """What makes a number on `split` optimistic; empty where nothing does.

    `selected_on`: what the best epoch was chosen on, "validation" or "test"; None for data apart
    from those of the training.
    """
    if selected_on == split == "test":
        return "chosen on the test split (the notebooks' protocol): an optimistic number"
    if selected_on == "validation" and split == "val":
        return "the best epoch was chosen on this split: an optimistic number"
    if selected_on and split in ("train", "all"):
        return "these are samples that were trained on: an optimistic number"
    return ""

"""Exact classification metrics from labels and predictions, equal to scikit-learn's (promise P1).

As with `zero_division=0`, a class that is never predicted has precision 0, and one that never
occurs has recall 0. Macro-F1 is the mean over the classes that occur or are predicted.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

NUM_RESAMPLES = 1000  # of the bootstrap
MAX_HELD = 10_000_000  # numbers of the bootstrap that are in memory at a time


def check_classes(labels: Tensor, predictions: Tensor, num_classes: int) -> None:
    """Raise `ValueError` if a class is not in 0 ... K - 1.

    `confusion_matrix` would count it in the cell of other classes.
    """
    for name, classes in (("label", labels), ("prediction", predictions)):
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < num_classes:
            raise ValueError(f"a {name} is not one of the {num_classes} classes")


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Return counts int64 [K, K]: the rows are true classes, the columns predicted classes.

    Labels and predictions are int64 [N]. Raises `ValueError` if a class is not in 0 ... K - 1, or
    the counts do not sum to N.
    """
    check_classes(labels, predictions, num_classes)
    cells = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    matrix = cells.view(num_classes, num_classes)
    if not int(matrix.sum()) == len(labels) == len(predictions):
        raise ValueError(
            f"the confusion matrix of {len(labels)} labels and {len(predictions)} predictions "
            f"sums to {int(matrix.sum())}"
        )
    return matrix


def per_class(labels: Tensor, predictions: Tensor, num_classes: int) -> dict[str, Tensor]:
    """Return precision, recall, f1 (float64 [K]) and support (int64 [K]) of each class.

    Labels and predictions are int64 [N]. The confusion matrix is not needed, so that memory is
    linear in K. Raises `ValueError` if a class is not in 0 ... K - 1.
    """
    check_classes(labels, predictions, num_classes)
    num_correct, predicted, support = (
        torch.bincount(classes, minlength=num_classes)
        for classes in (labels[labels == predictions], predictions, labels)
    )
    num_correct = num_correct.double()
    return {
        "precision": num_correct / predicted.clamp(min=1),
        "recall": num_correct / support.clamp(min=1),
        "f1": 2 * num_correct / (predicted + support).clamp(min=1),
        "support": support,
    }


def scores(
    labels: Tensor, predictions: Tensor, losses: Tensor, num_classes: int
) -> dict[str, float]:
    """Return loss, accuracy and macro-F1 in time linear in N and K.

    Labels and predictions are int64 [N], losses float64 [N], and N is at least 1.
    """
    present = torch.bincount(torch.cat((labels, predictions)), minlength=num_classes) > 0
    return {
        "loss": losses.mean().item(),
        "accuracy": (labels == predictions).sum().item() / len(labels),
        "macro_f1": per_class(labels, predictions, num_classes)["f1"][present].mean().item(),
    }


def intervals(labels: Tensor, predictions: Tensor, num_classes: int) -> dict[str, list[float]]:
    """Return the 95 % intervals of accuracy and macro-F1, each as [low, high], by the bootstrap.

    They are the 2.5 % and 97.5 % quantiles of the metrics of as many samples, drawn with
    replacement (Efron, Tibshirani 1993, "An Introduction to the Bootstrap"). It is enough to draw
    how often each cell of the confusion matrix occurs, which is fast.
    """
    cells, counts = (labels * num_classes + predictions).unique(return_counts=True)
    label, prediction = cells // num_classes, cells % num_classes
    correct = label == prediction
    random, num_samples = np.random.default_rng(0), len(labels)
    drawn: list[Tensor] = []
    num_held = max(1, min(NUM_RESAMPLES, MAX_HELD // max(num_classes, len(cells))))
    for start in range(0, NUM_RESAMPLES, num_held):
        num = min(num_held, NUM_RESAMPLES - start)
        draws = torch.from_numpy(random.multinomial(num_samples, counts / num_samples, num))
        num_correct, totals = torch.zeros(2, num, num_classes, dtype=torch.int64)
        num_correct.index_add_(1, label[correct], draws[:, correct])
        totals.index_add_(1, label, draws).index_add_(1, prediction, draws)
        f1 = 2 * num_correct.double() / totals.clamp(min=1)
        macro_f1 = f1.sum(1) / (totals > 0).sum(1)
        drawn.append(torch.stack((num_correct.sum(1).double() / num_samples, macro_f1)))
    quantiles = torch.tensor((0.025, 0.975), dtype=torch.float64)
    accuracy, f1 = torch.cat(drawn, 1).quantile(quantiles, 1).T.tolist()
    return {"accuracy_interval": accuracy, "macro_f1_interval": f1}


def roc_auc(labels: Tensor, probabilities: Tensor) -> float | None:
    """Return the area under the ROC curve of each class against the others, as a macro average.

    Labels are int64 [N], probabilities float [N, K]. It is the fraction of the pairs of a sample of
    the class and one of another class in which the former has the higher probability; equal
    ones count half. A class without such pairs is left out; if all are, or if a probability is not
    finite, return None.
    """
    if not bool(probabilities.isfinite().all()):
        return None
    areas = []
    columns = probabilities.T.contiguous().numpy()
    for k, num_positive in enumerate(torch.bincount(labels).tolist()):
        num_negative = len(labels) - num_positive
        if num_positive and num_negative:
            positive, ordered = columns[k, (labels == k).numpy()], np.sort(columns[k])
            below, not_above = (
                np.searchsorted(ordered, positive, side).sum() for side in ("left", "right")
            )
            # Without the pairs within the class: of each, one is below, or both are half above.
            pairs = (int(below) + int(not_above) - num_positive**2) / 2
            areas.append(pairs / (num_positive * num_negative))
    return math.fsum(areas) / len(areas) if areas else None


def report(
    labels: Tensor, predictions: Tensor, losses: Tensor, class_names: Sequence[str]
) -> dict[str, Any]:
    """Return `scores`, balanced accuracy, `intervals`, per-class metrics and confusion matrix.

    `lab.engine.evaluation.Predictions.report` adds the metrics that need probabilities.
    """
    num_classes = len(class_names)
    classes = per_class(labels, predictions, num_classes)
    rows = zip(class_names, *(values.tolist() for values in classes.values()), strict=True)
    return {
        "num_samples": len(labels),
        **scores(labels, predictions, losses, num_classes),
        "balanced_accuracy": classes["recall"][classes["support"] > 0].mean().item(),
        **intervals(labels, predictions, num_classes),
        "per_class": [dict(zip(("class", *classes), row, strict=True)) for row in rows],
        "confusion_matrix": confusion_matrix(labels, predictions, num_classes).tolist(),
        "class_names": list(class_names),
    }


def is_better(row: Mapping[str, float], best: Mapping[str, float], by: str) -> bool:
    """Return whether an epoch's row of history.jsonl is better than the `best` row so far.

    `best` is empty before the first epoch. In a tie, which small validation splits often have, the
    epoch with the lower loss is better. A value that is not finite is never better than a finite
    one.
    """
    if not best:
        return True
    new, old = row[f"val_{by}"], best[f"val_{by}"]
    if not math.isfinite(new):
        return False
    if new == old:
        return math.isfinite(row["val_loss"]) and not row["val_loss"] >= best["val_loss"]
    return not math.isfinite(old) or (new < old if by == "loss" else new > old)


def selection_bias_note(split: str, selection_split: str | None) -> str:
    """Return why a metric on `split` is optimistic, or "" if it is not.

    `selection_split` is the split on which the best epoch was selected, "validation" or "test"; it
    is None for data from another source than the training data.
    """
    if selection_split == split == "test":
        return "selected on the test split (the notebooks' protocol): an optimistic number"
    if selection_split == "validation" and split == "val":
        return "the best epoch was selected on this split: an optimistic number"
    if selection_split and split in ("train", "all"):
        return "these are samples that were trained on: an optimistic number"
    return ""

"""P1: metrics equal scikit-learn's, also in degenerate cases. Selection of the best epoch."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from lab.engine.metrics import (
    confusion_matrix,
    intervals,
    is_better,
    per_class,
    report,
    roc_auc,
    scores,
    selection_bias_note,
)


def drawn(num_samples, num_classes, seed, labels_from=None, predictions_from=None):
    """Return random labels and predictions of the given classes, or of all by default."""
    generator = torch.Generator().manual_seed(seed)

    def draw(classes):
        classes = torch.tensor(list(classes if classes is not None else range(num_classes)))
        return classes[torch.randint(len(classes), (num_samples,), generator=generator)]

    return draw(labels_from), draw(predictions_from)


CASES = {
    "one sample, right": (torch.tensor([0]), torch.tensor([0]), 1),
    "one sample, wrong": (torch.tensor([2]), torch.tensor([0]), 3),
    "one sample of the last class": (torch.tensor([9]), torch.tensor([9]), 10),
    "all right": (torch.arange(7) % 3, torch.arange(7) % 3, 3),
    "all wrong": (torch.arange(7) % 3, (torch.arange(7) + 1) % 3, 3),
    "absent class": (*drawn(50, 4, 0, labels_from=(0, 2, 3)), 4),
    "never predicted": (*drawn(50, 4, 1, predictions_from=(0, 1, 3)), 4),
    "neither": (*drawn(50, 4, 2, labels_from=(0, 1), predictions_from=(1, 2)), 4),
    "one class predicted": (*drawn(51, 5, 3, predictions_from=(4,)), 5),
    "fewer samples than classes": (*drawn(7, 100, 4), 100),
} | {f"{k} classes": (*drawn(10 * k + 1, k, k), k) for k in (1, 2, 10, 100)}


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize("case", CASES)
def test_p1_report_equals_scikit_learn(case):
    labels, predictions, num_classes = CASES[case]
    losses = torch.rand(len(labels), generator=torch.Generator().manual_seed(0)).double()
    names = [f"class {k}" for k in range(num_classes)]
    actual = report(labels, predictions, losses, names)

    every = list(range(num_classes))
    assert actual["num_samples"] == len(labels)
    assert actual["class_names"] == names
    assert actual["loss"] == pytest.approx(math.fsum(losses.tolist()) / len(labels), abs=1e-9)
    accuracy = reference.accuracy_score(labels, predictions)
    assert actual["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    macro = reference.f1_score(labels, predictions, average="macro", zero_division=0)
    assert actual["macro_f1"] == pytest.approx(macro, abs=1e-9)
    balanced = reference.recall_score(
        labels, predictions, labels=labels.unique(), average="macro", zero_division=0
    )
    assert actual["balanced_accuracy"] == pytest.approx(balanced, abs=1e-9)
    matrix = reference.confusion_matrix(labels, predictions, labels=every)
    assert actual["confusion_matrix"] == matrix.tolist()
    columns = reference.precision_recall_fscore_support(
        labels, predictions, labels=every, zero_division=0
    )
    for key, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        values = [row[key] for row in actual["per_class"]]
        assert values == pytest.approx(column.tolist(), abs=1e-9), key
    assert [row["class"] for row in actual["per_class"]] == names
    of_an_epoch = scores(labels, predictions, losses, num_classes)
    assert of_an_epoch == {key: actual[key] for key in ("loss", "accuracy", "macro_f1")}


@pytest.mark.parametrize("decimals", [1, 7])  # 1: most probabilities are equal
@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_p1_roc_auc_equals_scikit_learn(num_classes, decimals):
    labels, _ = drawn(101, num_classes, seed=num_classes)
    noise = torch.Generator().manual_seed(1)
    logits = torch.randn(101, num_classes, generator=noise) + torch.eye(num_classes)[labels]
    probabilities = logits.softmax(1).round(decimals=decimals)
    one_hot = torch.eye(num_classes)[labels]
    expected = reference.roc_auc_score(one_hot, probabilities, average="macro")
    assert 0.5 < expected < 0.99
    assert roc_auc(labels, probabilities) == pytest.approx(expected, abs=1e-9)
    # A class that does not occur is left out.
    more = torch.cat((probabilities, torch.rand(101, 1, generator=noise)), 1)
    assert roc_auc(labels, more) == pytest.approx(expected, abs=1e-9)


def test_roc_auc_of_one_class_or_of_nan_does_not_exist():
    assert roc_auc(torch.zeros(3).long(), torch.rand(3, 2)) is None
    assert roc_auc(torch.tensor([0, 1]), torch.tensor([[math.nan, 1], [0, 1]])) is None


def test_the_intervals_are_those_of_the_bootstrap():
    """They are compared with scikit-learn's metrics of samples that are drawn one by one."""
    labels, predictions = drawn(60, 4, seed=0, labels_from=(0, 0, 1, 2))
    predictions = torch.where(torch.arange(60) % 3 > 0, labels, predictions)
    random, values = np.random.default_rng(1), []
    for _ in range(1000):
        index = random.integers(60, size=60)
        true, predicted = labels[index], predictions[index]
        accuracy = (true == predicted).double().mean().item()
        f1 = per_class(true, predicted, 4)["f1"][torch.cat((true, predicted)).unique()].mean()
        values.append((accuracy, f1.item()))
    expected = np.quantile(values, (0.025, 0.975), axis=0).T
    found = intervals(labels, predictions, 4)
    assert found["accuracy_interval"] == pytest.approx(expected[0], abs=0.02)
    assert found["macro_f1_interval"] == pytest.approx(expected[1], abs=0.02)
    assert intervals(labels, labels, 4)["macro_f1_interval"] == [1, 1]


@pytest.mark.parametrize("num_classes", [1, 3, 100])
@pytest.mark.parametrize("num_samples", [0, 1, 101])
def test_p1_confusion_matrix_counts_each_sample_once_in_its_cell(num_samples, num_classes):
    labels, predictions = drawn(num_samples, num_classes, seed=num_samples)
    matrix = confusion_matrix(labels, predictions, num_classes)
    assert (matrix.shape, matrix.dtype) == ((num_classes, num_classes), torch.int64)
    naive = torch.zeros_like(matrix)
    for true, predicted in zip(labels.tolist(), predictions.tolist(), strict=True):
        naive[true, predicted] += 1
    assert torch.equal(matrix, naive)


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize("other", [0, 2])
@pytest.mark.parametrize("count", [confusion_matrix, per_class])
def test_p1_an_unknown_class_raises(count, wrong, other):
    known, unknown = torch.tensor([0, other]), torch.tensor([0, wrong])
    with pytest.raises(ValueError, match="a prediction is not one of the 3 classes"):
        count(known, unknown, 3)
    with pytest.raises(ValueError, match="a label is not one of the 3 classes"):
        count(unknown, known, 3)


@pytest.mark.parametrize("counts", [(1, 4), (4, 1)])
def test_p1_labels_and_predictions_of_different_samples_raise(counts):
    labels, predictions = (torch.zeros(count, dtype=torch.int64) for count in counts)
    with pytest.raises(ValueError, match="sums to 4"):
        confusion_matrix(labels, predictions, 3)


@pytest.mark.parametrize("by", ["accuracy", "macro_f1", "loss"])
def test_in_a_tie_the_lower_loss_is_better_and_the_earlier_epoch_stays(by):
    equal = {"val_accuracy": 0.5, "val_macro_f1": 0.5, "val_loss": 0.5}
    assert not is_better(equal, equal, by)
    assert is_better(equal | {"val_loss": 0.4}, equal, by)
    assert not is_better(equal | {"val_loss": 0.6}, equal, by)


def test_only_the_chosen_number_decides():
    new = {"val_accuracy": 0.4, "val_macro_f1": 0.6, "val_loss": 1.0}
    best = {"val_accuracy": 0.5, "val_macro_f1": 0.5, "val_loss": 2.0}
    assert [is_better(new, best, by) for by in ("accuracy", "macro_f1", "loss")] == [0, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_a_number_that_is_not_finite_is_never_better_than_a_finite_one(by, bad):
    good, bad = ({"val_loss": 0.0, f"val_{by}": value} for value in (0.0, bad))
    assert not is_better(bad, good, by)
    assert is_better(good, bad, by)
    assert not is_better(bad, bad, by)


def test_of_two_equal_epochs_one_with_a_finite_loss_is_better():
    rows = [{"val_accuracy": 0.1, "val_loss": loss} for loss in (2.0, math.nan)]
    assert is_better(rows[0], rows[1], "accuracy")
    assert not is_better(rows[1], rows[0], "accuracy")


@pytest.mark.parametrize(
    ("split", "selection_split", "text"),
    [
        ("test", "test", "selected on the test split"),
        ("test", "validation", ""),
        ("val", "validation", "selected on this split"),
        ("train", "validation", "trained on"),
        ("train", "test", "trained on"),
        ("all", "validation", "trained on"),
        ("test", None, ""),
        ("all", None, ""),
    ],
)
def test_p6_an_optimistic_metric_is_labeled(split, selection_split, text):
    note = selection_bias_note(split, selection_split)
    assert bool(note) == bool(text)
    assert text in note

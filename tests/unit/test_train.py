"""train.py and evaluate.py from end to end: what a run writes, and that its numbers are true."""

import csv
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as reference

import evaluate
import lab.data.loaders
import lab.data.splits
import train
from lab.checkpoint import interrupt
from lab.checkpoint import weights as weights_module
from lab.config.schema import TrainConfig
from lab.engine import evaluation
from lab.engine.evaluation import Predictions, predict_all
from lab.errors import UserError

RUN_FILES = {
    "config.json", "history.jsonl", "steps.jsonl", "best.safetensors", "report.json",
    "predictions.csv", "predictions.safetensors", "images.safetensors", "README.md", "checkpoints",
}  # fmt: skip
HISTORY = [
    "epoch", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_macro_f1",
    "learning_rate", "skipped_steps", "train_seconds", "eval_seconds", "images_per_second",
]  # fmt: skip
REPORT = {
    "split", "num_samples", "loss", "accuracy", "macro_f1", "balanced_accuracy",
    "accuracy_interval", "macro_f1_interval", "per_class", "confusion_matrix", "class_names",
    "top5_accuracy", "roc_auc", "calibration_error", "coverage", "best_epoch", "selection_split",
}  # fmt: skip


def run(folder, *words, name="run"):
    """Trains LeNet-5 on a few of the digits, unless `words` say otherwise; the run's folder."""
    defaults = ["--dataset", "digits", "--recipe", "smoke", "--name", name, "--quiet"]
    defaults += ["--threads", "1"]  # the machine may have others to run
    train.main([*defaults, "--output-dir", str(folder), *words])
    return Path(folder) / name


def eval_model(words):
    """Runs evaluate.py."""
    evaluate.main([*words, "--quiet", "--threads", "1"])


def read_json(path):
    return json.loads(path.read_text())


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(path):
    return load_file(path / "best.safetensors")


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def losses(path):
    return [row["loss"] for row in read_lines(path / "steps.jsonl")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 3 epochs of 11 steps: the last batch of each holds one sample."""
    words = ["--epochs", "3", "--max-steps", "0", "--max-train-samples", "321", "--log-every", "1"]
    return run(tmp_path_factory.mktemp("trained"), *words)


def test_a_run_has_exactly_the_documented_files(trained):
    assert {p.name for p in trained.iterdir()} == RUN_FILES


def test_config_has_every_setting_and_where_the_run_took_place(trained):
    config = read_json(trained / "config.json")
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    place = {"device", "device_name", "world_size", "precision", "versions", "commit"}
    assert config.keys() == names | place | {"parameters", "macs", "fingerprints"}
    assert (config["model"], config["dataset"], config["epochs"]) == ("lenet5", "digits", 3)
    assert (config["world_size"], config["image_size"]) == (1, 32)
    assert config["versions"]["torch"] in torch.__version__


def test_history_has_a_row_an_epoch(trained):
    rows = read_lines(trained / "history.jsonl")
    assert [list(row) for row in rows] == [HISTORY] * 3
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    for row in rows:
        assert row["train_accuracy"] * 321 == pytest.approx(round(row["train_accuracy"] * 321))
        assert row["images_per_second"] * row["train_seconds"] == pytest.approx(321)


def test_p2_the_epochs_loss_is_the_mean_over_samples(trained):
    steps = read_lines(trained / "steps.jsonl")
    assert [list(row) for row in steps] == [["step", "epoch", "loss", "learning_rate"]] * 33
    assert [row["step"] for row in steps] == list(range(1, 34))
    assert [row["epoch"] for row in steps] == [1] * 11 + [2] * 11 + [3] * 11
    for i, row in enumerate(read_lines(trained / "history.jsonl")):
        of_epoch = [step["loss"] for step in steps[11 * i : 11 * i + 11]]
        assert row["train_loss"] == pytest.approx((32 * sum(of_epoch[:10]) + of_epoch[10]) / 321)


def test_p1_report_is_what_scikit_learn_makes_of_the_predictions(trained):
    report = read_json(trained / "report.json")
    assert report.keys() == REPORT
    assert (report["split"], report["selection_split"]) == ("test", "validation")
    with open(trained / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "index", "label", "prediction", "confidence", "label_name", "prediction_name",
    ]  # fmt: skip
    assert [int(row["index"]) for row in rows] == list(range(100))
    labels, predictions = ([int(row[k]) for row in rows] for k in ("label", "prediction"))
    assert all(0.1 <= float(row["confidence"]) <= 1 for row in rows)
    every = list(range(10))
    matrix = reference.confusion_matrix(labels, predictions, labels=every)
    assert report["confusion_matrix"] == matrix.tolist()
    assert report["num_samples"] == matrix.sum() == 100
    assert report["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
    macro = reference.f1_score(labels, predictions, labels=every, average="macro", zero_division=0)
    assert report["macro_f1"] == pytest.approx(macro, abs=1e-9)
    assert [row["class"] for row in report["per_class"]] == report["class_names"]


def test_p6_the_best_epoch_is_the_first_with_the_best_validation_number(trained):
    rows = read_lines(trained / "history.jsonl")
    accuracies = [row["val_accuracy"] for row in rows]
    best = accuracies.index(max(accuracies))
    report, metadata = (
        read_json(trained / "report.json"),
        weights_module.read_metadata(trained / "best.safetensors"),
    )
    assert report["best_epoch"] == metadata["best_epoch"] == best + 1
    assert metadata["metrics"] == {k: v for k, v in rows[best].items() if k.startswith("val_")}


@pytest.mark.parametrize(("given", "loader"), [("folder", "resident"), ("file", "streaming")])
def test_p5_evaluate_repeats_the_report_to_the_last_digit(trained, tmp_path, given, loader):
    path = trained if given == "folder" else trained / "best.safetensors"
    eval_model([str(path), "--output", str(tmp_path / "e"), "--loader", loader])
    files = ("report.json", "predictions.csv", "predictions.safetensors")
    assert {p.name for p in (tmp_path / "e").iterdir()} == set(files)
    assert read_json(tmp_path / "e" / "report.json") == read_json(trained / "report.json")
    for name in files[1:]:
        assert (tmp_path / "e" / name).read_bytes() == (trained / name).read_bytes()


def test_p5_evaluate_on_validation_repeats_the_best_epochs_row(trained, tmp_path):
    eval_model([str(trained), "--split", "val", "--output", str(tmp_path)])
    report, rows = read_json(tmp_path / "report.json"), read_lines(trained / "history.jsonl")
    best = rows[report["best_epoch"] - 1]
    assert report["split"] == "val"
    for name in ("loss", "accuracy", "macro_f1"):
        assert report[name] == best[f"val_{name}"]


def test_p1_the_batch_size_of_an_evaluation_changes_no_count(trained, tmp_path):
    words = ["--batch-size", "7", "--max-eval-samples", "0", "--output", str(tmp_path)]
    eval_model([str(trained), *words])
    assert read_json(tmp_path / "report.json")["num_samples"] == 359  # all
    words = ["--batch-size", "1", "--max-eval-samples", "100", *words[4:]]
    eval_model([str(trained), *words])
    found, expected = read_json(tmp_path / "report.json"), read_json(trained / "report.json")
    assert found["confusion_matrix"] == expected["confusion_matrix"]


def test_p2_the_same_seed_gives_the_same_bits_and_another_does_not(trained, tmp_path):
    words = ["--epochs", "3", "--max-steps", "0", "--max-train-samples", "321", "--log-every", "1"]
    torch.manual_seed(123)  # what ran before does not matter
    again = run(tmp_path, *words)
    for name in ("best.safetensors", "predictions.csv", "report.json", "steps.jsonl"):
        assert (again / name).read_bytes() == (trained / name).read_bytes(), name
    other = run(tmp_path, *words, "--seed", "43", name="other")
    assert not same(weights(other), weights(again))
    ours, theirs = read_json(again / "report.json"), read_json(other / "report.json")
    supports = [[row["support"] for row in r["per_class"]] for r in (ours, theirs)]
    assert supports[0] == supports[1]  # on the same split


def test_p2_workers_and_loader_change_nothing(trained, tmp_path):
    words = ["--epochs", "3", "--max-steps", "0", "--max-train-samples", "321", "--log-every", "1"]
    streamed = run(tmp_path, *words, "--loader", "streaming")
    assert same(weights(streamed), weights(trained))


def test_runs_are_numbered_and_replaced_only_when_told(tmp_path):
    words = ["--dataset", "digits", "--recipe", "smoke", "--max-steps", "1", "--log-every", "1"]
    words += ["--output-dir", str(tmp_path), "--quiet", "--threads", "1"]
    for _ in range(2):
        train.main(words)
    names = ["lenet5-digits", "lenet5-digits-2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    (tmp_path / names[1] / "stale.txt").write_text("")
    before = (tmp_path / names[0] / "history.jsonl").read_bytes()
    with pytest.raises(ValueError, match="exists"):
        train.main([*words, "--name", names[1]])
    assert (tmp_path / names[1] / "stale.txt").exists()
    train.main([*words, "--name", names[1], "--overwrite"])
    assert {p.name for p in (tmp_path / names[1]).iterdir()} == RUN_FILES
    assert (tmp_path / names[0] / "history.jsonl").read_bytes() == before


@pytest.mark.parametrize(("max_steps", "epochs"), [(10, 1), (11, 2)])
def test_max_steps_ends_the_run_after_so_many(tmp_path, max_steps, epochs):
    words = ["--max-steps", str(max_steps), "--epochs", "5", "--log-every", "1"]
    folder = run(tmp_path, *words)
    assert len(read_lines(folder / "steps.jsonl")) == max_steps
    assert len(read_lines(folder / "history.jsonl")) == epochs
    assert (folder / "report.json").exists()


def test_the_average_of_the_weights_is_saved_and_changes_no_step(tmp_path):
    words = ["--max-steps", "2", "--max-train-samples", "33", "--log-every", "1"]
    plain = run(tmp_path, *words, name="plain")
    averaged = run(tmp_path, *words, "--ema-decay", "0.9", name="averaged")
    assert losses(averaged) == losses(plain)
    assert weights(averaged).keys() == weights(plain).keys()
    assert not same(weights(averaged), weights(plain))


@pytest.mark.parametrize(("monitor", "best"), [("macro_f1", 1), ("loss", 2)])
def test_p6_the_epoch_kept_is_the_best_by_the_number_chosen(
    tmp_path, monkeypatch, capsys, monitor, best
):
    numbers = {"macro_f1": [0.3, 0.2, 0.1], "loss": [3.0, 1.0, 2.0], "accuracy": [0.1, 0.2, 0.3]}
    epochs = zip(*numbers.values(), strict=True)

    class Altered(Predictions):
        def scores(self):
            return dict(zip(numbers, next(epochs), strict=True))

        def report(self):  # an epoch's numbers must not cost a report of every class
            assert next(epochs, None) is None
            return super().report()

    def altered(*arguments, **settings):
        return Altered(**vars(predict_all(*arguments, **settings)))

    monkeypatch.setattr(evaluation, "predict_all", altered)
    words = ["--max-train-samples", "64", "--epochs", "3", "--max-steps", "0", "--lr", "0.01"]
    folder = run(tmp_path, "--monitor", monitor, *words)
    monkeypatch.undo()
    rows, report = read_lines(folder / "history.jsonl"), read_json(folder / "report.json")
    [warning] = report.pop("warnings")  # 64 images of 10 classes
    assert warning.startswith(
        "there are fewer than 10 training images of classes 0, 1, 2, 3, 4 and"
    )
    assert f"warning: {warning}" in capsys.readouterr().err.splitlines()
    assert [row[f"val_{monitor}"] for row in rows] == numbers[monitor]
    assert report["best_epoch"] == best
    # The report is of that epoch's weights, not of the last's.
    eval_model([str(folder)])
    assert read_json(folder / "evaluate-test" / "report.json") == report


def test_p6_the_notebook_recipe_says_that_it_chose_on_the_test_split(tmp_path, capsys):
    folder = run(tmp_path, "--recipe", "notebook", "--epochs", "2", "--max-train-samples", "300")
    report, rows = read_json(folder / "report.json"), read_lines(folder / "history.jsonl")
    assert report["selection_split"] == "test"
    assert "selected on the test split" in capsys.readouterr().out
    best = rows[report["best_epoch"] - 1]
    assert (report["loss"], report["accuracy"]) == (best["val_loss"], best["val_accuracy"])
    with pytest.raises(ValueError, match="no validation split"):
        eval_model([str(folder), "--split", "val"])
    eval_model([str(folder)])
    assert read_json(folder / "evaluate-test" / "report.json") == report


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ([], ["train", "validation", "train", "validation", "test"]),
        (["--recipe", "notebook"], ["train", "test", "train", "test", "test"]),
    ],
)
def test_p6_the_test_split_is_read_once_at_the_end(tmp_path, monkeypatch, words, read):
    """But by the notebook recipe, which selects on it."""
    found, roles, load_splits = [], {}, lab.data.splits.load_splits

    def load(*arguments):
        splits = load_splits(*arguments)
        roles.update({id(splits.train): "train", id(splits.val): "validation"})
        roles[id(splits.test)] = "test"
        return splits

    def build(split, *arguments, **settings):
        loader = build_loader(split, *arguments, **settings)
        batches = loader.batches

        def logged(*arguments):
            found.append(roles[id(split)])
            return batches(*arguments)

        loader.batches = logged
        return loader

    build_loader = lab.data.loaders.build_loader
    monkeypatch.setattr(lab.data.splits, "load_splits", load)
    monkeypatch.setattr(lab.data.loaders, "build_loader", build)
    run(tmp_path, *words, "--epochs", "2", "--max-train-samples", "64", "--max-eval-samples", "20")
    assert found == read


def test_the_time_limit_includes_the_time_before_the_training(tmp_path, monkeypatch):
    times, load_splits, handler = {}, lab.data.splits.load_splits, interrupt.InterruptHandler

    def load(*arguments):
        times["data"] = time.monotonic()
        return load_splits(*arguments)

    def handle(accelerator, start_time, *arguments):
        times["start"] = start_time
        return handler(accelerator, start_time, *arguments)

    monkeypatch.setattr(lab.data.splits, "load_splits", load)
    monkeypatch.setattr(interrupt, "InterruptHandler", handle)
    run(tmp_path, "--max-steps", "1")
    assert times["start"] < times["data"]


def strict(text):
    """The value of a JSON text, which has no NaN and no infinity."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_loss_that_is_not_finite_is_null_in_every_file(tmp_path, monkeypatch, capfd):
    factors = iter((1, math.nan, math.nan))  # epoch 1, epoch 2, test

    def without_losses(*arguments, **settings):
        predictions = predict_all(*arguments, **settings)
        return dataclasses.replace(predictions, losses=predictions.losses * next(factors))

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "predict_all", without_losses)
        folder = run(tmp_path, "--max-steps", "12", "--monitor", "loss")
    assert strict((folder / "report.json").read_text())["loss"] is None
    rows = [strict(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [row["val_loss"] is None for row in rows] == [False, True]
    for path in folder.glob("checkpoints/*/state.json"):
        strict(path.read_text())
    assert "| - |" in (folder / "README.md").read_text()
    train.main(["--resume", str(folder), "--max-steps", "15", "--quiet"])  # it can be read back
    assert math.isfinite(read_lines(folder / "history.jsonl")[1]["val_loss"])
    assert capfd.readouterr().err == ""


def test_p7_a_run_whose_steps_are_all_skipped_ends_in_an_error(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("lab.engine.training.TrainStep.__call__", lambda *_: None)
    monkeypatch.setattr("lab.data.stratification.MIN_CLASS_SIZE", 0)
    words = ["--on-nonfinite", "skip", "--max-steps", "4", "--max-train-samples", "64"]
    with pytest.raises(UserError, match="the loss of every epoch was not finite"):
        run(tmp_path, *words)
    rows = read_lines(tmp_path / "run" / "history.jsonl")
    assert [(row["train_loss"], row["train_accuracy"]) for row in rows] == [(None, None)] * 2
    assert not (tmp_path / "run" / "report.json").exists()
    assert capfd.readouterr().err.splitlines() == [
        f"warning: epoch {epoch}: 2 steps were skipped because a gradient was not finite"
        for epoch in (1, 2)
    ]


def test_lenet5_reads_the_digits(tmp_path):
    folder = run(tmp_path, "--recipe", "default", "--epochs", "6")
    report = read_json(folder / "report.json")
    assert report["num_samples"] == 359
    assert report["accuracy"] >= 0.9


@pytest.mark.slow
def test_p5_a_compiled_run_learns_alike_and_has_plain_keys(tmp_path):
    words = ["--max-steps", "3", "--log-every", "1"]
    plain, compiled = run(tmp_path, *words), run(tmp_path, *words, "--compile", name="compiled")
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert weights(compiled).keys() == weights(plain).keys()


MNIST = os.environ.get("LAB_REAL_DATA", "")


@pytest.mark.slow
@pytest.mark.realdata
@pytest.mark.skipif(not MNIST, reason="LAB_REAL_DATA is not set")
def test_the_notebook_recipe_gives_the_notebooks_loss_on_mnist(tmp_path):
    """In the first epoch; `results/lenet5-mnist-notebook` has all five."""
    words = ["--recipe", "notebook", "--dataset", "mnist", "--data-dir", MNIST, "--epochs", "1"]
    folder = run(tmp_path, *words, "--seed", "42")
    [row] = read_lines(folder / "history.jsonl")
    assert row["train_loss"] == pytest.approx(0.5815, abs=0.02)
    report = read_json(folder / "report.json")
    assert (report["num_samples"], report["selection_split"]) == (10_000, "test")
    assert report["accuracy"] >= 0.92

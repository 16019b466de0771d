"""evaluate.py RUN RUN: the mean of the probabilities of several runs."""

import csv
import json

import numpy as np
import pytest
from mistakes import make_picture
from resuming import LENET, start
from safetensors.numpy import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss
from worlds import run_world

import evaluate
from lab.checkpoint import weights
from lab.data.fingerprint import FORMAT
from lab.engine import evaluation

FILES = ("report.json", "predictions.csv", "predictions.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return two runs with other image sizes, other normalization and one temperature."""
    folder = tmp_path_factory.mktemp("runs")
    start(folder, *LENET, name="one")
    words = ("--image-size", "28", "--max-train-samples", "200", "--seed", "1")
    start(folder, *LENET, *words, name="two")
    call(folder / "two", "--calibrate")
    return [folder / "one", folder / "two"]


def call(*words):
    evaluate.main([str(word) for word in (*words, "--threads", "1", "--quiet", "--workers", "0")])


def probabilities(path):
    return load_file(path / "predictions.safetensors")["probabilities"]


def test_p1_an_ensemble_is_the_mean_of_the_probabilities(runs, tmp_path):
    for run in runs:
        call(run)
    call(*runs, "--output", tmp_path / "e")
    single = [probabilities(run / "evaluate-test").astype(float) for run in runs]
    mean = sum(p / p.sum(1, keepdims=True) for p in single) / 2
    assert abs(single[0] - single[1]).max() > 0.01
    assert probabilities(tmp_path / "e") == pytest.approx(mean, abs=1e-6)
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    with open(tmp_path / "e" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    labels, predictions, confidence = (
        np.array([float(row[name]) for row in rows])
        for name in ("label", "prediction", "confidence")
    )
    assert (predictions == mean.argmax(1)).all()
    assert confidence == pytest.approx(mean.max(1), abs=2e-6)
    assert report["num_samples"] == len(rows) == 100
    assert report["accuracy"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-9)
    assert report["macro_f1"] == pytest.approx(
        f1_score(labels, predictions, average="macro", zero_division=0), abs=1e-9
    )
    assert report["loss"] == pytest.approx(log_loss(labels, mean), abs=1e-5)
    assert report["weights"] == [str(run / "best.safetensors") for run in runs]
    assert "best_epoch" not in report


@pytest.mark.parametrize("num_processes", [2, 3])
def test_p1_an_ensemble_does_not_depend_on_the_number_of_processes(runs, tmp_path, num_processes):
    words = (*runs, "--threads", 1, "--tta", "flip", "--batch-size", 30)
    call(*words, "--output", tmp_path / "one")
    words = ("evaluate.py", *words, "--workers", 0, "--output", tmp_path / "many")
    for ended in run_world(num_processes, *words, limit=200):
        assert ended.code == 0, ended.stderr
    for suffix in ("", "-tta-flip"):
        for name in FILES:
            files = [tmp_path / f"{world}{suffix}" / name for world in ("one", "many")]
            assert files[0].read_bytes() == files[1].read_bytes()


def test_p7_runs_that_cannot_be_averaged_are_refused(fails, runs, tmp_path, monkeypatch):
    one, two = runs
    for i in range(20):
        make_picture(tmp_path / "IMAGES" / ("cat", "dog")[i % 2] / f"{i}.png")
    start(tmp_path, *LENET, "--dataset", "IMAGES", "--model", "lenet5", name="cats")
    start(tmp_path, *LENET, "--split-seed", "1", name="other")
    first = f"{one}/best.safetensors"
    different = "have different samples. Give runs with the same data and --split-seed, or a"
    assert fails(evaluate, one, "cats", "--quiet") == (
        f"{first} and cats/best.safetensors were trained on different classes. "
        "Give runs with the same classes in the same order."
    )
    for split in ("test", "val"):
        assert fails(evaluate, one, "other", "--split", split, "--quiet") == (
            f"the {split} splits of {first} and other/best.safetensors {different} "
            "--dataset with --split all."
        )
    assert fails(evaluate, one, two, "--calibrate").startswith("--calibrate fits the temperature")
    monkeypatch.setattr(evaluation, "MAX_LOGITS_BYTES", 3000)
    assert "take more than 200 MB. Evaluate fewer" in fails(evaluate, one, two, "--quiet")


def test_p6_the_note_names_a_run_that_was_selected_on_the_split(runs, tmp_path, capsys):
    call(*runs, "--output", tmp_path / "e")
    assert "note: " not in capsys.readouterr().out
    start(tmp_path, *LENET, "--val-fraction", "0", name="biased")
    capsys.readouterr()
    call(*runs, tmp_path / "biased", "--output", tmp_path / "e")
    assert "note: selected on the test split" in capsys.readouterr().out
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    assert report["selection_split"] == "test"


def test_p6_a_change_of_the_data_of_any_run_is_reported(runs, tmp_path, capsys):
    path = runs[1] / "best.safetensors"
    metadata = weights.read_metadata(path)
    metadata["fingerprints"]["test"] = f"{FORMAT}-1"
    weights.write_weights(tmp_path / "other", weights.read_tensors(path), metadata)
    call(runs[0], tmp_path / "other", "--output", tmp_path / "e")
    assert "the test split has changed since the training" in capsys.readouterr().err

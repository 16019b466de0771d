"""Calibration error, coverage, and the temperature: its fit, and that everything uses it."""

import csv
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import evaluate
import lab
import predict
import train
from lab import distributed, export
from lab.checkpoint import weights
from lab.data import DataConfig
from lab.data.splits import load_split
from lab.engine import calibration, metrics
from lab.engine.calibration import (
    coverage_table,
    expected_calibration_error,
    fit_temperature,
    reliability_bins,
)
from lab.errors import UserError

QUIET = ("--threads", "1", "--quiet")


def test_the_calibration_error_is_the_mean_gap_of_the_bins():
    confidence = torch.tensor([0.05, 0.6, 0.61, 1 / 15, 1.0, 1.0], dtype=torch.float64)
    correct = torch.tensor([False, True, False, True, True, False])
    counts, accuracy, mean = reliability_bins(confidence, correct)
    assert counts.nonzero().flatten().tolist() == [0, 8, 9, 14]  # a bin contains its upper end
    assert counts[[0, 8, 9, 14]].tolist() == [2, 1, 1, 2]
    assert accuracy[[0, 8, 9, 14]].tolist() == [0.5, 1, 0, 0.5]
    assert mean[14] == 1
    gaps = 2 * abs(0.5 - (0.05 + 1 / 15) / 2) + 0.4 + 0.61 + 2 * 0.5
    assert expected_calibration_error(confidence, correct) == pytest.approx(gaps / 6)
    assert math.isnan(expected_calibration_error(confidence * math.nan, correct))


def test_the_coverage_table_is_what_min_confidence_leaves():
    noise = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=noise).double().round(decimals=2)  # with equal ones
    correct = torch.rand(500, generator=noise) < confidence
    table = coverage_table(confidence, correct)
    assert len(table) == 7
    for row, wanted in zip(table, (1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5), strict=True):
        decided = confidence >= row["min_confidence"]
        assert row["coverage"] == decided.double().mean()
        assert wanted <= row["coverage"] < wanted + 0.03
        assert row["accuracy"] == pytest.approx(correct[decided].double().mean().item())
    equal = coverage_table(torch.full((3,), 0.5).double(), torch.tensor([True, True, False]))
    assert [row["coverage"] for row in equal] == [1]


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_the_temperature_minimizes_the_loss(temperature):
    noise = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1000, 5, generator=noise)
    labels = torch.multinomial(logits.softmax(1), 1, generator=noise).flatten()
    logits *= temperature
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(temperature, rel=0.1)
    best, lower, higher = (
        F.cross_entropy(logits.double() / (fitted * factor), labels) for factor in (1, 0.999, 1.001)
    )
    assert best < min(lower, higher)


def test_a_temperature_is_fitted_to_logits_that_are_far_apart():
    """At temperature 1 all probabilities are 0 or 1, and the loss has no curvature."""
    logits, labels = torch.tensor([800.0, 0.0]).repeat(4000, 1), torch.zeros(4000).long()
    labels[0] = 1
    assert fit_temperature(logits, labels) == pytest.approx(800 / math.log(3999))


@pytest.mark.parametrize("kind", ["all correct", "not finite", "too large"])
def test_p7_a_temperature_that_cannot_be_fitted_is_refused(kind):
    logits, labels = torch.eye(3).repeat(4, 1), torch.arange(12) % 3
    if kind == "not finite":
        logits[0, 0] = math.nan
    message = "no temperature fits these 12 samples|take more than 200 MB"
    with pytest.raises(UserError, match=message):
        fit_temperature(None if kind == "too large" else logits, labels)


@pytest.fixture(scope="module")
def calibrated(finished, tmp_path_factory):
    """Return (a copy of a run, calibrated; its reports of the test split before and after)."""
    path = shutil.copytree(finished, tmp_path_factory.mktemp("calibrated") / "run")
    evaluate.main([str(path), *QUIET, "--calibrate"])
    evaluate.main([str(path), *QUIET])
    reports = (path / "report.json", path / "evaluate-test" / "report.json")
    return path, *(json.loads(report.read_text()) for report in reports)


def test_calibrate_changes_the_confidence_and_no_prediction(calibrated, finished):
    path, before, after = calibrated
    files = [folder / "best.safetensors" for folder in (finished, path)]
    old, new = map(weights.read_metadata, files)
    assert old["temperature"] == 1
    assert new == old | {"temperature": after["temperature"]}
    assert new["temperature"] != 1
    for name, tensor in load_file(files[0]).items():
        assert torch.equal(tensor, load_file(files[1])[name])
    for key in ("accuracy", "macro_f1", "confusion_matrix", "top5_accuracy"):
        assert after[key] == before[key], key
    assert after["loss"] != before["loss"]
    # On the split of the fit, the loss cannot increase.
    validation = json.loads((path / "evaluate-val" / "report.json").read_text())
    assert validation["split"] == "val"
    rows = map(json.loads, (path / "history.jsonl").read_text().splitlines())
    [best] = [row for row in rows if row["epoch"] == before["best_epoch"]]
    assert validation["loss"] < best["val_loss"]
    assert validation["accuracy"] == best["val_accuracy"]


@pytest.mark.parametrize("when", ["before the tensors are read", "before the temperature is saved"])
def test_p5_metadata_of_one_epoch_are_not_used_with_weights_of_another(
    finished, tmp_path_factory, monkeypatch, fails, when
):
    """A training that is still running replaces the weights."""
    run = shutil.copytree(finished, tmp_path_factory.mktemp("training") / "run")
    file, later = run / "best.safetensors", run / "later"
    tensors = {name: tensor + 1 for name, tensor in weights.read_tensors(file).items()}
    weights.write_weights(later, tensors, weights.read_metadata(file) | {"best_epoch": 7})
    module = evaluate if when.startswith("before the tensors") else calibration
    name = "load_members" if module is evaluate else "fit_temperature"
    original = getattr(module, name)

    def replace(*arguments):
        shutil.copy(later, file)
        return original(*arguments)

    monkeypatch.setattr(module, name, replace)
    message = fails(evaluate, run, "--calibrate", *QUIET)
    assert message == f"{file} was replaced while it was read. Run the command again."
    assert file.read_bytes() == later.read_bytes()


def test_p1_processes_compare_the_weights_that_they_read(finished, monkeypatch, tmp_path):
    compared = {}
    monkeypatch.setattr(distributed, "check_same_data", lambda _, values: compared.update(values))
    evaluate.main([str(finished), *QUIET, "--output", str(tmp_path / "e")])
    file = finished / "best.safetensors"
    assert compared["weights 0"] == weights.read_metadata(file)["sha256"]
    predict.main([str(finished), "docs/report.png", *QUIET])
    assert compared["weights"] == compared["weights 0"]


def test_calibrating_again_gives_the_same_temperature(calibrated, tmp_path):
    path, _, report = calibrated
    again = shutil.copytree(path, tmp_path / "again")
    evaluate.main([str(again), *QUIET, "--calibrate"])
    temperature = weights.read_metadata(again / "best.safetensors")["temperature"]
    assert temperature == pytest.approx(report["temperature"])


def test_a_resumed_run_without_a_better_epoch_is_tested_with_the_temperature(
    calibrated, tmp_path, monkeypatch
):
    path, _, evaluated = calibrated
    run = shutil.copytree(path, tmp_path / "run")
    file = run / "best.safetensors"
    metadata = weights.read_metadata(file) | {"best_epoch": 2}
    weights.write_weights(file, weights.read_tensors(file), metadata)
    monkeypatch.setattr(metrics, "is_better", lambda *_: False)
    train.main(["--resume", str(run), "--epochs", "4", "--max-steps", "0", "--quiet"])
    report = json.loads((run / "report.json").read_text())
    assert report["loss"] == evaluated["loss"]
    assert report["temperature"] == evaluated["temperature"]


def test_a_resumed_run_warns_that_better_weights_are_not_calibrated(calibrated, tmp_path, capsys):
    run = shutil.copytree(calibrated[0], tmp_path / "run")
    train.main(["--resume", str(run), "--epochs", "4", "--max-steps", "0", "--quiet"])
    report = json.loads((run / "report.json").read_text())
    assert "temperature" not in report
    warnings = capsys.readouterr().err.splitlines()
    assert [line.partition(" replace ")[2] for line in warnings] == [
        "calibrated ones: run evaluate.py --calibrate again"
    ]


def test_predict_and_export_use_the_temperature(calibrated, tmp_path):
    path, _, report = calibrated
    model, metadata = lab.load_model(path, "cpu")
    images = load_split(DataConfig(**metadata["data"]), "test", 1e9, 1)[0].images
    expected = load_file(path / "evaluate-test" / "predictions.safetensors")["probabilities"]
    found = lab.predict(images, (model, metadata)).probabilities
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    exported = export.ExportedModel(model, metadata, softmax=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)
    assert (
        export.describe(metadata, dynamic_batch=True, softmax=True)["temperature"]
        == (report["temperature"])
    )


def test_min_confidence_marks_what_is_undecided(calibrated, tmp_path, capsys):
    from PIL import Image

    path = calibrated[0]
    metadata = weights.read_metadata(path / "best.safetensors")
    images = load_split(DataConfig(**metadata["data"]), "test", 1e9, 1)[0].images[:20, 0]
    for i, image in enumerate(images):
        Image.fromarray(image.numpy()).save(tmp_path / f"{i:02}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    words = [str(path), str(tmp_path), "--threads", "1", "--workers", "0"]
    files = ["--json", str(tmp_path / "json"), "--csv", str(tmp_path / "csv"), "--top-k", "1"]
    predict.main([*words, *files])
    rows = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    assert not any("decided" in row for row in rows)
    confidences = [row["classes"][0]["confidence"] for row in rows if "classes" in row]
    threshold = sorted(confidences)[7] + 1e-4
    capsys.readouterr()
    predict.main([*words, *files, "--min-confidence", str(threshold)])
    rows = [json.loads(line) for line in (tmp_path / "json").read_text().splitlines()]
    decided = [row["decided"] for row in rows if "classes" in row]
    assert decided == [value >= threshold for value in confidences]
    with open(tmp_path / "csv", newline="") as file:
        cells = [row["decided"] for row in csv.DictReader(file)]
    assert cells[:-1] == ["yes" if value else "no" for value in decided]
    assert cells[-1] == ""  # of the file that cannot be read
    undecided = decided.count(False)
    assert f"undecided: {undecided} of 20 images" in capsys.readouterr().out
    predict.main([*words, "--min-confidence", str(threshold)])
    assert capsys.readouterr().out.count(" (undecided)") == undecided


@pytest.mark.parametrize(
    ("words", "metadata", "message"),
    [
        (
            "",
            {"selection_split": "test"},
            "--calibrate needs a validation split, and w was trained without one. "
            "Train with --val-fraction 0.1.",
        ),
        (
            "--split train",
            {},
            "--calibrate fits on the validation split, not on --split train. Leave out --split.",
        ),
    ],
)
def test_p7_calibrate_refuses(fails, finished, tmp_path, words, metadata, message):
    file = finished / "best.safetensors"
    content = weights.read_metadata(file) | metadata
    weights.write_weights(tmp_path / "w", weights.read_tensors(file), content)
    assert fails(evaluate, "w", "--calibrate", "--quiet", *words.split()) == message

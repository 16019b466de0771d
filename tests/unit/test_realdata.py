"""Losses and accuracies on MNIST and CIFAR-10, compared with the notebooks and results/.

LAB_REAL_DATA is a directory with MNIST/raw/*-ubyte and cifar10-jpg/{train,test}/CLASS/*.jpg.
"""

import json
import os
from pathlib import Path

import pytest

import train

FOLDER = os.environ.get("LAB_REAL_DATA", "")
pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not FOLDER, reason="LAB_REAL_DATA is not set"),
    pytest.mark.timeout(1800),
]


def run(output_dir, *argv, data_dir=FOLDER, name="run"):
    """Train, and return the run's directory."""
    argv = [*argv, "--output-dir", str(output_dir), "--name", name]
    argv += ["--data-dir", str(data_dir)] if data_dir else []
    train.main([*argv, "--quiet"])
    return Path(output_dir) / name


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_notebook_recipe_gives_the_notebooks_losses_on_mnist(tmp_path):
    """For the first two epochs; `results/lenet5-mnist-notebook` has all five."""
    argv = ["--recipe", "notebook", "--dataset", "mnist", "--seed", "42", "--epochs", "2"]
    folder = run(tmp_path, *argv)
    losses = [row["train_loss"] for row in read_lines(folder / "history.jsonl")]
    assert losses == [pytest.approx(0.5815, abs=0.02), pytest.approx(0.1616, abs=0.01)]
    report = json.loads((folder / "report.json").read_text())
    assert report["num_samples"] == 10_000
    assert report["accuracy"] >= 0.95
    assert report["selection_split"] == "test"


@pytest.mark.slow
def test_the_default_recipe_learns_a_sixth_of_mnist(tmp_path):
    """With all of it, `results/lenet5-mnist-default-seed*` reach 0.992."""
    folder = run(tmp_path, "--max-train-samples", "10000")
    report = json.loads((folder / "report.json").read_text())
    assert report["selection_split"] == "validation"
    assert report["num_samples"] == 10_000
    assert report["accuracy"] >= 0.97


def test_p2_both_loaders_train_alike_on_image_files(tmp_path):
    argv = ["--model", "alexnet", "--dataset", str(Path(FOLDER) / "cifar10-jpg")]
    argv += ["--mixed-precision", "no"]
    argv += ["--augment", "crop,flip", "--batch-size", "16", "--log-every", "1"]
    argv += ["--max-train-samples", "100", "--max-eval-samples", "50", "--max-steps", "4"]
    argv += ["--epochs", "1"]
    losses = {}
    for loader in ("resident", "streaming"):
        options = ["--loader", loader, "--workers", "2"]
        folder = run(tmp_path, *argv, *options, data_dir=None, name=loader)
        losses[loader] = [row["loss"] for row in read_lines(folder / "steps.jsonl")]
        report = json.loads((folder / "report.json").read_text())
        assert report["num_samples"] == 50
        assert report["class_names"][0] == "airplane"
    assert len(losses["resident"]) == 4
    assert losses["streaming"] == pytest.approx(losses["resident"], rel=1e-5)

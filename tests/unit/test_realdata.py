"""Numbers on MNIST and on CIFAR-10's pictures: the notebooks' losses, and what recipes reach.

LAB_REAL_DATA names a folder with MNIST/raw/*-ubyte and cifar10-jpg/{train,test}/CLASS/*.jpg.
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


def run(output_dir, *words, data_dir=FOLDER, name="run"):
    """Trains, and returns the run's folder."""
    words = [*words, "--data-dir", str(data_dir), "--output-dir", str(output_dir), "--name", name]
    train.main([*words, "--quiet"])
    return Path(output_dir) / name


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_the_notebook_recipe_gives_the_notebooks_losses_on_mnist(tmp_path):
    """Of its first two epochs; `results/lenet5-mnist-notebook` has all five."""
    words = ["--recipe", "notebook", "--dataset", "mnist", "--seed", "42", "--epochs", "2"]
    folder = run(tmp_path, *words)
    found = [row["train_loss"] for row in read_lines(folder / "history.jsonl")]
    assert found == [pytest.approx(0.5815, abs=0.02), pytest.approx(0.1616, abs=0.01)]
    report = json.loads((folder / "report.json").read_text())
    assert report["num_samples"] == 10_000
    assert report["accuracy"] >= 0.95
    assert report["selection_split"] == "test"


@pytest.mark.slow
def test_the_modern_recipe_learns_mnist_from_a_sixth_of_it(tmp_path):
    """`results/lenet5-mnist-default-seed*` have all of it, and 0.992."""
    folder = run(tmp_path, "--max-train-samples", "10000")
    report = json.loads((folder / "report.json").read_text())
    assert report["selection_split"] == "validation"
    assert report["num_samples"] == 10_000
    assert report["accuracy"] >= 0.97


def test_p2_pictures_in_files_train_like_pictures_in_memory(tmp_path):
    words = ["--model", "alexnet", "--dataset", "folder", "--mixed-precision", "no"]
    words += ["--augment", "crop,flip", "--batch-size", "16", "--log-every", "1"]
    words += [
        "--max-train-samples",
        "100",
        "--max-eval-samples",
        "50",
        "--max-steps",
        "4",
        "--epochs",
        "1",
    ]
    losses = {}
    for loader in ("resident", "streaming"):
        data_dir = Path(FOLDER) / "cifar10-jpg"
        given = [*words, "--loader", loader, "--workers", "2"]
        folder = run(tmp_path, *given, data_dir=data_dir, name=loader)
        losses[loader] = [row["loss"] for row in read_lines(folder / "steps.jsonl")]
        report = json.loads((folder / "report.json").read_text())
        assert report["num_samples"] == 50
        assert report["class_names"][0] == "airplane"
    assert len(losses["resident"]) == 4
    assert losses["streaming"] == pytest.approx(losses["resident"], rel=1e-5)

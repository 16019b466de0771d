"""evaluate.py on the data of the training, on other data, and with weights from a stranger."""

import csv
import json
import shutil
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resuming import start
from sklearn import metrics as reference

import evaluate
from lab.checkpoint import weights
from lab.config import recipes
from lab.data import DataConfig
from lab.data.fingerprint import FORMAT
from lab.data.splits import load_fingerprints, read_dataset
from lab.errors import UserError
from lab.models import build_model

CLASSES = ("dark", "gray", "light")
CHANGED = "has changed since the training (files added, removed, renamed or replaced)"
SELECTED = "note: selected on the test split"


def make_images(folder: Path, name: str, count: int, seed: int) -> None:
    """Write images of a class; some of them look like another class."""
    random = np.random.default_rng((seed, CLASSES.index(name)))
    folder.mkdir(parents=True)
    for i in range(count):
        brightness = 64 + 64 * CLASSES.index(name) + random.normal(0, 30)
        pixels = random.normal(brightness, 20, (28, 28, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02}.png")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run whose best epoch was selected on the test split, and its dataset."""
    folder = tmp_path_factory.mktemp("trained")
    for name in CLASSES:
        make_images(folder / "data" / name, name, 30, seed=0)
    words = ["--recipe", "smoke", "--threads", "1", "--quiet", "--val-fraction", "0"]
    words += [
        "--epochs",
        "8",
        "--max-steps",
        "40",
        "--batch-size",
        "16",
        "--max-eval-samples",
        "12",
    ]
    start(folder, *words, "--model", "lenet5", "--dataset", f"{folder}/data")
    return folder / "run", folder / "data"


def call(*words) -> None:
    evaluate.main([str(word) for word in (*words, "--threads", "1", "--quiet", "--workers", "0")])


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ([], SELECTED),
        (["--max-eval-samples", "0"], SELECTED),
        (["--split", "train"], "note: these are samples that were trained on"),
        (["--split", "all"], "note: these are samples that were trained on"),
        (["--split", "all", "--max-eval-samples", "12"], "note: these are samples that were"),
    ],
)
def test_p6_the_data_are_compared_with_the_trainings_whatever_is_asked_for(
    trained, tmp_path, capsys, words, note
):
    """Copied elsewhere they are the same; with one file renamed they are not."""
    copy = Path(shutil.copytree(trained[1], tmp_path / "copy"))
    words = [trained[0], *words, "--output", tmp_path / "e"]
    for dataset in ([], ["--dataset", copy]):
        call(*words, *dataset)
        out, err = capsys.readouterr()
        assert note in out
        assert CHANGED not in err
    for path in copy.glob("*/*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    call(*words, "--dataset", copy)
    out, err = capsys.readouterr()
    assert "note: " not in out
    assert CHANGED in err


def test_p6_only_a_change_of_the_evaluated_split_is_reported():
    data = DataConfig.of(recipes.resolve({"dataset": "digits"}))
    raw = read_dataset(data)
    recorded = load_fingerprints(data, raw) | {"train": f"{FORMAT}-1"}
    metadata = {"data": vars(data), "fingerprints": recorded}
    fewer = replace(data, max_eval_samples=50)
    for split, changed in {"train": True, "val": False, "test": False, "all": True}.items():
        assert evaluate.has_changed(metadata, fewer, split, raw, f"{FORMAT}-2") == changed


def test_p6_only_its_own_test_replaces_the_results_of_a_run(trained, tmp_path):
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    report = (run / "report.json").read_bytes()
    other = shutil.copytree(trained[1], tmp_path / "other")
    (other / "dark" / "00.png").rename(other / "dark" / "x.png")
    for words in ([run, "--split", "train"], [run, run], [trained[0]], [run, "--dataset", other]):
        with pytest.raises(UserError, match="whose test results would be replaced"):
            call(*words, "--output", run)
    assert (run / "report.json").read_bytes() == report
    call(run, "--output", run)
    assert json.loads((run / "report.json").read_text())["split"] == "test"


def test_p6_a_change_where_the_training_read_is_told(trained, tmp_path, capsys):
    copy = Path(shutil.copytree(trained[1], tmp_path / "copy"))
    metadata = weights.read_metadata(trained[0] / "best.safetensors")
    metadata["data"]["dataset"] = str(copy)
    model = build_model(**metadata["model"])
    weights.write_weights(tmp_path / "w", weights.copy_of(model), metadata)
    for path in copy.glob("*/*.png"):
        path.rename(path.with_name(f"x{path.name}"))
    call(tmp_path / "w")
    assert CHANGED in capsys.readouterr().err


@pytest.mark.parametrize("names", [("dark", "light"), ("light",)])
def test_p1_data_with_some_of_the_classes_are_evaluated(trained, tmp_path, capsys, names):
    """The labels are those of the weights, and macro-F1 is scikit-learn's."""
    for name in names:
        make_images(tmp_path / "new" / name, name, 25, seed=1)
    words = ["--dataset", tmp_path / "new", "--split", "all", "--output", tmp_path / "e"]
    call(trained[0], *words)
    report = json.loads((tmp_path / "e" / "report.json").read_text())
    with open(tmp_path / "e" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == report["num_samples"] == 25 * len(names)
    assert [row["label_name"] for row in rows] == [row["file"].split("/")[0] for row in rows]
    labels, predictions = ([row[k] for row in rows] for k in ("label_name", "prediction_name"))
    assert "gray" in predictions  # a class that is predicted and does not occur counts
    macro = reference.f1_score(labels, predictions, average="macro", zero_division=0)
    assert report["macro_f1"] == pytest.approx(macro, abs=1e-9)
    assert report["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
    assert report["class_names"] == list(CLASSES)
    matrix = reference.confusion_matrix(labels, predictions, labels=CLASSES)
    assert report["confusion_matrix"] == matrix.tolist()
    missing = [name for name in CLASSES if name not in names]
    assert (
        f"warning: the data has no samples of {len(missing)} of the 3 classes "
        f"({', '.join(missing)}): macro-F1" in capsys.readouterr().err
    )


def test_p7_classes_that_the_weights_do_not_know_are_refused(fails, tmp_path, trained):
    make_images(tmp_path / "new" / "light", "light", 3, seed=1)
    make_images(tmp_path / "new" / "purple", "dark", 3, seed=1)
    words = ("--dataset", "new", "--split", "all", "--quiet")
    assert fails(evaluate, trained[0], *words) == (
        f"the data have classes that {trained[0]}/best.safetensors was not trained on: purple. "
        "Give a --dataset with classes that it was trained on."
    )


@pytest.mark.parametrize(("dataset", "name"), [("mnist", "MNIST"), ("cifar10", "CIFAR10")])
def test_p4_nothing_is_downloaded_to_a_folder_that_only_metadata_names(
    fails, tmp_path, monkeypatch, dataset, name
):
    asked = []

    def refuse(request, *args, **settings):
        asked.append(request)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    config = recipes.resolve({"model": "lenet5", "dataset": "digits", "recipe": "smoke"})
    data = DataConfig.of(config)
    metadata = {
        "model": {"name": "lenet5", "num_classes": 10, "in_chans": 1, "image_size": 32},
        "data": {**vars(data), "dataset": dataset, "data_dir": "strangers", "image_size": 32},
        "class_names": list("0123456789"),
        "mean": [0.5],
        "std": [0.5],
        "precision": "no",
        "fingerprints": {},
        "best_epoch": 1,
        "selection_split": "validation",
    }
    model = build_model(**metadata["model"])
    weights.write_weights(tmp_path / "w", weights.copy_of(model), metadata)
    (tmp_path / "there").mkdir()
    for words in ("", f"--dataset {dataset}"):
        assert fails(evaluate, "w", "--quiet", *words.split()) == (
            f"{name} is not in strangers, the directory in the metadata of the weights. "
            "Set --data-dir to the directory that contains it, or to one to download it to."
        )
    assert asked == []
    message = fails(evaluate, "w", "--quiet", "--data-dir", "there")
    assert message.startswith(f"{name} is not in there and could not be downloaded")
    assert asked != []

"""cross_validate.py: folds that divide the images, resumed runs, results of all folds."""

import csv
import itertools
import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mistakes import make_picture
from resuming import cut_off
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from worlds import run_world

import cross_validate
import evaluate
import train
from lab.config.recipes import resolve
from lab.data import DataConfig
from lab.data.splits import _split, read_dataset
from lab.engine import evaluation
from lab.report.cross_validation import write_results

RESULTS = ("report.json", "predictions.csv", "predictions.safetensors")


def make_images(folder: Path) -> None:
    """Write 11 images of one class and 7 of another, and copies of three."""
    for i in range(18):
        make_picture(folder / ("cat" if i < 11 else "dog") / f"{i:02}.png")
    for i, name in ((0, "a"), (0, "zz"), (3, "b")):
        shutil.copy(folder / "cat" / f"{i:02}.png", folder / "cat" / f"{name}.png")
    shutil.copy(folder / "dog" / "15.png", folder / "dog" / "c.png")


def splits(dataset, num_folds, fold, seed=0, **settings):
    data = DataConfig(str(dataset), "data", 32, 0.2, 0.2, seed, 0, 0, **settings)
    data = DataConfig(**vars(data) | {"folds": num_folds, "fold": fold})
    return _split(read_dataset(data), data)


@pytest.mark.parametrize("num_folds", [2, 3, 7])
def test_p6_folds_divide_the_images_and_keep_copies_together(tmp_path, num_folds):
    make_images(tmp_path / "data")
    tested, sizes, counts = [], [], []
    for fold in range(1, num_folds + 1):
        parts = splits(tmp_path / "data", num_folds, fold)
        files = {name: parts[name].files() for name in ("train", "val", "test")}
        assert sorted(itertools.chain(*files.values())) == sorted(
            str(p.relative_to(tmp_path / "data")) for p in tmp_path.glob("data/*/*.png")
        )
        contents = [
            {(tmp_path / "data" / file).read_bytes() for file in names} for names in files.values()
        ]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert not contents[i] & contents[j]
        assert not parts["train"].missing_classes()
        tested += files["test"]
        distinct = {file for file in files["test"] if file[4:6].isdigit()}  # without the copies
        sizes.append(len(contents[2]))
        counts.append(sum(file.startswith("cat/") for file in distinct))
    assert len(tested) == len(set(tested)) == 22
    assert max(sizes) - min(sizes) <= 1
    assert sum(sizes) == 18
    assert max(counts) - min(counts) <= 1


def test_p6_folds_of_a_named_dataset_divide_it():
    parts = [splits("digits", 5, fold) for fold in range(1, 6)]
    assert sorted(len(part["test"].labels) for part in parts) == [359, 359, 359, 360, 360]
    for part in parts:
        assert sum(len(split.labels) for split in part.values()) == 1797
    classes = torch.stack([part["test"].labels.bincount() for part in parts])
    assert (classes.max(0).values - classes.min(0).values).max() == 1
    other = splits("digits", 5, 1, seed=1)["test"]
    assert not torch.equal(other.images, parts[0]["test"].images)


def test_p6_a_test_split_of_the_dataset_is_not_used(tmp_path):
    """Its validation split selects the best epoch of every fold."""
    for split in ("train", "val", "test"):
        for i in range(8):
            make_picture(tmp_path / split / ("cat", "dog")[i % 2] / f"{i}.png")
    for name in ("x", "y", "z"):
        shutil.copy(tmp_path / "train/cat/0.png", tmp_path / f"train/cat/{name}.png")
    for fold in (1, 2, 3):
        parts = {name: part.files() for name, part in splits(tmp_path, 3, fold).items()}
        assert len(parts["val"]) == 8
        assert len(parts["train"]) + len(parts["test"]) == 11
        assert all(file.startswith("train/") for file in parts["train"] + parts["test"])
        copies = {f"train/cat/{name}.png" for name in "0xyz"}
        assert len(copies & {*parts["test"]}) in (0, 4)


WORDS = ["--dataset", "data", "--model", "lenet5", "--recipe", "smoke", "--max-steps", "0",
         "--epochs", "3", "--val-fraction", "0.2", "--batch-size", "4", "--threads", "1",
         "--workers", "0", "--quiet"]  # fmt: skip


@pytest.fixture(scope="module")
def validated(tmp_path_factory):
    """Return the directory of a cross-validation of 3 folds; its parent has the dataset."""
    folder = tmp_path_factory.mktemp("folds")
    make_images(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cross_validate.main([*WORDS, "--folds", "3", "--name", "three"]) == 0
    return folder / "runs" / "three"


def test_p6_the_pooled_report_names_the_selection_split_and_has_a_finite_loss(validated, tmp_path):
    folds = [Path(shutil.copytree(validated / f"fold-{i}", tmp_path / str(i))) for i in (1, 2, 3)]
    for fold in folds:
        report = json.loads((fold / "report.json").read_text()) | {"selection_split": "test"}
        (fold / "report.json").write_text(json.dumps(report))
        table = torch.tensor([[1.0, 0.0]]).repeat(report["num_samples"], 1)
        save_file({"probabilities": table}, fold / "predictions.safetensors")
    write_results(tmp_path, folds)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["selection_split"] == "test"
    assert 1 < report["loss"] < 200


def read_rows(path):
    with open(path / "predictions.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_p1_the_pooled_report_counts_each_image_once(validated):
    folds = [validated / f"fold-{i}" for i in (1, 2, 3)]
    rows = read_rows(validated)
    assert sorted(row["file"] for row in rows) == sorted(
        str(path.relative_to(validated.parents[1] / "data"))
        for path in validated.parents[1].glob("data/*/*.png")
    )
    assert [(row["file"], row["prediction"]) for row in rows] == [
        (row["file"], row["prediction"]) for fold in folds for row in read_rows(fold)
    ]
    report = json.loads((validated / "report.json").read_text())
    labels, predictions = (
        [row[name] for row in rows] for name in ("label_name", "prediction_name")
    )
    assert report["confusion_matrix"] == confusion_matrix(labels, predictions).tolist()
    assert report["num_samples"] == 22
    assert report["accuracy"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-9)
    macro = f1_score(labels, predictions, average="macro", zero_division=0)
    assert report["macro_f1"] == pytest.approx(macro, abs=1e-9)
    reports = [json.loads((fold / "report.json").read_text()) for fold in folds]
    losses = [r["loss"] * r["num_samples"] for r in reports]
    assert report["loss"] == pytest.approx(sum(losses) / 22, rel=1e-5)
    for name in ("accuracy", "macro_f1"):
        values = [r[name] for r in reports]
        assert report[f"{name}_mean"] == pytest.approx(statistics.mean(values), abs=1e-12)
        assert report[f"{name}_std"] == pytest.approx(statistics.stdev(values), abs=1e-12)
        assert [fold[name] for fold in report["folds"]] == values


def test_p5_the_weights_of_a_fold_describe_its_test_split(validated, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(validated.parents[1])
    evaluate.main(["runs/three/fold-2", "--output", f"{tmp_path}/e", "--quiet", "--threads", "1"])
    for name in RESULTS[1:]:
        expected = (validated / "fold-2" / name).read_bytes()
        assert (tmp_path / "e" / name).read_bytes() == expected
    assert "has changed" not in capsys.readouterr().err


def test_a_fold_is_evaluated_on_images_that_could_not_be_divided(
    validated, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
        make_picture(tmp_path / "other" / name)
    words = ["--dataset", "other", "--split", "all", "--output", "e", "--quiet", "--threads", "1"]
    evaluate.main([str(validated / "fold-2"), *words])
    assert json.loads((tmp_path / "e" / "report.json").read_text())["num_samples"] == 3
    assert "the data has changed" in capsys.readouterr().err


def test_p3_finished_folds_are_not_trained_again(validated, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(validated.parents[1] / "data", "data")
    words, original = [*WORDS, "--folds", "3", "--name", "three"], train.main

    def main(argv):  # the second fold is killed
        if "fold-2" not in argv:
            return original(argv)
        cut_off(monkeypatch, 7, lambda: original(argv))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "main", main)
        with pytest.raises(KeyboardInterrupt):
            cross_validate.main(words)
    runs = Path("runs/three")
    assert not (runs / "fold-3").exists()
    assert not (runs / "report.json").exists()
    before = (runs / "fold-1" / "history.jsonl").read_bytes()  # contains durations
    assert cross_validate.main(words) == 0
    assert (runs / "fold-1" / "history.jsonl").read_bytes() == before
    for name in RESULTS:
        assert (runs / name).read_bytes() == (validated / name).read_bytes()


def test_large_probabilities_leave_the_metrics_of_each_fold(
    validated, monkeypatch, tmp_path, capsys
):
    shutil.copytree(validated.parents[1], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    runs = Path("runs/three")
    for file in runs.rglob("predictions.safetensors"):
        file.unlink()
    words = [*WORDS, "--folds", "3", "--name", "three"]
    with pytest.raises(ValueError, match="fold-1 has no predictions"):
        cross_validate.main(words)
    monkeypatch.setattr(evaluation, "MAX_LOGITS_BYTES", 0)
    capsys.readouterr()
    assert cross_validate.main(words) == 0
    printed = capsys.readouterr()
    assert "standard deviation" in printed.out
    assert "no report of all folds: the probabilities of a fold would be larger" in printed.err


def test_p1_two_processes_cross_validate(validated, tmp_path):
    dataset = ("--dataset", validated.parents[1] / "data", "--output-dir", tmp_path)
    words = ("cross_validate.py", *WORDS, *dataset, "--folds", 2, "--name", "two")
    ended = run_world(2, *words, limit=300)
    assert [world.code for world in ended] == [0, 0], ended[0].stderr
    assert [world.stdout.count("standard deviation") for world in ended] == [1, 0]
    assert json.loads((tmp_path / "two" / "report.json").read_text())["num_samples"] == 22
    assert len({row["file"] for row in read_rows(tmp_path / "two")}) == 22


def test_p7_mistakes_are_one_line(fails, tmp_path, validated):
    words = ("--dataset", "data", "--model", "lenet5", "--no-pretrained")
    assert fails(cross_validate, *words, "--fold", 2) == (
        "--fold is not an option of cross_validate.py. Leave it out."
    )
    assert "do not select a fold" in fails(cross_validate, *words, "--folds", 1)
    for options in (("--folds", 5), ("--fold", 2), ("--folds", 5, "--fold", 6)):
        assert "do not select a fold. Give at least 2 folds" in fails(train, *words, *options)
    make_picture(tmp_path / "data/cat/0.png")
    for i in range(5):
        make_picture(tmp_path / f"data/dog/{i}.png")
    words = (*words, "--name", "x", "--threads", 1, "--quiet")
    assert fails(cross_validate, *words) == (
        "cross-validation needs two different images of each class, and there is only one of cat. "
        "Add images of it, or remove the class."
    )
    make_picture(tmp_path / "data/cat/1.png")
    assert fails(cross_validate, *words, "--folds", 9) == (
        "7 images cannot be divided into 9 parts. Give fewer --folds."
    )


def test_p3_results_of_a_run_or_a_cross_validation_are_not_replaced(validated, tmp_path, fails):
    (tmp_path / "runs/x").mkdir(parents=True)
    (tmp_path / "runs/x/config.json").write_text("{}")
    words = ("--dataset", "digits", "--name", "x", "--output-dir", tmp_path / "runs")
    assert fails(cross_validate, *words) == (
        f"{tmp_path}/runs/x is a run, whose test results would be replaced. Give another --name."
    )
    words = (validated / "fold-1", "--dataset", validated.parents[1] / "data")
    assert fails(evaluate, *words, "--output", validated) == (
        f"{validated} is a cross-validation, whose results would be replaced. "
        "Give another --output."
    )


def test_a_settings_file_may_contain_options_that_are_not_accepted(monkeypatch, tmp_path, fails):
    monkeypatch.setattr(train, "main", lambda _: SimpleNamespace(interrupted=True, exit_code=0))
    (tmp_path / "s.yaml").write_text("model: lenet5\ndataset: digits\nfold: 0\n")
    words = ("--config", tmp_path / "s.yaml", "--output-dir", tmp_path / "runs")
    assert cross_validate.main([*map(str, words)]) == 0
    (tmp_path / "s.yaml").write_text("model: lenet5\ndataset: digits\nfolds: 5\nfold: 2\n")
    assert fails(cross_validate, *words).startswith("--fold is not an option")


def test_the_time_limit_is_that_of_all_folds(monkeypatch):
    limits = []

    def main(words):
        limits.append(float(words[len(words) - words[::-1].index("--max-hours")]))
        return SimpleNamespace(interrupted=len(limits) == 2, exit_code=0)

    monkeypatch.setattr(train, "main", main)
    clock = iter(range(0, 36000, 3600))
    monkeypatch.setattr(cross_validate.time, "monotonic", lambda: next(clock))
    assert cross_validate.main([*WORDS, "--max-hours", "3"]) == 0
    assert limits == [2, 1]  # the third fold is not started
    limits.clear()
    cross_validate.main(WORDS)
    assert limits == [0, 0]  # and none of the limit that a checkpoint of a fold contains


def test_p3_the_commit_of_the_data_of_a_fold_is_not_a_setting_to_compare(tmp_path):
    overrides = {"dataset": "hf:some/images", "folds": 3, "fold": 1}
    config = resolve(overrides)
    recorded = {**vars(config), "revision": "0" * 40, "versions": {}}
    (tmp_path / "fold-1").mkdir()
    (tmp_path / "fold-1" / "config.json").write_text(json.dumps(recorded))
    cross_validate.check_same_settings(tmp_path, config, overrides)


def test_p7_other_settings_or_data_do_not_continue_it(validated, monkeypatch, tmp_path):
    shutil.copytree(validated.parents[1], tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    words = [*WORDS, "--folds", "3", "--name", "three"]
    with pytest.raises(ValueError, match=r"--lr 0\.5 differs from the run's, which is 0\.002"):
        cross_validate.main([*words, "--lr", "0.5"])
    left_out = [word for word in words if word not in ("--val-fraction", "0.2")]
    with pytest.raises(ValueError, match=r"fold-1 was trained with --val-fraction 0\.2, not 0\.1"):
        cross_validate.main(left_out)
    shutil.rmtree("runs/three/fold-3")
    for i in range(30, 36):
        make_picture(Path(f"data/dog/{i}.png"))
    with pytest.raises(ValueError, match="the images have changed between the training of runs/th"):
        cross_validate.main(words)

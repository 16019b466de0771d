"""compare.py: the numbers of runs side by side, and the noise of their differences."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from handmade import make_run as make_finished
from PIL import Image
from resuming import LENET, start

import compare
from lab import console
from lab.data.fingerprint import FORMAT
from lab.errors import UserError
from lab.models.stats import model_stats
from lab.report import compare as compare_module
from lab.report.compare import difference
from lab.report.run_reader import RunResult, read_run


def make_run(tmp_path, right, name="a", dataset="digits"):
    """A run that is right where `right` is."""
    labels = np.arange(len(right)) % 3
    predictions = np.where(right, labels, (labels + 1) % 3)
    report = {"accuracy": float(np.mean(right)), "class_names": ["x", "y", "z"]}
    return RunResult(tmp_path / name, {"dataset": dataset}, report, [], labels, predictions)


def test_the_interval_is_that_of_drawing_samples(tmp_path):
    random = np.random.default_rng(0)
    a, b = random.random(400) < 0.8, random.random(400) < 0.7
    found, low, high = difference(make_run(tmp_path, a), make_run(tmp_path, b, "b"))
    draws = random.integers(400, size=(4000, 400))
    drawn = (a[draws].mean(1) - b[draws].mean(1)).tolist()
    assert found == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.006)
    assert low < found < high


def test_a_run_differs_from_itself_by_nothing(tmp_path):
    run = make_run(tmp_path, np.array([True, False] * 50))
    assert difference(run, run) == (0, 0, 0)


def test_paired_runs_are_told_apart_where_unpaired_ones_would_not_be(tmp_path):
    """One is right wherever the other is, and on 8 of 400 samples more."""
    a = np.arange(400) < 300
    b = np.arange(400) < 308
    _, low, high = difference(make_run(tmp_path, a), make_run(tmp_path, b, "b"))
    assert low < high < 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, words in {"slow": ["--lr", "1e-5"], "fast": [], "faster": ["--epochs", "6"]}.items():
        start(folder, *LENET, *words, name=name)
    return folder


def test_the_table_has_the_runs_own_numbers(trained):
    runs = [read_run(trained / name) for name in ("slow", "fast", "faster")]
    rows = compare_module.rows(runs)
    accuracies = [row["accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert rows[0]["to best"] is None
    assert rows[0].keys() == {"run", *console.IMPORTANCE}  # a column not listed is never printed
    for row in rows:
        report = json.loads((trained / row["run"] / "report.json").read_text())
        history = (trained / row["run"] / "history.jsonl").read_text().splitlines()
        assert (row["accuracy"], row["macro-F1"]) == (report["accuracy"], report["macro_f1"])
        assert (row["epochs"], row["parameters"]) == (len(history), 61_706)
        assert row["multiply-adds"] == 416_520
    for row in rows[1:]:
        assert row["to best"][0] == pytest.approx(row["accuracy"] - accuracies[0])


def test_runs_on_other_test_splits_are_not_compared(tmp_path, trained):
    other = start(tmp_path, *LENET, "--split-seed", "1", name="other")
    assert other == 0
    rows = compare_module.rows([read_run(trained / "fast"), read_run(tmp_path / "other")])
    assert [row["to best"] for row in rows] == [None, None]


def test_the_files_hold_the_table(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    assert compare.main(["slow", "fast", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "61,706" in printed
    text = (tmp_path / "out" / "comparison.md").read_text()
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"slow", "fast"}
    for row in rows:
        assert f"| {float(row['accuracy']):.4f} |" in text
        assert row["class accuracies"].count("=") == 10
    assert float(rows[1]["low"]) <= float(rows[1]["to best"]) <= float(rows[1]["high"])
    page = (tmp_path / "out" / "compare.html").read_text()
    assert {f"{float(row['accuracy']):.4f}" for row in rows} <= set(re.findall(r"[\d.]+", page))
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 10  # something is drawn


def test_folders_and_their_classes_are_told_apart(tmp_path):
    """100 classes are as many rows; two folders of pictures are two data sets."""
    hundred = [f"class {k}" for k in range(100)]
    folders = {"a": ["cat", "dog|wolf"], "b": hundred}
    for name, names in folders.items():
        make_finished(tmp_path / name, names, dataset="folder", data_dir=f"data/pics {name}/")
    runs = [read_run(tmp_path / name) for name in folders]
    rows = compare_module.rows(runs)
    assert [row["data set"] for row in rows] == ["folder (pics a)", "folder (pics b)"]
    compare_module.write(tmp_path, runs, rows)
    text = (tmp_path / "comparison.md").read_text()
    assert f"## {compare_module.RECALLS}\n" in text
    for run in runs:
        for row in run.report["per_class"]:
            name = row["class"].replace("|", "\\|")
            assert f"\n| {name} | {row['recall']:.4f} |\n" in text
    assert max(map(len, text.splitlines())) < 500


def test_counts_are_brief():
    counts = {0: "0", 999: "999", 1000: "1.00 k", 61_706: "61.7 k", 416_520: "417 k",
              999_499: "999 k", 999_500: "1.00 M", 14_859_082: "14.9 M"}  # fmt: skip
    assert {count: compare_module.brief(count) for count in counts} == counts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no runs to compare. Name the folders of runs."),
        ("gone", "gone is no run's folder: it has no config.json. Name one of train.py's."),
        ("a --output b", "--output is for several runs. Name more of them, or leave it out."),
        ("unfinished", "the run unfinished is not finished. Finish it: train.py --resume "
                       "unfinished."),
    ],
)  # fmt: skip
def test_p7_compare_refuses(fails, tmp_path, words, message):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    assert fails(compare, *words.split()) == message


@pytest.mark.parametrize("name", ["config.json", "report.json", "predictions.csv", "history.jsonl"])
def test_p7_a_damaged_run_is_named(tmp_path, trained, name):
    copied = shutil.copytree(trained / "fast", tmp_path / "copied")
    (copied / name).write_text("[1]\n2")
    with pytest.raises(UserError, match=r"the run .*copied is damaged"):
        read_run(copied)


def test_an_unfinished_run_is_left_out_of_several(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    assert compare.main([str(trained / "fast"), "unfinished"]) == 0
    assert "left out: the run unfinished is not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "in_chans", "size", "parameters", "macs"),
    [
        # Convolutions: outputs x 25 x channels in; then 120 x 84 + 84 x 10.
        ("lenet5", 1, 32, 61_706, 28**2 * 6 * 25 + 100 * 16 * 150 + 120 * 400 + 10_080 + 840),
        ("alexnet", 3, 32, 14_859_082, None),
    ],
)
def test_the_cost_of_a_network(model, in_chans, size, parameters, macs):
    found = model_stats(name=model, num_classes=10, in_chans=in_chans, image_size=size)
    assert found["parameters"] == parameters
    assert macs is None or found["macs"] == macs


def test_runs_are_compared_on_the_same_test_samples_only():
    def run(**config):
        settings = {"dataset": "folder", "split_seed": 0, **config}
        return RunResult(Path("run"), settings, {}, [], np.arange(3), None)

    old, current = ({"test": "0123456789abcdef"}, {"test": f"{FORMAT}-1"})
    a, b = run(fingerprints=current), run(fingerprints={"test": f"{FORMAT}-2"})
    assert a.has_same_test_split(run(fingerprints=current))
    assert not a.has_same_test_split(b)
    assert not a.has_same_test_split(run(fingerprints=current, split_seed=1))
    for other in (run(fingerprints=old), run()):  # whose fingerprints say nothing
        assert a.has_same_test_split(other)
        assert other.has_same_test_split(a)

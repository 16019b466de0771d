"""compare.py: the table of runs and the confidence intervals of their differences."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from resuming import LENET, start

import compare
from lab import console
from lab.data.fingerprint import FORMAT
from lab.errors import UserError
from lab.report import compare as compare_module
from lab.report.compare import difference
from lab.report.run_reader import RunResult, read_run


def make_run(tmp_path, correct, name="a", dataset="digits"):
    """Return a run whose predictions are correct where `correct` is true."""
    labels = np.arange(len(correct)) % 3
    predictions = np.where(correct, labels, (labels + 1) % 3)
    report = {"accuracy": float(np.mean(correct)), "class_names": ["x", "y", "z"]}
    return RunResult(tmp_path / name, {"dataset": dataset}, report, [], labels, predictions)


def test_the_interval_equals_that_of_resampled_test_splits(tmp_path):
    random = np.random.default_rng(0)
    a, b = random.random(400) < 0.8, random.random(400) < 0.7
    value, low, high = difference(make_run(tmp_path, a), make_run(tmp_path, b, "b"))
    draws = random.integers(400, size=(4000, 400))
    resampled = (a[draws].mean(1) - b[draws].mean(1)).tolist()
    assert value == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.006)
    assert low < value < high


def test_the_bootstrap_is_paired(tmp_path):
    """One run is correct wherever the other is, and on 8 of 400 samples more."""
    a = np.arange(400) < 300
    b = np.arange(400) < 308
    _, low, high = difference(make_run(tmp_path, a), make_run(tmp_path, b, "b"))
    assert low < high < 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    for name, options in {"slow": ["--lr", "1e-5"], "fast": [], "long": ["--epochs", "6"]}.items():
        start(directory, *LENET, *options, name=name)
    return directory


def test_the_table_has_the_metrics_of_the_runs(trained):
    runs = [read_run(trained / name) for name in ("slow", "fast", "long")]
    rows = compare_module.rows(runs)
    accuracies = [row["accuracy"] for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert rows[0]["vs. best"] is None
    assert rows[0].keys() >= set(console.RUN_COLUMNS)
    for row in rows:
        report = json.loads((trained / row["run"] / "report.json").read_text())
        lines = (trained / row["run"] / "history.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in lines]
        assert (row["accuracy"], row["macro-F1"]) == (report["accuracy"], report["macro_f1"])
        assert (row["epochs"], row["parameters"]) == (len(history), 61_706)
        assert row["MACs"] == 416_520
        assert row["images/s"] == np.median([epoch["images_per_second"] for epoch in history])
    for row in rows[1:]:
        assert row["vs. best"][0] == pytest.approx(row["accuracy"] - accuracies[0])


def test_runs_are_sorted_by_dataset_and_compared_if_they_have_predictions(trained):
    runs = [read_run(trained / name) for name in ("slow", "fast")]
    config = runs[0].config | {"dataset": "images"}
    others = [replace(run, config=config, labels=None, predictions=None) for run in runs]
    rows = compare_module.rows([*others, *runs])
    assert [row["dataset"] for row in rows] == ["digits", "digits", "images", "images"]
    assert [row["vs. best"] is None for row in rows] == [True, False, True, True]


def test_the_files_contain_the_table(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    compare.main(["slow", "fast", "--output", str(tmp_path / "out")])
    assert "vs. best" in capsys.readouterr().out
    text = (tmp_path / "out" / "comparison.md").read_text()
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"slow", "fast"}
    for row in rows:
        assert f"| {float(row['accuracy']):.4f} |" in text
        assert row["class recalls"].count("=") == 10
    assert float(rows[1]["low"]) <= float(rows[1]["vs. best"]) <= float(rows[1]["high"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "no runs to compare. Give the directories of one or more runs."),
        ("missing", "missing is not the directory of a run: it has no config.json. Give a "
                    "directory that train.py has written."),
        ("a --output b", "invalid --output: it applies to several runs. Give several runs, or omit "
                         "--output."),
        ("unfinished", "the run unfinished is not finished. Finish it: train.py --resume "
                       "unfinished."),
    ],
)  # fmt: skip
def test_p7_compare_reports_invalid_arguments(fails, tmp_path, arguments, message):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    assert fails(compare, *arguments.split()) == message


def test_p7_a_missing_prediction_is_named(tmp_path, trained):
    copied = shutil.copytree(trained / "fast", tmp_path / "copied")
    lines = (copied / "predictions.csv").read_text().splitlines(keepends=True)
    (copied / "predictions.csv").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=rf"predictions.csv \({len(lines) - 2} rows for"):
        read_run(copied)


def test_class_names_are_no_html_in_the_table():
    assert "&lt;b&gt;a\\|b" in compare_module._markdown([["class"], ["<b>a|b"]])


@pytest.mark.parametrize("name", ["predictions.csv", "history.jsonl"])
def test_p7_a_damaged_run_is_named(tmp_path, trained, name):
    copied = shutil.copytree(trained / "fast", tmp_path / "copied")
    (copied / name).write_text("[1]\n2")
    with pytest.raises(UserError, match=r"the run .*copied is damaged"):
        read_run(copied)


def test_an_unfinished_run_is_skipped(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    compare.main([str(trained / "fast"), "unfinished"])
    assert "skipped: the run unfinished is not finished" in capsys.readouterr().err


def test_the_fingerprint_decides_whether_two_test_splits_are_the_same():
    def run(**config):
        settings = {"dataset": "data/images", "split_seed": 0, **config}
        return RunResult(Path("run"), settings, {}, [], np.arange(3), None)

    old, current = ({"test": "0123456789abcdef"}, {"test": f"{FORMAT}-1"})
    a, b = run(fingerprints=current), run(fingerprints={"test": f"{FORMAT}-2"})
    assert a.has_same_test_split(run(fingerprints=current))
    assert not a.has_same_test_split(b)
    assert a.has_same_test_split(run(fingerprints=current, split_seed=1))  # a test directory
    assert not a.has_same_test_split(run(fingerprints=old, split_seed=1))
    for other in (run(fingerprints=old), run()):  # without a usable fingerprint
        assert a.has_same_test_split(other)
        assert other.has_same_test_split(a)


# The plot of a comparison

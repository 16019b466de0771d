"""predictions.csv, report.html and the plots name the right file of each sample."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from resuming import start

import evaluate
import predict
from lab.checkpoint import weights
from lab.data.decode import describe_decoder
from lab.report import html, plots
from lab.report.run_reader import read_run

CLASSES = ("cat", "dog")
SUBDIRECTORY = {"cat": "", "dog": "deep/er"}  # below the class directory
ODD = ('a, b "c"', "new\nline", "café", "caf\udce9", "<b>")  # the fourth is not UTF-8
SHORT = ["--recipe", "smoke", "--max-steps", "2", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a run that was trained on a directory without splits, and that directory.

    The names of the images, which are random, start with their class.
    """
    folder = tmp_path_factory.mktemp("trained")
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / "data" / name / SUBDIRECTORY[name]).mkdir(parents=True)
        for last in (*ODD, *range(25)):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            path = folder / "data" / name / SUBDIRECTORY[name] / f"{name}-{last}.png"
            try:
                Image.fromarray(pixels).save(path)
            except OSError:
                pytest.skip("the file system refuses such names")
    start(folder, *SHORT, "--model", "lenet5", "--dataset", f"{folder}/data")
    return folder / "run", folder / "data"


def test_p5_weights_record_how_files_are_decoded(trained, capsys):
    path = trained[0] / "best.safetensors"
    metadata = weights.read_metadata(path)
    assert metadata["decoder"] == describe_decoder()
    weights.load_model(path, metadata)
    assert capsys.readouterr().err == ""
    weights.load_model(path, metadata | {"decoder": "Pillow 1.0, pixels 00000000"})
    assert "decoded to other pixels than in training" in capsys.readouterr().err


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (["--split", "train"], 43),
        (["--split", "all", "--max-eval-samples", "9"], 9),
        (["--loader", "streaming", "--workers", "0", "--tta", "flip"], 12),
    ],
)
def test_each_row_names_its_file(trained, tmp_path, words, count):
    """The row has the class of the file, and predict.py gives the same prediction for it."""
    run_folder, data = trained
    options = ["--output", str(tmp_path / "e"), "--threads", "1", "--quiet"]
    evaluate.main([str(run_folder), *words, *options])
    rows = rows_of(tmp_path / "e" / "predictions.csv")
    assert len({row["file"] for row in rows}) == len(rows) == count
    paths = [str(data / row["file"]) for row in rows]
    options = ["--csv", str(tmp_path / "p.csv"), "--top-k", "1", "--threads", "1", "--workers", "0"]
    assert predict.main([str(run_folder), *paths, *options]) == 0
    for row, path, prediction in zip(rows, paths, rows_of(tmp_path / "p.csv"), strict=True):
        name = row["label_name"]
        assert name == CLASSES[int(row["label"])]
        assert row["prediction_name"] == CLASSES[int(row["prediction"])]
        assert row["file"].startswith(
            "/".join(filter(None, (name, SUBDIRECTORY[name], f"{name}-")))
        )
        assert prediction["path"] == path
        assert prediction["class1"] == CLASSES[int(row["prediction"])]
        assert float(prediction["confidence1"]) == pytest.approx(float(row["confidence"]), abs=1e-5)


def test_page_and_plots_name_the_files_of_mistakes(trained, tmp_path, monkeypatch):
    path = shutil.copytree(trained[0], tmp_path / "run")
    captions = []
    monkeypatch.setattr(plots, "_grid", lambda _, texts, *__: captions.extend(texts))
    for with_files in (True, False):
        if not with_files:  # as for datasets that have no files
            lines = [[*row.values()][:4] for row in rows_of(path / "predictions.csv")]
            lines.insert(0, ["index", "label", "prediction", "confidence"])
            text = "".join(",".join(line) + "\n" for line in lines)
            (path / "predictions.csv").write_text(text)
        captions.clear()
        found = read_run(path)
        plots.mistakes(found, found.images())
        assert (found.files is not None) == with_files
        wrong = np.flatnonzero(found.labels != found.predictions)
        names = [found.files[i] if with_files else f"#{i}" for i in wrong]
        shown = html._mistakes(found)
        assert sorted(name for _, _, name, *_ in shown) == sorted(names) != []
        for label, prediction, name, *_ in shown:
            i = wrong[names.index(name)]
            assert (label, prediction) == (found.labels[i], found.predictions[i])
        ends = {name[-8:] for name in names if name.isprintable()}
        drawn = {caption[-8:] for caption in captions}
        assert (ends <= drawn) == with_files
        text = html.write(path).read_text()
        assert "<b>" not in text


def test_names_are_relative_to_the_data_directory(trained, tmp_path, monkeypatch):
    run_folder, data = trained
    monkeypatch.chdir(data)
    expected = (run_folder / "predictions.csv").read_bytes()
    for given in (".", "../data/", os.path.relpath(data)):
        words = ["--dataset", given, "--output", str(tmp_path / "e"), "--threads", "1", "--quiet"]
        evaluate.main([str(run_folder), *words])
        assert (tmp_path / "e" / "predictions.csv").read_bytes() == expected

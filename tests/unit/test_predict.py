"""predict.py: pictures in files get evaluation's predictions; what cannot be read is named."""

import csv
import errno
import io
import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from resuming import start
from worlds import run, torchrun

import evaluate
import predict
from lab import console, inference
from lab.data import DataConfig, load_split
from lab.data.transforms import to_grayscale

CLASSES = ("dark", "light", "striped")
FEW = ["--recipe", "smoke", "--threads", "1", "--quiet"]


def picture(label, seed, size=40):
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 120, (size, size, 3)) + (0, 130, 60)[label]
    if label == 2:
        pixels[::4] = 255
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(a run, the folder of its test pictures)."""
    folder = tmp_path_factory.mktemp("trained")
    for split, count in {"train": 40, "test": 45}.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                suffix = ("png", "jpg", "bmp")[i % 3]
                picture(label, (i, label, count)).save(folder / split / name / f"{i:03}.{suffix}")
    words = [*FEW, "--model", "lenet5", "--dataset", str(folder), "--max-eval-samples", "0"]
    start(folder, *words, "--val-fraction", "0.2")
    return folder / "run", folder / "test"


def call(*words):
    return predict.main([str(word) for word in (*words, "--threads", "1", "--workers", "0")])


def stdin(text):
    """Standard input that holds `text`."""
    return io.TextIOWrapper(io.BytesIO(text.encode()))


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(("tta", "folder"), [("none", "e"), ("flip", "e-tta-flip")])
def test_predictions_are_those_of_evaluate(trained, tmp_path, tta, folder):
    run_folder, pictures = trained
    words = ("--csv", tmp_path / "out.csv", "--top-k", 1, "--tta", tta)
    assert call(run_folder, pictures, *words) == 0
    words = ("--quiet", "--threads", "1", "--output", str(tmp_path / "e"), "--tta", tta)
    evaluate.main([str(run_folder), *words])
    expected = read_csv(tmp_path / folder / "predictions.csv")
    found = read_csv(tmp_path / "out.csv")
    assert [row["class1"] for row in found] == [CLASSES[int(r["prediction"])] for r in expected]
    assert [row["confidence1"] for row in found] == [row["confidence"] for row in expected]
    assert [row["path"] for row in found] == sorted(map(str, pictures.glob("*/*")))
    assert len({row["class1"] for row in found}) > 1


def test_pictures_of_one_channel(tmp_path):
    """The digits' test split, written as PNG files, is told apart as evaluation does it."""
    start(tmp_path, "--dataset", "digits", *FEW, "--max-steps", "60", "--epochs", "6")
    run_folder = tmp_path / "run"
    config = json.loads((run_folder / "config.json").read_text())
    digits, _ = load_split(DataConfig(**{k: config[k] for k in DataConfig.__annotations__}),
                           "test", 1e9, 1)  # fmt: skip
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(digits.images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "pictures" / f"{i:04}.png")
    call(run_folder, tmp_path / "pictures", "--json", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = read_csv(run_folder / "predictions.csv")
    for one, row in zip(found, expected, strict=True):
        assert one["classes"][0]["class"] == row["prediction"]
        assert one["classes"][0]["confidence"] == pytest.approx(float(row["confidence"]), abs=1e-5)
    assert all(len(f["classes"]) == 3 for f in found)


def test_what_is_grey_keeps_its_values():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(to_grayscale(levels.expand(-1, 3, -1, -1)), levels)
    red, white = torch.tensor([255, 0, 0]), torch.tensor([255, 255, 255])
    found = to_grayscale(torch.stack((red, white)).byte().view(2, 3, 1, 1))
    assert found.flatten().tolist() == [76, 255]  # 0.2989 of it


def test_a_picture_that_cannot_be_read_is_named_and_the_others_go_on(trained, tmp_path, capsys):
    broken = tmp_path / "1-broken.png"
    broken.write_bytes(b"no picture")
    for i in (0, 2):
        picture(1, i).save(tmp_path / f"{i}.png")
    assert call(trained[0], tmp_path, "--json", tmp_path / "out") == 1
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [row["path"] for row in rows] == [str(tmp_path / f) for f in
                                             ("0.png", "1-broken.png", "2.png")]  # fmt: skip
    assert "classes" not in rows[1]
    assert "cannot read the image" in rows[1]["error"]
    assert all(len(row["classes"]) == 3 for row in (rows[0], rows[2]))
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: cannot read the image {broken}")


def test_any_kind_of_picture_is_taken(trained, tmp_path):
    image = picture(1, 0)
    kinds = {"grey.png": "L", "palette.png": "P", "alpha.png": "RGBA", "cmyk.jpg": "CMYK",
             "bits.png": "1"}  # fmt: skip
    for name, mode in kinds.items():
        image.convert(mode).save(tmp_path / name)
    Image.fromarray(np.full((9, 5), 40_000, dtype=np.uint16)).save(tmp_path / "sixteen.png")
    assert call(trained[0], *tmp_path.iterdir(), "--quiet") == 0


def test_paths_come_from_standard_input_in_their_order(trained, tmp_path, monkeypatch, capsys):
    paths = sorted(map(str, trained[1].glob("*/00*")), reverse=True)
    monkeypatch.setattr("sys.stdin", stdin("".join(f"{path}\n" for path in paths)))
    call(trained[0], "-", "--json", "-")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == paths
    for row in rows:
        confidences = [c["confidence"] for c in row["classes"]]
        assert confidences == sorted(confidences, reverse=True)
        assert sum(confidences) == pytest.approx(1, abs=1e-5)  # of three classes, all three


def test_a_name_that_is_no_utf8_keeps_its_bytes(trained, tmp_path, capfdbinary):
    path = os.fsencode(tmp_path) + b"/\xff.png"
    with open(path, "wb") as file:
        picture(0, 1).save(file, "PNG")
    assert call(trained[0], tmp_path, "--csv", "-", "--top-k", "1") == 0
    sys.stdout.flush()
    assert capfdbinary.readouterr().out.splitlines()[1].startswith(path + b",,")


def test_json_is_utf8_and_keeps_names_that_are_not(trained, tmp_path, capfdbinary):
    names = ("caf\u00e9.png", "\u732b.png", "\udcff.png")
    for name in names:
        with open(tmp_path / name, "wb") as file:
            picture(0, 1).save(file, "PNG")
    assert call(trained[0], tmp_path, "--json", "-") == 0
    sys.stdout.flush()
    out = capfdbinary.readouterr().out
    assert "caf\u00e9.png".encode() in out
    assert "\u732b.png".encode() in out
    rows = [json.loads(line) for line in out.decode("utf-8").splitlines()]
    assert {row["path"] for row in rows} == {str(tmp_path / name) for name in names}


@pytest.mark.parametrize("top", [True, False])
def test_a_directory_that_cannot_be_read_is_named(trained, tmp_path, monkeypatch, capsys, top):
    """It is not taken for an empty one, and the rest is classified."""
    locked, scandir = tmp_path / "in" / "locked", os.scandir
    locked.mkdir(parents=True)
    picture(0, 1).save(locked.parent / "a.png")

    def refuse(path):
        if os.fspath(path) == str(locked):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(locked))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read any directory
    given = locked if top else locked.parent
    assert call(trained[0], given, "--json", tmp_path / "out") == 1
    error = f"cannot read the directory {locked} (Permission denied)"
    assert capsys.readouterr().err == f"warning: {error}\n"
    rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert rows[-1] == {"path": str(locked), "error": error}
    assert [row["path"] for row in rows[:-1]] == ([] if top else [str(locked.parent / "a.png")])


def test_what_is_left_out_of_a_folder_is_told(trained, tmp_path, capsys):
    picture(0, 1).save(tmp_path / "a.png")
    picture(0, 1).save(tmp_path / "b.gif")
    assert call(trained[0], tmp_path, "--quiet") == 0
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: ignoring 1 files in directories, such as {tmp_path}/b.gif")


def test_a_picture_has_one_row_whatever_its_name(capsys):
    console.predictions_table([("a\nb\udcff.png", [("dark", 1.0)])])
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "dark" in line)
    assert row.split() == ["a?b\\udcff.png", "dark", "1.0000"]


def test_the_table_names_the_likeliest(trained, capsys):
    path = next(trained[1].glob("striped/*"))
    call(trained[0], path, "--top-k", "9")
    out = capsys.readouterr().out
    assert str(path) in out
    assert all(name in out for name in CLASSES)


def test_csv_has_a_column_for_every_class_asked_for(trained, tmp_path):
    path = next(trained[1].glob("dark/*"))
    text = inference.csv_rows([inference.ImagePrediction(str(path), (("a", 0.75), ("b", 0.25)))], 2)
    expected = f"path,error,class1,confidence1,class2,confidence2\n{path},,a,0.750000,b,0.250000\n"
    assert text.decode() == expected


def test_p1_two_processes_answer_for_each_path_on_standard_input(trained, tmp_path):
    """The rows are those of one process, in order, and each warning is printed once."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    picture(0, 1).save(tmp_path / "left-out.gif")
    paths = sorted(map(str, trained[1].glob("*/*")))[::3][:40]
    assert len({Path(path).parent for path in paths}) > 1
    (tmp_path / "list").write_text("".join(f"{path}\n" for path in paths))
    words = ["--top-k", "1", "--batch-size", "7", "--csv"]
    assert call(trained[0], *paths, tmp_path, *words, tmp_path / "one.csv") == 1
    words = ["-", tmp_path, *words, tmp_path / "two.csv", "--threads", "1"]
    words += ["--explain", tmp_path / "overlays"]
    command = torchrun(2, "predict.py", trained[0], *words)
    script = f"exec {shlex.join(command)} < {shlex.quote(str(tmp_path / 'list'))}"
    ended = run(["sh", "-c", script], limit=200)
    assert [row["path"] for row in read_csv(tmp_path / "two.csv")] == [*paths, str(broken)]
    assert len([f for f in (tmp_path / "overlays").rglob("*.png") if f.is_file()]) == len(paths)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    warnings = [line for line in ended.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2, ended.stderr
    assert warnings[1].startswith(f"warning: cannot read the image {broken}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "",
            "there are no images to classify. Give image files, or directories that contain some.",
        ),
        (
            "gone.png",
            "there is no file gone.png. Give image files, or directories that contain some.",
        ),
        (
            "empty",
            "there are no images to classify. Give image files, or directories that contain some.",
        ),
        ("empty --top-k 0", "invalid --top-k 0: expected at least 1."),
        ("empty --csv a --json a", "--json and --csv both write a. Give different files."),
    ],
)
def test_p7_predict_refuses(fails, tmp_path, trained, words, message):
    (tmp_path / "empty").mkdir()
    assert fails(predict, trained[0], *words.split()) == message

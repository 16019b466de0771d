"""predict.py: pictures in files get evaluation's predictions; what cannot be read is named."""

import csv
import errno
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
from worlds import python, run_all, run_world, world_by_hand

import evaluate
import predict
from lab.data.transforms import to_grayscale
from lab.inference import top_classes, write_output

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


def test_of_equal_probabilities_the_first_class_is_predicted_as_in_evaluation():
    logits = torch.randn(2000, 100, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    probabilities, classes = top_classes(logits, 3)
    assert torch.equal(classes[:, 0], logits.argmax(1))
    assert torch.equal(probabilities, logits.softmax(1).topk(3).values)


def test_what_is_gray_keeps_its_values():
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


def test_a_reader_of_the_output_may_end_early(monkeypatch):
    """As in `predict.py ... --json - | head`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    with os.fdopen(write_end, "w") as output:  # closing it writes what is left
        monkeypatch.setattr(sys, "stdout", output)
        write_output("-", b"a line\n")


def test_p7_all_processes_wait_for_the_files_that_the_first_writes(trained, tmp_path):
    """A launcher ends all processes after the first with an exit code, so that they were lost."""
    script = tmp_path / "full.py"
    script.write_text(
        "import sys, predict\nfrom lab import errors, inference\n"
        "def fail(*_): raise errors.UserError('the disk is full', 'Free some space')\n"
        "inference.write_output = fail\n"
        "sys.exit(errors.run_script(lambda: predict.main(sys.argv[1:])))\n"
    )
    words = (trained[1] / "dark", "--csv", tmp_path / "x.csv", "--threads", 1, "--workers", 0)
    ended = run_world(2, script, trained[0], *words, limit=200)
    assert [end.code for end in ended] == [2, 2]
    assert [line for end in ended for line in end.errors] == [
        "error: the disk is full. Free some space."
    ]


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


def test_p1_two_processes_answer_for_each_path_on_standard_input(trained, tmp_path):
    """The rows are those of one process, in order, and each warning is printed once."""
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    picture(0, 1).save(tmp_path / "left-out.gif")
    paths = sorted(map(str, trained[1].glob("*/*")))[::3][:40]
    assert len({Path(path).parent for path in paths}) > 1
    lines = [path + ("\r\n" if i % 2 else "\n") for i, path in enumerate(paths)]
    (tmp_path / "list").write_bytes("".join(lines).encode())
    words = ["--top-k", "1", "--batch-size", "7", "--csv"]
    assert call(trained[0], *paths, tmp_path, *words, tmp_path / "one.csv") == 1
    words = ["-", tmp_path, *words, tmp_path / "two.csv", "--threads", "1"]
    command = shlex.join(python("predict.py", trained[0], *words))
    script = f"exec {command} < {shlex.quote(str(tmp_path / 'list'))}"
    ends = run_all([["sh", "-c", script]] * 2, limit=200, envs=world_by_hand(2))
    assert [row["path"] for row in read_csv(tmp_path / "two.csv")] == [*paths, str(broken)]
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    warnings = [
        line for end in ends for line in end.stderr.splitlines() if line.startswith("warning: ")
    ]
    assert len(warnings) == 2
    assert warnings[1].startswith(f"warning: cannot read the image {broken}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "",
            "there are no images to classify. Give image files, or directories that contain some.",
        ),
        (
            "empty",
            "there are no images to classify. Give image files, or directories that contain some.",
        ),
        ("empty --top-k 0", "invalid --top-k 0: expected at least 1."),
        ("empty --csv a --json a", "--json and --csv both write a. Give different files."),
        (
            "empty --json image.PNG",
            "invalid --json image.PNG: its name is that of an image or of weights. "
            "Give the name of a text file.",
        ),
        ("empty --csv a --json ./a", "--json and --csv both write ./a. Give different files."),
        ("empty --csv pipe", "invalid --csv pipe: it is not a regular file. Give a file name."),
    ],
)
def test_p7_predict_refuses(fails, tmp_path, trained, words, message):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert fails(predict, trained[0], *words.split()) == message


def test_p7_a_directory_without_write_permission_is_refused_before_the_work(
    fails, tmp_path, trained, monkeypatch
):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    (tmp_path / "empty").mkdir()
    assert fails(predict, trained[0], "empty", "--csv", "a") == (
        "cannot write a (Permission denied). Give a directory with write permission."
    )

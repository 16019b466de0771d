"""P7: images, directories and downloads that are damaged, missing or inconsistent."""

import errno
import gzip
import math
import os
import struct
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mistakes import make_picture, matches

import train
from lab.config import recipes
from lab.config.schema import TrainConfig
from lab.data import DataConfig
from lab.data.decode import FileImages
from lab.data.loaders import LoaderOptions, build_loader
from lab.data.splits import load_splits, read_dataset
from lab.data.transforms import BatchTransform, EvalTransform
from lab.data.types import Split
from lab.errors import UserError

AGAIN = "Delete it to download it again."


# Directories

ONE_EACH = "Put the images of each class into a directory of its own."
AMBIGUOUS = (
    "images has the directory train and next to it bus, which contains images, too: train may be "
    "a split or a class. Move bus elsewhere; if both are classes, move all class directories into "
    "a directory train."
)
TWO = "Add images of the other classes."


@pytest.mark.parametrize(
    ("directories", "message"),
    [
        ("", f"images contains no class directories. {ONE_EACH}"),
        ("a", f"images has only one class, a. {TWO}"),
        (
            "a b empty/",
            "the class directory images/empty contains no images. "
            "Add some (.jpg, .jpeg, .png, .webp, .bmp), or delete the directory.",
        ),
        (
            "train/a train/b val/a",
            "images/val lacks classes of the training split: b. "
            "Every split needs images of the same classes.",
        ),
        (
            "train/a train/b test/a test/b test/c",
            "images/test has classes that the training split lacks: c. "
            "Every split needs images of the same classes.",
        ),
        (
            "val/a val/b test/a test/b",
            "images has a directory val, but no directory train. Rename the directory to train "
            "on to train; to evaluate, give images/val and --split all; if val is a class, move "
            "all class directories into a directory train.",
        ),
        (
            "Train/a Train/b training/a training/b",
            "images has both Train and training, two names of the same split. Remove one of them.",
        ),
        ("train bus car", AMBIGUOUS),
    ],
)
def test_p7_directories_of_images(fails, tmp_path, directories, message):
    (tmp_path / "images").mkdir()
    for name in directories.split():
        if name.endswith("/"):
            (tmp_path / "images" / name).mkdir()
        else:
            make_picture(tmp_path / "images" / name / "0.png")
    words = ("--model", "lenet5", "--dataset", "images", "--quiet")
    assert fails(train, *words) == message


LISTED = "lists files that do not exist or cannot be read"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "file,label\na.png,x\nno.png,y\n", f"m.csv {LISTED}: no.png. Paths are "
         "relative to the directory of the manifest."),
        ("m.csv", "path,label\na.png,x\n", "line 2 of m.csv has the unknown column 'path'. "
         "Use file, label, split only."),
        ("m.csv", "file\na.png\n", "line 2 of m.csv has no label. Add it, or delete the line."),

        ("m.csv", "file,label\n../a.png,x\n", "line 2 of m.csv names ../a.png, which is not in the "
         "manifest's directory. Move the manifest to a directory that contains all files, and use "
         "relative paths."),
        ("m.csv", "file,label\na.png,x\n./a.png,y\n", "line 3 of m.csv lists ./a.png again, like "
         "line 2. Delete one of them."),
        ("m.csv", "file,label,split\na.png,x,dev\n", "line 2 of m.csv has the split 'dev'. Use "
         "train, val or test."),
        ("m.csv", "file,label,split\na.png,x,test\n", "m.csv lists no training images. Add "
         "some; to evaluate on all images, leave out the splits and give --split all."),

        ("m.csv", "file,label,split\na.png,x,train\nb.png,y,test\n", "the test split of m.csv has "
         "classes that the training split lacks: y. Every split needs images of the same classes."),

        ("m.jsonl", '{"file": "a\\u0000", "label": "x"}\n', "line 1 of m.jsonl names "
         "'a\\x00', which cannot be a path. Correct it."),
        ("m.jsonl", '{"file": "\\ud800", "label": "x"}\n', "line 1 of m.jsonl names "
         "'\\ud800', which cannot be a path. Correct it."),

        ("m.jsonl", '{"file": "a.png", "label": 3}\n', "line 1 of m.jsonl has the label 3. Write "
         'it as "3".'),
        ("m.jsonl", '{"file": "a.png", "label": "x"}\n{"fi', "m.jsonl is not a valid manifest ("
         "line 2: Unterminated string starting at). Give a CSV file with a header, or one JSON "
         "object per line."),

        ("m.jsonl", '{"file": "a.png", "label": "\\ud800"}\n', "line 1 of m.jsonl has the label "
         "'\\ud800', not UTF-8. Correct it."),
        ("m.csv", "file,label,label\na.png,x,y\n", "m.csv is not a valid manifest (line 1: a "
         "column is repeated). Give a CSV file with a header, or one JSON object per line."),
        ("m.jsonl", '{"file": "a.png", "label": "x", "split": "test"}\n'
         '{"file": "b.png", "label": "x"}\n', "line 2 of m.jsonl has no split, unlike the lines "
         "before it. Give the split in all lines, or in none."),
        ("m.jsonl", "[1]\n", "m.jsonl is not a valid manifest (line 1 is not a JSON object). Give "
         "a CSV file with a header, or one JSON object per line."),

    ],
)  # fmt: skip
def test_p7_manifests(tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)
    for image in ("a.png", "b.png"):
        make_picture(tmp_path / image)
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(UserError) as raised:
        read_dataset(DataConfig.of(TrainConfig(dataset=name, image_size=32)))
    assert str(raised.value) == message


@pytest.mark.parametrize("refused", ["images", "images/a", "images/a/deep"])
def test_p7_an_unreadable_directory_is_named(fails, tmp_path, monkeypatch, refused):
    """It is neither ignored nor called empty."""
    for name in ("a/deep/0.png", "b/0.png", "b/1.png"):
        make_picture(tmp_path / "images" / name)
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if str(path) == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert fails(train, "--model", "lenet5", "--dataset", "images", "--quiet") == (
        f"cannot read the directory {refused} (Permission denied). Check its permissions."
    )


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scrambled(path: Path) -> None:
    """Write random bytes into the middle, which crash torchvision's PNG decoder."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 50] = np.random.default_rng(0).bytes(50)
    path.write_bytes(content)


@pytest.mark.parametrize("loader", ["resident", "streaming"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("x.jpg", half),
        ("x.png", half),
        ("x.webp", half),
        ("x.png", scrambled),
        ("x.jpg", lambda path: path.write_bytes(b"\xff\xd8\xff")),
        ("x.png", lambda path: path.write_text("not an image")),
    ],
)
def test_p7_a_damaged_image_is_named(fails, tmp_path, loader, name, damage):
    for i in range(6):
        for label in "ab":
            make_picture(tmp_path / f"images/{label}/{i}.png")
    damage(make_picture(tmp_path / "images/a" / name))
    words = ("--model", "lenet5", "--dataset", "images", "--quiet", "--epochs", 1)
    words += ("--loader", loader, "--workers", 0, "--test-fraction", 0.3, "--val-fraction", 0.3)
    # The streaming loader may only read it in an epoch, after the run directory was created and
    # the warning about few steps was printed.
    started = loader == "streaming"
    message = fails(train, *words, leaves=("runs",) if started else (), warnings=2 * started)
    expected = (
        f"cannot read the image images/a/{name} (*). "
        "Replace or delete the file, or give --skip-unreadable."
    )
    message, _, state = message.partition(" The last complete checkpoint of the run is ")
    assert not state or (tmp_path / state.rstrip(".")).is_dir()
    assert matches(message, expected)


def test_p7_a_worker_names_a_damaged_image(tmp_path):
    """Any other exception than UserError would end in the traceback of the worker."""

    path = str(tmp_path / "x.png")
    Path(path).write_text("not an image")
    split = Split(
        FileImages((path,), EvalTransform(32)), torch.zeros(1, dtype=torch.long), ("a", "b")
    )
    options = LoaderOptions(0, 1, torch.device("cpu"), "streaming", 1, math.inf)
    loader = build_loader(split, TRANSFORM, options, batch_size=3, seed=0)
    with pytest.raises(UserError, match=r"cannot read the image .*unknown format") as caught:
        list(loader.batches())
    assert caught.value.rank_local


TRANSFORM = BatchTransform((0.5,), (0.5,), (), "cpu")


# MNIST


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


LABELS = "t10k-labels-idx1-ubyte"
APART = (
    "images and labels of MNIST in data/MNIST/raw do not match. "
    "Delete the directory to download it again."
)
DAMAGED = f"data/MNIST/raw/{LABELS} is damaged (*). {AGAIN}"


@pytest.mark.parametrize(
    ("labels", "suffix", "message"),
    [
        (idx(np.arange(20))[:6], "", DAMAGED),
        (b"<html>404</html>" * 9, "", DAMAGED),
        (gzip.compress(idx(np.arange(20)), mtime=0)[:12] + b"\xff" * 20, ".gz", DAMAGED),
        (idx(np.arange(20)), ".gz", DAMAGED),
        (idx(np.arange(19) % 10), "", APART),
    ],
)
def test_p7_a_damaged_idx_file_is_named(fails, tmp_path, labels, suffix, message):
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for split, count in (("train", 200), ("t10k", 20)):
        (raw / f"{split}-images-idx3-ubyte").write_bytes(idx(np.zeros((count, 28, 28))))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(idx(np.arange(count) % 10))
    (raw / LABELS).unlink()
    (raw / (LABELS + suffix)).write_bytes(labels)
    expected = message.replace(LABELS, LABELS + suffix)
    assert matches(fails(train, "--dataset", "mnist", "--quiet"), expected)


@pytest.mark.parametrize(
    ("dataset", "name", "problem", "reason"),
    [
        ("mnist", "MNIST", urllib.error.URLError("no route"), "<urlopen error no route>"),
        ("cifar10", "CIFAR10", TimeoutError("timed out"), "timed out"),
    ],
)
def test_p7_no_network(fails, monkeypatch, dataset, name, problem, reason):
    def refuse(*args, **settings):
        raise problem

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    for made in ("data", "data/elsewhere"):  # an existing directory stays
        message = fails(train, "--dataset", dataset, "--quiet")
        Path(made).mkdir()
    assert message == (
        f"{name} is not in data and could not be downloaded ({reason}). "
        "Check the network or set --data-dir; `--dataset digits` needs no download."
    )


def test_p7_a_download_that_fails_leaves_nothing_however_many_try(tmp_path, monkeypatch):
    """A process must not delete what another process of the host has just created."""
    tries, lock = [], threading.Lock()

    def refuse(*args, **settings):
        with lock:
            tries.append(1)
        time.sleep(0.01)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    config = DataConfig.of(recipes.resolve({"dataset": "mnist"}))
    config = replace(config, data_dir=str(tmp_path / "no/such/folder"))
    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(load_splits, config, math.inf, 1) for _ in range(8)]
        assert [type(end.exception()) for end in ends] == [UserError] * 8
    assert len(tries) >= 8
    assert list(tmp_path.iterdir()) == []

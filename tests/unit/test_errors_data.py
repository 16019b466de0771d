"""P7: pictures, folders and downloads that are damaged, missing or do not fit."""

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
from lab.data import DataConfig, load_splits
from lab.data.decode import FileImages
from lab.data.loaders import LoaderOptions, build_loader
from lab.data.transforms import BatchTransform
from lab.data.types import Split
from lab.errors import UserError

ANEW = "Delete it, so that it is downloaded anew."


# Folders

ONE_EACH = "Put the pictures of each class into a folder of its own."
AMBIGUOUS = (
    "pictures has the folder train and, beside it, bus, which holds pictures too: train may be a "
    "split or a class. Move bus elsewhere; if both are classes, move all class folders into a "
    "folder train."
)
TWO = "Two or more are needed, each with the pictures of one class."


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            "",
            f"pictures holds no class folders. {ONE_EACH}",
        ),
        (
            "a",
            f"pictures holds one class, a. {TWO}",
        ),
        (
            "train",
            f"pictures/train holds no class folders. {ONE_EACH}",
        ),
        (
            "a b empty/",
            "the class folder pictures/empty holds no pictures. "
            "Add some (.jpg, .jpeg, .png, .webp, .bmp) or delete the folder.",
        ),
        (
            "train/a train/b val/a",
            "pictures/val lacks classes that are trained on: b. "
            "Every split needs the same class folders.",
        ),
        (
            "train/a train/b test/a test/b test/c",
            "pictures/test has classes that are not trained on: c. "
            "Every split needs the same class folders.",
        ),
        (
            "val/a val/b test/a test/b",
            "pictures has a folder val, but no folder train. Call the folder to train on train; "
            "if val is a class, move all class folders into a folder train.",
        ),
        (
            "valid invalid",
            "pictures has a folder valid, but no folder train. Call the folder to train on train; "
            "if valid is a class, move all class folders into a folder train.",
        ),
        (
            "Train/a Train/b training/a training/b",
            "pictures has both Train and training, two names of one split. Keep one of them.",
        ),
        (
            "train/a train/b val/a val/b Validation/a Validation/b",
            "pictures has both Validation and val, two names of one split. Keep one of them.",
        ),
        ("train bus car", AMBIGUOUS),
        ("train/express train/freight bus/old", AMBIGUOUS),
    ],
)
def test_p7_folders_of_pictures(fails, tmp_path, folders, message):
    (tmp_path / "pictures").mkdir()
    for name in folders.split():
        if name.endswith("/"):
            (tmp_path / "pictures" / name).mkdir()
        else:
            make_picture(tmp_path / "pictures" / name / "0.png")
    words = ("--dataset", "folder", "--data-dir", "pictures", "--quiet")
    assert fails(train, *words) == message


def test_p7_too_few_pictures(fails, tmp_path):
    for name in "ab":
        make_picture(tmp_path / "pictures" / name / "0.png")
    words = ("--dataset", "folder", "--data-dir", "pictures", "--quiet")
    assert fails(train, *words) == (
        "the test split is empty. Add pictures, or change the fractions."
    )


@pytest.mark.parametrize("refused", ["pictures", "pictures/a", "pictures/a/deep"])
def test_p7_a_folder_that_may_not_be_read_is_named(fails, tmp_path, monkeypatch, refused):
    """It is neither passed over nor called empty."""
    for name in ("a/deep/0.png", "b/0.png", "b/1.png"):
        make_picture(tmp_path / "pictures" / name)
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if str(path) == refused:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert fails(train, "--dataset", "folder", "--data-dir", "pictures", "--quiet") == (
        f"cannot read the folder {refused} (Permission denied). Mend its permissions."
    )


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scrambled(path: Path) -> None:
    """Random bytes in the middle: torchvision's PNG decoder would end the process."""
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
        ("x.bmp", half),
        ("x.png", scrambled),
        ("x.png", lambda path: path.write_bytes(b"")),
        ("x.jpg", lambda path: path.write_bytes(b"\xff\xd8\xff")),
        ("x.png", lambda path: path.write_text("not a picture")),
        ("x.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + os.urandom(500))),
    ],
)
def test_p7_a_damaged_picture_is_named(fails, tmp_path, loader, name, damage):
    for i in range(6):
        for label in "ab":
            make_picture(tmp_path / f"pictures/{label}/{i}.png")
    damage(make_picture(tmp_path / "pictures/a" / name))
    words = ("--dataset", "folder", "--data-dir", "pictures", "--quiet", "--epochs", 1)
    words += ("--loader", loader, "--workers", 0, "--test-fraction", 0.3, "--val-fraction", 0.3)
    # Streamed, it may first be met in an epoch; what was trained until then is kept.
    # Nor is it warned of few steps before, unless it has begun.
    begun = loader == "streaming"
    message = fails(train, *words, leaves=("runs",) if begun else (), warnings=int(begun))
    expected = (
        f"cannot read the picture pictures/a/{name} (*). "
        "Replace or delete that file, or give --skip-unreadable."
    )
    message, _, state = message.partition(" The last complete state of the run is ")
    assert not state or (tmp_path / state.rstrip(".")).is_dir()
    assert matches(message, expected)


def test_p7_a_worker_names_a_damaged_picture(tmp_path):
    """An exception of any other kind than a UserError would be the worker's traceback."""

    path = str(tmp_path / "x.png")
    Path(path).write_text("not a picture")
    split = Split(FileImages((path,), 32), torch.zeros(1, dtype=torch.long), ("a", "b"))
    options = LoaderOptions(0, 1, torch.device("cpu"), "streaming", 1, math.inf)
    loader = build_loader(split, TRANSFORM, options, batch_size=3, seed=0)
    try:  # pytest.raises would keep the loader, whose workers then end seconds later
        list(loader.batches())
    except Exception as error:
        assert (type(error), error.what, error.rank_local) == (  # noqa: PT017
            UserError,
            f"cannot read the picture {path} (in no known format)",
            True,
        )
    else:
        pytest.fail("no error")


TRANSFORM = BatchTransform((0.5,), (0.5,), (), "cpu")


def test_p7_a_batch_smaller_than_the_world():
    config = recipes.resolve({"dataset": "digits"})
    split = load_splits(DataConfig.of(config), math.inf, 1).train
    options = LoaderOptions(0, 4, torch.device("cpu"), "resident", 0, math.inf)
    with pytest.raises(UserError) as caught:
        build_loader(split, TRANSFORM, options, batch_size=3, seed=0)
    assert str(caught.value) == (
        "--batch-size 3 is smaller than the number of processes, 4. "
        "It counts the samples of all processes together: give more."
    )


# MNIST


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


LABELS = "t10k-labels-idx1-ubyte"
APART = (
    "images and labels of MNIST in data/MNIST/raw do not belong together. "
    "Delete that folder, so that it is downloaded anew."
)
DAMAGED = f"data/MNIST/raw/{LABELS} is damaged (*). {ANEW}"


@pytest.mark.parametrize(
    ("labels", "suffix", "message"),
    [
        (b"", "", DAMAGED),
        (idx(np.arange(20))[:3], "", DAMAGED),
        (idx(np.arange(20))[:6], "", DAMAGED),
        (idx(np.arange(20))[:8], "", DAMAGED),
        (idx(np.arange(20))[:-1], "", DAMAGED),
        (idx(np.arange(20)) + b"\0", "", DAMAGED),
        (b"<html>404</html>" * 9, "", DAMAGED),
        (idx(np.zeros((20, 28, 28))), "", DAMAGED),
        (gzip.compress(idx(np.arange(20)), mtime=0)[:-9], ".gz", DAMAGED),
        (gzip.compress(idx(np.arange(20)), mtime=0)[:12] + b"\xff" * 20, ".gz", DAMAGED),
        (idx(np.arange(20)), ".gz", DAMAGED),
        (idx(np.arange(19) % 10), "", APART),
        (idx(np.arange(20)), "", APART),
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
    ("dataset", "name"),
    [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST"), ("cifar10", "CIFAR10")],
)
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (urllib.error.URLError("no route to host"), "<urlopen error no route to host>"),
        (TimeoutError("timed out"), "timed out"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), f"[Errno {errno.ECONNRESET}] reset"),
    ],
)
def test_p7_no_network(fails, monkeypatch, dataset, name, problem, reason):
    def refuse(*args, **settings):
        raise problem

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    start = time.monotonic()
    for made in ("data", "data/elsewhere"):  # ... of which the last is left as it is
        message = fails(train, "--dataset", dataset, "--quiet")
        Path(made).mkdir()
    assert time.monotonic() - start < 5
    assert message == (
        f"{name} is not in data and could not be downloaded ({reason}). "
        "Check the network or give --data-dir; `--dataset digits` needs no download."
    )


def test_p7_a_download_that_fails_leaves_nothing_however_many_try(tmp_path, monkeypatch):
    """One of several processes of a host must not delete what another has just made."""
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

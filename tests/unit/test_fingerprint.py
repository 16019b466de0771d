"""Fingerprints: a later run and the other processes notice that samples have changed."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from mistakes import make_picture
from worlds import python, run_all, world_by_hand

import evaluate
import train
from lab.data import DataConfig
from lab.data.fingerprint import FORMAT, changed_splits, fingerprint
from lab.data.splits import load_splits
from lab.data.types import Split
from lab.distributed import check_same_data
from lab.errors import UserError


def config(root: Path) -> DataConfig:
    return DataConfig(str(root), "data", 32, 0.1, 0.2, 0, 0, 0)


def write_pictures(root: Path, count: int = 6) -> Path:
    """Write `count` different images of each of two classes."""
    for name in "ab":
        for i in range(count):
            path = make_picture(root / name / f"{i}.bmp")
            path.write_bytes(path.read_bytes() + f"{name}{i}".encode())
    return root


def fingerprints(root: Path) -> dict[str, str]:
    return load_splits(config(root), 0, 1).fingerprints


def replace_image(path: Path) -> None:
    """Replace an image by another one of the same size in bytes."""
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


# What a fingerprint depends on


def test_a_fingerprint_holds_names_labels_sizes_and_contents(tmp_path):
    root = write_pictures(tmp_path / "pictures")
    first = fingerprints(root)
    assert all(value.startswith(f"{FORMAT}-") for value in first.values())

    def altered(change) -> list[str]:
        copy = Path(shutil.copytree(root, tmp_path / "copy"))
        assert fingerprints(copy) == first  # wherever the folder lies
        change(copy)
        found = changed_splits(first, fingerprints(copy))
        shutil.rmtree(copy)
        return found

    for split in (load_splits(config(root), 0, 1).train, load_splits(config(root), 0, 1).test):
        for name in split.files():
            assert len(altered(lambda copy, name=name: replace_image(copy / name))) == 1
    assert altered(lambda copy: (copy / "a/0.bmp").rename(copy / "a/9.bmp"))
    assert altered(lambda copy: (copy / "a/0.bmp").rename(copy / "b/9.bmp"))
    assert altered(lambda copy: (copy / "a/0.bmp").unlink())


def test_the_size_of_every_file_counts_even_where_contents_are_not_read(tmp_path):
    """Only 256 of the 300 files are read, and of these the first 64 KiB."""
    paths = []
    for i in range(300):
        paths.append(str(tmp_path / f"{i}.png"))
        Path(paths[-1]).write_bytes(b"x")
    split = Split(torch.zeros(300, 1), torch.zeros(300).long(), ("a",), tuple(paths), str(tmp_path))
    seen = {fingerprint(split)}
    for path in paths[::10]:
        Path(path).write_bytes(b"xy")
        seen.add(fingerprint(split))
    assert len(seen) == 31


def test_a_fingerprint_of_images_in_memory_holds_their_pixels():
    images = torch.zeros(300, 1, 4, 4, dtype=torch.uint8)
    split = Split(images, torch.zeros(300).long(), ("a",))
    first = fingerprint(split)
    assert fingerprint(split) == first
    seen = {first}
    for start in (0, 149, 298):  # 256 of the 300 images are read, from all of the split
        images[start : start + 2, 0, 3, 3] = 1
        seen.add(fingerprint(split))
    assert len(seen) == 4
    labels = split.labels.clone()
    labels[7] = 1
    assert fingerprint(Split(images, labels, ("a", "b"))) not in seen


def test_fingerprints_of_another_format_are_not_compared():
    current = {"train": f"{FORMAT}-1", "test": f"{FORMAT}-2"}
    assert changed_splits({"train": f"{FORMAT}-1", "test": f"{FORMAT}-3"}, current) == ["test"]
    assert changed_splits({"train": "0123456789abcdef", "test": f"{FORMAT}-2"}, current) == []
    assert changed_splits(current, {"train": "0123456789abcdef"}) == []
    assert changed_splits({"train": "0123456789abcdef"}, {"train": "123456789abcdef0"}) == ["train"]
    assert changed_splits({}, current) == []


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("gone", path)])
def test_p7_a_path_that_is_not_a_file_is_named(tmp_path, make):
    """Opening a named pipe would block."""
    root = write_pictures(tmp_path)
    make(root / "a/x.png")
    with pytest.raises(UserError, match=r"cannot read the file .*/a/x\.png"):
        fingerprints(root)


# Processes with other data


class World:
    num_processes = 20


def test_processes_that_differ_are_named(monkeypatch):
    halves = [{"test": "x"}] * 10 + [{"test": "y"}] * 10
    monkeypatch.setattr("lab.distributed.gather_object", lambda mine: halves)
    with pytest.raises(UserError) as raised:
        check_same_data(World, {"test": "x"})
    assert str(raised.value) == (
        "processes with other data than process 0: 10, 11, 12, 13, 14, 15, 16, 17 and 2 more. "
        "Give every machine a copy of the same files."
    )


def test_p7_processes_with_other_data_neither_train_nor_evaluate(tmp_path, monkeypatch, capsys):
    mine = write_pictures(tmp_path / "mine", count=30)
    words = ["--model", "lenet5", "--recipe", "smoke", "--max-steps", "2", "--threads", "1"]
    words += ["--output-dir", str(tmp_path)]
    train.main([*words, "--dataset", str(mine), "--name", "run"])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in ("class training validation test", "a 21 3 6", "b 22 2 6"):
        assert lines.count(row.split()) == 1  # each folder run says what it has read

    theirs = Path(shutil.copytree(mine, tmp_path / "theirs"))
    (theirs / "a/7.bmp").rename(theirs / "b/x.bmp")
    trainings = [python("train.py", *words, "--dataset", root, "--name", "other")
                 for root in (mine, theirs)]  # fmt: skip
    ends = run_all(trainings, limit=200, envs=world_by_hand(2))
    assert [ended.code for ended in ends] == [2, 2]
    assert [ended.errors for ended in ends] == [
        [
            "error: processes with other data than process 0: 1. Give every machine a copy of "
            "the same files."
        ],
        [],
    ]
    assert all("Traceback" not in ended.stderr for ended in ends)
    assert not (tmp_path / "other").exists()

    def differ(*_):
        raise UserError("other data", "Copy it")

    monkeypatch.setattr("lab.distributed.check_same_data", differ)
    with pytest.raises(UserError, match="other data"):
        evaluate.main([str(tmp_path / "run"), "--threads", "1", "--output", f"{tmp_path}/e"])
    assert not (tmp_path / "e").exists()

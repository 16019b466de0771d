"""The cache of decoded images: read the second time, never stale, never incomplete."""

import errno
import math
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from PIL import Image

from lab.data import DataConfig, cache, decode
from lab.data.decode import FileImages
from lab.data.images import channel_statistics
from lab.data.splits import load_split, load_splits
from lab.data.transforms import EvalTransform
from lab.errors import UserError


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_IMAGES", 3)
    monkeypatch.setattr(cache, "IN_USE", set())
    return tmp_path / "cache" / "images"


@pytest.fixture
def files(tmp_path):
    """Five noisy images of 10 x 10 pixels."""
    rng = np.random.default_rng(0)
    paths = []
    for i in range(5):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)).save(paths[-1])
    return FileImages(tuple(paths), EvalTransform(10))


@pytest.fixture
def decoded(monkeypatch):
    """The paths that were decoded so far."""
    paths, original = [], decode.decode
    monkeypatch.setattr(decode, "decode", lambda p, size: paths.append(p) or original(p, size))
    return paths


def test_the_second_time_nothing_is_decoded_and_pixels_are_the_same(files, decoded):
    first = files.decode_all(1)
    assert sorted(decoded) == sorted(files.paths)
    assert torch.equal(first, files[torch.arange(5)])
    decoded.clear()
    os.chmod(files.paths[0], 0o600)  # changes no pixel
    assert torch.equal(files.decode_all(1), first)
    assert decoded == []


def test_another_decoder_decodes_anew(files, decoded, monkeypatch):
    files.decode_all(1)
    monkeypatch.setattr(cache, "DECODERS", ("another version",))
    decoded.clear()
    files.decode_all(1)
    assert len(decoded) == 5


def test_the_lock_is_held_while_a_result_is_computed(cache_dir):
    def check(name):
        with pytest.raises(Timeout):
            FileLock(cache_dir / f"{name}.lock").acquire(timeout=0)
        return 1

    assert cache.cached_json("numbers", lambda: check("numbers")) == 1
    images = cache.cached("images", (1, 1), lambda image: image.fill_(check("images")))
    assert images.tolist() == [[1]]


def test_a_result_that_cannot_be_written_leaves_no_file(cache_dir, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert cache.cached_json("numbers", lambda: 1) == 1
    assert [path.suffix for path in cache_dir.iterdir()] == [".lock"]


@pytest.mark.parametrize("change", ["content", "time", "size", "order", "fewer"])
def test_whatever_changes_is_decoded_anew(files, decoded, change):
    files.decode_all(1)
    decoded.clear()
    if change == "content":
        Image.new("RGB", (10, 10)).save(files.paths[2])
    elif change == "time":
        os.utime(files.paths[2], (1, 1))
    elif change == "size":
        files = FileImages(files.paths, EvalTransform(9))
    elif change == "order":
        files = FileImages(files.paths[::-1], EvalTransform(10))
    else:
        files = FileImages(files.paths[:4], EvalTransform(10))
    images = files.decode_all(1)
    assert len(decoded) == len(files)
    assert torch.equal(images, files[torch.arange(len(files))])


def test_what_is_written_to_cached_images_does_not_change_the_file(files, decoded):
    first = files.decode_all(1)
    expected = first.clone()
    first.zero_()
    assert torch.equal(files.decode_all(1), expected)
    assert len(decoded) == len(files)


def test_relative_paths_in_another_directory_are_other_files(files, tmp_path, monkeypatch):
    images = []
    for color in ("red", "blue"):
        (tmp_path / color).mkdir()
        monkeypatch.chdir(tmp_path / color)
        Image.new("RGB", (10, 10), color).save("a.bmp")  # uncompressed: of the same size
        os.utime("a.bmp", (1, 1))
        images.append(FileImages(["a.bmp"], EvalTransform(10)).decode_all(1, use_cache=True))
    assert not torch.equal(*images)


def test_a_file_that_became_readable_is_read_again(files, monkeypatch):
    path, original = files.paths[2], decode.decode

    def refuse(name, size):
        if name == path:
            raise UserError(f"cannot read the image {name} (Permission denied)", "Replace it")
        return original(name, size)

    monkeypatch.setattr(decode, "decode", refuse)
    assert list(files.unreadable(1)) == [2]
    monkeypatch.setattr(decode, "decode", original)
    os.chmod(path, 0o600)  # changes neither its size nor its modification time
    assert FileImages(files.paths, EvalTransform(10)).unreadable(1) == {}


def test_images_that_could_not_be_read_are_tried_first(files, decoded):
    with open(files.paths[3], "wb") as file:
        file.write(b"damaged")
    files = FileImages(files.paths, files.transform)
    for num_decoded in (5, 1):
        decoded.clear()
        with pytest.raises(UserError, match="cannot read the image"):
            files.decode_all(1)
        assert len(decoded) == num_decoded


def test_p3_images_are_on_disk_before_their_file_takes_its_name(files, monkeypatch):
    """Otherwise a power failure could leave a file of the right size that holds zeros."""
    calls, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(os, "fsync", lambda n: (calls.append("sync"), fsync(n)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    files.decode_all(1)
    cache.store_json("key", [1])
    assert calls == ["sync", "replace"] * 2


@pytest.mark.parametrize("content", [b"", b"x" * 2000, None])
def test_a_damaged_file_is_replaced(files, cache_dir, content):
    expected = files.decode_all(1).clone()
    (path,) = cache_dir.glob("*.uint8")
    path.write_bytes(path.read_bytes()[:-7] if content is None else content)
    assert torch.equal(files.decode_all(1), expected)
    assert torch.equal(files.decode_all(1), expected)


def test_without_a_writable_cache_images_are_decoded_into_memory(files, cache_dir, monkeypatch):
    monkeypatch.setenv("LAB_CACHE", files.paths[0])  # not a directory
    assert torch.equal(files.decode_all(1), files[torch.arange(5)])
    monkeypatch.setenv("LAB_CACHE", str(cache_dir.parent))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert torch.equal(files.decode_all(1), files[torch.arange(5)])
    assert [p.suffix for p in cache_dir.iterdir()] == [".lock"]


def test_old_files_are_deleted_but_no_files_of_other_programs(files, cache_dir):
    cache_dir.mkdir(parents=True)
    other_file = cache_dir.parent / "features.uint8"
    for path, days in (
        (cache_dir / "old.uint8", 31),
        (cache_dir / "killed.tmp", 31),
        (cache_dir / "new.uint8", 29),
        (other_file, 400),
    ):
        path.write_bytes(b"")
        stamp = cache.time.time() - days * 24 * 3600
        os.utime(path, (stamp, stamp))
    files.decode_all(1)
    assert other_file.exists()
    assert (cache_dir / "new.uint8").exists()
    assert not (cache_dir / "old.uint8").exists()
    assert not (cache_dir / "killed.tmp").exists()


def test_the_least_recently_used_files_are_deleted_but_none_of_this_run(
    files, cache_dir, monkeypatch
):
    """A test split must not evict the training split, which every start would decode again."""
    monkeypatch.setattr(cache, "MAX_BYTES", 2000)
    cache_dir.mkdir(parents=True)
    other = cache_dir / "of-another-run.uint8"
    other.write_bytes(bytes(10))
    os.utime(other, (time.time() - 60,) * 2)
    files.decode_all(1)  # 1,500 bytes
    assert other.exists()
    FileImages(files.paths[:4], EvalTransform(10)).decode_all(1)  # 1,200 bytes
    assert sorted(path.stat().st_size for path in cache_dir.glob("*.uint8")) == [1200, 1500]


def test_files_that_are_read_count_as_used(files, cache_dir, monkeypatch):
    files.decode_all(1)
    cache.store_json("numbers", [1])
    paths = {path for path in cache_dir.iterdir() if path.suffix in (".uint8", ".json")}
    for path in paths:
        os.utime(path, (1, 1))
    monkeypatch.setattr(cache, "IN_USE", set())
    files.decode_all(1)
    assert cache.load_json("numbers") == [1]
    assert paths == cache.IN_USE
    assert all(path.stat().st_mtime > 1 for path in paths)


def test_a_folder_of_enough_images_is_decoded_once_whatever_its_splits_hold(
    files, decoded, tmp_path, monkeypatch
):
    for i, path in enumerate([*files.paths] * 3):
        (tmp_path / f"data/{'ab'[i % 2]}").mkdir(parents=True, exist_ok=True)
        copy = tmp_path / f"data/{'ab'[i % 2]}/{i}.png"
        shutil.copy(path, copy)
        copy.write_bytes(copy.read_bytes() + b"%d" % i)  # no file is the same as another
    config = DataConfig(str(tmp_path / "data"), "data", 10, 0.2, 0.2, 0, 0, 0)
    monkeypatch.setattr(cache, "MIN_IMAGES", 15)
    first = load_splits(config, math.inf, 1)
    assert len(set(decoded)) == 15
    decoded.clear()
    second = load_splits(config, math.inf, 1)
    assert decoded == []
    assert (second.mean, second.std) == (first.mean, first.std)
    for name in ("train", "val", "test"):
        alone, _ = load_split(config, name, math.inf, 1)
        assert torch.equal(alone.images, getattr(first, name).images)
    assert decoded == []
    written = {*cache.cache_dir().glob("*.uint8")}
    assert load_splits(config, 0, 1).mean == first.mean  # streaming
    assert decoded != []
    decoded.clear()
    assert load_splits(config, 0, 1).mean == first.mean
    assert decoded == []
    assert {*cache.cache_dir().glob("*.uint8")} == written  # only mean and std were cached
    images = first.train.images[torch.arange(10)]
    assert (first.mean, first.std) == channel_statistics(images)


def forked(call, *given):
    """Start and return a forked process that calls a function."""
    process = multiprocessing.get_context("fork").Process(target=call, args=given)
    process.start()
    return process


def die(files):
    """Decode, and kill this process at the third image."""
    original = decode.decode

    def killed(path, size):
        if path == files.paths[2]:
            os.kill(os.getpid(), 9)
        return original(path, size)

    decode.decode = killed
    files.decode_all(1)


def test_a_process_killed_while_writing_leaves_no_incomplete_images(files, decoded, cache_dir):
    process = forked(die, files)
    process.join(120)
    assert process.exitcode == -9
    assert not list(cache_dir.glob("*.uint8"))
    assert torch.equal(files.decode_all(1), files[torch.arange(5)])
    assert len(decoded) == 10  # all of them, and once more for the comparison
    assert not list(cache_dir.glob("*.tmp"))


def decode_slowly(files, results):
    """Put (number of decoded images, the sum of all pixels) into the queue `results`."""
    original, paths = decode.decode, []

    def slow(path, size):
        paths.append(path)
        time.sleep(0.2)
        return original(path, size)

    decode.decode = slow
    total = int(files.decode_all(1).long().sum())
    results.put((len(paths), total))


def test_of_two_processes_at_once_one_decodes_and_the_other_reads(files):
    results = multiprocessing.get_context("fork").SimpleQueue()
    both = [forked(decode_slowly, files, results) for _ in "ab"]
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    total = int(files[torch.arange(5)].long().sum())
    assert sorted(results.get() for _ in both) == [(0, total), (5, total)]


def test_the_directory_of_a_user_without_a_home(monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert cache.cache_dir() == Path(os.environ["LAB_CACHE"]) / "images"
    monkeypatch.delenv("LAB_CACHE")
    assert cache.cache_dir().parts[-2:] == ("lab", "images")

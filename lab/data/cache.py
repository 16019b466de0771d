"""Decoded images kept on disk, so that a folder is decoded once and read by all processes.

And the turns that they take to download a data set.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import PIL
import torch
import torchvision
from filelock import FileLock
from torch import Tensor

# What decides the pixels: the last counts up when `lab.data.decode` changes.
DECODERS = (torchvision.__version__, PIL.__version__, 2)
FEWEST = 1000  # pictures; fewer are decoded faster than it is worth a file
KEPT_DAYS = 30  # unused for longer, a file is deleted
KEPT_BYTES = 20e9  # beyond that, the longest unused ones are
IN_USE: set[Path] = set()  # what this process has read or written


def cache_dir() -> Path:
    """Return the directory of the files: in LAB_CACHE, or in `lab` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LAB_CACHE") or Path(home) / "lab") / "pictures"


def cached(key: str, shape: Sequence[int], fill: Callable[[Tensor], None]) -> Tensor:
    """Return decoded images, uint8 of `shape`: from disk, or by `fill` into a new tensor.

    What is on disk is memory-mapped: processes of one host share its pages. One process writes,
    under a lock that dies with it, to a temporary name that is renamed when it is whole. Where the
    disk is full or not to be written, the images are decoded into memory.
    """
    with suppress(OSError):
        path = cache_dir() / f"{key}.uint8"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if (images := _read(path, shape)) is None:
                _write(path, shape, fill)
                images = _read(path, shape)
        if images is not None:
            return images
    images = torch.empty(tuple(shape), dtype=torch.uint8)
    fill(images)
    return images


def cached_json(key: str, compute: Callable[[], Any]) -> Any:
    """Return what `compute()` returned to the first process of this host that asked for `key`.

    As JSON leaves it; the others wait. Where nothing can be written, each process computes it.
    """
    with ExitStack() as held:
        with suppress(OSError):
            cache_dir().mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(cache_dir() / f"{key}.lock"))
        result = load_json(key)
        if result is None:
            result = json.loads(json.dumps(compute()))
            store_json(key, result)
    return result


def load_json(key: str) -> Any:
    """Return what `store_json` stored; None where there is nothing, or not all of it."""
    path = cache_dir() / f"{key}.json"
    with suppress(OSError, ValueError):
        result = json.loads(path.read_text())
        _mark_as_used(path)
        return result
    return None


def store_json(key: str, value: Any) -> None:
    """Write a value, whole or not at all; a disk that is full or not to be written is no error."""
    temporary = cache_dir() / f"{key}-{os.getpid()}.tmp"
    with suppress(OSError):
        try:
            with open(temporary, "w") as file:
                json.dump(value, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, cache_dir() / f"{key}.json")
        finally:
            temporary.unlink(missing_ok=True)


def _mark_as_used(path: Path) -> None:
    IN_USE.add(path)
    with suppress(OSError):
        os.utime(path)


def _read(path: Path, shape: Sequence[int]) -> Tensor | None:
    """The images in a file; None where there is none, or not all of it."""
    size = math.prod(shape)
    if not path.is_file() or path.stat().st_size != size:
        return None
    _mark_as_used(path)
    # Not shared: what this process writes to it stays its own.
    images = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return images.view(tuple(shape))


def _write(path: Path, shape: Sequence[int], fill: Callable[[Tensor], None]) -> None:
    temporary = path.with_suffix(".tmp")
    size = math.prod(shape)
    try:
        with open(temporary, "w+b") as file:
            file.truncate(size)
            # A mapped page that the disk has no room for would end the process: claim all now.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            images = torch.from_file(str(temporary), shared=True, size=size, dtype=torch.uint8)
            fill(images.view(tuple(shape)))
            del images
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _mark_as_used(path)
    _sweep(path.parent)


def _sweep(directory: Path) -> None:
    """Delete what was long unused, killed writers' files too, and the oldest beyond the limit.

    What this process uses stays: a split must not push out another split of the same run.
    """
    with suppress(OSError):
        found = [p for suffix in ("uint8", "json", "tmp") for p in directory.glob(f"*.{suffix}")]
        total = 0
        for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            old = path.stat().st_mtime < time.time() - KEPT_DAYS * 24 * 3600
            if path not in IN_USE and (old or total > KEPT_BYTES):
                path.unlink()


def key_of(paths: Sequence[str], size: int, change_time: bool = False) -> str:
    """Return a name that changes with any file's path, length or time, their order, size, decoder.

    With `change_time` also with a file's permissions. A file that is missing counts as such.
    """
    key = hashlib.blake2b(repr((DECODERS, size)).encode(), digest_size=16)
    here = os.getcwd()
    for path in paths:
        line = f"\n{os.path.join(here, path)}"
        try:
            stat = os.stat(path)
        except OSError as error:
            line += f" {error.strerror}"
        else:
            line += f" {stat.st_size} {stat.st_mtime_ns}"
            line += f" {stat.st_ctime_ns}" if change_time else ""
        key.update(os.fsencode(line))
    return key.hexdigest()

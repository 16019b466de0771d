"""A cache of decoded images on disk, so that a directory is decoded once for all processes."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock
from torch import Tensor

# What decides the pixels: increase the last number when `lab.data.decode` changes.
DECODERS = (torch.__version__, PIL.__version__, 5)
MIN_IMAGES = 1000  # fewer images are decoded too fast to be worth a file
MAX_AGE_DAYS = 30  # files that were not used for longer are deleted
MAX_BYTES = 20e9  # if the cache is larger, the least recently used files are deleted
IN_USE: set[Path] = set()  # the files that this process has read or written


def cache_dir() -> Path:
    """Return the cache directory, which is in LAB_CACHE or in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("LAB_CACHE") or Path(home) / "lab") / "images"


def cached(key: str, shape: Sequence[int], fill: Callable[[Tensor], None]) -> Tensor:
    """Return decoded images, uint8 of `shape`, from disk or, if they are not there, from `fill`.

    The file is memory-mapped, so that the processes of a host share its pages. One process writes
    it, under a lock that is released if the process dies, to a temporary name that is renamed at
    the end. If the disk is full or read-only, the images are decoded into memory.
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
    """Return the result of `compute()`, converted to JSON and back, from disk if it is there.

    One process of a host computes it while the others wait. If nothing can be written, every
    process computes it.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            cache_dir().mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(cache_dir() / f"{key}.lock"))
        result = load_json(key)
        if result is None:
            result = json.loads(json.dumps(compute()))
            store_json(key, result)
    return result


def load_json(key: str) -> Any:
    """Return the value that `store_json` stored; None if it is missing or damaged."""
    path = cache_dir() / f"{key}.json"
    with suppress(OSError, ValueError):
        result = json.loads(path.read_text())
        _mark_as_used(path)
        return result
    return None


def store_json(key: str, value: Any) -> None:
    """Write a value atomically; do nothing if the disk is full or read-only."""
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
    """Return the images in a file; None if it is missing or incomplete."""
    size = math.prod(shape)
    if not path.is_file() or path.stat().st_size != size:
        return None
    _mark_as_used(path)
    # shared=False: what this process writes to the tensor does not change the file.
    images = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return images.view(tuple(shape))


def _write(path: Path, shape: Sequence[int], fill: Callable[[Tensor], None]) -> None:
    temporary = path.with_suffix(".tmp")
    size = math.prod(shape)
    try:
        with open(temporary, "w+b") as file:
            file.truncate(size)
            # Writing to a mapped page that does not fit on the disk would kill the process.
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
    _delete_unused(path.parent)


def _delete_unused(directory: Path) -> None:
    """Delete files that are too old, those of killed processes, and the oldest beyond the limit.

    Files that this process uses stay: a split must not evict another split of the same run.
    """
    with suppress(OSError):
        paths = [p for suffix in ("uint8", "json", "tmp") for p in directory.glob(f"*.{suffix}")]
        total = 0
        for path in sorted(paths, key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            old = path.stat().st_mtime < time.time() - MAX_AGE_DAYS * 24 * 3600
            if path not in IN_USE and (old or total > MAX_BYTES):
                path.unlink()


def stat_files(paths: Sequence[str]) -> Tensor:
    """Return size in bytes, modification time and change time in ns of each file, int64 [N, 3].

    The row of a path that cannot be read as a regular file is (-1, errno, 0), with errno 0 if it is
    of another type.
    """
    stats = np.fromiter(map(_stat_file, paths), np.dtype((np.int64, 3)), len(paths))
    return torch.from_numpy(stats)


def _stat_file(path: str) -> tuple[int, int, int]:
    try:
        status = os.stat(path)
    except OSError as error:
        return -1, error.errno or 0, 0
    except ValueError:  # a path with a null character
        return -1, errno.EINVAL, 0
    if not stat.S_ISREG(status.st_mode):  # reading a named pipe would block
        return -1, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def key_of(paths: Sequence[str], stats: Tensor, transform: Any, change_time: bool = False) -> str:
    """Return a key that changes with the decoder, what `transform` is, the files and their order.

    A file is identified by its path, size and modification time and, with `change_time`, by its
    change time, which also changes with its permissions. `stats` are those of `stat_files`. The
    paths are all absolute or all relative.
    """
    key = hashlib.blake2b(repr((DECODERS, transform)).encode(), digest_size=16)
    is_absolute = any(map(os.path.isabs, paths[:1]))
    prefix = "" if is_absolute else os.path.join(os.getcwd(), "")
    key.update(os.fsencode("\0".join(prefix + path for path in paths)))
    key.update(stats[:, : 3 if change_time else 2].numpy().tobytes())
    return key.hexdigest()

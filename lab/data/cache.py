"""Decoded pictures kept on disk, so that a folder is decoded once and read by all processes.

And the turns that they take to download a data set.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
import torch
import torchvision
from filelock import FileLock
from torch import Tensor

if TYPE_CHECKING:
    from lab.data.folder import ImageFiles

# What decides the pixels: the last counts up when `lab.data.folder.decode` changes.
DECODERS = (torchvision.__version__, PIL.__version__, 1)
FEWEST = 1000  # pictures; fewer are decoded faster than it is worth a file
KEPT_DAYS = 30  # unused for longer, a file is deleted
KEPT_BYTES = 20e9  # beyond that, the longest unused ones are


def folder() -> Path:
    """Where the files lie: below LAB_CACHE, or below `lab` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LAB_CACHE") or Path(home) / "lab") / "pictures"


def cached(files: ImageFiles, fill: Callable[[Tensor], None]) -> Tensor:
    """The pictures decoded, uint8 [N, 3, size, size]: from disk, or by `fill` into a new tensor.

    What is on disk is memory-mapped: processes of one host share its pages. One process writes,
    under a lock that dies with it, to a temporary name that is renamed when it is whole. Where the
    disk is full or not to be written, the pictures are decoded into memory.
    """
    if len(files) >= FEWEST:
        with suppress(OSError):
            path = folder() / f"{_key(files)}.uint8"
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if (images := _read(path, files)) is None:
                    _write(path, files, fill)
                    images = _read(path, files)
            if images is not None:
                return images
    images = torch.empty(tuple(files.shape), dtype=torch.uint8)
    fill(images)
    return images


def _read(path: Path, files: ImageFiles) -> Tensor | None:
    """The pictures in a file; None where there is none, or not all of it."""
    size = math.prod(files.shape)
    if not path.is_file() or path.stat().st_size != size:
        return None
    with suppress(OSError):
        os.utime(path)  # used today
    # Not shared: what this process writes to it stays its own.
    images = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return images.view(tuple(files.shape))


def _write(path: Path, files: ImageFiles, fill: Callable[[Tensor], None]) -> None:
    temporary = path.with_suffix(".tmp")
    size = math.prod(files.shape)
    try:
        with open(temporary, "w+b") as file:
            file.truncate(size)
            # A mapped page that the disk has no room for would end the process: claim all now.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            images = torch.from_file(str(temporary), shared=True, size=size, dtype=torch.uint8)
            fill(images.view(tuple(files.shape)))
            del images
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sweep(path)


def _sweep(newest: Path) -> None:
    """Deletes what was long unused, killed writers' files too, and the oldest beyond the limit."""
    with suppress(OSError):
        found = [p for suffix in ("uint8", "tmp") for p in newest.parent.glob(f"*.{suffix}")]
        total = 0
        for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True):
            total += path.stat().st_size
            old = path.stat().st_mtime < time.time() - KEPT_DAYS * 24 * 3600
            if path != newest and (old or total > KEPT_BYTES):
                path.unlink()


def _key(files: ImageFiles) -> str:
    """A name that changes with any file's path, length or time, their order, size and decoder."""
    key = hashlib.blake2b(repr((DECODERS, files.size)).encode(), digest_size=16)
    here = os.getcwd()
    for path in files.paths:
        stat = os.stat(path)
        line = f"\n{os.path.join(here, path)} {stat.st_size} {stat.st_mtime_ns}"
        key.update(os.fsencode(line))
    return key.hexdigest()


@contextmanager
def turn_to_download(name: str, root: Path) -> Iterator[None]:
    """Makes the folder and locks it; what was made is gone again where the download fails.

    The lock in the folder is for other hosts and users. Whoever deletes such a file and its folder
    leaves those who wait for it without: so this host's processes come one by one through another
    lock, which stays where it is, in the user's cache folder.
    """
    digest = hashlib.blake2b(os.fsencode(root.resolve() / name), digest_size=16).hexdigest()
    turns = folder().with_name("downloads") / f"{digest}.lock"
    with ExitStack() as held:
        with suppress(OSError):  # not to be written: the folder's own lock has to do
            turns.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(turns))
        lock = root / f".{name}.lock"
        folders = (root / name / "raw", root / name, root, *root.parents)  # torchvision's first
        made = [path for path in folders if not path.exists()]
        locked_before = lock.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                yield
        except BaseException:
            with suppress(OSError):
                if not locked_before:
                    lock.unlink(missing_ok=True)
                for path in made:
                    if path.exists():
                        path.rmdir()  # fails, and so do the others, where it is not empty
            raise

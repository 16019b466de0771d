"""MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 as splits of uint8 images in memory.

torchvision downloads them, in one process of a host, while the other processes wait for a lock.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from lab.data import DataConfig
from lab.data.cache import cache_dir
from lab.data.types import RawSplits, Split
from lab.errors import UserError


def read_mnist(config: DataConfig, download: bool = True) -> RawSplits:
    """Return MNIST (LeCun, Cortes, Burges 1998): 60,000 + 10,000 grayscale digits, 28 x 28."""
    return _read_idx("MNIST", config.data_dir, download, tuple("0123456789"))


def read_fashion_mnist(config: DataConfig, download: bool = True) -> RawSplits:
    """Return Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 grayscale clothes."""
    from torchvision.datasets import FashionMNIST

    return _read_idx("FashionMNIST", config.data_dir, download, tuple(FashionMNIST.classes))


def read_cifar10(config: DataConfig, download: bool = True) -> RawSplits:
    """Return CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 color images, 32 x 32."""
    return _read_cifar("CIFAR10", config.data_dir, download)


def read_cifar100(config: DataConfig, download: bool = True) -> RawSplits:
    """Return CIFAR-100 (Krizhevsky 2009): like CIFAR-10, with 100 classes."""
    return _read_cifar("CIFAR100", config.data_dir, download)


def _read_idx(name: str, data_dir: str, download: bool, class_names: tuple[str, ...]) -> RawSplits:
    """Return the splits of a dataset in MNIST's IDX format, from DATA_DIR/NAME/raw."""
    raw = Path(data_dir) / name / "raw"

    def find(file: str) -> Path:
        """Return the path of the file, or of its gzipped form if there is only that."""
        return raw / file if (raw / file).is_file() else raw / f"{file}.gz"

    kinds = ("images-idx3", "labels-idx1")
    names = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in kinds]

    def missing() -> bool:
        return not all(find(n).is_file() for n in names)

    if missing():
        _download(name, data_dir, download, missing)
    arrays = [_read_idx_file(find(n), num_dims=3 if "idx3" in n else 1) for n in names]
    splits = []
    for images, labels in (arrays[:2], arrays[2:]):
        if len(images) != len(labels) or int(labels.max()) >= len(class_names):
            raise UserError(
                f"images and labels of {name} in {raw} do not match",
                "Delete the directory to download it again",
            )
        splits.append(Split(images.unsqueeze(1), labels.long(), class_names))
    return RawSplits(splits[0], test=splits[1])


def _read_idx_file(path: Path, num_dims: int) -> Tensor:
    """Return the uint8 array in an IDX file (http://yann.lecun.com/exdb/mnist, "file formats")."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if content[:4] != bytes([0, 0, 8, num_dims]):  # 8: unsigned bytes
            raise ValueError(f"not an IDX file of bytes in {num_dims} dimensions")
        header = 4 + 4 * num_dims
        shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header)
        return data.view(shape)
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
        if isinstance(error, PermissionError):
            raise _unreadable(error) from error
        raise UserError(f"{path} is damaged ({error})", "Delete it to download it again") from error


def _read_cifar(name: str, data_dir: str, download: bool) -> RawSplits:
    """Return the splits of CIFAR, read by torchvision, which first checks each file's MD5."""
    from torchvision import datasets

    def read(train: bool) -> Any:
        try:
            return getattr(datasets, name)(data_dir, train=train)
        except PermissionError as error:
            raise _unreadable(error) from error
        except (RuntimeError, OSError):  # missing, or its MD5 is wrong
            return None

    train = read(train=True)
    if train is None:
        _download(name, data_dir, download, missing=lambda: read(train=True) is None)
        train = read(train=True)
    splits = []
    for data in (train, read(train=False)):
        if data is None:
            raise UserError(f"{name} in {data_dir} is damaged", "Delete it to download it again")
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.tensor(data.targets), tuple(data.classes)))
    return RawSplits(splits[0], test=splits[1])


def _unreadable(error: OSError) -> UserError:
    return UserError(f"cannot read {error.filename} ({error.strerror})", "Check its permissions")


def _download(name: str, data_dir: str, allowed: bool, missing: Callable[[], bool]) -> None:
    """Let torchvision download a dataset once per host. Raises `UserError` if it is not allowed."""
    if not allowed:
        raise UserError(
            f"{name} is not in {data_dir}, the directory in the metadata of the weights",
            "Set --data-dir to the directory that contains it, or to one to download it to",
        )
    from torchvision import datasets

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision sets no timeout
    try:
        with download_lock(name, Path(data_dir)):
            if missing():
                getattr(datasets, name)(data_dir, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        # MNIST's message has one line for each mirror; the last one gives the reason.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"{name} is not in {data_dir} and could not be downloaded ({reason})",
            "Check the network or set --data-dir; `--dataset digits` needs no download",
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


@contextmanager
def download_lock(name: str, root: Path) -> Iterator[None]:
    """Create the directory and lock it; if the download fails, delete what was created.

    The lock in the directory is for other hosts and users. If a process deletes that lock and its
    directory, the processes that wait for the lock have none: those of this host therefore first
    acquire another lock, in the user's cache directory, which is never deleted.
    """
    digest = hashlib.blake2b(os.fsencode(root.resolve() / name), digest_size=16).hexdigest()
    host_lock = cache_dir().with_name("downloads") / f"{digest}.lock"
    with ExitStack() as stack:
        with suppress(OSError):  # not writable: only the lock in the directory is used
            host_lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(host_lock))
        lock = root / f".{name}.lock"
        # The first two are torchvision's.
        directories = (root / name / "raw", root / name, root, *root.parents)
        created = [path for path in directories if not path.exists()]
        locked_before = lock.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(lock):
                yield
        except BaseException:
            with suppress(OSError):
                if not locked_before:
                    lock.unlink(missing_ok=True)
                for path in created:
                    if path.exists():
                        path.rmdir()  # raises, and ends the loop, if it is not empty
            raise

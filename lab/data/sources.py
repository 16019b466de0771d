"""Data sets as splits of uint8 images in memory: MNIST, Fashion-MNIST, CIFAR, digits, shapes.

Downloads are torchvision's; one process a host does them, the others wait at a lock.
"""

from __future__ import annotations

import gzip
import http.client
import os
import socket
import unicodedata
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lab.data import toy
from lab.data.cache import turn_to_download
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data import DataConfig


SAMPLE_SIZE = 10_000  # images; more would move mean and std by less than 0.001


class Files(Protocol):
    """Images that behave as a uint8 tensor [N, C, H, W], but are decoded when indexed."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Tensor: ...
    def take(self, index: Tensor) -> Files: ...
    def join(self, others: Sequence[Any]) -> Files: ...
    def decode_all(self, num_workers: int, use_cache: bool | None = None) -> Tensor: ...


Images = Tensor | Files


@dataclass(frozen=True)
class Split:
    """Labelled images in a fixed order."""

    images: Images  # uint8 [N, C, H, W], in memory or in files
    labels: Tensor  # int64 [N]
    class_names: tuple[str, ...]
    paths: tuple[str, ...] | None = None  # of the samples' files, decoded or not; None without
    root: str = ""  # the data folder that they lie in

    def files(self) -> list[str] | None:
        """Return the paths below the data folder, POSIX; None where samples come from no files."""
        if self.paths is None:
            return None
        prefix = os.path.join(self.root, "")
        files = [path.removeprefix(prefix) for path in self.paths]
        return files if os.sep == "/" else [file.replace(os.sep, "/") for file in files]

    def missing_classes(self) -> list[str]:
        """Return the names of the classes that no sample is of."""
        counts = self.labels.bincount(minlength=len(self.class_names)).tolist()
        return [name for name, count in zip(self.class_names, counts, strict=True) if not count]

    def take(self, index: Tensor) -> Split:
        """The samples at `index`, int64 [M], in that order."""
        images = self.images
        taken = images[index] if isinstance(images, Tensor) else images.take(index)
        paths = self.paths and tuple(self.paths[i] for i in index.tolist())
        return replace(self, images=taken, labels=self.labels[index], paths=paths)


@dataclass(frozen=True)
class Parts:
    """What a data set ships; a part that it lacks is None and is cut from `train`."""

    train: Split
    val: Split | None = None
    test: Split | None = None
    warnings: tuple[str, ...] = ()  # what of the data was left out

    def named(self) -> dict[str, Split]:
        """Return the parts that there are, by name."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in parts.items() if split is not None}


def normalized(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): systems store the same name differently."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def join(splits: Sequence[Split]) -> Split:
    """Return the samples of several splits as one, in the order given."""
    first, *others = splits
    if not others:
        return first
    if isinstance(first.images, Tensor):
        images: Images = torch.cat([split.images for split in splits])  # type: ignore[misc]
    else:
        images = first.images.join([split.images for split in others])
    labels = torch.cat([split.labels for split in splits])
    paths = first.paths and tuple(path for split in splits for path in split.paths or ())
    return replace(first, images=images, labels=labels, paths=paths)


def stratified_sample(labels: Tensor, count: int, seed: int) -> Tensor:
    """Return the sorted positions, int64 [count], of a random sample that keeps class proportions.

    Every class gets the whole part of its share; the places left go to the largest remainders.
    """
    sizes = torch.bincount(labels)
    return _sample(labels, sizes, _shares(sizes, count), seed)


def stratified_cut(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Return (rest, cut): `fraction` of the samples of each class cut off, both in order.

    Each side gets at least one sample of every class that has two or more. The only sample of a
    class stays in the rest.
    """
    sizes = torch.bincount(split.labels)
    counts = _shares(sizes, max(1, round(len(split.labels) * fraction)))
    counts = torch.minimum(counts.clamp(min=1), sizes - 1).clamp(min=0)
    cut = _sample(split.labels, sizes, counts, seed)
    rest = torch.ones(len(split.labels), dtype=torch.bool)
    rest[cut] = False
    return split.take(rest.nonzero().flatten()), split.take(cut)


def _shares(sizes: Tensor, count: int) -> Tensor:
    """Return how many of `count` samples each class gets, int64 [K], by the largest remainder."""
    total = int(sizes.sum())
    shares, remainder = sizes * count // total, sizes * count % total
    left = count - int(shares.sum())
    shares[remainder.argsort(descending=True, stable=True)[:left]] += 1
    return shares


def _sample(labels: Tensor, sizes: Tensor, counts: Tensor, seed: int) -> Tensor:
    """Return the sorted positions of `counts[k]` random samples of each class k."""
    random = np.random.RandomState(seed)
    classes = labels.argsort(stable=True).split(sizes.tolist())
    chosen = [
        members[random_choice(len(members), count, random)]
        for members, count in zip(classes, counts.tolist(), strict=True)
    ]
    return torch.cat(chosen).sort().values


def random_choice(num_items: int, count: int, random: np.random.RandomState) -> Tensor:
    """Return the first `count` of the numbers below `num_items`, shuffled, int64 [count].

    This is the Fisher-Yates shuffle on 32-bit outputs of the Mersenne Twister: the numbers that
    torch.randperm gives for the same seed in PyTorch 2.14, by which all published splits were
    drawn. PyTorch may change its algorithm; NumPy guarantees that RandomState's stream never
    changes (NEP 19), so no upgrade can move a sample from one split to another.
    """
    outputs = random.randint(2**32, size=max(0, num_items - 1), dtype=np.uint32)
    offsets = outputs % np.arange(num_items, 1, -1)
    order = list(range(num_items))
    for i, offset in enumerate(offsets[:count].tolist()):
        order[i], order[i + offset] = order[i + offset], order[i]
    return torch.tensor(order[:count], dtype=torch.long)


def limit(split: Split, count: int, seed: int) -> Split:
    """At most `count` samples, stratified and seeded; all of them where `count` is 0."""
    if count == 0 or count >= len(split.labels):
        return split
    return split.take(stratified_sample(split.labels, count, seed))


def in_memory(split: Split, num_workers: int, use_cache: bool | None = None) -> Split:
    """Return the split with its images in a tensor; `use_cache` as in `ImageFiles.decode_all`."""
    if isinstance(split.images, Tensor):
        return split
    return replace(split, images=split.images.decode_all(num_workers, use_cache))


@dataclass(frozen=True)
class ResizedImages:
    """Images in memory that are resized when indexed, as the resized ones may not fit there.

    Bilinear, antialiased, rounded to uint8.
    """

    images: Tensor  # uint8 [N, C, H, W]
    size: int

    @property
    def shape(self) -> Sequence[int]:
        return (*self.images.shape[:2], self.size, self.size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Tensor:
        return self._resize(self.images[index])

    def take(self, index: Tensor) -> ResizedImages:
        return ResizedImages(self.images[index], self.size)

    def join(self, others: Sequence[ResizedImages]) -> ResizedImages:
        """Return the images of several sets as one, in the order given."""
        return replace(self, images=torch.cat([one.images for one in (self, *others)]))

    def decode_all(self, num_workers: int, use_cache: bool | None = None) -> Tensor:
        """Return all images resized, uint8 [N, C, size, size]."""
        images = torch.empty(tuple(self.shape), dtype=torch.uint8)
        for part, whole in zip(images.split(4096), self.images.split(4096), strict=True):
            part.copy_(self._resize(whole))
        return images

    def _resize(self, images: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        if not len(images):
            return torch.empty(0, *self.shape[1:], dtype=torch.uint8)
        return F.resize(images, [self.size, self.size])


def resize(split: Split, size: int) -> Split:
    """Return the split with images of `size` x `size` pixels; `in_memory` resizes all of them."""
    if split.images.shape[-2:] == (size, size):
        return split
    assert isinstance(split.images, Tensor)  # files are decoded to their size
    return replace(split, images=ResizedImages(split.images, size))


def sample_positions(num_images: int) -> Tensor:
    """Return the positions of the images whose mean and std are computed, int64 [n], sorted.

    These are all, or `SAMPLE_SIZE` evenly spaced ones.
    """
    # float32 decided on the numbers of all smaller datasets; it cannot hold larger positions.
    dtype = torch.float32 if num_images <= 2**24 else torch.float64
    return torch.linspace(0, num_images - 1, min(num_images, SAMPLE_SIZE), dtype=dtype).long()


def histogram(images: Tensor) -> Tensor:
    """Return how often each value occurs in each channel of uint8 [N, C, H, W], int64 [C, 256]."""
    channels = images.transpose(0, 1).flatten(1)
    return torch.stack([torch.bincount(values, minlength=256) for values in channels])


def channel_statistics(
    images: Images, counts: Tensor | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) of each channel in units of the full range.

    `counts`: the histogram [C, 256] of the images at `sample_positions`, where it is known.
    """
    if counts is None:
        counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
        for index in sample_positions(images.shape[0]).split(1000):
            counts += histogram(images[index])
    values = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=1e-6).sqrt()
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in std.tolist())


def read_digits(config: DataConfig) -> Parts:
    """The 1,797 handwritten digits of UCI, 8 x 8, bundled with the package."""
    images, labels = toy.load_digits()
    return Parts(Split(images, labels, tuple("0123456789")))


def read_shapes(config: DataConfig) -> Parts:
    """Procedural pictures: `num_samples` to train on and a fifth as many to test on."""
    train, test = (
        Split(*toy.make_shapes(n, 2 * config.split_seed + i), toy.SHAPE_NAMES)
        for i, n in enumerate((config.num_samples, max(1, config.num_samples // 5)))
    )
    return Parts(train, test=test)


def read_mnist(config: DataConfig, download: bool = True) -> Parts:
    """MNIST (LeCun, Cortes, Burges 1998): 60,000 + 10,000 grey digits, 28 x 28."""
    return _read_idx("MNIST", config.data_dir, download, tuple("0123456789"))


def read_fashion_mnist(config: DataConfig, download: bool = True) -> Parts:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 grey clothes, 28 x 28."""
    from torchvision.datasets import FashionMNIST

    return _read_idx("FashionMNIST", config.data_dir, download, tuple(FashionMNIST.classes))


def read_cifar10(config: DataConfig, download: bool = True) -> Parts:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs, 32 x 32."""
    return _read_cifar("CIFAR10", config.data_dir, download)


def read_cifar100(config: DataConfig, download: bool = True) -> Parts:
    """CIFAR-100 (Krizhevsky 2009): as CIFAR-10, in 100 classes."""
    return _read_cifar("CIFAR100", config.data_dir, download)


def _read_idx(name: str, data_dir: str, download: bool, class_names: tuple[str, ...]) -> Parts:
    """The two splits of a data set in MNIST's IDX format, from DATA_DIR/NAME/raw."""
    raw = Path(data_dir) / name / "raw"

    def find(file: str) -> Path:
        """The file, or its gzipped form where there is only that."""
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
                f"images and labels of {name} in {raw} do not belong together",
                "Delete that folder, so that it is downloaded anew",
            )
        splits.append(Split(images.unsqueeze(1), labels.long(), class_names))
    return Parts(splits[0], test=splits[1])


def _read_idx_file(path: Path, num_dims: int) -> Tensor:
    """The uint8 array in an IDX file (http://yann.lecun.com/exdb/mnist, "file formats")."""
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
        raise UserError(
            f"{path} is damaged ({error})", "Delete it, so that it is downloaded anew"
        ) from error


def _read_cifar(name: str, data_dir: str, download: bool) -> Parts:
    """The two splits of CIFAR through torchvision, which checks each file's MD5 before it reads."""
    from torchvision import datasets

    def read(train: bool) -> Any:
        try:
            return getattr(datasets, name)(data_dir, train=train)
        except PermissionError as error:
            raise _unreadable(error) from error
        except (RuntimeError, OSError):  # missing, or not what its MD5 promises
            return None

    def missing() -> bool:
        return read(train=True) is None

    if missing():
        _download(name, data_dir, download, missing)
    splits = []
    for train in (True, False):
        data = read(train)
        if data is None:
            raise UserError(
                f"{name} in {data_dir} is damaged", "Delete it, so that it is downloaded anew"
            )
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        splits.append(Split(images, torch.tensor(data.targets), tuple(data.classes)))
    return Parts(splits[0], test=splits[1])


def _unreadable(error: OSError) -> UserError:
    return UserError(f"cannot read {error.filename} ({error.strerror})", "Check its permissions")


def _download(name: str, data_dir: str, allowed: bool, missing: Callable[[], bool]) -> None:
    """Let torchvision download a dataset once per host. Raises `UserError` unless it is allowed."""
    if not allowed:
        raise UserError(
            f"{name} is not in {data_dir}, the folder that the weights name",
            "Give --data-dir the folder that holds it, or one to download it to",
        )
    from torchvision import datasets

    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds; torchvision sets none, and would wait for ever
    try:
        with turn_to_download(name, Path(data_dir)):
            if missing():
                getattr(datasets, name)(data_dir, download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        # Of MNIST's several lines, one a mirror, the last says why.
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise UserError(
            f"{name} is not in {data_dir} and could not be downloaded ({reason})",
            "Check the network or give --data-dir; `--dataset digits` needs no download",
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)

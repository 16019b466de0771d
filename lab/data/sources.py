"""Data sets as splits of uint8 images in memory: MNIST, Fashion-MNIST, CIFAR, digits, shapes.

Downloads are torchvision's; one process a host does them, the others wait at a lock.
"""

from __future__ import annotations

import gzip
import http.client
import socket
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lab.data import toy
from lab.data.cache import turn_to_download
from lab.errors import UserError

if TYPE_CHECKING:
    from lab.data import DataConfig


class Files(Protocol):
    """Images that behave as a uint8 tensor [N, C, H, W], but are decoded when indexed."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Tensor: ...
    def take(self, index: Tensor) -> Files: ...
    def decode_all(self, num_workers: int, keep: bool | None = None) -> Tensor: ...


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
        """The paths below the data folder, POSIX; None where samples come from no files."""
        if self.paths is None:
            return None
        return [Path(path).relative_to(self.root).as_posix() for path in self.paths]

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


def stratified_sample(labels: Tensor, count: int, seed: int) -> Tensor:
    """The sorted positions, int64 [count], of a random sample with each class's share kept.

    Every class gets the whole part of its share; the places left go to the largest remainders.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.bincount(labels)
    quota, remainder = sizes * count // len(labels), sizes * count % len(labels)
    left = count - int(quota.sum())
    quota[remainder.argsort(descending=True, stable=True)[:left]] += 1
    classes = labels.argsort(stable=True).split(sizes.tolist())
    chosen = [
        members[torch.randperm(len(members), generator=generator)[:size]]
        for members, size in zip(classes, quota.tolist(), strict=True)
    ]
    return torch.cat(chosen).sort().values


def stratified_cut(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(rest, cut): `fraction` of the samples of each class cut off, seeded; both in order."""
    num_cut = max(1, round(len(split.labels) * fraction))
    cut = stratified_sample(split.labels, num_cut, seed)
    rest = torch.ones(len(split.labels), dtype=torch.bool)
    rest[cut] = False
    return split.take(rest.nonzero().flatten()), split.take(cut)


def limit(split: Split, count: int, seed: int) -> Split:
    """At most `count` samples, stratified and seeded; all of them where `count` is 0."""
    if count == 0 or count >= len(split.labels):
        return split
    return split.take(stratified_sample(split.labels, count, seed))


def in_memory(split: Split, num_workers: int, keep: bool | None = None) -> Split:
    """Return the split with its images in a tensor; `keep` as in `ImageFiles.decode_all`."""
    if isinstance(split.images, Tensor):
        return split
    return replace(split, images=split.images.decode_all(num_workers, keep))


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

    def decode_all(self, num_workers: int, keep: bool | None = None) -> Tensor:
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
    """Return the positions that `channel_statistics` looks at, int64 [min(num_images, 10,000)].

    All, or 10,000 evenly spaced ones: a larger sample would move mean and standard deviation by
    less than 0.001.
    """
    # float32 decided on the numbers of all smaller datasets; it cannot hold larger positions.
    dtype = torch.float32 if num_images <= 2**24 else torch.float64
    return torch.linspace(0, num_images - 1, min(num_images, 10_000), dtype=dtype).long()


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


def read_mnist(config: DataConfig) -> Parts:
    """MNIST (LeCun, Cortes, Burges 1998): 60,000 + 10,000 grey digits, 28 x 28."""
    return _read_idx("MNIST", config.data_dir, tuple("0123456789"))


def read_fashion_mnist(config: DataConfig) -> Parts:
    """Fashion-MNIST (Xiao, Rasul, Vollgraf 2017): 60,000 + 10,000 grey clothes, 28 x 28."""
    from torchvision.datasets import FashionMNIST

    return _read_idx("FashionMNIST", config.data_dir, tuple(FashionMNIST.classes))


def read_cifar10(config: DataConfig) -> Parts:
    """CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour photographs, 32 x 32."""
    return _read_cifar("CIFAR10", config.data_dir)


def read_cifar100(config: DataConfig) -> Parts:
    """CIFAR-100 (Krizhevsky 2009): as CIFAR-10, in 100 classes."""
    return _read_cifar("CIFAR100", config.data_dir)


def _read_idx(name: str, data_dir: str, class_names: tuple[str, ...]) -> Parts:
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
        _download(name, data_dir, missing)
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
        raise UserError(
            f"{path} is damaged ({error})", "Delete it, so that it is downloaded anew"
        ) from error


def _read_cifar(name: str, data_dir: str) -> Parts:
    """The two splits of CIFAR through torchvision, which checks each file's MD5 before it reads."""
    from torchvision import datasets

    def read(train: bool) -> Any:
        try:
            return getattr(datasets, name)(data_dir, train=train)
        except (RuntimeError, OSError):  # missing, or not what its MD5 promises
            return None

    def missing() -> bool:
        return read(train=True) is None

    if missing():
        _download(name, data_dir, missing)
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


def _download(name: str, data_dir: str, missing: Callable[[], bool]) -> None:
    """Lets torchvision download a data set, once a host however many processes ask."""
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

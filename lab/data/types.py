"""The types that the data package passes on: `Split`, `RawSplits`, `LazyImages` and `Batch`."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor

from lab.errors import UserError, name_some

NUM_NAMED = 20  # the most unreadable files that a message lists


class LazyImages(Protocol):
    """Images that are decoded or resized when indexed, like a uint8 tensor [N, C, H, W]."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: Tensor) -> Tensor: ...
    def select(self, index: Tensor) -> LazyImages: ...
    def join(self, others: Sequence[Any]) -> LazyImages: ...
    def decode_all(self, num_workers: int, use_cache: bool | None = None) -> Tensor: ...


Images = Tensor | LazyImages


def select(images: Any, index: Tensor) -> Any:
    """Return the images at `index`, int64 [n], without reading those that are not in memory."""
    return images[index] if isinstance(images, Tensor) else images.select(index)


def is_text(name: str) -> bool:
    """Return whether a name can be written to a file: UTF-8, with the bytes of `os.fsdecode`."""
    try:
        name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return False
    return True


class Paths(Sequence[str]):
    """A sequence of paths in one block of bytes, which selections share.

    In a tuple of strings, reading a path increments its reference count, so that each worker
    process would soon have a copy of the memory that it shares with its parent: 1 GB for 10 million
    paths (benchmarks/scale.py).
    """

    def __init__(self, paths: Iterable[str] = ()):
        texts = [path.encode("utf-8", "surrogatepass") for path in paths]
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        self._text, self._stops = b"".join(texts), lengths.cumsum()
        self._starts = self._stops - lengths

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), 10_000):  # Python integers take more memory than int64
            part = slice(first, first + 10_000)
            for start, stop in zip(
                self._starts[part].tolist(), self._stops[part].tolist(), strict=True
            ):
                yield self._text[start:stop].decode("utf-8", "surrogatepass")

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice | np.ndarray) -> Paths: ...
    def __getitem__(self, index: int | slice | np.ndarray) -> str | Paths:
        """Return a path or, for a slice or positions int64 [n], several paths."""
        if isinstance(index, (slice, np.ndarray)):
            paths = Paths()
            paths._text, paths._starts, paths._stops = (
                self._text, self._starts[index], self._stops[index]
            )  # fmt: skip
            return paths
        return self._text[self._starts[index] : self._stops[index]].decode("utf-8", "surrogatepass")

    @classmethod
    def of(cls, paths: Sequence[str]) -> Paths:
        """Return the paths as an object of this class."""
        return paths if isinstance(paths, cls) else cls(paths)


@dataclass(frozen=True)
class Split:
    """Labeled images in a fixed order."""

    images: Images  # uint8 [N, C, H, W], in memory or in files
    labels: Tensor  # int64 [N]
    class_names: tuple[str, ...]
    paths: Sequence[str] | None = None  # of the images' files, even if the images are in memory
    root: str = ""  # the data directory that contains these files

    def files(self) -> list[str] | None:
        """Return the POSIX paths relative to the data directory; None if there are no files."""
        if self.paths is None:
            return None
        prefix = os.path.join(self.root, "")
        files = [path.removeprefix(prefix) for path in self.paths]
        return files if os.sep == "/" else [file.replace(os.sep, "/") for file in files]

    def class_counts(self) -> list[int]:
        """Return the number of samples of each class."""
        return self.labels.bincount(minlength=len(self.class_names)).tolist()

    def missing_classes(self) -> list[str]:
        """Return the names of the classes without samples."""
        counts = zip(self.class_names, self.class_counts(), strict=True)
        return [name for name, count in counts if not count]

    def select(self, index: Tensor) -> Split:
        """Return the samples at `index`, int64 [M], in that order."""
        paths = self.paths and Paths.of(self.paths)[index.numpy()]
        images = select(self.images, index)
        return replace(self, images=images, labels=self.labels[index], paths=paths)


@dataclass(frozen=True)
class RawSplits:
    """The splits that a dataset comes with; a missing one is None and is split off from `train`."""

    train: Split
    val: Split | None = None
    test: Split | None = None
    warnings: tuple[str, ...] = ()  # about files that are ignored
    revision: str = ""  # see `DataConfig`

    def named(self) -> dict[str, Split]:
        """Return the splits that are not None, by name."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def joined(self) -> Split:
        """Return the samples of all splits as one."""
        splits = [*self.named().values()]
        first, *others = splits
        if not others:
            return first
        if isinstance(first.images, Tensor):
            images: Images = torch.cat([split.images for split in splits])  # type: ignore[misc]
        else:
            images = first.images.join([split.images for split in others])
        labels = torch.cat([split.labels for split in splits])
        paths = first.paths and Paths(path for split in splits for path in split.paths or ())
        return replace(first, images=images, labels=labels, paths=paths)


def normalized(name: str) -> str:
    """Return a file name in Unicode's composed form (NFC): file systems store different forms."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch, on its device. It may be empty."""

    images: Tensor  # float32 [n, C, H, W], normalized
    labels: Tensor  # int64 [n]
    indices: Tensor  # int64 [n], positions in the split
    global_batch_size: int  # samples of the batch over all processes
    targets: Tensor | None = None  # float32 [n, K], soft targets of mixed images
    # Number of samples of each part for gradient accumulation, which may be 0. Empty: not divided.
    part_sizes: tuple[int, ...] = ()
    # float32 [K]: weights of the classes in the loss, with a mean of 1 over the global batch.
    class_weights: Tensor | None = None


class UnreadableImages(UserError):
    """Images that cannot be decoded; `reasons` maps each path to its error message."""

    def __init__(self, reasons: Mapping[str, str]):
        what, files = next(iter(reasons.values())), "the file"
        if len(reasons) > 1:
            names = name_some([*reasons], NUM_NAMED)
            what, files = f"cannot read {len(reasons)} images: {names}", "these files"
        super().__init__(what, f"Replace or delete {files}, or give --skip-unreadable")
        self.args, self.reasons = (reasons,), reasons  # args: for unpickling

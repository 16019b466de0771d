"""Fingerprints: whether two runs, or two processes, have the same samples in the same order."""

from __future__ import annotations

import hashlib
import os
import stat
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from lab.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from lab.data.types import Split

FORMAT = "v2"  # a fingerprint is FORMAT-DIGEST; those of different formats cannot be compared
NUM_HASHED = 256  # images of a split whose contents are hashed
BYTES_HASHED = 2**16  # of each file


def fingerprint(split: Split) -> str:
    """Return a digest of labels, file names and sizes, and of the contents of a sample of images.

    The names are those below the data folder, which may lie elsewhere. Raises `UserError` for a
    file that cannot be read.
    """
    digest = hashlib.blake2b(_little_endian(split.labels.numpy()), digest_size=8)
    files = split.files()
    if files is not None and split.paths is not None:
        names = unicodedata.normalize("NFC", "\0".join(files))
        digest.update(names.encode("utf-8", "surrogateescape"))
        digest.update(_little_endian(file_sizes(split.paths)))
    for content in hash_sample(split).values():
        digest.update(content)
    return f"{FORMAT}-{digest.hexdigest()}"


def changed_splits(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the names of the splits whose recorded fingerprint is not the current one.

    Those that were never recorded, or by an earlier version in another format, cannot be compared.
    """
    return [
        name
        for name, fingerprint in current.items()
        if name in recorded
        and recorded[name] != fingerprint
        and _has_format(recorded[name]) == _has_format(fingerprint)
    ]


def _has_format(recorded: Any) -> bool:
    return str(recorded).startswith(f"{FORMAT}-")


def file_sizes(paths: Sequence[str]) -> np.ndarray:
    """Return the sizes in bytes, int64 [N]; raises `UserError` for what is not a readable file."""
    import numpy as np  # here: compare.py --help imports this module

    return np.fromiter(map(_file_size, paths), np.int64, len(paths))


def _file_size(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error
    if not stat.S_ISREG(status.st_mode):  # reading a named pipe would wait for ever
        raise _unreadable(path, "not a regular file")
    return status.st_size


def hash_sample(split: Split) -> dict[int, bytes]:
    """Return a digest of each of NUM_HASHED images, evenly spaced, by position in the split."""
    num_samples = len(split.labels)
    num_hashed = min(num_samples, NUM_HASHED)
    return {
        position: hashlib.blake2b(_content(split, position), digest_size=8).digest()
        for position in (i * num_samples // num_hashed for i in range(num_hashed))
    }


def _content(split: Split, position: int) -> bytes:
    """Return the beginning of an image's file, or its pixels where it lies in memory."""
    if split.paths is None:
        return cast("Tensor", split.images)[position].contiguous().numpy().tobytes()
    path = split.paths[position]
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read(BYTES_HASHED)
    except OSError as error:
        raise _unreadable(path, error.strerror) from error


def _little_endian(array: np.ndarray) -> bytes:
    return array.astype("<i8", copy=False).tobytes()


def _unreadable(path: str, reason: str | None) -> UserError:
    return UserError(f"cannot read the file {path} ({reason})", "Replace or delete that file")


@dataclass(frozen=True)
class Listing:
    """The samples of a data set, one by one, to say in what two copies of it differ."""

    samples: dict[str, tuple[str, int]]  # class, and size in bytes, by name
    digests: dict[str, bytes]  # of the images whose contents a fingerprint has hashed

    @classmethod
    def of(cls, parts: Mapping[str, Split], cut: Mapping[str, Split]) -> Listing:
        """Return what lies in the `parts` that the data come in, and what fingerprints of the
        splits `cut` from them have hashed. Raises `UserError` for a file that cannot be read.
        """
        samples: dict[str, tuple[str, int]] = {}
        digests: dict[str, bytes] = {}
        for part, split in parts.items():
            names = _sample_names(part, split)
            sizes = [0] * len(names) if split.paths is None else file_sizes(split.paths).tolist()
            classes = [split.class_names[label] for label in split.labels.tolist()]
            samples |= zip(names, zip(classes, sizes, strict=True), strict=True)
        for part, split in cut.items():
            names = _sample_names(part, split)
            digests |= {names[i]: content for i, content in hash_sample(split).items()}
        return cls(samples, digests)

    def first_difference(self, other: Listing) -> str:
        """Return what is first different in `other`; empty where nothing is."""
        for name, (of_class, size) in self.samples.items():
            if name not in other.samples:
                return f"{name} (class {of_class}) is missing"
            other_class, other_size = other.samples[name]
            if other_class != of_class:
                return f"{name} is of class {other_class}, not {of_class}"
            if other_size != size:
                return f"{name} has {other_size:,} bytes, not {size:,}"
        for name, (of_class, _) in other.samples.items():
            if name not in self.samples:
                return f"{name} (class {of_class}) was added"
        for name, content in self.digests.items():
            if other.digests.get(name) != content:
                return f"{name} has other contents"
        return ""


def _sample_names(part: str, split: Split) -> list[str]:
    files = split.files()
    if files is None:
        return [f"image {i} of {part}" for i in range(len(split.labels))]
    return unicodedata.normalize("NFC", "\0".join(files)).split("\0")

"""Fingerprints, which show whether two runs or two processes have the same samples."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lab.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from lab.data.types import Split

FORMAT = "v2"  # a fingerprint is FORMAT-DIGEST; different formats cannot be compared
NUM_HASHED = 256  # images of a split whose contents are hashed
BYTES_HASHED = 2**16  # of each file


def fingerprint(split: Split) -> str:
    """Return a digest of labels, file names and sizes, and of the content of some images.

    File names are relative to the data directory, which may be moved. Raises `UserError` if a file
    cannot be read.
    """
    digest = hashlib.blake2b(_little_endian(split.labels.numpy()), digest_size=8)
    files = split.files()
    if files is not None:
        names = unicodedata.normalize("NFC", "\0".join(files))
        digest.update(names.encode("utf-8", "surrogateescape"))
        digest.update(_little_endian(_file_sizes(split)))
    num_samples = len(split.labels)
    num_hashed = min(num_samples, NUM_HASHED)  # evenly spaced
    for position in (i * num_samples // num_hashed for i in range(num_hashed)):
        image = hashlib.blake2b(_content(split, position), digest_size=8)
        digest.update(image.digest())
    return f"{FORMAT}-{digest.hexdigest()}"


def changed_splits(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Return the names of the splits whose recorded fingerprint is not the current one.

    Fingerprints that are missing or in the format of an earlier version cannot be compared.
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


def _file_sizes(split: Split) -> np.ndarray:
    """Return the sizes of a split's files in bytes, int64 [N].

    Raises `UserError` if one of them is not a readable regular file.
    """
    from lab.data.cache import stat_files  # here: compare.py --help imports this module
    from lab.data.decode import FileImages

    assert split.paths is not None
    images = split.images
    stats = images.file_stats() if isinstance(images, FileImages) else stat_files(split.paths)
    for i in (stats[:, 0] < 0).nonzero().flatten().tolist():
        error_code = int(stats[i, 1])
        reason = os.strerror(error_code) if error_code else "not a regular file"
        raise _unreadable(split.paths[i], reason)
    return stats[:, 0].numpy()


def _content(split: Split, position: int) -> bytes:
    """Return the beginning of an image's file, or the pixels of an image in memory."""
    from lab.data.decode import FileImages

    images = split.images
    if isinstance(images, FileImages):
        try:
            return images.read(position, num_bytes=BYTES_HASHED)
        except OSError as error:
            raise _unreadable(images.paths[position], error.strerror) from error
    import torch

    return images[torch.tensor([position])].contiguous().numpy().tobytes()


def _little_endian(array: np.ndarray) -> bytes:
    return array.astype("<i8", copy=False).tobytes()


def _unreadable(path: str, reason: str | None) -> UserError:
    return UserError(f"cannot read the file {path} ({reason})", "Replace or delete the file")

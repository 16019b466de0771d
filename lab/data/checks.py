"""Checks of image files: exact duplicates, unreadable files, sizes, modes and class sizes."""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lab.data import cache
from lab.data.decode import FORMATS, FileImages, in_workers, worker_batches
from lab.data.stratification import class_size_warnings
from lab.data.transforms import EvalTransform
from lab.data.types import RawSplits
from lab.errors import UserError, name_some

TAIL_BYTES = 4096  # at the end of a file, where images of the same size in bytes differ
NUM_READERS = 16  # threads that wait for the disk
NUM_NAMED = 10  # the most files, or groups of duplicates, that a warning lists
SAMPLE_SIZE = 96  # pixels per side of the samples of each class
MAX_SAMPLES, TOTAL_SAMPLES = 8, 500  # of a class, and of all classes with more than one
ANIMATED = ("GIF", "WEBP", "PNG")  # the formats with animations

Groups = list[list[int]]  # positions of equal images, sorted; every group has two or more


# Files with the same content


def identical_files(raw: RawSplits) -> Groups:
    """Return the groups of files with the same content, as positions in the joined splits.

    Only files of equal size are read: their ends and, if these are equal, all of them. The result
    is cached until a file changes. Files that cannot be read are in no group.
    """
    images = raw.joined().images
    if not isinstance(images, FileImages):
        return []
    if len(images) < cache.MIN_IMAGES:
        return _identical_files(images)
    key = f"{images.key(0)}-identical"
    return cache.cached_json(key, lambda: _identical_files(images))


def _identical_files(images: FileImages) -> Groups:
    sizes = images.file_stats()[:, 0]
    positions = ((sizes > 0) & _is_repeated(sizes)).nonzero().flatten()
    for num_bytes in (TAIL_BYTES, 0):

        def read(part: Tensor, num_bytes: int = num_bytes) -> Tensor:
            digests = [
                _file_digest(images, i, size, num_bytes and size - num_bytes)
                for i, size in zip(part.tolist(), sizes[part].tolist(), strict=True)
            ]
            return torch.tensor(digests, dtype=torch.int64).view(-1, 2)

        with ThreadPoolExecutor(NUM_READERS) as readers:
            digests = torch.cat([*readers.map(read, positions.split(100))])
        # Half of a digest is enough to find candidates, and is compared without Python objects.
        is_candidate = digests.any(1) & _is_repeated(digests[:, 0])
        positions, digests = positions[is_candidate], digests[is_candidate]
    return _groups(zip(positions.tolist(), map(tuple, digests.tolist()), strict=True))


def _is_repeated(values: Tensor) -> Tensor:
    """Return whether each value occurs several times, bool [N]."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return counts[inverse] > 1


def _file_digest(images: FileImages, i: int, size: int, offset: int) -> tuple[int, int]:
    """Return a digest of a file's size and of its content from `offset` on, as two int64.

    They are zero if the file cannot be read.
    """
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    try:
        digest.update(images.read(i, max(0, offset)))
    except (OSError, ValueError):
        return 0, 0
    return struct.unpack("<2q", digest.digest())


def _groups(keys: Iterable[tuple[int, Any]]) -> Groups:
    """Return the positions with the same key, of each key with several."""
    positions: dict[Any, list[int]] = {}
    for i, key in keys:
        positions.setdefault(key, []).append(i)
    return sorted(sorted(group) for group in positions.values() if len(group) > 1)


def originals(raw: RawSplits, groups: Groups) -> dict[str, str]:
    """Return the path of the first file of its group for each path in `groups`."""
    if not groups:
        return {}
    paths = raw.joined().paths or ()
    return {paths[i]: paths[group[0]] for group in groups for i in group}


@dataclass(frozen=True)
class Duplicates:
    """The groups of equal images by what they spoil; a group may be in both of the first lists."""

    leaks: Groups  # in several splits
    conflicts: Groups  # in several classes
    copies: Groups  # in one class of one split

    @classmethod
    def of(cls, raw: RawSplits, groups: Groups) -> Duplicates:
        """Sort the groups of positions in the joined splits."""
        splits = [name for name, split in raw.named().items() for _ in range(len(split.labels))]
        labels = raw.joined().labels.tolist()
        found = cls([], [], [])
        for group in groups:
            leak, conflict = (len({of[i] for i in group}) > 1 for of in (splits, labels))
            if leak:
                found.leaks.append(group)
            if conflict:
                found.conflicts.append(group)
            if not (leak or conflict):
                found.copies.append(group)
        return found


def duplicate_warnings(raw: RawSplits, groups: Groups) -> list[str]:
    """Return the warnings about files with the same content in several splits or classes."""
    if not groups:
        return []
    found = Duplicates.of(raw, groups)
    files = raw.joined().files() or []
    return [
        f"exact duplicates in several {places}: "
        + name_some([" = ".join(files[i] for i in group) for group in groups], NUM_NAMED)
        for places, groups in (("splits", found.leaks), ("classes", found.conflicts))
        if groups
    ]


# All checks


@dataclass(frozen=True)
class DataCheck:
    """The result of all checks. Files are named relative to the data directory."""

    class_names: tuple[str, ...]
    counts: Mapping[str, Sequence[int]]  # images of each class, by the name of the split
    facts: Mapping[str, str]  # sizes, modes and formats of the images
    problems: Sequence[str]  # that make a metric wrong, or stop a training
    warnings: Sequence[str]
    samples: Sequence[Sequence[tuple[str, Tensor]]]  # of each class: file, uint8 [3, H, W]


def check(raw: RawSplits, image_size: int, num_workers: int) -> DataCheck:
    """Decode all images and return what was found.

    What is found in a file is cached until a file changes. Raises `UserError` if the images are not
    in files.
    """
    whole = raw.joined()
    images, files = whole.images, whole.files()
    if not isinstance(images, FileImages) or files is None:
        raise UserError("this dataset has no image files", "Give a directory of images")
    records = inspect(images, num_workers)
    readable = [i for i, record in enumerate(records) if len(record) > 1]
    groups = _groups((i, records[i][-1]) for i in readable)
    found, separable = Duplicates.of(raw, groups), _separable(raw, groups)
    copies = [group for group in found.copies if group[0] not in separable]
    small = [i for i in readable if min(records[i][2:4]) < image_size]
    animated = [i for i in readable if records[i][4] > 1]

    def equal(group: Sequence[int]) -> str:
        return " = ".join(files[i] for i in group)

    problems = []
    if len(whole.class_names) == 1:
        problems.append(f"there is only one class, {whole.class_names[0]}")
    problems += [record[0] for record in records if len(record) == 1]
    problems += [f"exact duplicates in several splits: {equal(group)}" for group in found.leaks]
    problems += [
        f"exact duplicates in several classes: {equal(group)}" for group in found.conflicts
    ]
    problems += [
        f"the held-out split may separate files with the same pixels: {equal(group)}"
        for group in groups
        if group[0] in separable
    ]
    warnings = [*raw.warnings]
    if copies:
        count = sum(map(len, copies)) - len(copies)
        warnings.append(f"exact duplicates in one class ({count:,}): "
                        f"{name_some([*map(equal, copies)], NUM_NAMED)}")  # fmt: skip
    for what, positions in (
        (f"smaller than {image_size} x {image_size} pixels, which training enlarges", small),
        ("animated, of which the first frame is used", animated),
    ):
        if positions:
            names = name_some([files[i] for i in positions], NUM_NAMED)
            warnings.append(f"images {what} ({len(positions):,}): {names}")
    counts = {name: split.class_counts() for name, split in raw.named().items()}
    warnings += class_size_warnings(whole.class_names, counts["train"])
    samples = [
        [(files[i], EvalTransform(SAMPLE_SIZE)(images.decode(i))) for i in positions]
        for positions in _sample_positions(whole.labels, readable, len(whole.class_names))
    ]
    facts = _facts([records[i] for i in readable])
    return DataCheck(whole.class_names, counts, facts, problems, warnings, samples)


def _sample_positions(labels: Tensor, readable: list[int], num_classes: int) -> Groups:
    """Return evenly spaced positions of readable images of each class."""
    members: Groups = [[] for _ in range(num_classes)]
    for i, label in zip(readable, labels[readable].tolist(), strict=True):
        members[label].append(i)
    count = max(1, min(MAX_SAMPLES, TOTAL_SAMPLES // num_classes))
    return [[m[k * len(m) // count] for k in range(count)] if len(m) > count else m
            for m in members]  # fmt: skip


def inspect(images: FileImages, num_workers: int) -> list[list[Any]]:
    """Return [format, mode, height, width, frames, digest of the pixels] of each image.

    For an image that cannot be decoded, it is [error message]. The digest is that of the decoded
    RGB pixels, in the EXIF orientation. Results are cached until a file changes.
    """

    def compute() -> list[list[Any]]:
        batches = worker_batches(len(images), num_workers)
        with in_workers(partial(_inspect_batch, images), batches, num_workers) as results:
            return [record for batch in results for record in batch]

    key = images.key(0, change_time=True)
    return cache.cached_json(f"{key}-checks", compute)


def _inspect_batch(images: FileImages, index: Tensor) -> list[list[Any]]:
    return [_inspect(images, i) for i in index.tolist()]


def _inspect(images: FileImages, i: int) -> list[Any]:
    try:
        pixels = images.decode(i)
    except UserError as error:
        return [error.what]
    kind, mode, frames = "unknown", "unknown", 1
    with suppress(Exception), warnings.catch_warnings():  # Pillow raises exceptions of many types
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(images.read(i)), formats=FORMATS) as image:
            kind, mode = image.format or kind, image.mode
            if kind in ANIMATED:
                frames = getattr(image, "n_frames", 1)
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.contiguous().numpy().data)
    return [kind, mode, *pixels.shape[-2:], frames, digest.hexdigest()]


def _separable(raw: RawSplits, groups: Groups) -> set[int]:
    """Return the first positions of the groups of training images that a split may separate.

    A split keeps files with the same content together, but does not decode images.
    """
    if raw.test is not None and raw.val is not None:
        return set()
    first = {i: group[0] for group in identical_files(raw) for i in group}
    num_train = len(raw.train.labels)
    return {
        group[0] for group in groups if len({first.get(i, i) for i in group if i < num_train}) > 1
    }


def _facts(records: Sequence[list[Any]]) -> dict[str, str]:
    """Return the sizes, modes and formats of readable images as text."""
    if not records:
        return {}
    sides = np.array([record[2:4] for record in records])
    heights, widths = sides.T
    lengths = {"shorter": sides.min(1), "longer": sides.max(1)}
    return {
        f"{name} side": f"{values.min():,} to {values.max():,} pixels, median {np.median(values):g}"
        for name, values in lengths.items()
    } | {
        "sizes": _counted([f"{w} x {h}" for h, w in zip(heights, widths, strict=True)]),
        "modes": _counted([record[1] for record in records]),
        "formats": _counted([record[0] for record in records]),
    }


def _counted(values: Sequence[str]) -> str:
    """Return the most frequent values with their counts."""
    counts = Counter(values).most_common()
    return name_some([f"{value} ({n:,})" for value, n in counts], 5)

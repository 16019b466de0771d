"""DATASETS: every data set by name; load_splits reads one.

Listing them imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.errors import UserError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from lab.data.sources import Parts, Split

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class DatasetSpec:
    """How a data set is read, and how its pixels are normalised."""

    read: str  # "module:function" in this package; returns Parts
    mean: Numbers | None = None  # a channel, in units of the full range; None: measured
    std: Numbers | None = None
    bundled: bool = False  # it comes with lab: no file below --data-dir is read


DATASETS = {
    "mnist": DatasetSpec("sources:read_mnist", (0.1307,), (0.3081,)),
    "fashion-mnist": DatasetSpec("sources:read_fashion_mnist", (0.2860,), (0.3530,)),
    "cifar10": DatasetSpec(
        "sources:read_cifar10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": DatasetSpec(
        "sources:read_cifar100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    ),
    "digits": DatasetSpec("sources:read_digits", bundled=True),
    "shapes": DatasetSpec("sources:read_shapes", bundled=True),
    "folder": DatasetSpec("folder:read_folder"),
}


def find_dataset(name: str) -> DatasetSpec:
    """The spec of a data set; raises `UserError` with the list of the known."""
    if name not in DATASETS:
        raise UserError(f"there is no data set {name}", suggestion(name, DATASETS))
    return DATASETS[name]


def require_data_dir_is_read(dataset: str, data_dir: str | None) -> None:
    """Nothing; raises `UserError` for an unknown set, and where it comes with lab, for a folder."""
    if find_dataset(dataset).bundled and data_dir is not None:
        raise UserError(
            f"{dataset} comes with lab, and reads nothing of --data-dir {data_dir}",
            "Leave it out; for a folder of pictures, give --dataset folder",
        )


@dataclass(frozen=True)
class DataConfig:
    """All that decides which samples a split holds; kept in the weights' metadata.

    Fields as in TrainConfig.
    """

    dataset: str
    data_dir: str
    image_size: int
    val_fraction: float
    test_fraction: float
    split_seed: int
    num_samples: int
    limit_train: int
    limit_eval: int
    skip_unreadable: bool = False

    @classmethod
    def of(cls, settings: Any) -> DataConfig:
        """The fields that are attributes of `settings`, a TrainConfig."""
        return cls(**{f.name: getattr(settings, f.name) for f in fields(cls)})


@dataclass(frozen=True)
class Splits:
    """The parts of a data set, at one image size, and how to normalise their pixels.

    `val` is what the best epoch is chosen on: a cut of the training split, or the test split
    itself where `selected_on` says "test".
    """

    train: Split
    val: Split
    test: Split
    mean: Numbers
    std: Numbers
    selected_on: str  # "validation" or "test"
    fingerprints: dict[str, str]  # of "train", "val", "test": which samples are in it

    def choose_loader(self, kind: str, memory: float) -> str:
        """Return which loader `kind` "auto" stands for: "resident" or "streaming".

        Resident where all splits are in memory and take at most `memory` bytes together.
        """
        if kind != "auto":
            return kind
        from torch import Tensor

        images = {id(s.images): s.images for s in (self.train, self.val, self.test)}.values()
        decoded = all(isinstance(one, Tensor) for one in images)
        fits = sum(math.prod(one.shape) for one in images) <= memory
        return "resident" if decoded and fits else "streaming"


def load_splits(config: DataConfig, memory: float, num_workers: int) -> Splits:
    """The splits of a data set; the same for the same settings, on every process.

    Images are decoded, by `num_workers` processes, and resized where all splits together take at
    most `memory` bytes; otherwise that is left to the loader. Raises `UserError` where files are
    missing, damaged or too few.
    """
    from lab.data.sources import channel_statistics

    cut = _cut(config)
    if config.skip_unreadable:
        cut = _without_unreadable(cut, num_workers)
    named = _ready(cut, config, memory, num_workers)
    spec = find_dataset(config.dataset)
    mean, std = spec.mean, spec.std
    if mean is None or std is None:
        counts = _cached_histogram(cut, named["train"], num_workers)
        mean, std = channel_statistics(named["train"].images, counts)
    selected_on = "validation" if "val" in named else "test"
    val = named.get("val", named["test"])
    return Splits(named["train"], val, named["test"], mean, std, selected_on, _fingerprints(cut))


def load_split(
    config: DataConfig, name: str, memory: float, num_workers: int
) -> tuple[Split, str | None]:
    """The split "train", "val" or "test" alone, and its fingerprint; or "all" of the data.

    "all" is data that come in one piece, uncut, at most `limit_eval` samples of them. Raises
    `UserError` where there is no such split.
    """
    from lab.data.sources import limit

    if name == "all":
        parts = _read(config)
        if parts.test is not None:
            raise UserError(f"{config.dataset} comes in splits", "Give --split test, val or train")
        whole = {name: limit(parts.train, config.limit_eval, config.split_seed)}
        if config.skip_unreadable:
            whole = _without_unreadable(whole, num_workers)
        return _ready(whole, config, memory, num_workers)[name], None
    cut = _cut(config)
    if name not in cut:
        raise UserError(
            "this data has no validation split: the best epoch was chosen on the test split",
            "Give --split test",
        )
    one = {name: cut[name]}
    if config.skip_unreadable:
        one = _without_unreadable(one, num_workers)
    keep = _worth_keeping(cut)
    return _ready(one, config, memory, num_workers, keep)[name], _fingerprints(one)[name]


def _read(config: DataConfig) -> Parts:
    module, read = find_dataset(config.dataset).read.split(":")
    return getattr(importlib.import_module(f"lab.data.{module}"), read)(config)


def _cut(config: DataConfig) -> dict[str, Split]:
    """The splits "train", "test" and, where there is one, "val"; files are not decoded yet."""
    from lab.data.sources import limit, stratified_cut

    parts, seed = _read(config), config.split_seed
    train, val, test = parts.train, parts.val, parts.test
    if test is None:
        train, test = stratified_cut(train, config.test_fraction, seed)
    if val is None and config.val_fraction > 0:
        train, val = stratified_cut(train, config.val_fraction, seed)
    cut = {"train": limit(train, config.limit_train, seed)}
    cut["test"] = limit(test, config.limit_eval, seed)
    if val is not None:
        cut["val"] = limit(val, config.limit_eval, seed)
    return cut


def _without_unreadable(cut: dict[str, Split], num_workers: int) -> dict[str, Split]:
    """Return the splits without the images that cannot be decoded, and warn of those.

    After the cut, so that the other samples stay where they are.
    """
    import torch

    from lab import console
    from lab.data.decode import ImageFiles, name_some

    left, unread = {}, []
    for name, split in cut.items():
        if not isinstance(split.images, ImageFiles):
            raise UserError(
                "--skip-unreadable is for a directory of images",
                "Leave it out, or give --dataset folder",
            )
        unreadable = split.images.unreadable(num_workers)
        unread += [split.images.paths[i] for i in unreadable]
        keep = torch.ones(len(split.labels), dtype=torch.bool)
        keep[list(unreadable)] = False
        left[name] = split.take(keep.nonzero().flatten()) if unreadable else split
        if name == "train":
            before, after = (s.labels.unique().tolist() for s in (split, left[name]))
            empty = [split.class_names[label] for label in set(before) - set(after)]
            if empty:
                raise UserError(
                    f"none of the training images of {', '.join(sorted(empty))} can be read",
                    "Replace some, or delete the class",
                )
    if unread:
        images = f"{len(unread)} image{'s' if len(unread) > 1 else ''}"
        console.warn(f"left out {images} that cannot be read: {name_some(unread)}")
    return left


def _worth_keeping(cut: dict[str, Split]) -> bool:
    """Whether all splits together hold enough images to write them to the cache once decoded."""
    from lab.data import cache

    return sum(len(split.labels) for split in cut.values()) >= cache.FEWEST


def _cached_histogram(cut: dict[str, Split], train: Split, num_workers: int) -> Tensor | None:
    """Return the histogram of the training images in files; None where it is not worth a file."""
    from torch import Tensor

    from lab.data.decode import ImageFiles
    from lab.data.sources import sample_positions

    files = cut["train"].images
    decoded = train.images if isinstance(train.images, Tensor) else None
    if not isinstance(files, ImageFiles) or (decoded is not None and not _worth_keeping(cut)):
        return None
    return files.histogram(sample_positions(len(files)), num_workers, decoded)


def _ready(
    named: dict[str, Split],
    config: DataConfig,
    memory: float,
    num_workers: int,
    keep: bool | None = None,
) -> dict[str, Split]:
    """Return the splits at the image size, and in memory where all of them fit into `memory`.

    `keep`: whether to write decoded images to the cache; None: where these splits are worth it.
    """
    from lab.data.decode import UnreadableImages
    from lab.data.sources import in_memory, resize

    for name, split in named.items():
        if len(split.labels) == 0:
            title = {"train": "training", "val": "validation"}.get(name, name)
            raise UserError(f"the {title} split is empty", "Add pictures, or change the fractions")
    named = {name: resize(split, config.image_size) for name, split in named.items()}
    if sum(math.prod(split.images.shape) for split in named.values()) > memory:
        return named
    keep = _worth_keeping(named) if keep is None else keep
    decoded: dict[str, Split] = {}
    reasons: dict[str, str] = {}
    for name, split in named.items():
        try:
            decoded[name] = in_memory(split, num_workers, keep)
        except UnreadableImages as error:  # all splits first, so that one message names all files
            reasons |= error.reasons
    if reasons:
        raise UnreadableImages(reasons)
    return decoded


def _fingerprints(cut: dict[str, Split]) -> dict[str, str]:
    """A digest of each split: its labels and, of files, their last two names."""
    found = {}
    for name, split in cut.items():
        digest = hashlib.blake2b(split.labels.numpy().tobytes(), digest_size=8)
        for path in getattr(split.images, "paths", ()):
            digest.update("/".join(Path(path).parts[-2:]).encode("utf-8", "surrogateescape"))
        found[name] = digest.hexdigest()
    return found
